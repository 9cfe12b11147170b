"""RMSNorm and SRMSNorm against NumPy, their dtype policy and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import RMSNorm, SRMSNorm
from tests.models import oracles
from tests.numerics import assert_close


def test_rms_norm_is_its_equation():
    norm = RMSNorm(48, rngs=nnx.Rngs(0))
    norm.scale[...] = jax.random.normal(jax.random.key(1), (48,))
    x = 3 * jax.random.normal(jax.random.key(2), (2, 5, 48)) + 1
    expected = oracles.rms_norm(np.asarray(x, np.float64), np.asarray(norm.scale, np.float64))
    assert_close(norm(x), expected)


def test_srms_norm_is_its_equation_and_has_no_parameters():
    norm = SRMSNorm(48, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(norm))
    x = 3 * jax.random.normal(jax.random.key(2), (2, 5, 48)) + 1
    assert_close(norm(x), oracles.srms_norm(np.asarray(x, np.float64)))


def test_gain_starts_at_one():
    norm = RMSNorm(8, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm.scale[...], np.ones(8))
    assert norm.scale.dtype == jnp.float32
    assert RMSNorm(8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).scale.dtype == jnp.bfloat16


@pytest.mark.parametrize("cls", [RMSNorm, SRMSNorm])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_input_is_normalised_in_float32(cls, dtype):
    norm = cls(512, rngs=nnx.Rngs(0))
    if cls is RMSNorm:
        norm.scale[...] = jax.random.normal(jax.random.key(1), (512,))
    # Squares of these overflow float16, and 512 equal terms do not sum up in bfloat16.
    x = 300 * jax.random.normal(jax.random.key(2), (3, 512)).astype(dtype)
    y = norm(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(dtype))


def test_epsilon_is_inside_of_the_root():
    x = jnp.array([[1e-3, -1e-3]])
    assert_close(SRMSNorm(2, rngs=nnx.Rngs(0))(x), np.array([[1, -1]]) / np.sqrt(2))
    assert_close(
        RMSNorm(2, epsilon=3e-6, rngs=nnx.Rngs(0))(x), np.array([[1, -1]]) / np.sqrt(1 + 3)
    )


def test_zeros_stay_zeros_with_finite_gradients():
    norm = SRMSNorm(4, rngs=nnx.Rngs(0))
    value, gradient = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros((1, 4)))
    assert value == 0
    assert_close(gradient, np.full((1, 4), 1e3))
