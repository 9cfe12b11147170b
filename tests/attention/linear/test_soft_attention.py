"""`soft_attention`: its definition, Newton's inverse and its gradient, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import soft_attention
from tests.numerics import assert_close, error_ratio
from tests.oracles import soft_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, S, N, K, H, V = 2, 15, 11, 4, 2, 8, 6
ENLARGED = 10
"""By how much inverses of these matrices enlarge errors of rounding."""

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, keys=S, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, keys, K, H), (batch, keys, K, V)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


LANDMARKS = np.random.default_rng(1).normal(size=(B, 5, N, H))
CASES = {
    "image": dict(shape=(5, 3), num_landmarks=(3, 2), scale=1.0),
    "landmarks": dict(landmarks=LANDMARKS),
    "solved": dict(num_landmarks=(4,), ridge=0.1, inverse="solve"),
    "normalised": dict(landmarks=LANDMARKS, normalise=True),
    "normalised, solved": dict(landmarks=LANDMARKS, normalise=True, inverse="solve"),
}


def _defined(arrays, options):
    options = {("inverse_by" if n == "inverse" else n): x for n, x in options.items()}
    return oracle.soft_attention(*arrays, **options)


@functools.cache
def _run(case):
    """Returns a function to the output, and the gradients of a sum with the weights given."""

    def loss(arrays, weights):
        out = soft_attention(*arrays, **CASES[case])
        return jnp.vdot(weights, out), out

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    """Newton's are close to the inverse here, so that all gradients are those of the results."""
    arrays = _arrays(jnp.float64)
    weights = np.random.default_rng(2).normal(size=(B, T, N, V))
    gradients, out = _run(case)(arrays, weights)
    assert_close(out, _defined(arrays, CASES[case]), jnp.float64, factor=ENLARGED)
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(i).normal(size=gradient.shape)
        moved = []
        for step in (1e-5, -1e-5):
            inputs = [x + step * direction if j == i else x for j, x in enumerate(arrays)]
            moved.append(np.vdot(weights, _defined(inputs, CASES[case])))
        expected = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(np.vdot(gradient, direction), expected, rtol=1e-5)
    if case == "landmarks":
        solved = _defined(arrays, CASES[case] | {"inverse": "solve"})
        assert_close(out, solved, jnp.float64, factor=ENLARGED)


def test_newton_falls_short_where_landmarks_are_alike(x64):
    query, key, value = _arrays(jnp.float64)
    landmarks = LANDMARKS.copy()
    landmarks[:, 1] = landmarks[:, 0] + 1e-3

    @jax.jit
    def run(*arrays):
        return [
            soft_attention(*arrays, landmarks=landmarks, ridge=1e-6, inverse=inverse)
            for inverse in ("newton", "solve")
        ]

    newton, solved = run(query, key, value)
    options = dict(landmarks=landmarks, ridge=1e-6)
    assert_close(newton, _defined((query, key, value), options), jnp.float64, factor=ENLARGED)
    expected = _defined((query, key, value), options | {"inverse": "solve"})
    assert error_ratio(solved, expected) < 1e-8
    assert error_ratio(newton, expected) > 0.01


def test_all_tokens_as_landmarks_give_the_whole_kernel(x64):
    """It is symmetric, with ones on the diagonal: the values are unit vectors."""
    query, _, _ = _arrays(jnp.float64)
    value = np.array(np.broadcast_to(np.eye(T)[None, :, None], (B, T, N, T)))
    run = functools.partial(soft_attention, num_landmarks=T, ridge=0.0, inverse="solve")
    kernel = np.moveaxis(jax.jit(run)(query, query, value), 2, 1)
    for b, n in np.ndindex(B, N):
        expected = oracle.gaussian(query[b, :, n], query[b, :, n], H**-0.5)
        assert_close(kernel[b, n], expected, jnp.float64, factor=ENLARGED)
    assert_close(kernel, np.swapaxes(kernel, 2, 3), jnp.float64, factor=ENLARGED)
    assert_close(
        np.diagonal(kernel, axis1=2, axis2=3), np.ones((B, N, T)), jnp.float64, factor=ENLARGED
    )


def test_rows_do_not_depend_on_their_neighbours():
    """Nor heads on each other; and one token, in bfloat16, is a landmark."""
    query, key, value = _arrays()
    query[1] *= 3
    run = jax.jit(functools.partial(soft_attention, num_landmarks=4))
    both = run(query, key, value)
    assert_close(
        both[:1],
        oracle.soft_attention(query[:1], key[:1], value[:1], num_landmarks=(4,)),
        factor=10,
    )
    one = np.ones((1, 1, 2, 8), jnp.bfloat16)
    out = jax.jit(soft_attention)(one, one, 2 * one)
    assert out.dtype == jnp.bfloat16
    assert_close(out, np.full(one.shape, 2 / 1.01), jnp.bfloat16)


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    options = dict(shape=(5, 3), num_landmarks=2)
    run = jax.jit(functools.partial(soft_attention, **options)).lower(*placed).compile()
    expected = oracle.soft_attention(*arrays, shape=(5, 3), num_landmarks=(2, 2))
    assert_close(run(*placed), expected, factor=ENLARGED)
    assert not COLLECTIVE.findall(run.as_text())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(shape=(3, 4)), ValueError, r"shape: \(3, 4\) has 12 tokens; query has 15"),
        (dict(num_landmarks=0), ValueError, "num_landmarks: must be a positive integer.*got 0"),
        (dict(landmarks=LANDMARKS[:, :, :2]), ValueError, r"landmarks: must be \[2, m, 4, 8\]"),
        (dict(landmarks=LANDMARKS, num_landmarks=3), ValueError, "landmarks: are given"),
        (dict(inverse="svd"), ValueError, "inverse: must be 'newton' or 'solve'; got 'svd'"),
        (
            dict(implementation="pallas_tpu"),
            NotImplementedError,
            "soft_attention: implementation 'pallas_tpu' does not serve this call",
        ),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        soft_attention(*_arrays(), **options)
