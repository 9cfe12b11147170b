"""Examples that are made when they are asked for, as batches to train and to measure on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

SPLITS = ("train", "validation", "test")
ENDLESS = 2**40
"""Number of examples of a split that nobody will see the end of."""


class Examples(Protocol):
    """Examples by number, each a dictionary of arrays, "weights" of targets among them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def check_split(split: str, seed: int) -> None:
    """Raises ValueError unless there is such a split and the seed is at least 0."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} must be one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed: {seed} must be at least 0")


def train_batches(
    examples: Examples, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Batches of a process's part of the examples; the iterator's state can be saved after any.

    Args:
      examples: those of all processes.
      batch_size: examples in a batch of this process.
      process_index: which part of the examples, from 0.
      process_count: number of parts.
    """
    dataset = grain.MapDataset.source(examples)[process_index::process_count]
    # No threads: what they would read ahead takes microseconds to make.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return dataset.to_iter_dataset(read).batch(batch_size, drop_remainder=True)


def padded_batches(examples: Examples, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of all examples, each once; the last is filled up with targets of weight 0."""
    for first in range(0, len(examples), batch_size):
        rows = [examples[min(i, len(examples) - 1)] for i in range(first, first + batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["weights"][len(examples) - first :] = 0
        yield batch
