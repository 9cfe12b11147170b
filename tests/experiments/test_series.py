"""Series: files and their errors, windows, their order and resumption, simple forecasts, a run."""

import dataclasses
import json
import re

import numpy as np
import pytest
from flax import nnx

from experiments import config as configs
from experiments import forecasts, tasks
from experiments.config import SeriesConfig
from experiments.data.series import (
    SeriesDataConfig,
    Windows,
    evaluation_batches,
    generated_series,
    open_series,
    train_dataset,
)
from experiments.errors import ExperimentError
from experiments.record import read_metrics

TIMES = 40
"""Of which the first 28 are for training and the last 8 for the test."""


def table(changed=None):
    """Columns b, c and a of 40 times; c is constant while trained on."""
    values = np.random.default_rng(0).normal(5, 3, (TIMES, 3)).round(3)
    values[:28, 1] = 7
    if changed is not None:
        values[changed] += 100
    return values


@pytest.fixture
def write(tmp_path):
    """Writes a table as a CSV file, with a date; returns a configuration of it."""

    def write(values, **settings):
        lines = ["Date,b,c,a,note"]
        lines += [
            ",".join((f"2020-01-01 {i:02}:00", *map(str, row), "x")) for i, row in enumerate(values)
        ]
        path = tmp_path / "table.csv"
        path.write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
        sizes = {"input_length": 6, "horizon": 3, "period": 4}
        return SeriesDataConfig(path=path, **(sizes | settings))

    return write


def test_a_file_is_read_and_scaled_by_its_training_part(write):
    values = table()
    found = open_series(write(values))
    assert found.names == ("b", "c", "a") and found.targets == 3 and found.ends == (28, 32, 40)
    for column in (0, 2):
        x = values[:, column]
        mean = sum(x[:28]) / 28
        deviation = (sum((x[:28] - mean) ** 2) / 28) ** 0.5
        np.testing.assert_allclose(found.values[:, column], (x - mean) / deviation, rtol=1e-5)
    np.testing.assert_allclose(found.values[:, 1], values[:, 1] - 7, rtol=1e-5)
    part = open_series(write(values, columns=("c", "a", "b"), targets=("a",)))
    assert part.names == ("a", "c", "b") and part.targets == 1
    np.testing.assert_array_equal(part.values, found.values[:, [2, 1, 0]])


def test_windows(write):
    config = write(table(), targets=("a",))
    values = open_series(config).values
    first = {"train": 0, "validation": 28 - 6, "test": 32 - 6}
    counts = {"train": 28 - 8, "validation": 2, "test": 6}
    for split, begin in first.items():
        windows = Windows(config, split)
        assert len(windows) == counts[split]
        for i, window in enumerate(windows[j] for j in range(len(windows))):
            at = begin + i
            np.testing.assert_array_equal(window["inputs"], values[at : at + 6])
            np.testing.assert_array_equal(window["targets"], values[at + 6 : at + 9, :1])
        with pytest.raises(IndexError):
            windows[len(windows)]


@pytest.mark.parametrize("time", [5, 27, 28, 33, 39])
def test_inputs_do_not_know_the_future(write, time):
    """A changed value changes inputs that hold its time, and scales if it is trained on."""
    before = {split: [*_all(write(table()), split)] for split in ("train", "validation", "test")}
    config = write(table(time))
    for split, begin in (("train", 0), ("validation", 22), ("test", 26)):
        for i, (old, new) in enumerate(zip(before[split], _all(config, split), strict=True)):
            if time >= 28:
                at = begin + i
                assert (old["inputs"] != new["inputs"]).any() == (at <= time < at + 6)
                assert (old["targets"] != new["targets"]).any() == (at + 6 <= time < at + 9)
            else:
                assert (old["inputs"] != new["inputs"]).any()


def _all(config, split):
    windows = Windows(config, split)
    return (windows[i] for i in range(len(windows)))


def test_evaluation_has_every_window_once(write):
    config = write(table())
    batches = list(evaluation_batches(config, "train", batch_size=8))
    weights = np.concatenate([batch["weights"] for batch in batches])
    np.testing.assert_array_equal(weights, np.arange(24) < 20)
    for name in ("inputs", "targets"):
        rows = np.concatenate([batch[name] for batch in batches])[:20]
        np.testing.assert_array_equal(rows, [window[name] for window in _all(config, "train")])


def _numbers(config, batches):
    """The numbers of windows in batches."""
    known = {window["inputs"].tobytes(): i for i, window in enumerate(_all(config, "train"))}
    return [known[row.tobytes()] for batch in batches for row in batch["inputs"]]


def test_training_takes_every_window_once_an_epoch(write):
    config = write(table())

    def parts(seed):
        found = []
        for part in range(2):
            rows = iter(
                train_dataset(config, batch_size=5, seed=seed, process_index=part, process_count=2)
            )
            found.append(_numbers(config, [next(rows) for _ in range(4)]))
        return np.array(found).reshape(2, 2, 10)  # process, epoch, place

    orders = parts(0)
    for epoch in (0, 1):
        assert sorted(orders[:, epoch].ravel()) == list(range(20))
    assert (orders[:, 0] != orders[:, 1]).any()
    np.testing.assert_array_equal(orders, parts(0))
    assert (parts(1) != orders).any()


@pytest.mark.parametrize("steps", [0, 3, 7])
def test_training_data_resumes(write, steps):
    config = write(table())
    rows = iter(train_dataset(config, batch_size=4, seed=0))
    for _ in range(steps):
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    expected = _numbers(config, [next(rows) for _ in range(4)])
    for ahead in (0, 2):
        again = iter(train_dataset(config, batch_size=4, seed=0))
        for _ in range(ahead):
            next(again)
        again.set_state(state)
        assert _numbers(config, [next(again) for _ in range(4)]) == expected


def test_the_generated_series_is_the_same_everywhere():
    names, values = generated_series()
    assert len(names) == 4 and values.shape == (20_000, 4)
    assert generated_series()[1] is values
    # A day's and a week's cycle, two harmonics each, are what stands out of 119 weeks.
    weeks = values[: 119 * 168]
    spectrum = np.abs(np.fft.rfft(weeks - weeks.mean(axis=0), axis=0)).sum(axis=1)
    assert set(np.argsort(spectrum)[-4:].tolist()) == {119, 2 * 119, 7 * 119, 14 * 119}
    first = [-1.891628539, 1.374951231, 0.727547875, 0.924184568]
    np.testing.assert_allclose(values[0], first, rtol=1e-8)


WRONG_FILES = {
    "": "line 1 must name the columns; it is ''",
    "1.5,2\n1,2\n": "line 1 must name the columns; it is '1.5, 2'",
    "a,a\n1,2\n": "line 1: column 'a' must have a name of its own",
    "a,\n1,2\n": "line 1: column '' must have a name of its own",
    "a,b\n": "has no line of values",
    "date,b\n1,x\n": "has no column of numbers",
    "a,b\n1,2\n1,2,3\n": "line 3: 3 values, but there are 2 columns",
    "a,b\n1,2\n1\n": "line 3: 1 values, but there are 2 columns",
    "a,b\n1,2\n1,\n": "line 3, column 'b': a value is missing",
    "a,b\n1,\n1,\n": "line 2, column 'b': a value is missing",
    "a,b\nNA,2\n1,3\n": "line 2, column 'a': 'NA' is no number",
    "a,b\n\n1,2\nnan,3\n": "line 4, column 'a': 'nan' is no number",
    "a,b\n1,2\n1,inf\n": "line 3, column 'b': 'inf' is no number",
    "a\n1\n2\n": "the train part has 1 of its 2 times, fewer than input_length + horizon = 120",
    b"a\n\xff\n": "is not text in UTF-8",
}


@pytest.mark.parametrize("content", WRONG_FILES)
def test_wrong_files(tmp_path, content):
    path = tmp_path / "wrong.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(WRONG_FILES[content])) as caught:
        open_series(SeriesDataConfig(path=path))
    assert "wrong" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon: 0 must be at least 1"),
        ({"period": 7}, "period: 7 must be at most the input_length, 6"),
        ({"split": (0.7, 0.2, 0.2)}, "split: (0.7, 0.2, 0.2) must be three shares above 0"),
        ({"columns": ("a", "a")}, "columns: a, a; each may be named once"),
        ({"columns": ("a", "Date")}, "columns: 'Date' is not one of b, c, a"),
        ({"columns": ("a",), "targets": ("b",)}, "targets: 'b' is not one of a"),
        ({"horizon": 5}, "the validation part has 4 of its 40 times, fewer than horizon 5"),
    ],
)
def test_wrong_settings(write, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_series(write(table(), **settings))


def test_wrong_arguments(write):
    config = write(table())
    for arguments, message in (
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"seed": -1}, "seed: -1 must be at least 0"),
        ({"process_index": 2, "process_count": 2}, r"process_index: 2 must be in 0\.\.1"),
        ({"process_count": 21}, "20 windows are too few for 21 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            train_dataset(config, **({"batch_size": 1, "seed": 0} | arguments))
    with pytest.raises(ValueError, match="split: 'all' must be one of train, validation, test"):
        evaluation_batches(config, "all", batch_size=1)


def test_simple_forecasts():
    inputs = np.arange(12.0).reshape(1, 6, 2)
    last = forecasts.repeat_last(inputs, 3)
    np.testing.assert_array_equal(last[0], [[10, 11]] * 3)
    season = forecasts.repeat_last(inputs, 5, 3)
    np.testing.assert_array_equal(season[0, :, 0], [6, 8, 10, 6, 8])


def test_the_linear_forecast_solves_its_equations():
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(2, 30, 5, 2)), rng.normal(size=(30, 3, 1))
    inputs = inputs[0]
    weights = (np.arange(30) < 25).astype(np.float32)
    batches = [
        {"inputs": inputs[i], "targets": targets[i], "weights": weights[i]}
        for i in (slice(0, 10), slice(10, 30))
    ]
    forecast = forecasts.LinearForecast(batches, ridge=0.1)
    last = inputs[:, -1:, :1]
    x, y = (inputs[..., :1] - last)[:25, :, 0], (targets - last)[:25, :, 0]
    # With means taken off there is no b, and the penalty leaves b free.
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x, y - mean_y
    matrix = np.linalg.solve(x.T @ x + 0.1 * 25 * np.eye(5), x.T @ y)
    expected = ((inputs[..., :1] - last)[..., 0] - mean_x) @ matrix + mean_y + last[..., 0]
    np.testing.assert_allclose(forecast(inputs[..., :1])[..., 0], expected, rtol=1e-9)


def test_baselines_are_measured_on_every_window(write):
    config = write(table(), targets=("a",))
    found = forecasts.baselines(config)
    errors = [w["inputs"][-1, 0] - w["targets"][:, 0] for w in _all(config, "test")]
    np.testing.assert_allclose(found["last value"], np.square(errors).mean(), rtol=1e-6)
    errors = [w["inputs"][2:5, 0] - w["targets"][:, 0] for w in _all(config, "test")]
    np.testing.assert_allclose(found["last season of 4"], np.square(errors).mean(), rtol=1e-6)
    assert list(found) == ["last value", "last season of 4", "linear"]
    assert "last season of 4" not in forecasts.baselines(dataclasses.replace(config, period=None))


@pytest.mark.parametrize("preset", configs.presets("series"))
def test_presets(preset):
    config = configs.parse(["--preset", preset, "--data.targets", "a", "b"], "train", "series")
    values = json.loads(json.dumps(configs.to_json(config)))
    assert configs.from_json(SeriesConfig, values) == config
    assert config.data.targets == ("a", "b")


def test_wrong_sizes(write):
    config, task = configs.presets("series")["tiny"], tasks.TASKS["series"]
    data = write(table(), input_length=12, horizon=8, split=(0.6, 0.2, 0.2), targets=("a", "b"))
    for changes, message in (
        ({"horizon": 9}, "model.horizon: 9, but data.horizon is 8"),
        ({"label_length": 13}, "model.label_length: 13 must be at most data.input_length, 12"),
        ({}, "model.channels: 4, but table has 3 columns: give --model.channels 3"),
        ({"channels": 3}, "model.outputs: 3, but table has 2 targets: give --model.outputs 2"),
    ):
        model = dataclasses.replace(config.model, **changes)
        with pytest.raises(ExperimentError, match=re.escape(message)):
            task.check(dataclasses.replace(config, model=model, data=data))
    data = dataclasses.replace(data, path=data.path.with_name("none.csv"))
    with pytest.raises(ExperimentError, match=r"data: .*none\.csv"):
        task.check(dataclasses.replace(config, data=data))


class Linear(nnx.Module):
    """In the Autoformer's place, as it takes seconds to compile."""

    def __init__(self, config, rngs):
        self.map = nnx.Linear(24 * config.channels, config.horizon, rngs=rngs)

    def __call__(self, inputs):
        return self.map(inputs.reshape(len(inputs), -1))[..., None]


def test_a_run(call, write, monkeypatch):
    """It is trained, and its forecasts are measured beside the simple ones."""
    monkeypatch.setattr(tasks.TASKS["series"], "make_model", Linear, raising=True)
    waves = np.sin(2 * np.pi * np.arange(240)[:, None] / np.array([6, 8, 12]))
    data = write(waves)
    run = data.path.parent / "run"
    call(
        "experiments.train", "series", "--preset", "tiny", "--run", run, "--data.path", data.path,
        "--model.channels", 3, "--model.outputs", 1, "--data.targets", "a", "--steps", 30,
        "--data.horizon", 4, "--model.horizon", 4, "--log.no-tensorboard",
        "--log.evaluate-every", 0, "--checkpoint.every", 30, "--optimizer.learning-rate", 0.03,
    )  # fmt: skip
    rows = read_metrics(run)
    losses = [row["mse"] for row in rows if "mse" in row]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert {"validation_mse", "validation_mae"} <= {name for row in rows for name in row}
    out = call("experiments.evaluate", run)
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["mse"]) == [
        "auto_correlation", "last value", "last season of 24", "linear"
    ]  # fmt: skip
    assert found["values"] == (48 - 4 + 1) * 4
    assert all(f"{value:.4f}" in out for value in found["mse"].values())
    assert "MSE" in out


def test_sums_count_windows_by_their_weights(quick_compilation):
    batch = {"inputs": np.zeros((3, 24, 1)), "targets": np.float32([[[1], [-3]]] * 3)}
    config = configs.presets("series")["tiny"].model
    model = Linear(dataclasses.replace(config, channels=1, horizon=2), nnx.Rngs(0))
    task = tasks.TASKS["series"]
    weighted = {**batch, "weights": np.float32([1, 1, 0])}
    found = nnx.jit(lambda model: [task.sums(model, x) for x in (weighted, batch)])(model)
    for (sums, count), expected in zip(found, ((20, 8, 4), (30, 12, 6)), strict=True):
        assert (float(sums["loss"]), float(sums["mae"]), float(count)) == expected
