"""`norm_attention`: its definition, with positions too, and what the norm is for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import norm_attention
from tests.numerics import assert_close
from tests.oracles import norm_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, N, K, H, V = 2, 13, 4, 2, 8, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, keys=T, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, T, N, H), (batch, keys, K, H), (batch, keys, K, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


RNG = np.random.default_rng(1)
FREQUENCIES, REFLECTION = RNG.uniform(0, 1, H // 2), RNG.standard_normal(H)
REFLECTION /= np.linalg.norm(REFLECTION)
PLACED = dict(frequencies=FREQUENCIES, reflection=REFLECTION)
IDS = np.sort(RNG.integers(0, 3, (B, T)), axis=1)
CASES = {
    "full": {},
    "causal": dict(is_causal=True),
    "elu": dict(is_causal=True, feature_map="elu", normalize=False),
    "documents": dict(is_causal=True, segment_ids=IDS, **PLACED),
    "full, documents": dict(segment_ids=IDS, feature_map="elu", **PLACED),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    arrays, options = _arrays(jnp.float64), CASES[case]
    out = jax.jit(functools.partial(norm_attention, **options, chunk_size=4))(*arrays)
    assert_close(out, oracle.norm_attention(*arrays, **options), jnp.float64)


def test_more_keys_than_queries(x64):
    arrays = _arrays(jnp.float64, keys=T + 4)
    assert_close(norm_attention(*arrays), oracle.norm_attention(*arrays), jnp.float64)


@pytest.mark.parametrize("case", ("causal", "full, documents"))
def test_gradients(case):
    options = {n: jnp.asarray(x) if n in PLACED else x for n, x in CASES[case].items()}

    def loss(implementation, *arrays):
        out = norm_attention(*arrays, **options, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    assert_close(run("xla", *_arrays()), run("reference", *_arrays()), factor=4)


def test_learned_frequencies(x64):
    """Their gradient is that of differences."""
    arrays, direction = _arrays(jnp.float64), jnp.asarray(RNG.standard_normal(H // 2))

    def loss(step):
        frequencies = FREQUENCIES + step * direction
        return jnp.sum(jnp.sin(norm_attention(*arrays, is_causal=True, frequencies=frequencies)))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=1e-6)


def test_a_factor_of_the_values_changes_nothing():
    query, key, value = _arrays()
    assert_close(norm_attention(query, key, 100 * value), norm_attention(query, key, value))


def test_only_distances_count():
    """With positions, a causal sequence after another as if it stood at the beginning."""
    arrays, options = _arrays(), dict(is_causal=True, **PLACED)
    twice = [jnp.concatenate([x, x], axis=1) for x in arrays]
    ids = np.repeat([[0, 1]], T, axis=1).repeat(B, axis=0)
    out = norm_attention(*twice, **options, segment_ids=ids)
    assert_close(out[:, T:], norm_attention(*arrays, **options), factor=4)


def test_gradients_near_weights_of_zero():
    """The paper's point: a sum of weights near 0 makes the gradient of its quotient explode."""

    def gradient(normalised, size):
        query, key = (jnp.full((1, 2, 1, 1), x) for x in (1.0, 1.0))
        key = key.at[0, 0].set(-1 + size)  # weights -1 + size and 1
        value = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)

        def loss(key):
            if normalised:
                return norm_attention(query, key, value, feature_map="elu").sum()
            weights = key[0, :, 0, 0]
            return jnp.sum(weights * value[0, :, 0, 0]) / jnp.sum(weights)

        return np.abs(jax.grad(loss)(key)).max()

    assert gradient(False, 1e-3) > 1e5
    assert gradient(True, 1e-3) < 10


def test_no_keys_are_zeros():
    query, key, value = _arrays()
    out, gradient = jax.value_and_grad(lambda v: norm_attention(query, key, 0 * v).sum())(value)
    assert out == 0
    chex.assert_tree_all_finite(gradient)


def test_steps_with_positions():
    arrays = _arrays()
    whole = norm_attention(*arrays, is_causal=True, **PLACED)
    state = attention.init_norm_attention_state(B, 99, N, K, H, V)
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, T)):
        out, state = attention.norm_attention_step(state, *(x[:, part] for x in arrays), **PLACED)
        parts.append(out)
    assert_close(jnp.concatenate(parts, axis=1), whole, factor=2)
    assert state.length == T


def test_sharded():
    """Heads send one number for each token, for the norm; rows of a batch send nothing."""
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    run = functools.partial(norm_attention, is_causal=True)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    assert_close(jax.jit(run)(*placed), run(*arrays))
    assert set(collectives(run, *placed)) == {"all-reduce"}
    assert not collectives(run, *(place(devices, x, "data") for x in arrays))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(feature_map="relu"), ValueError, "feature_map: .*elu_plus_one, elu; got 'relu'"),
        (dict(frequencies=np.ones(3)), ValueError, r"frequencies: shape \(3,\) must be \(4,\)"),
        (PLACED | dict(reflection=np.ones(3)), ValueError, r"direction: shape \(3,\)"),
        (dict(return_state=True), ValueError, "is_causal: must be True"),
        (dict(is_causal=True, initial_state=3), TypeError, "initial_state: .*NormAttentionState"),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        norm_attention(*_arrays(), **options)
    with pytest.raises(TypeError, match="state: must be a NormAttentionState; got int"):
        attention.norm_attention_step(3, *_arrays())
