"""Structured output: the next token is one with which the text can still become what was asked for."""
