"""Tests of what the GPU kernels compute for themselves."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import gpu


def test_reciprocal():
    """It is as exact as it says, where the inverse is no denormal, and ends with 0."""
    x = np.exp2(np.linspace(0, 124.9, 200_001)).astype(np.float32)
    found = np.asarray(gpu.reciprocal(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(found * x, 1, rtol=0, atol=2.2e-5)
    ends = gpu.reciprocal(jnp.asarray([2.0**127, np.inf], jnp.float32))
    np.testing.assert_array_equal(ends, 0)


def test_reciprocal_of_what_is_no_number():
    assert np.isnan(gpu.reciprocal(jnp.float32(np.nan)))
