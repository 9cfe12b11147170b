"""Heads: which of them a token uses, and how they share keys, values and parameters."""
