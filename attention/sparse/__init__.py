"""Sparse attention: local, block-sparse, routed, hierarchical, hashed."""
