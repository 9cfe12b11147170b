"""`selective_scan`: its definition, its limits, its gate, steps, and the routes of SS2D."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import cross_merge, cross_scan, init_selective_scan_state, selective_scan
from pallas_kernels.linear import linear_attention
from tests.numerics import assert_close
from tests.oracles import selective_scan as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, D, N = 2, 19, 6, 3

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = np.array([[0] * 8 + [1] * 11, [3] * 2 + [4] * 1 + [3] * 16])


def _arrays(dtype=np.float32, batch=B, groups=None, tokens=T):
    """Returns x, delta, A, B, C, and D, z and the bias of delta."""
    rng = np.random.default_rng(0)
    vector = (batch, tokens, N) if groups is None else (batch, tokens, groups, N)
    channel = (batch, tokens, D)
    shapes = channel, channel, (D, N), vector, vector, (D,), channel, (D,)
    x, delta, A, *rest = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return x, delta, -np.exp(A), *rest


def _call(x, delta, A, B, C, D, z, delta_bias, **options):
    return selective_scan(x, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, **options)


@pytest.mark.parametrize(
    ("groups", "options"),
    ((None, {}), (2, dict(segment_ids=IDS)), (None, dict(delta_softplus=False))),
    ids=("plain", "groups and documents", "no softplus"),
)
def test_against_the_oracle(groups, options, x64):
    arrays = _arrays(np.float64, groups=groups)
    out, state = jax.jit(functools.partial(_call, **options, return_state=True))(*arrays)
    *inputs, z, bias = arrays
    options = {name.removeprefix("delta_"): x for name, x in options.items()}
    expected, last = oracle.selective_scan(*inputs, bias=bias, z=z, **options)
    assert_close((out, state.hidden), (expected, last), jnp.float64)


def test_gradients():
    def loss(implementation, *arrays):
        out = _call(*arrays, segment_ids=IDS, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out))

    @jax.jit
    def both(*arrays):
        every = tuple(range(1, 9))
        return [jax.grad(loss, every)(name, *arrays) for name in ("xla", "reference")]

    xla, reference = both(*_arrays())
    assert_close(xla, reference, factor=4)


def test_limits():
    """No step: y = D x. No decay and vectors of ones: N times the sum of s x. One rate: a gate."""
    x, delta, A, b, c, skip, _, _ = _arrays()
    run = jax.jit(selective_scan, static_argnames="delta_softplus")
    still = run(x, delta * 0, A, b, c, D=skip, delta_softplus=False)
    assert_close(still, skip * x)
    one, step = np.ones_like(b), np.log1p(np.exp(delta))
    assert_close(run(x, delta, A * 0, one, one), N * np.cumsum(step * x, axis=1))
    gated, gate = np.zeros((B, D)), 1 / (1 + np.exp(-delta))
    out = run(x, delta, A[:, :1] * 0 - 1, one[..., :1], one[..., :1])
    for t in range(T):
        # Euler's rule: softplus(delta) where the exact one has the gate itself.
        gated = (1 - gate[:, t]) * gated + step[:, t] * x[:, t]
        assert_close(out[:, t], gated)


def test_one_rate_for_all_states_is_linear_attention():
    x, delta, A, b, c, *_ = _arrays()
    out = jax.jit(selective_scan)(x, delta, np.repeat(A[:, :1], N, 1), b, c)
    step = np.log1p(np.exp(delta))
    query, key = (np.broadcast_to(v[:, :, None], (B, T, D, N)) for v in (c, b))
    value, decay = (step * x)[..., None], step * A[:, 0]
    linear = jax.jit(lambda *arrays: linear_attention(*arrays[:3], log_decay=arrays[3]))
    assert_close(out, linear(query, key, value, decay)[..., 0])


def test_causal_steps_and_low_precision():
    """Steps give one pass, and do not depend on what comes after them."""
    x, delta, A, b, c, skip, z, bias = _arrays()
    run = jax.jit(_call)
    whole = run(x, delta, A, b, c, skip, z, bias)

    @jax.jit
    def stepped(*arrays):
        state, parts = init_selective_scan_state(B, T, D, N), []
        for start, end in ((0, 7), (7, 8), (8, T)):
            x, delta, b, c, z = (a[:, start:end] for a in arrays)
            out, state = attention.selective_scan_step(
                state, x, delta, A, b, c, D=skip, z=z, delta_bias=bias
            )
            parts.append(out)
        return jnp.concatenate(parts, axis=1)

    before = stepped(x, delta, b, c, z)
    assert_close(before, whole)
    for token in np.random.default_rng(1).integers(1, T, 3):
        changed = (np.where(np.arange(T)[:, None] >= token, -a, a) for a in (x, delta, b, c, z))
        after = stepped(*changed)
        np.testing.assert_array_equal(after[:, :token], before[:, :token])
        assert np.all(np.any(after[:, token] != before[:, token], axis=-1))
    low = [np.asarray(a, jnp.bfloat16) for a in (x, delta, A, b, c, skip, z, bias)]
    out = run(*low)
    assert out.dtype == jnp.bfloat16
    assert_close(out, run(*(a.astype(np.float32) for a in low)), jnp.bfloat16)


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    channel, vector = ("data", None, "tensor"), ("data",)
    specs = channel, channel, ("tensor",), vector, vector, ("tensor",), channel, ("tensor",)
    placed = [place(devices, a, *spec) for a, spec in zip(arrays, specs, strict=True)]
    program = jax.jit(_call).lower(*placed).compile()
    x, delta, A, b, c, skip, z, bias = arrays
    expected, _ = oracle.selective_scan(x, delta, A, b, c, skip, bias=bias, z=z)
    assert_close(program(*placed), expected)
    assert not COLLECTIVE.findall(program.as_text())


def test_routes_and_back():
    there = jax.jit(lambda x, shape: cross_scan(x, shape), static_argnums=1)
    back = jax.jit(lambda x, shape: cross_merge(x, shape), static_argnums=1)
    for shape in ((3, 5), (1, 4)):
        tokens = shape[0] * shape[1]
        x = np.random.default_rng(0).standard_normal((2, tokens, 2, 3)).astype(np.float32)
        routes = there(x, shape)
        assert routes.shape == (2, 4, tokens, 2, 3)
        np.testing.assert_array_equal(back(routes, shape), np.repeat(x[:, None], 4, 1))
    image = np.arange(15).reshape(3, 5)
    rows, columns = image.ravel(), image.T.ravel()
    routes = there(rows[None], (3, 5))[0]
    np.testing.assert_array_equal(routes, [rows, columns, rows[::-1], columns[::-1]])
    for wrong in ((3, 4), (15,), 15):
        with pytest.raises(ValueError, match="shape: must be a height and a width of 15 tokens"):
            cross_scan(rows[None], wrong)
    with pytest.raises(ValueError, match=r"x: must be \[B, 4, T, ...\], four routes; got \(1, 15"):
        cross_merge(rows[None], (3, 5))


def test_wrong_input():
    x, delta, A, b, c, _, z, _ = _arrays()
    for changes, error, message in (
        (dict(z=z[:, 1:]), ValueError, r"z: must have the shape of x, \(2, 19, 6\)"),
        (dict(z=z.astype(int)), TypeError, "z: must be floating point; got int"),
        (dict(delta=delta[:, 1:]), ValueError, r"delta: must have shape \[2, 19, 6\]"),
        (dict(A=A[1:]), ValueError, r"A: must have shape \[6, N\]"),
        (dict(initial_state=3), TypeError, "initial_state: must be a ScanState; got int"),
        (dict(chunk_size=0), ValueError, "chunk_size: must be a positive integer"),
    ):
        with pytest.raises(error, match=message):
            selective_scan(**dict(x=x, delta=delta, A=A, B=b, C=c) | changes)
    with pytest.raises(TypeError, match="state: must be a ScanState; got NoneType"):
        attention.selective_scan_step(None, x, delta, A, b, c)
