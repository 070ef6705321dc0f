"""Choosing tokens: slots, plans, the logits pipeline, samplers, stopping."""
