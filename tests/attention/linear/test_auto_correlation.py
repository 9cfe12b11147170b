"""`auto_correlation`: its definition, periods and shifts; and moving averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import auto_correlation, series_decomposition
from tests.numerics import assert_close
from tests.oracles import auto_correlation as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H = 2, 19, 4, 2, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, keys=None, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), *[(batch, keys or tokens, K, H)] * 2
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


CASES = {
    "rows": (dict(factor=2), T),
    "batch, keys filled up": (dict(lags="batch", factor=1.5, fit=True), 13),
    "channels, keys cut": (dict(lags="channel", fit=True), 23),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    """And gradients by finite differences, which change no choice."""
    options, keys = CASES[case]
    arrays = _arrays(jnp.float64, keys=keys)
    defined = functools.partial(
        oracle.auto_correlation, **{n: x for n, x in options.items() if n != "fit"}
    )
    weights = np.random.default_rng(2).normal(size=(B, T, N, H))

    @jax.jit
    def run(arrays):
        def loss(implementation, arrays):
            out = auto_correlation(*arrays, **options, implementation=implementation)
            return jnp.vdot(weights, out), out

        return [
            jax.grad(functools.partial(loss, name), has_aux=True)(arrays)
            for name in ("xla", "reference")
        ]

    found, reference = run(arrays)
    assert_close(found, reference, jnp.float64)
    assert_close(found[1], defined(*arrays), jnp.float64)
    for i, gradient in enumerate(found[0]):
        direction = np.random.default_rng(i).normal(size=gradient.shape)
        moved = []
        for step in (1e-6, -1e-6):
            inputs = [x + step * direction if j == i else x for j, x in enumerate(arrays)]
            moved.append(np.vdot(weights, defined(*inputs)))
        expected = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(np.vdot(gradient, direction), expected, rtol=1e-6)


def test_periods_and_shifts(x64):
    """A series of period p is most like itself p later, and a shift of it shifts the output."""
    rng = np.random.default_rng(3)
    periodic = np.tile(rng.normal(size=(1, 5, N, H)), (1, 4, 1, 1))
    time = np.array(np.broadcast_to(np.eye(20)[None, :, None], (1, 20, N, 20)))
    run = jax.jit(auto_correlation)
    weights = np.asarray(run(periodic, periodic, time))
    assert_close(weights.sum(axis=-1), np.ones((1, 20, N)), jnp.float64)
    lags = (np.argwhere(weights[0, 0, 0] > 1e-9)[:, 0]) % 5
    assert len(lags) == 2 and not lags.any()  # int(ln 20) of them

    arrays = [rng.normal(size=(1, 20, N, H)) for _ in range(2)] + [time]
    shifted = run(*(np.roll(x, 3, axis=1) for x in arrays))
    assert_close(shifted, np.roll(run(*arrays), 3, axis=1), jnp.float64)

    # The largest correlation of a series with itself is at lag 0, where only one is taken.
    alone = jax.jit(functools.partial(auto_correlation, factor=0.1))(arrays[0], arrays[0], time)
    np.testing.assert_array_equal(alone, time)


def test_one_token_and_low_precision():
    query, key, value = _arrays(tokens=1)
    out = jax.jit(auto_correlation)(query, key, value)
    assert_close(out, np.repeat(value, N // K, axis=2))
    low = [x.astype(jnp.bfloat16) for x in _arrays()]
    out = jax.jit(auto_correlation)(*low)
    assert out.dtype == jnp.bfloat16
    assert_close(out, oracle.auto_correlation(*low), jnp.bfloat16)


def test_memory_does_not_grow_with_the_lags():
    """Shifted values are made one lag at a time, in the backward too."""

    def temporary(factor):
        def loss(*arrays):
            return jnp.sum(jnp.sin(auto_correlation(*arrays, factor=factor)))

        x = jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.float32)
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(10) < 1.1 * temporary(1)


def test_series_decomposition(x64):
    x = np.random.default_rng(4).normal(size=(B, T, 3, 2))
    for window in (1, 4, 25):
        found = series_decomposition(x, window)
        assert_close(found, oracle.series_decomposition(x, window), jnp.float64)
        assert_close(found[0] + found[1], x, jnp.float64)
    low, trend = series_decomposition(x.astype(jnp.bfloat16))
    assert low.dtype == trend.dtype == jnp.bfloat16

    def loss(x):
        return jnp.sum(series_decomposition(x, 5)[1] ** 2)

    direction = np.random.default_rng(5).normal(size=x.shape)
    moved = [
        np.sum(oracle.series_decomposition(y, 5)[1] ** 2)
        for y in (x + 1e-6 * direction, x - 1e-6 * direction)
    ]
    gradient = jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(
        np.vdot(gradient, direction), (moved[0] - moved[1]) / 2e-6, rtol=1e-6
    )


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    run = jax.jit(auto_correlation).lower(*placed).compile()
    assert_close(run(*placed), oracle.auto_correlation(*arrays))
    # The mean over heads.
    assert set(COLLECTIVE.findall(run.as_text())) == {"all-reduce"}


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    (
        (dict(lags="head"), T, "lags: must be 'row', 'batch' or 'channel'; got 'head'"),
        (dict(factor=0), T, "factor: must be a positive number; got 0"),
        ({}, 13, "key: shape .* must have the 19 tokens"),
    ),
)
def test_wrong_input(options, keys, message):
    with pytest.raises(ValueError, match=message):
        auto_correlation(*_arrays(keys=keys), **options)


def test_wrong_widths_and_series():
    query, key, value = _arrays()
    with pytest.raises(ValueError, match="value: must have the 6 channels of query for lags 'chan"):
        auto_correlation(query, key, value[..., :4], lags="channel")
    with pytest.raises(ValueError, match="window: must be a positive integer; got 0"):
        series_decomposition(query, 0)
    with pytest.raises(ValueError, match=r"x: must be \[B, T, ...\]; got shape \(3,\)"):
        series_decomposition(np.ones(3))
    with pytest.raises(TypeError, match="x: must be floating point; got int32"):
        series_decomposition(np.ones((3, 4), np.int32))
