"""Documents as tokens, and streams of documents as rows of fixed length.

A token is a byte, or `BOS` at the start of a document. Documents are joined into one stream, which
is cut into rows of T + 1 tokens: T inputs and, one further on, T targets. The last token of a row
is the first of the next, so that each token of the stream is a target once.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

BOS = 256
"""The token before the first byte of a document."""
VOCAB_SIZE = 257
"""Number of different tokens: the bytes and BOS."""

Row = dict[str, Int[np.ndarray, " T+1"]]


def encode(text: bytes) -> UInt16[np.ndarray, " L+1"]:
    """The tokens of a document: BOS, then its bytes."""
    tokens = np.empty(len(text) + 1, np.uint16)
    tokens[0] = BOS
    tokens[1:] = np.frombuffer(text, np.uint8)
    return tokens


def cut(stream: UInt16[np.ndarray, " L"], length: int) -> UInt16[np.ndarray, "R T+1"]:
    """All whole rows of `length` + 1 tokens of a stream, each `length` after the one before.

    Returns:
      a view of the stream; (L - 1) // length rows.
    """
    if len(stream) <= length:
        return np.empty((0, length + 1), stream.dtype)
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]


def segment_ids(tokens: Int[np.ndarray, "*B T+1"]) -> Int[np.ndarray, "*B T+1"]:
    """The number of each token's document within its row, from 1."""
    ids = np.ones(tokens.shape, np.int32)
    np.cumsum(tokens[..., 1:] == BOS, axis=-1, dtype=np.int32, out=ids[..., 1:])
    ids[..., 1:] += 1
    return ids


def targets_and_weights(
    tokens: Int[Array, "B T+1"], segment_ids: Int[Array, "B T+1"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"], Float[Array, "B T"]]:
    """Splits rows into what a language model reads and what it is to predict.

    A target counts if it is a byte of the same document as its input: the first byte of a document
    is predicted from BOS; BOS itself and padding (segment id 0) are not predicted.

    Args:
      tokens: rows, NumPy or JAX arrays (also traced).
      segment_ids: the document of each token within its row, from 1; 0 for padding.

    Returns:
      inputs, segment ids of the inputs, targets, and float32 weights of the targets: 1 or 0.
    """
    targets = tokens[:, 1:]
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    weights = (same & (targets != BOS)).astype(np.float32)
    return tokens[:, :-1], segment_ids[:, :-1], targets, weights


class Texts(Protocol):
    """Texts with random access, which is cheaper for many at once."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Some of them."""


class ShuffledDocuments:
    """Documents without an end: those of a data set, shuffled anew each epoch.

    Each of several parts (processes) gets other documents of an epoch, and all parts together get
    each document once.

    Args:
      texts: the data set.
      seed: determines the orders, >= 0.
      part: which part, from 0.
      parts: number of parts.
    """

    def __init__(self, texts: Texts, *, seed: int, part: int = 0, parts: int = 1):
        self._texts = texts
        self._part = part
        self._parts = parts
        # Epoch e is shuffled with this + e: were it the seed itself, neighbouring seeds would
        # have orders in common.
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.epoch = len(range(part, len(texts), parts))
        """Number of this part's documents in an epoch."""

    def read(self, first: int, count: int) -> list[bytes]:
        """Documents number `first` to `first` + `count` - 1, from 0 on through all epochs."""
        return self._texts.read([self._index(first + i) for i in range(count)])

    def _index(self, number: int) -> int:
        epoch, position = divmod(number, self.epoch)
        return grain.experimental.index_shuffle(
            self._part + position * self._parts,
            max_index=len(self._texts) - 1,
            seed=(self._seed + epoch) % 2**32,
            rounds=4,
        )


class PackedRows(grain.IterDataset[Row]):
    """An endless stream of rows, shuffled within windows.

    The stream is read one window after the other, and the rows of a window are drawn in random
    order; so a batch has parts of many documents although a long document fills many rows that
    follow each other. A window has `window_rows` rows, or fewer at the end of an epoch: every
    token is a target once before the next epoch begins (the last few, less than a row, go to the
    next epoch's first window; no token is lost or repeated).

    A row is {"tokens": int32 [T + 1], "segment_ids": int32 [T + 1]}; segment ids count from 1.

    The iterator's state is a few numbers (which document and where in it the window begins, and
    the rows that were drawn of it), from which the window is read again. To take it costs a
    microsecond, to set it the reading of a window.

    Args:
      documents: what the stream is made of.
      length: T.
      window_rows: rows in a window.
      seed: numbers >= 0 that determine the order in a window.
      read_ahead: documents that are read at once.
      identity: what the rows depend on. It is part of the state, and a state with another
        identity is refused.
    """

    def __init__(
        self,
        documents: ShuffledDocuments,
        *,
        length: int,
        window_rows: int,
        seed: Sequence[int],
        read_ahead: int,
        identity: Mapping[str, str | int],
    ):
        super().__init__()
        self.documents = documents
        self.length = length
        self.window_rows = window_rows
        self.seed = tuple(seed)
        self.read_ahead = read_ahead
        self.identity = dict(identity)

    def __iter__(self) -> PackedRowsIterator:
        """Returns an iterator at the beginning of the first epoch."""
        return PackedRowsIterator(self)

    def __str__(self) -> str:
        return f"PackedRows(length={self.length}, window_rows={self.window_rows})"


class PackedRowsIterator(grain.DatasetIterator[Row]):
    """Iterator of `PackedRows`."""

    def __init__(self, dataset: PackedRows):
        super().__init__()
        self._dataset = dataset
        self._block_number = -1
        self._block: list[bytes] = []
        self._go_to(document=0, offset=0, window=0, row=0)

    def __next__(self) -> Row:
        if self._order is None:
            self._read_window()
        tokens = self._rows[self._order[self._row]].astype(np.int32)
        self._row += 1
        if self._row == len(self._order):
            self._leave_window()
        return {"tokens": tokens, "segment_ids": segment_ids(tokens)}

    def get_state(self) -> dict[str, Any]:
        """Where the iterator is, as JSON values."""
        return {
            "document": self._document,
            "offset": self._offset,
            "window": self._window,
            "row": self._row,
            "identity": dict(self._dataset.identity),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
          ValueError: if the state is that of other data or settings, naming what differs.
        """
        theirs, ours = state["identity"], self._dataset.identity
        differences = [
            f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name) != ours.get(name)
        ]
        if differences:
            raise ValueError(
                f"the rows cannot go on where others stopped: {'; '.join(differences)}"
            )
        self._go_to(**{name: state[name] for name in ("document", "offset", "window", "row")})

    def _go_to(self, *, document: int, offset: int, window: int, row: int) -> None:
        self._document = document
        self._offset = offset
        self._window = window
        self._row = row
        self._rows: UInt16[np.ndarray, "R T+1"] | None = None
        self._order: Int[np.ndarray, " R"] | None = None
        self._stream: UInt16[np.ndarray, " L"] | None = None

    def _read_window(self) -> None:
        """Reads documents until there are enough rows, or an epoch ends and there is one row."""
        length, epoch = self._dataset.length, self._dataset.documents.epoch
        if self._stream is None:
            self._next = self._document
            self._begins = [-self._offset]
            pieces = [self._read()[self._offset :]]
        else:
            pieces = [self._stream]
        size = len(pieces[0])
        while size <= self._dataset.window_rows * length and (self._next % epoch or size <= length):
            self._begins.append(size)
            pieces.append(self._read())
            size += len(pieces[-1])
        self._stream = np.concatenate(pieces)
        self._rows = cut(self._stream, length)[: self._dataset.window_rows]
        generator = np.random.default_rng((*self._dataset.seed, self._window))
        self._order = generator.permutation(len(self._rows))

    def _read(self) -> UInt16[np.ndarray, " L+1"]:
        count = self._dataset.read_ahead
        number, index = divmod(self._next, count)
        if number != self._block_number:
            self._block = self._dataset.documents.read(number * count, count)
            self._block_number = number
        self._next += 1
        return encode(self._block[index])

    def _leave_window(self) -> None:
        """Goes to the last token of the window, which is the first one of the next."""
        end = len(self._rows) * self._dataset.length
        containing = bisect.bisect_right(self._begins, end) - 1
        self._begins = [begin - end for begin in self._begins[containing:]]
        self._stream = self._stream[end:].copy()
        self._document += containing
        self._offset = -self._begins[0]
        self._window += 1
        self._row = 0
        self._rows = self._order = None
