"""`diag_attention`: its definition, what a block sees, and steps that keep one block only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import diag_attention
from tests.numerics import assert_close
from tests.oracles import diag_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, N, K, H, V = 2, 19, 4, 2, 8, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, batch=B, kv_heads=K):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, tokens, kv_heads, H), (batch, tokens, kv_heads, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


IDS = np.sort(np.random.default_rng(1).integers(0, 3, (B, T)), axis=1)
each_weight = pytest.mark.parametrize("weights", ("softmax", "relu"))


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("ids", (None, IDS), ids=("one document", "documents"))
@each_weight
def test_against_the_oracle(weights, ids, is_causal, x64):
    options = dict(block_size=8, is_causal=is_causal, weights=weights, segment_ids=ids)
    arrays = _arrays(jnp.float64)
    out = jax.jit(functools.partial(diag_attention, **options))(*arrays)
    assert_close(out, oracle.diag_attention(*arrays, **options), jnp.float64)


@each_weight
def test_gradients(weights):
    def loss(implementation, *arrays):
        out = diag_attention(
            *arrays, block_size=8, weights=weights, is_causal=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    assert_close(run("xla", *_arrays()), run("reference", *_arrays()), factor=4)


def test_one_block_is_full_attention():
    arrays = _arrays()
    for size in (T, 100):
        for is_causal in (False, True):
            out = diag_attention(*arrays, block_size=size, is_causal=is_causal)
            assert_close(out, attention.softmax_attention(*arrays, is_causal=is_causal))


def test_a_block_of_one_is_its_value():
    query, key, value = _arrays(kv_heads=N)
    assert_close(diag_attention(query, key, value, block_size=1), value)


@each_weight
def test_blocks_do_not_see_each_other(weights):
    """Whole blocks may be exchanged, and a change of one changes no other."""
    arrays = _arrays(tokens=24)
    run = functools.partial(diag_attention, block_size=8, weights=weights)
    order = np.r_[16:24, 0:8, 8:16]
    assert_close(run(*(x[:, order] for x in arrays)), run(*arrays)[:, order])
    changed = [x.at[:, 10].add(1) for x in arrays]
    differs = np.any(run(*changed) != run(*arrays), axis=(0, 2, 3))
    assert differs[8:16].all() and not differs[:8].any() and not differs[16:].any()


def test_scores_below_zero_give_zeros():
    query, key, value = _arrays()
    query, key = jnp.abs(query), -jnp.abs(key)
    out, gradient = jax.value_and_grad(
        lambda v: diag_attention(query, key, v, weights="relu").sum()
    )(value)
    assert out == 0 and (gradient == 0).all()


@each_weight
def test_steps_across_blocks(weights):
    """Prompts that end anywhere in a block, and tokens that begin new ones."""
    arrays, options = _arrays(), dict(block_size=4, weights=weights)
    whole = jax.jit(functools.partial(diag_attention, is_causal=True, **options))(*arrays)
    step = jax.jit(functools.partial(attention.diag_attention_step, **options))
    for ends in ((1, 2, 3, 4, 5, T), (3, 12, T), (T,)):
        state = attention.init_diag_attention_state(B, 99, N, K, H, V, block_size=4)
        parts, start = [], 0
        for end in ends:
            here = (x[:, start:end] for x in arrays)
            out, state = step(state, *here)
            parts.append(out)
            start = end
        assert_close(jnp.concatenate(parts, axis=1), whole, factor=2)
        assert state.length == T and state.key.shape == (B, 4, K, H)


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    run = functools.partial(diag_attention, block_size=8)
    assert_close(jax.jit(run)(*placed), run(*arrays))
    assert not collectives(run, *placed)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(block_size=0), "block_size: must be a positive integer; got 0"),
        (dict(block_size=2.0), "block_size: .*2.0"),
        (dict(weights="sigmoid"), "weights: must be 'softmax' or 'relu'; got 'sigmoid'"),
    ),
)
def test_wrong_input(options, message):
    with pytest.raises(ValueError, match=message):
        diag_attention(*_arrays(), **options)
    state = attention.init_diag_attention_state(B, 99, N, K, H, V, block_size=4)
    with pytest.raises(ValueError, match=message):
        attention.diag_attention_step(state, *_arrays(), **options)


def test_wrong_state():
    arrays = _arrays()
    with pytest.raises(TypeError, match="state: must be a DiagAttentionState; got int"):
        attention.diag_attention_step(3, *arrays)
    state = attention.init_diag_attention_state(B, 99, N, K, H, V, block_size=4)
    with pytest.raises(ValueError, match="block_size: 8, but the state has room for 4 tokens"):
        attention.diag_attention_step(state, *arrays, block_size=8)
    state = attention.init_diag_attention_state(1, 99, N, K, H, V)
    with pytest.raises(ValueError, match=r"key: shape .* does not fit the state's"):
        attention.diag_attention_step(state, *arrays)
