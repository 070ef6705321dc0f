"""Stochastic beam search: samples without replacement, and what they estimate."""
