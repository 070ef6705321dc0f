"""A stopping criterion for texts that have run into a loop."""
