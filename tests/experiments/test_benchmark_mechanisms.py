"""The benchmark of growth: exponents, and its table."""

import json

import pytest

from experiments.benchmark.mechanisms import exponent
from experiments.errors import ExperimentError


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_exponents_are_of_the_last_lengths(power):
    costs = {n: 1e-9 * n**power for n in (1024, 2048, 4096, 8192, 16384)}
    costs[1024] = 1.0  # what does not count
    assert exponent(costs) == pytest.approx(power)
    assert exponent({1024: 1.0}) is None
    assert exponent({1024: 1.0, 16384: 16.0**power}) == pytest.approx(power)


def test_table(call, tmp_path):
    options = ("--tokens", 64, 128, 256, "--repeats", 1, "--heads", 1, "--features", 16)
    path = tmp_path / "found.json"
    shown = call(
        "experiments.benchmark.__main__",
        "mechanisms",
        *options,
        "--only",
        "aaren",
        "--output",
        path,
    )
    lines = shown.strip().splitlines()
    assert len(lines) == 3 and "| aaren_attention | O(T) |" in lines[2]
    for column in ("64 ms", "256 ms", "exponent", "up to", "agrees", "MiB at 256", "of exact"):
        assert f" {column} |" in lines[0]
    assert "| 1,024 |" in lines[2] and " 512 ms" not in lines[0]
    (record,) = json.loads(path.read_text())["records"]
    lengths = {"64", "128", "256", "512", "1024"}
    assert set(record["seconds"]) == set(record["bytes"]) == lengths
    assert record["memory exponent"] < 1.2


def test_lengths_that_make_no_sense_are_refused(call):
    for tokens in ((64,), (128, 64)):
        with pytest.raises(ExperimentError, match="give two lengths or more, ascending"):
            call("experiments.benchmark.__main__", "mechanisms", "--tokens", *tokens)
    with pytest.raises(ExperimentError, match="both must be at least 1"):
        call("experiments.benchmark.__main__", "mechanisms", "--tokens", 1, 2, "--repeats", 0)
