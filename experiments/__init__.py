"""Scripts that train, evaluate, compare and sample the models."""
