"""`aaren_attention`: its definition, and that it is attention of one query to all beginnings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import aaren_attention, init_aaren_attention_state
from tests.numerics import assert_close
from tests.oracles import aaren_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, N, K, H, V = 2, 19, 4, 2, 8, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, batch=B, rows=1):
    rng = np.random.default_rng(0)
    shapes = (rows, 1, N, H), (batch, T, K, H), (batch, T, K, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


IDS = np.sort(np.random.default_rng(1).integers(0, 3, (B, T)), axis=1)


@pytest.mark.parametrize("rows", (1, B))
@pytest.mark.parametrize("ids", (None, IDS), ids=("one document", "documents"))
def test_against_the_oracle(ids, rows, x64):
    arrays = _arrays(jnp.float64, rows=rows)
    out = jax.jit(functools.partial(aaren_attention, segment_ids=ids, chunk_size=4))(*arrays)
    assert_close(out, oracle.aaren_attention(*arrays, segment_ids=ids), jnp.float64)


def test_gradients():
    def loss(implementation, *arrays):
        out = aaren_attention(*arrays, implementation=implementation, segment_ids=IDS)
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    assert_close(run("xla", *_arrays()), run("reference", *_arrays()), factor=2)


def test_the_last_token_is_ordinary_attention():
    query, key, value = _arrays()
    whole = attention.softmax_attention(jnp.broadcast_to(query, (B, 1, N, H)), key, value)
    assert_close(aaren_attention(query, key, value)[:, -1:], whole)
    every = jnp.broadcast_to(query, (B, T, N, H))
    causal = attention.softmax_attention(every, key, value, is_causal=True)
    assert_close(aaren_attention(query, key, value), causal)


@pytest.mark.parametrize("size", (1e4, -1e4))
def test_scores_of_any_size(size):
    query, key, value = _arrays()
    out = aaren_attention(size * query, key, value)
    assert_close(out, aaren_attention(size * query, key, value, implementation="reference"))
    assert np.isfinite(out).all()


def test_steps_in_parts():
    arrays = _arrays()
    whole = aaren_attention(*arrays)
    state, parts = init_aaren_attention_state(B, 99, N, K, H, V), []
    for part in (slice(0, 1), slice(1, 9), slice(9, T)):
        query, *tokens = arrays
        out, state = attention.aaren_attention_step(state, query, *(x[:, part] for x in tokens))
        parts.append(out)
    assert_close(jnp.concatenate(parts, axis=1), whole)


def test_sharded():
    query, key, value = _arrays(batch=4)
    devices = mesh(AxisType.Auto)
    placed = [place(devices, query, None, None, "tensor")]
    placed += [place(devices, x, "data", None, "tensor") for x in (key, value)]
    assert_close(jax.jit(aaren_attention)(*placed), aaren_attention(query, key, value))
    assert not collectives(aaren_attention, *placed)


def test_wrong_input():
    query, key, value = _arrays()
    every = jnp.broadcast_to(query, (B, T, N, H))
    with pytest.raises(
        ValueError, match=r"query: shape \(2, 19, 4, 8\) must be \[2 or 1, 1, N, 8\]"
    ):
        aaren_attention(every, key, value)
    with pytest.raises(ValueError, match=r"query: .* a multiple of the 2 heads of key"):
        aaren_attention(query[:, :, :3], key, value)
    with pytest.raises(ValueError, match="key: dtype float16 must be query's"):
        aaren_attention(query, jnp.float16(key), value)
    with pytest.raises(ValueError, match="key: must be a float array of 4 dimensions"):
        aaren_attention(query, key[0], value)
    with pytest.raises(ValueError, match="value: shape"):
        aaren_attention(query, key, value[:, 1:])
    with pytest.raises(TypeError, match="state: must be a SoftmaxState; got int"):
        attention.aaren_attention_step(3, query, key, value)
