"""A needle in a haystack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from experiments.config import NeedleConfig
from experiments.data.made import ENDLESS, padded_batches, train_batches
from experiments.data.needle import NeedleExamples
from experiments.tasks.mqar import MqarTask

PLOT = "needle.png"


class NeedleTask(MqarTask):
    """Values found again at any depth, measured in their share that is found."""

    what = "a needle in a haystack: values to be found at any depth of a sequence"
    targets = "values"

    def train_dataset(
        self, config: NeedleConfig, *, batch_size: int, process_index: int, process_count: int
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Ever new sequences, the needle anywhere."""
        return train_batches(
            NeedleExamples(config.data, "train", seed=config.seed, count=ENDLESS),
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluation_batches(
        self,
        config: NeedleConfig,
        split: str,
        length: int | None = None,
        depth: float | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The same sequences in every run."""
        count = config.data.evaluate_examples
        examples = NeedleExamples(
            config.data, split, seed=0, count=count, length=length, depth=depth
        )
        return padded_batches(examples, config.batch_size)

    def test_data(
        self, config: NeedleConfig, max_bytes: int | None = None
    ) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """Sequences as in training, then of every length with the needle at every depth."""
        del max_bytes
        found = {"": self.evaluation_batches(config, "test")}
        for length in config.data.evaluate_lengths:
            for depth in config.data.evaluate_depths:
                label = f"{length} tokens, depth {depth:g}"
                found[label] = self.evaluation_batches(config, "test", length, depth)
        return found

    def units(self, config: NeedleConfig) -> tuple[int, str]:
        """Tokens are those of all sequences."""
        rows, data = config.batch_size, config.data
        return rows * data.length, f"{rows} x {data.length} tokens with {data.values} values"

    def plot(self, config: NeedleConfig, values: dict[str, float], run: Path) -> Path:
        """Draws accuracy by length and depth into `needle.png`."""
        from matplotlib.figure import Figure  # half a second to import

        lengths, depths = config.data.evaluate_lengths, config.data.evaluate_depths
        cells = np.array(list(values.values())[1:]).reshape(len(lengths), len(depths)).T
        figure = Figure(figsize=(1.5 + len(lengths), 1.2 + 0.6 * len(depths)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), value in np.ndenumerate(cells):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("tokens of a sequence")
        axes.set_ylabel("depth of the needle")
        axes.set_title(
            f"{next(iter(values))}: values found\n(trained on {config.data.length} tokens)"
        )
        figure.savefig(run / PLOT, dpi=120)
        return run / PLOT
