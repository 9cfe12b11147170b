"""Text for language models, byte by byte: any text data set of TFDS as rows of tokens.

Everything is made of documents, a data set's examples. `train_dataset` gives shuffled rows for
ever, `evaluation_batches` each byte of a split once, `documents` the bytes themselves.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Float, Int, UInt16

from experiments.data.packing import (
    BOS,
    VOCAB_SIZE,
    PackedRows,
    ShuffledDocuments,
    cut,
    encode,
    segment_ids,
    targets_and_weights,
)
from experiments.data.prepare import data_directory
from experiments.data.texts import TfdsTexts, open_texts

__all__ = [
    "BOS",
    "VOCAB_SIZE",
    "TextDataConfig",
    "documents",
    "evaluation_batches",
    "targets_and_weights",
    "train_dataset",
]


@dataclasses.dataclass(frozen=True)
class TextDataConfig:
    """Which text, and which parts of it."""

    name: str = "python_source"
    """A TFDS data set, such as lm1b or wiki40b/en (these need a network the first time);
    python_source is the standard library of the Python that runs, and needs nothing."""
    text_feature: str = "text"
    """The feature of an example that is its text."""
    train_split: str = "train"
    """What is trained on; a part of a split is written train[:95%]."""
    validation_split: str = "validation"
    """What is measured while training."""
    test_split: str = "test"
    """What is measured at the end."""
    data_dir: str | None = None
    """Where prepared data sets are kept; default: $TFDS_DATA_DIR, or else attention_atlas/tfds in
    $XDG_CACHE_HOME or ~/.cache."""
    shuffle_bytes: int = 4 * 2**20
    """Bytes of text (in the order of the shuffled documents) over which training rows are mixed."""

    @property
    def directory(self) -> str:
        """Where prepared data sets are kept."""
        return data_directory(self.data_dir)


def train_dataset(
    config: TextDataConfig,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[dict[str, Int[np.ndarray, "B T+1"]]]:
    """Batches of rows of the training split, for ever.

    The documents are shuffled anew each epoch and dealt out to the processes; each process joins
    its documents and cuts them into rows (see `PackedRows`). The iterator's state can be saved
    after any batch (`get_state`, `grain.checkpoint`), and a restored one gives the same batches
    as if it had gone on. It does its work when it is asked; to do it beside a fast accelerator's,
    wrap the data set in `grain.experimental.ThreadPrefetchIterDataset`.

    Args:
      config: the data.
      batch_size: rows in a batch of this process.
      sequence_length: T, targets in a row.
      seed: determines the order, >= 0.
      process_index: which part of the documents, from 0.
      process_count: number of parts.

    Returns:
      batches {"tokens": int32 [B, T + 1], "segment_ids": int32 [B, T + 1]}, to be taken apart by
      `targets_and_weights`.

    Raises:
      ValueError: if an argument is out of range, the data set, split or feature is unknown, or
        there are fewer documents than processes.
      OSError: if the data cannot be prepared or read.
    """
    _check_sizes(
        batch_size=batch_size, sequence_length=sequence_length, shuffle_bytes=config.shuffle_bytes
    )
    if seed < 0:
        raise ValueError(f"seed: {seed}; it must be at least 0")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: {process_index}; it must be in 0..{process_count - 1}")
    texts = _open(config, config.train_split)
    if len(texts) < process_count:
        raise ValueError(
            f"{len(texts)} documents in {config.name} {config.train_split} are too few for "
            f"{process_count} processes"
        )
    window_rows = max(1, config.shuffle_bytes // sequence_length)
    rows = PackedRows(
        ShuffledDocuments(texts, seed=seed, part=process_index, parts=process_count),
        length=sequence_length,
        window_rows=window_rows,
        seed=(seed, process_index),
        read_ahead=texts.read_ahead,
        identity={
            "data set": texts.full_name,
            "split": config.train_split,
            "text feature": config.text_feature,
            "documents": len(texts),
            "sequence length": sequence_length,
            "rows shuffled together": window_rows,
            "seed": seed,
            "part of the documents": f"{process_index} of {process_count}",
        },
    )
    return rows.batch(batch_size, drop_remainder=True)


def documents(config: TextDataConfig, split: str, max_bytes: int | None = None) -> Iterator[bytes]:
    """The documents of a split, always in the same order (TFDS's, by a hash: no sorting).

    Args:
      config: the data.
      split: a split of the data set, such as `config.test_split`.
      max_bytes: where to stop, in the middle of a document if need be; None: at the end.

    Returns:
      an iterator of the documents' bytes.

    Raises:
      ValueError, OSError: as `train_dataset`.
    """
    return _documents(_open(config, split), sys.maxsize if max_bytes is None else max_bytes)


def _documents(texts: TfdsTexts, left: int) -> Iterator[bytes]:
    for first in range(0, len(texts), texts.read_ahead):
        for text in texts.read(range(first, min(first + texts.read_ahead, len(texts)))):
            if left <= 0:
                return
            yield text[:left]
            left -= len(text)


def evaluation_batches(
    config: TextDataConfig,
    split: str,
    *,
    batch_size: int,
    sequence_length: int,
    max_bytes: int | None = None,
) -> Iterator[dict[str, Int[np.ndarray, "B T+1"] | Float[np.ndarray, "B T"]]]:
    """Batches in which every byte of a split's documents is a target of weight 1 exactly once.

    The documents are joined in their fixed order and cut into rows. The j-th target of a row has
    as context the bytes of its document among the j tokens before it in the row: at most T, on
    average about T / 2, and less where a document begins. Longer rows measure longer context.

    Args:
      config: the data.
      split: a split of the data set, such as `config.test_split`.
      batch_size: rows in a batch. The last one is filled up with rows of weight 0.
      sequence_length: T, targets in a row.
      max_bytes: how much of the split is taken, from its beginning; None: all.

    Returns:
      an iterator of {"tokens": int32 [B, T + 1], "segment_ids": int32 [B, T + 1] (0: padding),
      "weights": float32 [B, T]}; the weights are those of `targets_and_weights`.

    Raises:
      ValueError, OSError: as `train_dataset`.
    """
    _check_sizes(batch_size=batch_size, sequence_length=sequence_length)
    return _evaluation_batches(documents(config, split, max_bytes), batch_size, sequence_length)


def _evaluation_batches(
    texts: Iterator[bytes], batch_size: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
    targets = batch_size * length
    pieces, size = [], 0
    for text in texts:
        pieces.append(encode(text))
        size += len(pieces[-1])
        if size > targets:
            stream = np.concatenate(pieces)
            blocks = cut(stream, targets)
            for block in blocks:
                yield _evaluation_batch(block, batch_size, length)
            pieces = [stream[len(blocks) * targets :]]
            size = len(pieces[0])
    if size > 1:
        yield _evaluation_batch(np.concatenate(pieces), batch_size, length)


def _evaluation_batch(
    stream: UInt16[np.ndarray, " L"], batch_size: int, length: int
) -> dict[str, np.ndarray]:
    """One batch from a piece of a stream, filled up with padding."""
    padded = np.zeros(batch_size * length + 1, stream.dtype)
    padded[: len(stream)] = stream
    is_token = np.arange(len(padded)) < len(stream)
    tokens = cut(padded, length).astype(np.int32)
    ids = np.where(cut(is_token, length), segment_ids(tokens), 0)
    *_, weights = targets_and_weights(tokens, ids)
    return {"tokens": tokens, "segment_ids": ids, "weights": weights}


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: {value}; it must be at least 1")


def _open(config: TextDataConfig, split: str) -> TfdsTexts:
    return open_texts(config.name, split, feature=config.text_feature, data_dir=config.directory)
