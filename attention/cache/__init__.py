"""Key-value caches and what is kept in them."""
