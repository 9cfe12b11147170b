"""`softplus_attention`: its definition, the limits of its two forms, and its steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import masks, positions
from tests.numerics import assert_close
from tests.oracles import softplus_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, S, N, K, H, V = 2, 9, 13, 4, 2, 8, 5
POWERS = (None, 3.0)
each_power = pytest.mark.parametrize("power", POWERS)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(queries=T, keys=S, dtype=jnp.float32, batch=B):
    return (
        _normal(0, batch, queries, N, H, dtype=dtype),
        _normal(1, batch, keys, K, H, dtype=dtype),
        _normal(2, batch, keys, K, V, dtype=dtype),
    )


def _jitted(**options):
    return jax.jit(functools.partial(attention.softplus_attention, **options))


IDS = (
    np.array([[0] * 4 + [1] * 5, [2] * 9]),
    np.array([[-1] + [0] * 6 + [1] * 6, [2] * 11 + [-1] * 2]),
)
PAIRS = ((IDS[0][:, :, None] == IDS[1][:, None]) | (IDS[1][:, None] == -1))[:, None]
LENGTHS = np.array([5, 13])
VALID = (np.arange(S) < LENGTHS[:, None])[:, None, None]
OF_HEADS = np.random.default_rng(6).random((1, N, T, S)) < 0.6
# Each case: arguments, and the pairs that they allow.
CASES = {
    "plain": ({}, None),
    "causal": ({"is_causal": True}, np.tril(np.ones((T, S), bool))),
    "window": (
        {"local_window_size": (4, 0), "query_offset": np.array([3, 0])},
        masks.window(4, 0, np.array([3, 0])).to_dense(T, S),
    ),
    "lengths and documents": (
        {"segment_ids": IDS, "key_value_seq_lengths": LENGTHS},
        PAIRS & VALID,
    ),
    "documents of key heads": (
        {"segment_ids": tuple(np.repeat(ids[:, None], K, axis=1) for ids in IDS)},
        PAIRS,
    ),
    "mask of heads": ({"mask": OF_HEADS, "is_causal": True}, OF_HEADS & np.tri(T, S, dtype=bool)),
}


@each_power
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, power):
    options, allowed = CASES[case]
    expected = oracle.softplus_attention(*_arrays(), allowed=allowed, reweight_power=power)
    out = _jitted(reweight_power=power, **options)(*_arrays())
    # A relative error of a weight w grows by w / (w - 1), and with the power.
    assert_close(out, expected, factor=1 if power is None else 4)


def test_gradients():
    """Of both passes; those of a query that sees one key, and of vectors of length 0, are 0."""
    power, cotangent = 15.0, _normal(3, B, T, N, V)

    def loss(implementation, *arrays):
        out = attention.softplus_attention(
            *arrays, is_causal=True, reweight_power=power, implementation=implementation
        )
        return jnp.vdot(out, cotangent), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    query, key, value = _arrays()
    arrays = query.at[:, 4].set(0), key.at[:, 2].set(0), value
    gradients, out = run("xla", *arrays)
    assert_close((gradients, out), run("reference", *arrays), factor=1 + power)
    chex.assert_tree_all_finite((gradients, out))
    np.testing.assert_array_equal(out[:, 0], 0)
    np.testing.assert_array_equal(gradients[0][:, [0, 4]], 0)
    np.testing.assert_array_equal(gradients[1][:, 2], 0)
    assert (gradients[0][:, 1:4] != 0).any((2, 3)).all()


def test_weights_sum_to_one():
    """Reweighted too, but for rows with nothing above the mean: of one key, or of equal weights.

    Not reweighted, the output of a query that sees one key is its value.
    """
    query, key, value = _arrays()
    key = key.at[:, :3].set(key[:, :1])
    ones = jnp.ones_like(value)
    assert_close(_jitted(is_causal=True)(query, key, ones), jnp.ones((B, T, N, V)))
    one = _jitted()(query[:, :1], key[:, :1], value[:, :1])
    assert_close(one, jnp.repeat(value[:, :1], N // K, axis=2))
    sums = _jitted(is_causal=True, reweight_power=15)(query, key, ones)
    np.testing.assert_array_equal(sums[:, :3], 0)
    assert_close(sums[:, 3:], jnp.ones((B, T - 3, N, V)))


@each_power
def test_lengths_of_queries_and_keys_do_not_matter(power):
    query, key, value = _arrays()
    call = _jitted(reweight_power=power)
    factors = jnp.exp(3 * _normal(4, B, S, K, 1))
    scaled = call(1e4 * query, factors * key, value)
    assert_close(scaled, call(query, key, value), factor=4)


def test_a_large_power_selects_the_nearest_key():
    query, key, value = _arrays()
    out = _jitted(reweight_power=1e4)(query, key, value)
    unit = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    nearest = jnp.argmax(
        jnp.einsum("btnh,bsnh->btns", query, jnp.repeat(unit, N // K, axis=2)), axis=-1
    )
    value = jnp.repeat(value, N // K, axis=2)
    assert_close(out, jnp.take_along_axis(value, nearest[..., None], axis=1))


def test_rotation_before_and_after_the_normalisation_are_the_same():
    query, key, value = _arrays(T, T)
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)]
    rotated = jax.jit(
        lambda *x: attention.softplus_attention(*map(positions.rope, x), value, is_causal=True)
    )
    assert_close(rotated(query, key), rotated(*unit))


def test_what_lies_beyond_the_lengths_may_be_anything():
    query, key, value = _arrays()
    lengths = {"query_seq_lengths": np.array([9, 4]), "key_value_seq_lengths": LENGTHS}

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            out = attention.softplus_attention(*arrays, reweight_power=3, **lengths)
            return (out**2).sum(), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)

    clean = run(query, key, value)
    beyond = ~VALID[:, 0, 0, :, None, None]
    poisoned = (jnp.where(beyond, jnp.nan, x) for x in (key, value))
    chex.assert_trees_all_equal(run(query.at[1, 4:].set(jnp.nan), *poisoned), clean)
    np.testing.assert_array_equal(clean[1][1, 4:], 0)
    assert (clean[1][0] != 0).any()


@each_power
def test_without_a_batch_and_in_low_precision(power):
    query, key, value = _arrays(dtype=jnp.bfloat16)
    call = _jitted(reweight_power=power)
    out = call(query, key, value)
    assert out.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in (query, key, value)]
    assert_close(out, oracle.softplus_attention(*exact, reweight_power=power), jnp.bfloat16)
    np.testing.assert_array_equal(call(query[0], key[0], value[0]), out[0])


def test_steps_are_one_pass():
    """Whatever the cache can hold: a step counts the keys that there are."""
    options, arrays = {"reweight_power": 3.0, "local_window_size": (5, 0)}, _arrays(T, T)
    expected = attention.softplus_attention(*arrays, is_causal=True, **options)
    step = jax.jit(functools.partial(attention.softplus_attention_step, **options))
    state = attention.init_softplus_attention_state(B, 12, N, K, H, V, jnp.float32)
    parts, start = [], 0
    for count in (4, 1, 4):
        out, state = step(state, *(x[:, start : start + count] for x in arrays))
        parts.append(out)
        start += count
    assert int(state.length) == T
    assert_close(jnp.concatenate(parts, axis=1), expected, factor=4)


def test_wrong_arguments():
    query, key, value = _arrays()
    call = functools.partial(attention.softplus_attention, query, key, value)
    with pytest.raises(ValueError, match=r"value: dtype bfloat16 must be query's"):
        attention.softplus_attention(query, key, value.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"key: shape \(2, 13, 2, 7\) must have"):
        attention.softplus_attention(query, key[..., :7], value)
    with pytest.raises(TypeError, match=r"query: must be floating point"):
        attention.softplus_attention(*(x.astype(int) for x in (query, key, value)))
    for power in (0, -1.0, jnp.ones(())):
        with pytest.raises(ValueError, match=r"reweight_power: must be a positive number or None"):
            call(reweight_power=power)
    with pytest.raises(ValueError, match=r"segments: key_ids must be given"):
        call(segment_ids=IDS[0])
    wide = jnp.tile(value, 50)
    with pytest.raises(
        NotImplementedError, match=r"softplus_attention: .*'pallas_gpu'.*at most 128"
    ):
        attention.softplus_attention(query, key, wide, implementation="pallas_gpu")


def test_sharded_is_unsharded():
    """With axes in the types, of what is computed before the kernel too."""
    arrays = _arrays(6, 6, batch=8)
    ids = np.sort(np.random.default_rng(0).integers(0, 2, (8, 6)), axis=1)
    lengths = np.array([6, 5, 4, 6, 6, 3, 2, 6])

    def loss(query, key, value, ids, lengths):
        out = attention.softplus_attention(
            query, key, value, segment_ids=ids, key_value_seq_lengths=lengths, reweight_power=3
        )
        return (out**2).sum()

    def run(*arguments):
        return jax.value_and_grad(loss, (0, 1, 2))(*arguments)

    devices = mesh(AxisType.Explicit)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    placed += [place(devices, jnp.asarray(x), "data") for x in (ids, lengths)]
    assert_close(jax.jit(run)(*placed), jax.jit(run)(*arrays, ids, lengths), factor=4)
    assert collectives(jax.grad(loss), *placed) == []
