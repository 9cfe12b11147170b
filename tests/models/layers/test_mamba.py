"""The Mamba block: its equations, steps, documents, how it starts, dtypes and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import MambaBlock
from tests.numerics import assert_close
from tests.oracles import selective_scan as oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D = 2, 9, 6
IDS = np.array([[1] * 3 + [2] * 6, [1] * 1 + [2] * 7 + [1] * 1])


def make(**arguments):
    sizes = dict(features=D, state_size=3, rank=2)
    return MambaBlock(**(sizes | arguments), rngs=nnx.Rngs(0))


def inputs(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (B, T, D), dtype)


@nnx.jit
def run(block, x, **keywords):
    return block(x, **keywords)


def silu(x):
    return x / (1 + np.exp(-x))


def expected(block, x, ids):
    p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(block)))
    u, z = np.split(np.float64(x) @ p["in_proj"]["kernel"], 2, axis=-1)
    kernel, convolved = p["conv"]["kernel"], np.zeros_like(u) + p["conv"]["bias"]
    for b, t in np.ndindex(B, T):
        for back in range(4):
            if back <= t and len(set(ids[b, t - back : t + 1])) == 1:
                convolved[b, t] += kernel[3 - back] * u[b, t - back]
    u = silu(convolved)
    delta, b, c = np.split(u @ p["x_proj"]["kernel"], (2, 5), axis=-1)
    delta = delta @ p["dt_proj"]["kernel"]
    rates = -np.exp(p["A_log"])
    y, _ = oracle.selective_scan(u, delta, rates, b, c, p["D"], p["dt_bias"], segment_ids=ids, z=z)
    return y @ p["out_proj"]["kernel"]


def test_is_its_equations():
    block, x = make(), inputs()
    block.conv.bias[...] = jnp.linspace(-1, 1, 2 * D)
    assert_close(run(block, x), expected(block, x, np.zeros((B, T))))
    assert_close(run(block, x, segment_ids=IDS), expected(block, x, IDS))


def test_steps_are_the_parallel_form():
    @nnx.jit
    def both(block, x):
        state, outputs, position = block.init_state(B, T), [], 0
        for tokens in (3, 1, 1, 4):
            before = state
            y, state = block.step(x[:, position : position + tokens], state, position)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
            outputs.append(y)
            position += tokens
        return jnp.concatenate(outputs, 1), block(x)

    assert_close(*both(make(), inputs()))


def test_sees_nothing_later_and_all_before():
    block, x = make(), inputs()
    y, changed = run(block, x), run(block, x.at[:, 4].add(1.0))
    differs = np.any(y != changed, axis=(0, 2))
    assert not differs[:4].any() and differs[4:].all()


def test_how_it_starts():
    block = MambaBlock(64, rngs=nnx.Rngs(0))
    shapes = {
        "in_proj/kernel": (64, 256),
        "conv/kernel": (4, 128),
        "conv/bias": (128,),
        "x_proj/kernel": (128, 36),
        "dt_proj/kernel": (4, 128),
        "dt_bias": (128,),
        "A_log": (128, 16),
        "D": (128,),
        "out_proj/kernel": (128, 64),
    }
    state = nnx.to_flat_state(nnx.state(block))
    assert {"/".join(path): p.shape for path, p in state} == shapes
    assert all(isinstance(p, nnx.Param) and p.dtype == jnp.float32 for _, p in state)
    assert_close(np.exp(block.A_log[...]), np.tile(np.arange(1.0, 17), (128, 1)))
    assert np.all(np.asarray(block.D[...]) == 1)
    step = np.asarray(jax.nn.softplus(block.dt_bias[...]))
    assert 0.9e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.11
    assert 5e-3 < np.median(step) < 2e-2  # the middle of the logarithms is 1e-2
    kernel = np.abs(block.dt_proj.kernel[...])
    assert 0.48 < kernel.max() <= 0.5 and 0.22 < kernel.mean() < 0.28
    biased = MambaBlock(64, use_bias=True, conv_bias=False, rngs=nnx.Rngs(0))
    names = {"/".join(path) for path, _ in nnx.to_flat_state(nnx.state(biased))}
    assert names == set(shapes) - {"conv/bias"} | {"in_proj/bias", "out_proj/bias"}


def test_gradients_and_bfloat16():
    narrow, wide, x = make(dtype=jnp.bfloat16, features=16), make(features=16), inputs()
    x = jnp.concatenate([x, x, x], axis=-1)[..., :16]
    chex.assert_trees_all_equal(nnx.state(narrow), nnx.state(wide))
    y, reference = run(narrow, x), run(wide, x)
    assert y.dtype == jnp.bfloat16 and reference.dtype == jnp.float32
    assert_close(y, reference, jnp.bfloat16)
    state = narrow.init_state(B, T)
    assert state.convolution.dtype == jnp.bfloat16 and state.scan.hidden.dtype == jnp.float32
    assert state.scan.hidden.shape == (B, 3, 32)
    gradients = nnx.jit(nnx.grad(lambda block: (block(x, segment_ids=IDS) ** 2).sum()))(wide)
    for path, g in nnx.to_flat_state(gradients):
        assert np.isfinite(g[...]).all() and np.any(np.asarray(g[...]) != 0), path


def test_options_reach_the_scan():
    block, x = make(options={"chunk_size": 4}), inputs()
    assert_close(run(block, x), run(make(), x))
    assert_close(block(x, options={"implementation": "reference"}), run(block, x))
    with pytest.raises(ValueError, match="selective_scan: implementation"):
        block(x, options={"implementation": "fastest"})


def test_wrong_arguments_are_refused():
    for arguments, error, message in (
        (dict(state_size=0), ValueError, "state_size: 0 must be at least 1"),
        (dict(rank=1.5), TypeError, "rank: 1.5 must be an int"),
        (dict(options={"z": 1}), ValueError, "options: 'z' is not free: the layer sets it"),
        (dict(options={"scale": 1}), ValueError, "'scale' is not an option of selective_scan"),
    ):
        with pytest.raises(error, match=message):
            make(**arguments)
    block, x = make(), inputs()
    with pytest.raises(ValueError, match=r"x: shape \(2, 9, 5\) must be \[batch, tokens, 6\]"):
        block(x[..., :5])
    with pytest.raises(TypeError, match="state: must be a MambaState; got int"):
        block.step(x, 3, 0)
    with pytest.raises(ValueError, match="options: 'segment_ids' is not free"):
        block(x, options={"segment_ids": IDS})
