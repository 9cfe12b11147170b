"""Forecasting of series."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments import forecasts
from experiments.config import SeriesConfig
from experiments.data import series
from experiments.errors import ExperimentError
from experiments.tasks.task import Means, Sums, Task
from models.forecasting import Autoformer, ForecasterConfig


class SeriesTask(Task):
    """Forecasts, measured in the mean squared error of scaled values."""

    what = "forecasts of series"
    metric = "mse"
    metric_label = "MSE"
    targets = "values"

    def make_model(self, model: ForecasterConfig, rngs: nnx.Rngs) -> Autoformer:
        """An Autoformer."""
        return Autoformer(model, rngs=rngs)

    def sums(self, model: Autoformer, batch: dict[str, Array]) -> tuple[Sums, Float[Array, ""]]:
        """Squared and absolute errors."""
        error, weights = model(batch["inputs"]) - batch["targets"], batch.get("weights")
        weights = jnp.ones(error.shape[:1]) if weights is None else weights
        count = weights.sum() * error[0].size
        weights = weights[:, None, None]
        sums = {"loss": (error**2 * weights).sum(), "mae": (jnp.abs(error) * weights).sum()}
        return sums, count

    def check(self, config: SeriesConfig) -> None:
        """Refuses a series that cannot be read, and a model of other sizes."""
        data, model = config.data, config.model
        if model.horizon != data.horizon:
            raise ExperimentError(
                f"model.horizon: {model.horizon}, but data.horizon is {data.horizon}"
            )
        if model.label_length > data.input_length:
            raise ExperimentError(
                f"model.label_length: {model.label_length} must be at most data.input_length, "
                f"{data.input_length}"
            )
        try:
            found = series.open_series(data)
        except (ValueError, OSError) as error:
            raise ExperimentError(f"data: {error}") from error
        for name, has, wanted in (
            ("channels", model.channels, len(found.names)),
            ("outputs", model.output_channels, found.targets),
        ):
            if has != wanted:
                what = "columns" if name == "channels" else "targets"
                raise ExperimentError(
                    f"model.{name}: {has}, but {data.name} has {wanted} {what}: give "
                    f"--model.{name} {wanted}"
                )

    def train_dataset(
        self, config: SeriesConfig, *, batch_size: int, process_index: int, process_count: int
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        """Windows of the training part in a random order."""
        return series.train_dataset(
            config.data,
            batch_size=batch_size,
            seed=config.seed,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluation_batches(
        self, config: SeriesConfig, split: str
    ) -> Iterator[dict[str, np.ndarray]]:
        """Each window once."""
        return series.evaluation_batches(config.data, split, batch_size=config.batch_size)

    def baselines(
        self, config: SeriesConfig, count: int, max_bytes: int | None = None
    ) -> dict[str, float]:
        """The last value, the last season and a linear map of the inputs."""
        del count, max_bytes
        return forecasts.baselines(config.data)

    def units(self, config: SeriesConfig) -> tuple[int, str]:
        """Tokens are the times that forecasts are made from."""
        rows, data = config.batch_size, config.data
        words = f"{rows} windows of {data.input_length} + {data.horizon} times of {data.name}"
        return rows * data.input_length, words

    def measures(self, means: Means) -> dict[str, float]:
        """The loss is the mean squared error."""
        return {**means, "mse": means["loss"]}

    def line(self, measures: dict[str, float]) -> str:
        """Both errors."""
        return f"MSE {measures['mse']:.4f}  MAE {measures['mae']:.4f}"
