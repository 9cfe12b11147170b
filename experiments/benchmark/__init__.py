"""Benchmarks against peers: `python -m experiments.benchmark --help`."""
