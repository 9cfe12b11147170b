"""Tasks of recall, MQAR and the needle: their sequences, and the commands that compare on them."""

import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import compare, tasks
from experiments.compare import CompareConfig, contestant
from experiments.config import presets
from experiments.data.made import ENDLESS, padded_batches, train_batches
from experiments.data.mqar import MqarDataConfig, MqarExamples
from experiments.data.needle import MARK, NeedleDataConfig, NeedleExamples
from experiments.errors import ExperimentError

TINY = presets("mqar")["tiny"]


@given(
    pairs=st.integers(1, 9), extra=st.integers(0, 30), seed=st.integers(0, 9), index=st.integers(0)
)
@settings(max_examples=60, deadline=None)
def test_a_query_is_answered_by_what_followed_its_key(pairs, extra, seed, index):
    length = 4 * pairs + 2 * extra
    config = MqarDataConfig(vocab_size=length + 20, length=length, pairs=pairs)
    examples = MqarExamples(config, "train", seed=seed, count=ENDLESS)
    example = examples[index % ENDLESS]
    tokens, targets, weights = (example[name] for name in ("tokens", "targets", "weights"))
    half = config.vocab_size // 2
    keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert 1 <= keys.min() and keys.max() < half <= values.min()
    places = np.flatnonzero(weights)
    assert len(places) == pairs and np.all(weights[places] == 1)
    assert np.all(places >= 2 * pairs) and np.all(places % 2 == 0)
    value_of = dict(zip(keys, values, strict=True))
    assert sorted(tokens[places]) == sorted(keys)
    assert [value_of[key] for key in tokens[places]] == targets[places].tolist()
    again = MqarExamples(config, "train", seed=seed, count=ENDLESS)[index % ENDLESS]
    np.testing.assert_array_equal(again["tokens"], tokens)


def test_queries_come_soon_and_hay_is_of_the_whole_vocabulary():
    config = MqarDataConfig(vocab_size=300, length=256, pairs=4)
    examples = [MqarExamples(config, "test", seed=0, count=300)[i] for i in range(300)]
    gaps = np.concatenate([np.flatnonzero(e["weights"]) - 8 for e in examples]) // 2
    # p(1) ~ 1 and p(j) ~ j^-0.99 of 124: the first place is taken in nearly every sequence's draw.
    assert np.median(gaps) < 20 and gaps.max() > 90
    even = [MqarExamples(dataclasses.replace(config, power=1.0), "test", seed=0, count=300)[i]
            for i in range(100)]  # fmt: skip
    assert 50 < np.median(np.concatenate([np.flatnonzero(e["weights"]) for e in even]) // 2) < 80
    hay = np.concatenate([e["tokens"][9::2] for e in examples])
    assert hay.min() == 0 and hay.max() == 299 and abs(hay.mean() - 149.5) < 3


def test_splits_seeds_and_processes_have_sequences_of_their_own():
    config = TINY.data

    def first(split, seed):
        return MqarExamples(config, split, seed=seed, count=4)[0]["tokens"].tolist()

    found = [first(split, seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    assert len({tuple(x) for x in found}) == 6
    examples = MqarExamples(config, "train", seed=0, count=ENDLESS)
    whole = next(iter(train_batches(examples, batch_size=4)))["tokens"]
    parts = [
        next(iter(train_batches(examples, batch_size=2, process_index=i, process_count=2)))
        for i in range(2)
    ]
    joined = np.stack([part["tokens"] for part in parts], 1).reshape(4, -1)
    np.testing.assert_array_equal(joined, whole)


def test_data_goes_on_where_it_was():
    examples = MqarExamples(TINY.data, "train", seed=0, count=ENDLESS)
    rows = iter(train_batches(examples, batch_size=3))
    assert isinstance(rows, grain.DatasetIterator)
    for _ in range(2):
        next(rows)
    state, after = rows.get_state(), next(rows)["tokens"]
    other = iter(train_batches(examples, batch_size=3))
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["tokens"], after)


def test_every_example_is_measured_once():
    examples = MqarExamples(TINY.data, "test", seed=0, count=7)
    batches = list(padded_batches(examples, 3))
    assert [len(batch["tokens"]) for batch in batches] == [3, 3, 3]
    assert sum(batch["weights"].sum() for batch in batches) == 7 * TINY.data.pairs
    np.testing.assert_array_equal(batches[2]["tokens"][0], examples[6]["tokens"])


def test_needles_lie_at_their_depth():
    config = NeedleDataConfig(vocab_size=20, length=30, values=3)
    for length, depth in itertools.product((8, 30, 61), (0.0, 0.5, 1.0)):
        examples = NeedleExamples(config, "test", seed=0, count=9, length=length, depth=depth)
        for example in (examples[i] for i in range(9)):
            tokens, where = example["tokens"], np.flatnonzero(example["weights"])
            marks = np.flatnonzero(tokens == MARK)
            assert len(tokens) == length and len(marks) == 2
            assert marks.tolist() == [round(depth * (length - 7)), length - 3]
            needle = tokens[marks[0] + 1 : marks[0] + 4]
            assert needle.min() >= 10
            np.testing.assert_array_equal(example["targets"][where], needle)
            np.testing.assert_array_equal(tokens[marks[1] + 1 :], needle[:-1])
            hay = np.delete(tokens, [*range(marks[0], marks[0] + 4), *range(length - 3, length)])
            assert hay.size == length - 7 and (not hay.size or 1 <= hay.min() <= hay.max() < 10)
    anywhere = NeedleExamples(config, "train", seed=0, count=99)
    depths = {int(np.flatnonzero(anywhere[i]["tokens"] == MARK)[0]) for i in range(99)}
    assert min(depths) == 0 and max(depths) == 23 and len(depths) > 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MqarDataConfig(length=63), "length: 63 must be even and at least 32"),
        (lambda: MqarDataConfig(length=30), "length: 30 must be even and at least 32"),
        (lambda: MqarDataConfig(vocab_size=64), "vocab_size: 64 must be greater than the length"),
        (lambda: MqarDataConfig(power=0.0), "power: 0.0 must be above 0"),
        (lambda: MqarDataConfig(pairs=0), "pairs: 0 must be at least 1"),
        (lambda: MqarExamples(TINY.data, "dev", seed=0, count=1), "split: 'dev' must be one of"),
        (lambda: MqarExamples(TINY.data, "test", seed=-1, count=1), "seed: -1 must be at least 0"),
        (lambda: NeedleDataConfig(length=7), "length: 7 must be at least 18"),
        (lambda: NeedleDataConfig(evaluate_depths=(2.0,)), "evaluate_depths: 2.0 must be from 0"),
    ],
)
def test_wrong_data_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_contestant_takes_the_place_of_attention():
    base = presets("mqar")["mqar"].model
    assert base.mixers == ("base_conv", "softmax_attention", "softmax_attention")
    model = contestant("rat_attention:chunk_size=4", base).model
    assert model.mixers == ("base_conv", "rat_attention", "rat_attention")
    assert model.layer_options(1)["chunk_size"] == 4
    assert contestant("mamba", base).model.mixers == ("base_conv", "mamba", "mamba")
    based = contestant("based:feature_dim=8:window=4", base).model
    assert based.mixers == ("base_conv", "based_linear_attention", "softmax_attention")
    assert based.layer_settings(1)["head_dim"] == 8 and based.layer_settings(1)["value_dim"] == 32
    assert based.layer_options(2) == {"local_window_size": 3}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("softmax", "'softmax' is not in the catalogue; did you mean softmax_attention"),
        ("agent_attention", "'agent_attention' has no causal form"),
        ("based:features=8", "unexpected keyword argument 'features'"),
        ("based:8", "'8' must be OPTION=VALUE"),
    ],
)
def test_an_unknown_contestant_is_refused(name, message):
    with pytest.raises(ExperimentError, match=message):
        contestant(name, presets("mqar")["mqar"].model)


def test_a_comparison_loses_nothing_to_one_that_fails(
    tmp_path, capsys, quick_compilation, monkeypatch
):
    config = CompareConfig(
        "mqar",
        "softmax_attention,rat_attention:chunk_size=0,base_conv:width=0",
        preset="tiny",
        run=tmp_path / "run",
        overrides={"steps": "2", "checkpoint.every": "100", "log.evaluate_every": "0"},
    )
    results = compare.compare(config)
    assert [bool(r.error) for r in results] == [False, True, True]
    assert "chunk_size" in results[1].error and "width" in results[2].error
    assert 0 <= results[0].values["16"] <= 1 and results[0].state_bytes["64"] > 0
    report = (tmp_path / "run/report.md").read_text()
    for word in ("2 steps of 8 x 16 tokens", "| `softmax_attention` |", "Failed:", "state.png"):
        assert word in report
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    # Called again, what is finished is not trained again.
    before = (tmp_path / "run/softmax_attention/metrics.jsonl").read_text()
    trained = []
    monkeypatch.setattr(compare, "train", lambda run: trained.append(run) or 1 / 0)
    again = compare.compare(config)
    assert again[0] == results[0] and len(trained) == 2
    assert (tmp_path / "run/softmax_attention/metrics.jsonl").read_text() == before
    assert "division by zero" in again[1].error
    # Another budget is another comparison.
    longer = dataclasses.replace(config, overrides=config.overrides | {"steps": "3"})
    assert compare.compare(longer)[0].error.startswith("ZeroDivisionError")
    with pytest.raises(ExperimentError, match="task: 'text2' must be one of mqar"):
        compare.compare(dataclasses.replace(config, task="text2"))
    with pytest.raises(ExperimentError, match="names one of them twice"):
        compare.compare(dataclasses.replace(config, mechanisms="mamba,mamba"))
    capsys.readouterr()


def test_needles_are_measured_by_length_and_depth(tmp_path, call):
    run = tmp_path / "run"
    options = ("--preset", "tiny", "--steps", 2, "--run", run, "--log.no-tensorboard")
    call("experiments.train", "needle", *options)
    shown = call("experiments.evaluate", run)
    found = json.loads((run / "evaluation.json").read_text())
    name = "base_conv, landmark_attention"
    cells = [f"{name}, {n} tokens, depth {d}" for n in (16, 32) for d in (0, 1)]
    assert list(found["accuracy"]) == [name, *cells] and found["values"] == 24
    assert "needle.png" in shown and (run / "needle.png").read_bytes().startswith(b"\x89PNG")
    config = presets("needle")["tiny"]
    assert tasks.of(config).what.startswith("a needle")
