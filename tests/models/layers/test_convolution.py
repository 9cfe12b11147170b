"""The causal depthwise convolution: its sum, documents, steps, dtypes and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import CausalDepthwiseConv
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D = 2, 11, 5
IDS = np.array([[0] * 3 + [1] * 8, [7] * 1 + [2] * 2 + [7] * 8])


def make(**arguments):
    conv = CausalDepthwiseConv(**(dict(features=D, width=4) | arguments), rngs=nnx.Rngs(0))
    if arguments.get("use_bias", True):
        conv.bias[...] = jnp.arange(conv.features) / 3
    return conv


def inputs(dtype=np.float32):
    return np.random.default_rng(1).standard_normal((B, T, D)).astype(dtype)


def expected(conv, x, ids=None):
    kernel, x = np.float64(conv.kernel[...]), np.float64(x)
    out = np.zeros_like(x) + (np.float64(conv.bias[...]) if conv.use_bias else 0)
    for b, t in np.ndindex(B, T):
        for back in range(min(t + 1, len(kernel))):
            if ids is not None and len(set(ids[b, t - back : t + 1])) > 1:
                break
            out[b, t] += kernel[len(kernel) - 1 - back] * x[b, t - back]
    return out


@nnx.jit
def run(conv, x, ids=None):
    return conv(x, ids)


@pytest.mark.parametrize("arguments", ({}, dict(use_bias=False), dict(width=1)), ids=str)
def test_is_its_sum(arguments):
    conv = make(**arguments)
    assert_close(run(conv, inputs()), expected(conv, inputs()))
    assert_close(run(conv, inputs(), IDS), expected(conv, inputs(), IDS))


def test_steps_are_the_parallel_form():
    for arguments in ({}, dict(width=1)):
        conv, x = make(**arguments), inputs()

        @nnx.jit
        def stepped(conv, x):
            state, parts = conv.init_state(B), []
            for start, end in ((0, 1), (1, 2), (2, 8), (8, T)):
                y, state = conv.step(x[:, start:end], state)
                parts.append(y)
            return jnp.concatenate(parts, axis=1), state

        y, state = stepped(conv, x)
        assert_close(y, run(conv, x))
        np.testing.assert_array_equal(state, x[:, T - conv.width + 1 :])


def test_what_stands_in_another_document_is_not_read():
    """Not even NaN, which times zero is NaN."""
    x = inputs()
    x[0, :3] = np.nan
    assert np.isfinite(run(make(), x, IDS)[0, 3:]).all()


def test_parameters_and_dtypes():
    conv = make(dtype=jnp.bfloat16, features=400)
    kernel = np.asarray(conv.kernel[...])
    assert kernel.shape == (4, 400) and conv.bias.shape == (400,)
    assert kernel.dtype == np.float32 and 0.45 < np.abs(kernel).max() <= 0.5
    assert set(nnx.to_pure_dict(nnx.state(make(use_bias=False)))) == {"kernel"}
    low, wide = make(dtype=jnp.bfloat16), make()
    y = run(low, inputs())
    assert y.dtype == jnp.bfloat16 and low.init_state(3).dtype == jnp.bfloat16
    assert low.init_state(3, jnp.float32).dtype == jnp.float32
    assert_close(y, run(wide, inputs()), jnp.bfloat16)


def test_gradients_reach_all_that_is_seen():
    conv = make()
    gradients = nnx.jit(nnx.grad(lambda conv, x: (conv(x, IDS) ** 2).sum()))(conv, inputs())
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.all(np.asarray(leaf) != 0)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="width: 0 must be at least 1"):
        make(width=0)
    conv, x = make(), inputs()
    with pytest.raises(ValueError, match=r"x: shape \(2, 11, 4\) must be \[batch, tokens, 5\]"):
        conv(x[..., :4])
    with pytest.raises(ValueError, match=r"state: shape \(2, 2, 5\) must be \(2, 3, 5\)"):
        conv.step(x, jnp.zeros((2, 2, 5)))
    with pytest.raises(ValueError, match=r"segment_ids: must have shape \(2, 11\)"):
        conv(x, IDS[:, 1:])
