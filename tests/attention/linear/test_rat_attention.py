"""`rat_attention`: its definition, its two limits, and steps with one key for a chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import init_rat_attention_state, rat_attention
from attention.positions import rope
from tests.numerics import assert_close
from tests.oracles import rat_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, N, K, H = 2, 22, 4, 2, 8

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, batch=B, kv_heads=K):
    rng = np.random.default_rng(0)
    shapes = (batch, T, N, H), (batch, T, kv_heads, H), (batch, T, kv_heads, H)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return [*arrays, jnp.asarray(-np.exp(rng.standard_normal((batch, T, N, H))), dtype)]


def _call(query, key, value, log_decay, **options):
    return rat_attention(query, key, value, log_decay=log_decay, **options)


# Documents end within chunks and at their ends, and one is shorter than a chunk.
IDS = np.array([[0] * 8 + [1] * 14, [3] * 2 + [4] * 11 + [3] * 9])
CASES = {
    "plain": dict(chunk_size=4),
    "no positions": dict(chunk_size=4, rope_base=None, scale=1.0),
    "documents": dict(chunk_size=4, segment_ids=IDS),
    "chunks of one": dict(chunk_size=1, segment_ids=IDS),
    "one chunk": dict(chunk_size=50),
    "whole chunks": dict(chunk_size=11),
}


@pytest.mark.parametrize("gated", (True, False))
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, gated, x64):
    *arrays, log_decay = _arrays(jnp.float64)
    log_decay = log_decay if gated else None
    out = jax.jit(functools.partial(_call, **CASES[case]))(*arrays, log_decay)
    assert_close(out, oracle.rat_attention(*arrays, log_decay, **CASES[case]), jnp.float64)


@pytest.mark.parametrize("case", ("plain", "documents"))
def test_gradients(case):
    def loss(implementation, *arrays):
        out = _call(*arrays, **CASES[case], implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, (1, 2, 3, 4), has_aux=True), static_argnums=0)
    assert_close(run("xla", *_arrays()), run("reference", *_arrays()), factor=4)


def test_chunks_of_one_are_attention():
    query, key, value, _ = _arrays()
    out = rat_attention(query, key, value, chunk_size=1)
    turned = (rope(x) for x in (query, key))
    assert_close(out, attention.softmax_attention(*turned, value, is_causal=True))


def test_one_chunk_is_a_recurrence():
    query, key, value, log_decay = _arrays(kv_heads=N)
    out = _call(query, key, value, log_decay, chunk_size=T)
    hidden = np.zeros((B, N, H))
    for t in range(T):
        gate = np.exp(log_decay[:, t])
        hidden = gate * hidden + (1 - gate) * value[:, t]
        assert_close(out[:, t], hidden)


def test_causal_at_every_token():
    arrays = _arrays()
    run = jax.jit(functools.partial(_call, chunk_size=4))
    before, arrays = run(*arrays), [np.array(x) for x in arrays]
    for token in range(T):
        after = run(*(x - (np.arange(T) == token)[:, None, None].astype(x.dtype) for x in arrays))
        differs = np.any(before != after, axis=(0, 2, 3))
        assert differs[token] and not differs[:token].any()


@pytest.mark.parametrize("gated", (True, False))
def test_steps_across_chunks(gated):
    *arrays, log_decay = _arrays()
    log_decay = log_decay if gated else None
    whole = jax.jit(functools.partial(_call, chunk_size=4))(*arrays, log_decay)
    step = jax.jit(functools.partial(attention.rat_attention_step, chunk_size=4))
    for ends in ((1, 2, 3, 4, 5, T), (6, 13, T)):
        state = init_rat_attention_state(B, 24, N, K, H, H, chunk_size=4, gated=gated)
        parts, start = [], 0
        for end in ends:
            here = [x[:, start:end] for x in arrays]
            gates = None if log_decay is None else log_decay[:, start:end]
            out, state = step(state, *here, log_decay=gates)
            parts.append(out)
            start = end
        assert_close(jnp.concatenate(parts, axis=1), whole, factor=2)
        assert state.length == T and state.chunk_keys.shape[1] == 6


def test_tokens_that_do_not_fit_show():
    """Two chunks of 4 and the tokens of one more fit, in one step or token by token."""
    arrays = _arrays()[:3]
    step = jax.jit(functools.partial(attention.rat_attention_step, chunk_size=4))
    begin = init_rat_attention_state(B, 8, N, K, H, H, chunk_size=4)
    out, _ = step(begin, *(x[:, :13] for x in arrays))
    assert np.isnan(out[:, -1]).all()
    out, state = step(begin, *(x[:, :12] for x in arrays))
    assert np.isfinite(out).all()
    for token, fits in ((11, True), (12, False), (13, False)):
        if token == 11:
            _, state = step(begin, *(x[:, :11] for x in arrays))
        out, state = step(state, *(x[:, token : token + 1] for x in arrays))
        assert np.isfinite(out).all() == fits


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    run = functools.partial(_call, chunk_size=4)
    assert_close(jax.jit(run)(*placed), run(*arrays))
    assert not collectives(run, *placed)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(chunk_size=0), ValueError, "chunk_size: must be a positive integer; got 0"),
        (dict(log_decay=jnp.ones((B, T, K, H))), ValueError, "log_decay: must have query's shape"),
        (dict(log_decay=jnp.ones((B, T, N, H), int)), TypeError, "log_decay: .*int32"),
    ),
)
def test_wrong_input(options, error, message):
    query, key, value, log_decay = _arrays()
    with pytest.raises(error, match=message):
        rat_attention(query, key, value, **options)
    with pytest.raises(ValueError, match="value: must have 8 channels"):
        rat_attention(query, key, value[..., :5], log_decay=log_decay)
    with pytest.raises(TypeError, match="state: must be a RATState; got int"):
        attention.rat_attention_step(3, query, key, value)
    with pytest.raises(ValueError, match="chunk_size"):
        init_rat_attention_state(B, 8, N, K, H, H, chunk_size=0)
    state = init_rat_attention_state(B, 8, N, K, H, H)
    with pytest.raises(
        ValueError, match=r"state: was made for .*\[2, 2, 8\]; these are \[2, 4, 8\]"
    ):
        attention.rat_attention_step(state, query, key, value, log_decay=log_decay)
