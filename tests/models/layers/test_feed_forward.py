"""The feed-forward kinds against NumPy, their dtype policy and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import FeedForward
from tests.models import oracles
from tests.numerics import assert_close

KINDS = {
    "swiglu": oracles.swiglu,
    "sglu": oracles.sglu,
    "gelu": lambda x, p: oracles.gelu_tanh(x @ p["up"]) @ p["down"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_its_equation(kind):
    layer = FeedForward(16, 40, kind=kind, rngs=nnx.Rngs(0))
    parameters = nnx.to_pure_dict(nnx.state(layer))
    shapes = {"gate": (16, 40), "up": (16, 40), "down": (40, 16)}
    if kind == "gelu":
        del shapes["gate"]
    assert {name: p["kernel"].shape for name, p in parameters.items()} == shapes
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    expected = KINDS[kind](np.asarray(x, np.float64), oracles.float64(parameters))
    assert_close(layer(x), expected)


def test_biases_start_at_zero_and_are_added():
    layer = FeedForward(8, 16, use_bias=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 3, 8))
    before = layer(x)
    without = FeedForward(8, 16, rngs=nnx.Rngs(0))
    nnx.update(without, {n: {"kernel": getattr(layer, n).kernel} for n in ("gate", "up", "down")})
    assert_close(before, without(x))
    layer.down.bias[...] = jnp.arange(8.0)
    assert_close(layer(x), before + jnp.arange(8.0))


@pytest.mark.parametrize("kind", KINDS)
def test_computes_in_bfloat16_with_float32_parameters(kind):
    x = jax.random.normal(jax.random.key(1), (4, 8, 32))
    narrow = FeedForward(32, 96, kind=kind, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    wide = FeedForward(32, 96, kind=kind, rngs=nnx.Rngs(0))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype(jnp.float32)}
    assert narrow(x).dtype == jnp.bfloat16
    assert wide(x).dtype == jnp.float32
    assert_close(narrow(x), wide(x), jnp.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    layer = FeedForward(8, 16, kind=kind, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    assert all((np.asarray(g) != 0).all() for g in jax.tree.leaves(gradients))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="kind: 'relu' must be one of 'swiglu', 'sglu', 'gelu'"):
        FeedForward(8, 16, kind="relu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="hidden_features: 0 must be at least 1"):
        FeedForward(8, 0, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"features: 8\.0 must be an int"):
        FeedForward(8.0, 16, rngs=nnx.Rngs(0))
