"""`based_linear_attention`: its definition, its limits, and the features it never writes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import based_linear_attention, init_based_linear_attention_state
from tests.numerics import assert_close
from tests.oracles import based_linear_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, N, K, F, V = 2, 21, 4, 2, 6, 5

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(tokens=T, dtype=jnp.float32, heads=N, kv_heads=K, batch=B):
    rng = np.random.default_rng(0)
    shapes = (
        (batch, tokens, heads, F),
        (batch, tokens, kv_heads, F),
        (batch, tokens, kv_heads, V),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


IDS = np.sort(np.random.default_rng(1).integers(0, 4, (B, T)), axis=1)


@pytest.mark.parametrize("ids", (None, IDS), ids=("one document", "documents"))
def test_against_the_oracle(ids, x64):
    arrays = _arrays(dtype=jnp.float64)
    expected = oracle.based_linear_attention(*arrays, segment_ids=ids)
    run = functools.partial(based_linear_attention, segment_ids=ids, chunk_size=8)
    out = jax.jit(run)(*arrays)
    assert_close(out, expected, jnp.float64)


def test_gradients():
    cotangent = _arrays()[2][:, :, :1]

    def loss(implementation, *arrays):
        out = based_linear_attention(*arrays, segment_ids=IDS, implementation=implementation)
        return jnp.sum(jnp.sin(out) * cotangent), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    assert_close(run("xla", *_arrays()), run("reference", *_arrays()))


def test_small_scores_are_softmax():
    """The error is the next term of the exponential, of third order."""
    query, key, value = _arrays(kv_heads=N)
    errors = []
    for size in (0.4, 0.2):
        exact = attention.softmax_attention(
            size * query, size * key, value, scale=F**-0.5, is_causal=True
        )
        errors.append(np.abs(based_linear_attention(size * query, size * key, value) - exact).max())
    # Scores are of the square of the size, so half of it is 2^6 times less.
    assert 0 < errors[1] < errors[0] / 40


def test_weights_are_positive_and_sum_to_one():
    query, key, value = _arrays()
    ones = jnp.ones_like(value)
    assert_close(based_linear_attention(5 * query, key, ones), jnp.ones((B, T, N, V)))
    # Where the polynomial is smallest, at s = -1, a weight is 1/2.
    key = jnp.full((1, 2, 1, F), -1.0).at[:, 0].set(0)
    query = jnp.full((1, 2, 1, F), F**-0.5)
    out = based_linear_attention(query, key, jnp.ones((1, 2, 1, 1)).at[:, 0].set(0))
    np.testing.assert_allclose(out[0, 1, 0, 0], 0.5 / 1.5, rtol=1e-5)


def test_features_are_never_written():
    """The gradient of 4096 tokens takes less memory than the features of one array would."""
    tokens, features = 4096, 16
    x = jax.ShapeDtypeStruct((1, tokens, 1, features), jnp.float32)

    def loss(*arrays):
        return jnp.sum(jnp.sin(based_linear_attention(*arrays)))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * 153 * 4


def test_one_token_is_its_value():
    query, key, value = _arrays(tokens=1, kv_heads=N)
    assert_close(based_linear_attention(query, key, value), value)


def test_state():
    """Has one row for each feature, and joins any two parts."""
    arrays = _arrays()
    whole, state = based_linear_attention(*arrays, return_state=True)
    empty = init_based_linear_attention_state(B, 100, N, K, F, V)
    shapes = [jax.tree.map(jnp.shape, x) for x in (state, empty)]
    assert shapes[0] == shapes[1]
    assert state.memory.shape == (B, N, 1 + F + F * (F + 1) // 2, V)
    parts, state = [], empty
    for part in (slice(0, 9), slice(9, 10), slice(10, T)):
        out, state = attention.based_linear_attention_step(state, *(x[:, part] for x in arrays))
        parts.append(out)
    assert_close(jnp.concatenate(parts, axis=1), whole)


def test_sharded():
    arrays = _arrays(batch=4)
    devices = mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    run = jax.jit(based_linear_attention)
    assert_close(run(*placed), based_linear_attention(*arrays))
    assert not collectives(run, *placed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(epsilon=-1), ValueError, "epsilon: .*-1"),
        (dict(initial_state=jnp.ones(3)), TypeError, "initial_state"),
        (dict(segment_ids=np.ones((B, T + 1), int)), ValueError, "segment_ids"),
    ),
)
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=message):
        based_linear_attention(*_arrays(), **change)
    query, key, value = _arrays()
    with pytest.raises(ValueError, match="key"):
        based_linear_attention(query, key[..., :3], value)
    with pytest.raises(TypeError, match="state: must be a LinearState; got int"):
        attention.based_linear_attention_step(3, query, key, value)
