"""What every task has."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

Sums = dict[str, Float[Array, ""]]
"""Sums over the targets of a batch, by name; "loss" is what is trained."""
Means = dict[str, float]
"""Means over targets, by name."""


class Task(abc.ABC):
    """A task: how its model, data, loss and measures are made from its configuration."""

    what: str
    """What it is, in a line."""
    metric: str
    """The measure that the curves show, a key of what `measures` returns."""
    metric_label: str
    """The same in words."""
    targets: str
    """What its targets are: bytes, queries, images."""
    metric_range: tuple[float, float] | None = None
    """Range of the measure in plots."""

    @abc.abstractmethod
    def make_model(self, model: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The model of a configuration's `model`."""

    @abc.abstractmethod
    def sums(self, model: nnx.Module, batch: dict[str, Array]) -> tuple[Sums, Float[Array, ""]]:
        """Sums over the targets of a batch, among them "loss", and the number of targets."""

    @abc.abstractmethod
    def check(self, config: Any) -> None:
        """Refuses what the model and the data of a configuration cannot be together.

        Raises:
          ExperimentError: naming the option, its value and what it must be.
        """

    @abc.abstractmethod
    def train_dataset(
        self, config: Any, *, batch_size: int, process_index: int, process_count: int
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Batches of this process, for ever; the iterator's state can be saved after any."""

    @abc.abstractmethod
    def evaluation_batches(self, config: Any, split: str) -> Iterator[dict[str, np.ndarray]]:
        """Batches of "validation" (while training) or "test" data, all of one size."""

    def test_data(
        self, config: Any, max_bytes: int | None = None
    ) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """Batches of all that is measured at the end, by a label; that of the first is empty.

        Args:
          config: the configuration.
          max_bytes: how much of a text is used; of no meaning for other data.
        """
        del max_bytes
        return {"": self.evaluation_batches(config, "test")}

    def baselines(self, config: Any, count: int, max_bytes: int | None = None) -> dict[str, float]:
        """The measure by name of what a model must beat, on the test data; none by default.

        Args:
          config: the configuration.
          count: number of targets on which the model was measured.
          max_bytes: as for `test_data`.
        """
        del config, count, max_bytes
        return {}

    @abc.abstractmethod
    def units(self, config: Any) -> tuple[int, str]:
        """How many tokens a step has, and the data in words, such as "8 x 256 bytes of lm1b"."""

    def plot(self, config: Any, values: dict[str, float], run: Path) -> Path | None:
        """Draws what was measured of a run on its test data; None where there is nothing to draw.

        Args:
          config: the configuration.
          values: the measure by the labels of `test_data`, each with the model's name before it.
          run: directory to write to.
        """
        del config, values, run

    def measures(self, means: Means) -> dict[str, float]:
        """What is written down of the means over a batch or a split."""
        return dict(means)

    def line(self, measures: dict[str, float]) -> str:
        """The measures in few words, for the progress line."""
        return f"loss {measures['loss']:.4f}  {self.metric_label} {measures[self.metric]:.3f}"
