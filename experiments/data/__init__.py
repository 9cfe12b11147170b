"""Text data sets, and the pipeline that makes rows of tokens of them."""
