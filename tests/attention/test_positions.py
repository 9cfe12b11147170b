"""Positions: rotations, slopes and linearized encodings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.positions import alibi_slopes, init_lrpe_theta, lrpe, rope
from tests.numerics import assert_close


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def rotated(x, positions, base, count):
    """Returns x with channels i and i + count / 2 turned as complex numbers, token by token."""
    x = np.array(x, np.float64)
    for i in range(count // 2):
        j = i + count // 2
        turns = np.exp(1j * positions * base ** (-2 * i / count))
        pairs = (x[..., i] + 1j * x[..., j]) * turns[..., None]
        x[..., i], x[..., j] = pairs.real, pairs.imag
    return x


@pytest.mark.parametrize("fraction, count", ((1.0, 12), (0.5, 6), (1 / 3, 4)))
def test_rope_turns_pairs(fraction, count, x64):
    x, positions = random(2, 7, 3, 12), np.array([np.arange(7), 11 - np.arange(7)])
    actual = rope(x, positions, base=500.0, fraction=fraction)
    assert_close(actual, rotated(x, positions, 500.0, count), jnp.float64)
    np.testing.assert_array_equal(actual[..., count:], x[..., count:])
    default = rope(x, fraction=fraction)
    assert_close(default, rotated(x, np.arange(7)[None], 10_000.0, count), jnp.float64)
    shared = rope(x, positions[1], base=500.0, fraction=fraction)
    assert_close(shared[1], actual[1], jnp.float64)


def test_rope_scores_depend_on_distance_only(x64):
    query, key = random(1, 5, 2, 8, seed=1), random(1, 5, 2, 8, seed=2)

    def scores(shift):
        at = jnp.arange(5) * 3 + shift
        return jnp.einsum("btnh,bsnh->bnts", rope(query, at), rope(key, at))

    assert_close(scores(1000), scores(0), jnp.float64, factor=10)
    assert abs(scores(0)[0, 0, 0, 1] - jnp.sum(query[0, 0, 0] * key[0, 1, 0])) > 1e-3
    # Turning keeps norms: a token scores itself as it would without positions.
    same = jnp.einsum("btnh,btnh->btn", rope(query), rope(query))
    assert_close(same, jnp.sum(query**2, -1), jnp.float64)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16, jnp.float32))
def test_rope_angles_are_not_rounded_to_the_dtype(dtype):
    x, positions = random(1, 3, 1, 8, dtype=dtype), np.array([[257, 4095, 60_001]])
    out = rope(x, positions)
    assert out.dtype == dtype
    # At 60001 the products with the frequencies, all below 1, carry float32's relative 6e-8.
    limit = {"bfloat16": 1, "float16": 1.5, "float32": 1000}[jnp.dtype(dtype).name]
    assert_close(out, rotated(x, positions, 10_000.0, 8), dtype, factor=limit)


def test_alibi_slopes():
    np.testing.assert_array_equal(alibi_slopes(8), [2.0**-h for h in range(1, 9)])
    np.testing.assert_array_equal(alibi_slopes(1), np.float32([2**-8]))
    twelve = alibi_slopes(12)
    assert twelve.shape == (12,)
    assert twelve.dtype == np.float32
    np.testing.assert_array_equal(twelve[:8], alibi_slopes(8))
    np.testing.assert_array_equal(twelve[8:], alibi_slopes(16)[0:8:2])
    for heads in range(1, 40):
        slopes = alibi_slopes(heads)
        assert len(set(slopes.tolist())) == heads
        assert np.all((slopes > 0) & (slopes <= 1))


def test_lrpe_scores_are_decomposed_cosines(x64):
    query, key = random(2, 6, 2, 4, seed=1), random(2, 6, 2, 4, seed=2)
    theta = random(2, 4, seed=3)
    at = np.array([np.arange(6), np.arange(6) * 7 + 900])
    actual = jnp.einsum("btnh,bsnh->btsn", lrpe(query, theta, at), lrpe(key, theta, at))
    distance = at[:, :, None] - at[:, None]
    cosines = np.cos(distance[..., None, None] * np.asarray(theta))
    expected = np.einsum("btnh,bsnh,btsnh->btsn", query, key, cosines)
    assert_close(actual, expected, jnp.float64)
    assert lrpe(query, theta).shape == (2, 6, 2, 8)
    assert_close(lrpe(query, theta)[..., :4] ** 2 + lrpe(query, theta)[..., 4:] ** 2, query**2)


def test_lrpe_learns_its_angles(x64):
    x, theta, weight = random(1, 5, 2, 3), random(2, 3, seed=1), random(1, 5, 2, 6, seed=2)
    gradient = jax.grad(lambda theta: jnp.sum(lrpe(x, theta) * weight))(theta)
    t = np.arange(5)[None, :, None, None]
    turned = -np.sin(t * theta) * weight[..., :3] + np.cos(t * theta) * weight[..., 3:]
    assert_close(gradient, np.sum(t * x * turned, axis=(0, 1)), jnp.float64)


def test_lrpe_dtype_and_initial_angles():
    theta = init_lrpe_theta(3, 4)
    assert theta.dtype == jnp.float32
    expected = [[10_000 ** (-2 * (4 * n + i) / 12) for i in range(4)] for n in range(3)]
    assert_close(theta, np.asarray(expected))
    x = random(1, 300, 3, 4, dtype=jnp.bfloat16)
    out = lrpe(x, theta)
    assert out.dtype == jnp.bfloat16
    exact = np.float64(x) * np.cos(np.arange(300)[None, :, None, None] * np.float64(theta))
    assert_close(out[..., :4], exact, jnp.bfloat16)


X = jnp.zeros((2, 5, 3, 8))


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: rope(X[0]), ValueError, r"x: .*\(5, 3, 8\)"),
        (lambda: rope(X.astype(int)), TypeError, "x: .*int"),
        (lambda: rope(X, jnp.arange(4)), ValueError, r"positions: .*\(4,\).*\[5\] or \[2, 5\]"),
        (lambda: rope(X, jnp.zeros((1, 5), int)), ValueError, r"positions: .*\(1, 5\)"),
        (lambda: rope(X, jnp.zeros(5)), TypeError, "positions: .*float32"),
        (lambda: rope(X, fraction=0.3), ValueError, "fraction: 0.3 of the 8 channels"),
        (lambda: rope(X, fraction=0.375), ValueError, "fraction: 0.375"),
        (lambda: rope(X, fraction=1.25), ValueError, "fraction: 1.25"),
        (lambda: rope(X, fraction=0.0), ValueError, "fraction: 0.0"),
        (lambda: lrpe(X, jnp.zeros((3, 4))), ValueError, r"theta: .*\(3, 4\).*\(3, 8\)"),
        (lambda: lrpe(X.astype(int), jnp.zeros((3, 8))), TypeError, "x: .*int"),
        (lambda: lrpe(X, jnp.zeros((3, 8)), jnp.arange(6)), ValueError, r"positions: .*\(6,\)"),
        (lambda: alibi_slopes(0), ValueError, "num_heads: 0"),
        (lambda: init_lrpe_theta(0, 4), ValueError, "num_heads, head_dim: 0, 4"),
    ),
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
