"""A needle in a haystack: a few values to be found again, at any depth of a long sequence."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.made import SPLITS, check_split
from models.checks import check_positive

MARK = 0
"""Token that stands before the values, and once more at the end, where they are asked for."""


@dataclasses.dataclass(frozen=True)
class NeedleDataConfig:
    """Where what is hidden.

    A sequence is hay, random tokens of the lower half of the vocabulary. In it stand a mark and
    `values` tokens of the upper half, the needle; at its end stand the mark and the same values
    once more, each of which is to be predicted from what is before it. At depth 0 the needle is the
    first thing in a sequence, at 1 the last before the question.

    After the passkey task of Mohtashami and Jaggi, Landmark Attention: Random-Access Infinite
    Context Length for Transformers (2023).

    Raises:
      ValueError: a value is out of its range; the message names it.
      TypeError: a size is not an integer.
    """

    vocab_size: int = 64
    """Number of different tokens."""
    length: int = 64
    """Tokens of a sequence while training, the question and its answer among them."""
    values: int = 8
    """Tokens to be found."""
    evaluate_examples: int = 32
    """Sequences on which accuracy is measured, at each length and depth."""
    evaluate_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Lengths on which accuracy is measured at the end."""
    evaluate_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Depths at which it is measured there."""

    def __post_init__(self) -> None:
        """Checks every field."""
        object.__setattr__(self, "evaluate_lengths", tuple(self.evaluate_lengths))
        object.__setattr__(self, "evaluate_depths", tuple(self.evaluate_depths))
        check_positive(
            vocab_size=self.vocab_size,
            length=self.length,
            values=self.values,
            evaluate_examples=self.evaluate_examples,
        )
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size: {self.vocab_size} must be at least 4")
        for length in (self.length, *self.evaluate_lengths):
            if length < 2 * self.values + 2:
                raise ValueError(
                    f"length: {length} must be at least {2 * self.values + 2}, the room of the "
                    "needle and the question"
                )
        for depth in self.evaluate_depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"evaluate_depths: {depth} must be from 0 to 1")


class NeedleExamples:
    """The sequences of a split, each made when it is asked for; the same for the same seed.

    Args:
      config: the task.
      split: "train", "validation" or "test"; they share no sequence but by chance.
      seed: determines the sequences, >= 0.
      count: number of sequences.
      length: tokens of a sequence; None for the configuration's.
      depth: where the needle is, from 0 to 1; None for anywhere.
    """

    def __init__(
        self,
        config: NeedleDataConfig,
        split: str,
        *,
        seed: int,
        count: int,
        length: int | None = None,
        depth: float | None = None,
    ):
        check_split(split, seed)
        self._config, self._count, self._depth = config, count, depth
        self._length = config.length if length is None else length
        self._seed = (SPLITS.index(split), seed)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"NeedleExamples({self._config}, {self._seed}, {self._length}, {self._depth})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {"tokens": int32 [T], "targets": int32 [T], "weights": float32 [T]}."""
        config, length, count = self._config, self._length, self._config.values
        rng = np.random.default_rng((*self._seed, index))
        half = config.vocab_size // 2
        tokens = rng.integers(1, half, length, dtype=np.int32)
        needle = np.array([MARK, *rng.integers(half, config.vocab_size, count)], np.int32)
        # The last value is the last target, so it stands nowhere as an input.
        question = length - count
        last = question - len(needle)
        place = rng.integers(0, last + 1) if self._depth is None else round(self._depth * last)
        tokens[place : place + len(needle)] = needle
        tokens[question:] = needle[:-1]
        targets, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        targets[question:], weights[question:] = needle[1:], 1
        return {"tokens": tokens, "targets": targets, "weights": weights}
