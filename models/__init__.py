"""Flax NNX models: layers which take any attention mechanism by name, and models made of them."""
