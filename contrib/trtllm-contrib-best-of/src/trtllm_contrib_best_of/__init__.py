"""Best of n: several answers are drawn, and a scorer says which of them the user gets."""
