"""Multi-query associative recall (MQAR): pairs of keys and values, then queries for the values."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.made import SPLITS, check_split
from models.checks import check_positive


@dataclasses.dataclass(frozen=True)
class MqarDataConfig:
    """What is to be recalled.

    A sequence begins with n pairs k1 v1 ... kn vn. Each key stands once more, at an even distance
    2 * gap behind them, and there its value is to be predicted. Keys are drawn from the lower half
    of the vocabulary and values from the upper, without replacement within a sequence; all other
    places are filled with tokens of the whole vocabulary, keys in use included. Gaps j - 1 are
    drawn without replacement with p(j) ~ j^(a - 1), so that most queries come soon.

    Source: Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models
    (2023).

    Raises:
      ValueError: a value is out of its range; the message names it.
      TypeError: a size is not an integer.
    """

    vocab_size: int = 8192
    """Number of different tokens; more than `length`."""
    length: int = 64
    """Tokens of a sequence, an even number."""
    pairs: int = 8
    """n, keys to recall; at most a quarter of `length`."""
    power: float = 0.01
    """a: small ones put queries soon after the pairs, 1 anywhere alike."""
    evaluate_examples: int = 512
    """Sequences on which accuracy is measured."""
    evaluate_lengths: tuple[int, ...] = ()
    """Further lengths on which accuracy is measured at the end, with as many pairs."""

    def __post_init__(self) -> None:
        """Checks every field."""
        object.__setattr__(self, "evaluate_lengths", tuple(self.evaluate_lengths))
        check_positive(
            vocab_size=self.vocab_size,
            length=self.length,
            pairs=self.pairs,
            evaluate_examples=self.evaluate_examples,
        )
        for length in (self.length, *self.evaluate_lengths):
            if length % 2 or 4 * self.pairs > length:
                raise ValueError(
                    f"length: {length} must be even and at least {4 * self.pairs}, four times the "
                    f"{self.pairs} pairs"
                )
        if self.vocab_size <= self.length:
            raise ValueError(
                f"vocab_size: {self.vocab_size} must be greater than the length, {self.length}"
            )
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"pairs: {self.pairs} must be at most {self.vocab_size // 2 - 1}, the keys of a "
                f"vocabulary of {self.vocab_size}"
            )
        if not self.power > 0:
            raise ValueError(f"power: {self.power} must be above 0")


class MqarExamples:
    """The sequences of a split, each made when it is asked for; the same for the same seed.

    Args:
      config: the task.
      split: "train", "validation" or "test"; they share no sequence but by chance.
      seed: determines the sequences, >= 0.
      count: number of sequences.
      length: tokens of a sequence; None for the configuration's.
    """

    def __init__(
        self,
        config: MqarDataConfig,
        split: str,
        *,
        seed: int,
        count: int,
        length: int | None = None,
    ):
        check_split(split, seed)
        self._config, self._count = config, count
        self._length = config.length if length is None else length
        self._seed = (SPLITS.index(split), seed)
        space = (self._length - 2 * config.pairs) // 2
        weights = np.arange(1, space + 1) ** (config.power - 1.0)
        self._probability = weights / weights.sum()

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"MqarExamples({self._config}, {self._seed}, {self._length})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {"tokens": int32 [T], "targets": int32 [T], "weights": float32 [T]}."""
        config, pairs, length = self._config, self._config.pairs, self._length
        rng = np.random.default_rng((*self._seed, index))
        half = config.vocab_size // 2
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(config.vocab_size - half, pairs, replace=False)
        gaps = rng.choice(len(self._probability), pairs, replace=False, p=self._probability)
        tokens = rng.integers(0, config.vocab_size, length, dtype=np.int32)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + 2 * gaps
        tokens[places] = keys
        targets, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        targets[places], weights[places] = values, 1
        return {"tokens": tokens, "targets": targets, "weights": weights}
