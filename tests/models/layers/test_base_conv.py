"""BASED's gated short convolution: its equations, steps, documents, dtypes and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import BaseConv
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D = 2, 9, 6
IDS = np.array([[1] * 3 + [2] * 6, [1] * 1 + [2] * 7 + [1] * 1])


def make(**arguments):
    return BaseConv(**(dict(features=D) | arguments), rngs=nnx.Rngs(0))


def inputs(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (B, T, D), dtype)


@nnx.jit
def run(layer, x, **keywords):
    return layer(x, **keywords)


def expected(layer, x, ids):
    p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(layer)))
    a, b = np.split(np.float64(x) @ p["in_proj"]["kernel"] + p["in_proj"]["bias"], 2, axis=-1)
    taps, convolved = p["conv"]["kernel"], np.zeros_like(a)
    for row, t in np.ndindex(B, T):
        for back in range(3):
            if back <= t and len(set(ids[row, t - back : t + 1])) == 1:
                convolved[row, t] += taps[2 - back] * a[row, t - back]
    y = convolved / (1 + np.exp(-convolved)) * b
    return y @ p["out_proj"]["kernel"] + p["out_proj"]["bias"]


def test_is_its_equations():
    layer, x = make(), inputs()
    for part in (layer.in_proj, layer.out_proj):
        part.bias[...] = jnp.linspace(-1, 1, part.bias.size)
    assert layer.in_proj.kernel.shape == (D, 4 * D) and layer.out_proj.kernel.shape == (2 * D, D)
    assert_close(run(layer, x), expected(layer, x, np.zeros((B, T))))
    assert_close(run(layer, x, segment_ids=IDS), expected(layer, x, IDS))


def test_steps_are_the_parallel_form_and_the_future_is_not_seen():
    @nnx.jit
    def both(layer, x):
        state, outputs, position = layer.init_state(B, T), [], 0
        for tokens in (3, 1, 1, 4):
            y, state = layer.step(x[:, position : position + tokens], state, position)
            outputs.append(y)
            position += tokens
        return jnp.concatenate(outputs, 1), layer(x), layer(x.at[:, 4].add(1.0))

    stepped, whole, changed = both(make(), inputs())
    assert_close(stepped, whole)
    differs = np.any(whole != changed, axis=(0, 2))
    assert differs.tolist() == [4 <= t < 7 for t in range(T)]


def test_gradients_and_bfloat16():
    narrow, wide, x = make(dtype=jnp.bfloat16), make(), inputs()
    chex.assert_trees_all_equal(nnx.state(narrow), nnx.state(wide))
    y = run(narrow, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, run(wide, x), jnp.bfloat16)
    gradients = nnx.jit(nnx.grad(lambda layer: (layer(x, segment_ids=IDS) ** 2).sum()))(wide)
    for path, g in nnx.to_flat_state(gradients):
        assert np.isfinite(g[...]).all() and np.any(np.asarray(g[...]) != 0), path


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="width: 0 must be at least 1"):
        make(width=0)
    with pytest.raises(ValueError, match="expansion: 3 x 5 features must be even"):
        make(features=5, expansion=3)
    layer, x = make(), inputs()
    with pytest.raises(ValueError, match=r"x: shape \(2, 9, 5\) must be \[batch, tokens, 6\]"):
        layer(x[..., :5])
    with pytest.raises(ValueError, match="options: scale, but this layer has none"):
        layer(x, options={"scale": 1})
    with pytest.raises(ValueError, match="state: shape"):
        layer.step(x, layer.init_state(1, T), 0)
