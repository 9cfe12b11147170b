"""Compressors and byte statistics that a language model must beat."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence

import numpy as np

SYMBOLS = 257  # the 256 bytes, and the mark that stands before a document
MARK = 256


class ByteModel:
    """The distribution of a byte given the bytes before it, counted on training documents.

    Contexts of every length up to `order` are mixed by Witten and Bell's rule: with c(x, b) the
    count of byte b after context x, n(x) their sum and d(x) the number of distinct ones,
    p(b | x) = (c(x, b) + d(x) p(b | x')) / (n(x) + d(x)), where x' is x without its oldest byte,
    and below the empty context stands the uniform distribution (Witten and Bell 1991, method C).

    Args:
      order: bytes of context; 0, 1 or 2.
      documents: the training documents.
    """

    def __init__(self, order: int, documents: Iterable[bytes]):
        if order not in (0, 1, 2):
            raise ValueError(f"order: {order}; it must be 0, 1 or 2")
        symbols = _symbols(documents, order)
        self._counts = [_count(symbols, length) for length in range(order + 1)]
        self._totals = [counts.sum(1, dtype=np.int64) for counts in self._counts]
        self._distinct = [(counts > 0).sum(1) for counts in self._counts]

    def bits(self, documents: Iterable[bytes]) -> float:
        """The code length of documents in bits."""
        symbols = _symbols(documents, len(self._counts) - 1)
        probability = np.full(int((symbols != MARK).sum()), 1 / 256)
        for length, counts in enumerate(self._counts):
            contexts, bytes_ = _contexts(symbols, length)
            totals = self._totals[length][contexts]
            distinct = self._distinct[length][contexts]
            seen = totals > 0
            mixed = counts[contexts, bytes_] + distinct * probability
            np.divide(mixed, totals + distinct, out=probability, where=seen)
        return float(-np.log2(probability).sum())


def lzma_bits(documents: Sequence[bytes]) -> float:
    """The size in bits of documents, joined and compressed by LZMA at its strongest preset."""
    return 8.0 * len(lzma.compress(b"".join(documents), preset=9 | lzma.PRESET_EXTREME))


def _symbols(documents: Iterable[bytes], order: int) -> np.ndarray:
    """All documents in one array, each with marks before it, so that no context leaves it."""
    mark = np.full(max(order, 1), MARK, np.int32)
    parts = [mark]
    for document in documents:
        parts += [mark, np.frombuffer(document, np.uint8).astype(np.int32)]
    return np.concatenate(parts)


def _contexts(symbols: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of the context before each byte, and the byte."""
    at = np.flatnonzero(symbols != MARK)
    context = np.zeros(len(at), np.int64)
    for back in range(length, 0, -1):
        context = context * SYMBOLS + symbols[at - back]
    return context, symbols[at]


def _count(symbols: np.ndarray, length: int) -> np.ndarray:
    contexts, bytes_ = _contexts(symbols, length)
    size = SYMBOLS**length
    return (
        np.bincount(contexts * 256 + bytes_, minlength=size * 256)
        .reshape(size, 256)
        .astype(np.int32)
    )
