"""RAT's layer: its equations, documents, how it starts, its state and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import RATLayer
from tests.numerics import assert_close
from tests.oracles.rat_attention import rat_attention as oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D, N = 2, 9, 12, 3
IDS = np.array([[1] * 3 + [2] * 6, [1] * 1 + [2] * 7 + [1] * 1])


def make(**arguments):
    sizes = dict(features=D, num_heads=N, chunk_size=3)
    return RATLayer(**(sizes | arguments), rngs=nnx.Rngs(0))


def inputs():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def expected(layer, x, ids):
    p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(layer)))
    x = np.float64(x)

    def heads(y):
        y = y.reshape(B, T, -1, D // N)
        return np.repeat(y, N // y.shape[2], axis=2)

    query, key, value = (heads(x @ p[name]["kernel"]) for name in ("query", "key", "value"))
    gates = 1 / (1 + np.exp(-(x @ p["decay"]["kernel"] + p["decay_bias"])))
    out = oracle(query, key, value, np.log(heads(gates)), chunk_size=3, segment_ids=ids)
    gate = 1 / (1 + np.exp(-(x @ p["gate"]["kernel"])))
    return (gate * out.reshape(B, T, D)) @ p["out"]["kernel"]


def test_is_its_equations_and_its_steps():
    @nnx.jit
    def run(layer, x):
        first, state = layer.step(x[:, :4], layer.init_state(B, T), 0)
        rest, _ = layer.step(x[:, 4:], state, 4)
        return layer(x), layer(x, segment_ids=IDS), jnp.concatenate([first, rest], 1)

    layer, x = make(), inputs()
    whole, packed, stepped = run(layer, x)
    assert_close(whole, expected(layer, x, np.zeros((B, T), int)))
    assert_close(packed, expected(layer, x, IDS))
    assert_close(stepped, whole)


def test_how_it_starts():
    layer = make(features=64, num_heads=4, chunk_size=16)
    assert layer.query.kernel.shape == layer.key.kernel.shape == (64, 2 * 16)
    kept = 1 - jax.nn.sigmoid(layer.decay_bias[...])
    assert kept.min() > 1 / 16 and kept.max() < 1 / 2 and kept.std() > 0.05
    assert make(num_heads=3).num_groups == 1
    state = layer.init_state(1, 100)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * 64 * (100 // 16 + 3)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_groups: 2 must divide the 3 heads"):
        make(num_groups=2)
    with pytest.raises(ValueError, match="chunk_size: 0 must be at least 1"):
        make(chunk_size=0)
    with pytest.raises(ValueError, match="options: 'log_decay' is not free"):
        make(options={"log_decay": 1})
    layer, x = make(), inputs()
    with pytest.raises(ValueError, match=r"x: shape \(2, 9, 5\) must be \[batch, tokens, 12\]"):
        layer(x[..., :5])
    with pytest.raises(TypeError, match="state: must be a RATState"):
        layer.step(x, 3, 0)
