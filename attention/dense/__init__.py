"""Exact attention and its score functions, normalisers and position terms."""
