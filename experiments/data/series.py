"""Series of numbers from a CSV file, or made up, cut into windows for forecasting."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float

from models.checks import check_positive

SPLITS = ("train", "validation", "test")
TIME_NAMES = ("date", "time", "datetime", "timestamp")
"""Columns of these names, in any case, count time, also where they hold numbers."""


@dataclasses.dataclass(frozen=True)
class SeriesDataConfig:
    """Which series, which parts of it are for what, and how much of it a forecast sees.

    Raises:
      ValueError: a value is out of its range; the message names it.
      TypeError: a size is not an integer.
    """

    path: Path | None = None
    """CSV file: a line of names, then a line for each time, oldest first. None: hours made up by
    `generated_series`."""
    columns: tuple[str, ...] = ()
    """Columns that are used; empty: all but a date and others without a number."""
    targets: tuple[str, ...] = ()
    """Those of them that are forecast; empty: all."""
    input_length: int = 96
    """Times that a forecast is made from."""
    horizon: int = 24
    """Times that are forecast, just after them."""
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of the times that are trained on, measured while training and at the end, in the order
    of time."""
    period: int | None = 24
    """Season of the baseline that repeats the last one, at most `input_length`; None: without
    it."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the series."""
        for name in ("columns", "targets", "split"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        check_positive(input_length=self.input_length, horizon=self.horizon)
        if len(self.split) != 3 or min(self.split) <= 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split: {self.split} must be three shares above 0 that add up to 1")
        if self.period is not None:
            check_positive(period=self.period)
            if self.period > self.input_length:
                raise ValueError(
                    f"period: {self.period} must be at most the input_length, {self.input_length}"
                )
        for name in ("columns", "targets"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: {', '.join(given)}; each may be named once")

    @property
    def name(self) -> str:
        """The series in a word."""
        return "generated" if self.path is None else self.path.stem


@dataclasses.dataclass(frozen=True)
class Series:
    """A series as models see it."""

    names: tuple[str, ...]
    """Its columns; those that are forecast come first."""
    targets: int
    """How many are forecast."""
    values: Float[np.ndarray, "times channels"]
    """Float32, less the mean and divided by the deviation of each column's training part (by 1
    where it is constant there)."""
    ends: tuple[int, int, int]
    """Where the parts for training, validation and test end."""


def open_series(config: SeriesDataConfig) -> Series:
    """The series of a configuration.

    Raises:
      ValueError: a line or value of the file is no good, or a column is missing, or a part is too
        short for one window.
      OSError: the file cannot be read.
    """
    if config.path is None:
        names, values = generated_series()
    else:
        found = config.path.stat()
        names, values = _read(config.path, (found.st_mtime_ns, found.st_size))
    columns = _chosen("columns", config.columns, names)
    targets = _chosen("targets", config.targets, columns)
    order = targets + tuple(name for name in columns if name not in targets)
    values = values[:, [names.index(name) for name in order]]
    times, shares = len(values), config.split
    ends = int(times * shares[0]), times - int(times * shares[2]), times
    need = config.input_length + config.horizon, config.horizon, config.horizon
    for split, end, begin, least in zip(SPLITS, ends, (0, *ends[:2]), need, strict=True):
        if end - begin < least:
            inputs = f"input_length + horizon = {least}" if split == "train" else f"horizon {least}"
            raise ValueError(
                f"{config.name}: the {split} part has {end - begin} of its {times} times, fewer "
                f"than {inputs}"
            )
    mean, deviation = values[: ends[0]].mean(axis=0), values[: ends[0]].std(axis=0)
    scaled = (values - mean) / np.where(deviation > 0, deviation, 1)
    return Series(order, len(targets), scaled.astype(np.float32), ends)


def _chosen(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"{option}: {name!r} is not one of {listed}{hint}")
    return given or known


@functools.lru_cache(maxsize=1)
def generated_series() -> tuple[tuple[str, ...], Float[np.ndarray, "20000 4"]]:
    """The names and values of four columns of 20000 hours, the same on every machine.

    Each is the sum of a day's and a week's cycle, two harmonics each, which all columns mix with
    weights of their own; a linear trend; and noise, of which 0.8 stays from one hour to the next.
    Random numbers are those of `numpy.random.default_rng(0)`.
    """
    rng, times, channels = np.random.default_rng(0), np.arange(20_000), 4
    values = np.zeros((len(times), channels))
    for period, size in ((24, 1.0), (12, 0.5), (168, 0.7), (84, 0.3)):
        phase = rng.uniform(0, 2 * math.pi, channels)
        weight = size * rng.uniform(0.5, 1.5, channels)
        values += weight * np.sin(2 * math.pi * times[:, None] / period + phase)
    values += rng.uniform(-1, 1, channels) * times[:, None] / len(times)
    shocks, noise = 0.3 * rng.standard_normal(values.shape), np.zeros(channels)
    for time, shock in enumerate(shocks):
        noise = 0.8 * noise + shock
        values[time] += noise
    return tuple(f"channel_{i}" for i in range(channels)), values


@functools.lru_cache(maxsize=1)
def _read(
    path: Path, stamp: tuple[int, int]
) -> tuple[tuple[str, ...], Float[np.ndarray, "times channels"]]:
    """Returns names and values of the columns with numbers; the stamp says when it changed."""
    del stamp
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            return _parsed(path, reader)
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not text in UTF-8: {error}") from error


def _parsed(path: Path, reader: Iterator[list[str]]) -> tuple[tuple[str, ...], np.ndarray]:
    names = tuple(name.strip() for name in next(reader, ()))
    if not names or all(_number(name) is not None for name in names):
        raise ValueError(f"{path}: line 1 must name the columns; it is {', '.join(names)!r}")
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"{path}: line 1: column {name!r} must have a name of its own")
    rows: list[np.ndarray] = []
    # The first value of each column that is no number, and where it stands.
    wrong: dict[int, tuple[int, str]] = {}
    numeric = np.zeros(len(names), bool)
    for row in reader:
        if not row:
            continue  # an empty line
        if len(row) != len(names):
            raise ValueError(
                f"{path}: line {reader.line_num}: {len(row)} values, but there are {len(names)} "
                "columns"
            )
        values = np.full(len(names), np.nan)
        for column, text in enumerate(row):
            number = _number(text)
            if number is None:
                wrong.setdefault(column, (reader.line_num, text.strip()))
            else:
                values[column] = number
        numeric |= ~np.isnan(values)
        rows.append(values)
    kept = []
    for column, name in enumerate(names):
        line, text = wrong.get(column, (None, ""))
        if name.lower() in TIME_NAMES or (text and not numeric[column]):
            continue
        if line is not None:
            what = f"{text!r} is no number" if text else "a value is missing"
            raise ValueError(f"{path}: line {line}, column {name!r}: {what}")
        kept.append(column)
    if not rows or not kept:
        raise ValueError(f"{path}: has no {'column of numbers' if rows else 'line of values'}")
    return tuple(names[column] for column in kept), np.stack(rows)[:, kept]


def _number(text: str) -> float | None:
    """Returns a finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Windows:
    """The windows of a part of a series, in the order of time.

    Those of "validation" and "test" begin before their part, so that each of its times is forecast.

    Args:
      config: the data.
      split: "train", "validation" or "test".

    Raises:
      ValueError: the split is unknown, or as `open_series`.
      OSError: as `open_series`.
    """

    def __init__(self, config: SeriesDataConfig, split: str):
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} must be one of {', '.join(SPLITS)}")
        self.series = open_series(config)
        """The series."""
        self._config, part = config, SPLITS.index(split)
        self._first = self.series.ends[part - 1] - config.input_length if part else 0
        window = config.input_length + config.horizon
        self._count = self.series.ends[part] - self._first - window + 1

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Windows({self._config}, {self._first}, {self._count})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {"inputs": float32 [input_length, C], "targets": float32 [horizon, O]}."""
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        begin = self._first + int(index)
        middle = begin + self._config.input_length
        return {
            "inputs": self.series.values[begin:middle],
            "targets": self.series.values[
                middle : middle + self._config.horizon, : self.series.targets
            ],
        }


def train_dataset(
    config: SeriesDataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Batches of windows of the training part, for ever.

    Windows are shuffled anew each epoch and dealt out to the processes, which together take each
    once an epoch (but for the last few, fewer than processes); epochs follow each other within
    batches. The iterator's state can be saved after any batch (`get_state`, `grain.checkpoint`),
    and a restored one gives the same batches as if it had gone on.

    Args:
      config: the data.
      batch_size: windows in a batch of this process.
      seed: determines the order, >= 0.
      process_index: which part of each epoch, from 0.
      process_count: number of parts.

    Returns:
      batches {"inputs": float32 [B, input_length, C], "targets": float32 [B, horizon, O]}; the O
      columns that are forecast are the first of the C.

    Raises:
      ValueError: an argument is out of range, or as `open_series`.
      OSError: as `open_series`.
    """
    check_positive(batch_size=batch_size)
    if seed < 0:
        raise ValueError(f"seed: {seed} must be at least 0")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: {process_index} must be in 0..{process_count - 1}")
    windows = Windows(config, "train")
    if len(windows) < process_count:
        raise ValueError(
            f"{config.name}: {len(windows)} windows are too few for {process_count} processes"
        )
    # Epoch e is shuffled with this + e: were it the seed itself, neighbouring seeds would have
    # orders in common.
    order = int(np.random.SeedSequence(seed).generate_state(1)[0])
    dataset = grain.MapDataset.source(windows).shuffle(seed=order)
    dataset = dataset[process_index::process_count].repeat(None)
    # No threads: what they would read ahead takes microseconds to cut out.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return dataset.to_iter_dataset(read).batch(batch_size, drop_remainder=True)


def evaluation_batches(
    config: SeriesDataConfig, split: str, *, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the windows of a part, each once, in the order of time.

    Args:
      config: the data.
      split: "train", "validation" or "test".
      batch_size: windows in a batch; the last is filled up with windows of weight 0.

    Returns:
      an iterator of batches as those of `train_dataset`, and "weights": float32 [B].

    Raises:
      ValueError, OSError: as `train_dataset`.
    """
    check_positive(batch_size=batch_size)
    return _evaluation_batches(Windows(config, split), batch_size)


def _evaluation_batches(windows: Windows, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(windows), batch_size):
        rows = [windows[min(i, len(windows) - 1)] for i in range(first, first + batch_size)]
        weights = np.arange(first, first + batch_size) < len(windows)
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        yield {**batch, "weights": weights.astype(np.float32)}
