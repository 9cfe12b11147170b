"""Other attention in a trained model: what is kept, what is lost, and the command."""

import functools
import json

import jax
import numpy as np
import pytest

from attention import hip_attention, softmax_attention
from experiments.training_free import _sums, kept

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, N, H = 2, 12, 4, 6


def inputs(key_heads=2):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, key_heads, H), (B, T, key_heads, H)]
    return [tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)]


def measured(function, **options):
    return jax.jit(functools.partial(_sums, functools.partial(function, **options)))


def by_hand(qkv, window):
    """Returns errors of a window, and of the best choice of as many keys, token by token."""
    query, key, value = (np.float64(x) for x in qkv)
    errors = np.zeros(3)
    for b, n, t in np.ndindex(B, N, T):
        keys, values = key[b, : t + 1, n // 2], value[b, : t + 1, n // 2]
        weights = np.exp(keys @ query[b, t, n] / np.sqrt(H))
        exact = weights @ values / weights.sum()
        near = weights * (np.arange(t + 1) > t - window)
        best = weights * (weights >= np.sort(weights)[-min(window, t + 1)])
        for i, some in enumerate((near, best)):
            errors[i] += np.sum((some @ values / some.sum() - exact) ** 2)
        errors[2] += np.sum(exact**2)
    return np.sqrt(errors[:2] / errors[2])


def test_a_window_by_hand():
    options = {"is_causal": True, "local_window_size": 3}
    found = kept(measured(softmax_attention, **options), inputs())
    error, best = by_hand(inputs()[0], window=4)
    assert found.density == pytest.approx((1 + 2 + 3 + 4 * 9) / (T * (T + 1) / 2))
    assert found.error == pytest.approx(error, rel=1e-4)
    assert found.best == pytest.approx(best, rel=1e-4) and best < error


def test_all_keys_are_no_error():
    found = kept(measured(hip_attention, mask_k=T), inputs())
    assert found.density == 1 and found.error < 1e-6 and found.best < 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


def test_the_command_changes_one_option(trained, tmp_path, call, refused, small_text):
    options = ("--preset", "tiny", "--steps", 2, "--model.num-layers", 1)
    options += ("--model.mechanism", "softmax_attention", "--log.no-tensorboard", *small_text)
    call("experiments.train", "text", *options, "--run", trained)
    command = ("experiments.training_free", trained, "--tokens", 64, "--rows", 2)
    window = ("--mechanism", "hip_attention", "--options", "mask_k", 8, "block_q", 8)
    window += ("block_k", 1, "group", 2, "window", 8, "sinks", 2)
    shown = call(*command, *window, "--output", tmp_path / "found.json")
    exact, hip = json.loads((tmp_path / "found.json").read_text())
    assert exact["model"] == {"density": 1.0, "error": 0.0, "best": pytest.approx(0, abs=1e-6)}
    assert hip["mechanism"] == "hip_attention" and hip["options"]["mask_k"] == 8
    assert hip["bits_per_byte"] != exact["bits_per_byte"] > 0
    for inputs in ("model", "random"):
        assert 0.2 < hip[inputs]["density"] < 0.9
    assert 0 < hip["random"]["best"] < hip["random"]["error"]
    assert "hip_attention" in shown and "bits per byte" in shown
    for arguments, message in (
        (("--mechanism", "hip_atention"), "did you mean hip_attention"),
        (("--mechanism", "agent_attention"), "does not support is_causal=True"),
        (("--options", "mask_k", 8), "they are of `mechanism`, and none is given"),
        (("--rows", 10_000), "rows: 10000, but"),
    ):
        code, said = refused(*command, *arguments)
        assert code in (1, 2) and message in said, said
