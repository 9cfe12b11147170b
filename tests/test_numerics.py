"""The comparison that all numerical tests rely on must itself be able to fail."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import LIMITS, assert_close, error_ratio


def test_error_ratio_is_relative():
    reference = np.array([3.0, 4.0])
    assert error_ratio(reference, reference) == 0
    assert error_ratio(1.01 * reference, reference) == pytest.approx(0.01)
    assert error_ratio(1e6 * 1.01 * reference, 1e6 * reference) == pytest.approx(0.01)


def test_error_ratio_of_a_zero_reference_is_absolute():
    assert error_ratio(np.full(4, 0.5), np.zeros(4)) == pytest.approx(0.5)
    assert error_ratio(np.zeros(4), np.zeros(4)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_error_ratio_rejects_what_is_not_finite(bad):
    assert error_ratio([1.0, bad], [1.0, 1.0]) == np.inf
    assert error_ratio([1.0, 1.0], [1.0, bad]) == np.inf


def test_error_ratio_accepts_equal_infinities_only():
    assert error_ratio([-np.inf, 1.0], [-np.inf, 1.0]) == 0
    assert error_ratio([-np.inf, 1.0], [np.inf, 1.0]) == np.inf
    assert error_ratio([np.nan, 1.0], [np.nan, 1.0]) == np.inf


def test_error_ratio_rejects_other_shapes():
    with pytest.raises(AssertionError, match="shapes differ"):
        error_ratio(np.ones((2, 3)), np.ones(3))


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_assert_close_holds_the_limit_of_the_dtype(dtype):
    reference = np.random.default_rng(0).normal(size=100)
    assert_close(reference * (1 + 0.9 * LIMITS[dtype]), reference, dtype=dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(reference * (1 + 1.1 * LIMITS[dtype]), reference, dtype=dtype)
    assert_close(reference * (1 + 1.1 * LIMITS[dtype]), reference, dtype=dtype, factor=2)


def test_assert_close_names_the_leaf_that_differs():
    good, bad = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.zeros(2)}
    with pytest.raises(AssertionError, match=r"\['b'\]"):
        assert_close(bad, good)
    with pytest.raises(AssertionError, match="structures differ"):
        assert_close({"a": jnp.ones(2)}, good)
