"""Forecasts that a model of series must beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from experiments.data.series import SeriesDataConfig, evaluation_batches

Values = Float[np.ndarray, "B times channels"]
Forecast = Callable[[Values], Values]


def repeat_last(inputs: Values, horizon: int, period: int = 1) -> Values:
    """The last season of the inputs, over and over; by default their last value."""
    times = np.arange(horizon) % period
    return inputs[:, inputs.shape[1] - period + times]


class LinearForecast:
    """`last + (inputs - last) W + b`, with the same matrix W [L, horizon] for all channels.

    W and b minimise the mean squared error on training windows plus `ridge * ||W||^2`, in closed
    form.

    Source: Zeng et al., Are Transformers Effective for Time Series Forecasting? (2022), NLinear,
    which is trained by gradient descent there.

    Args:
      windows: batches {"inputs": [B, L, C], "targets": [B, horizon, O], "weights": [B]}, of which
        the first O of the C channels are forecast.
      ridge: weight of the penalty, above 0.
    """

    def __init__(self, windows: Iterable[dict[str, np.ndarray]], ridge: float = 1e-3):
        squares = products = 0.0
        for batch in windows:
            kept = batch["weights"] > 0
            targets = batch["targets"][kept].astype(np.float64)
            x, last = _centred(batch["inputs"][kept][..., : targets.shape[-1]])
            y = np.moveaxis(targets - last, 1, 2).reshape(-1, targets.shape[1])
            squares += x.T @ x
            products += x.T @ y
        # The last column is of ones: it counts, and its weight b has no penalty.
        penalty = ridge * squares[-1, -1] * np.diag(np.arange(len(squares)) < len(squares) - 1)
        self._weights = np.linalg.solve(squares + penalty, products)

    def __call__(self, inputs: Values) -> Values:
        """The forecast of all channels that are given."""
        x, last = _centred(inputs)
        out = (x @ self._weights).reshape(len(inputs), inputs.shape[2], -1)
        return last + np.moveaxis(out, 1, 2)


def _centred(inputs: Values) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [B C, L + 1] of inputs less the last, and a one; and the last, [B, 1, C]."""
    inputs = inputs.astype(np.float64)
    last = inputs[:, -1:]
    rows = np.moveaxis(inputs - last, 1, 2).reshape(-1, inputs.shape[1])
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1), last


def baselines(config: SeriesDataConfig, split: str = "test") -> dict[str, float]:
    """Mean squared errors by name of forecasts on the windows that a model is measured on.

    Raises:
      ValueError, OSError: the series cannot be read.
    """

    def windows(split: str) -> Iterable[dict[str, np.ndarray]]:
        return evaluation_batches(config, split, batch_size=256)

    forecasts: dict[str, Forecast] = {"last value": lambda x: repeat_last(x, config.horizon)}
    if config.period is not None:
        period = config.period
        forecasts[f"last season of {period}"] = lambda x: repeat_last(x, config.horizon, period)
    forecasts["linear"] = LinearForecast(windows("train"))
    sums, count = dict.fromkeys(forecasts, 0.0), 0
    for batch in windows(split):
        kept = batch["weights"] > 0
        targets = batch["targets"][kept].astype(np.float64)
        inputs = batch["inputs"][kept][..., : targets.shape[-1]]
        count += targets.size
        for name, forecast in forecasts.items():
            sums[name] += float(((forecast(inputs) - targets) ** 2).sum())
    return {name: total / count for name, total in sums.items()}
