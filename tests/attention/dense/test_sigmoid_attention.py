"""`sigmoid_attention`: its definition, its default bias, its limits, and its steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import masks
from attention.parallel import axes
from tests.numerics import assert_close
from tests.oracles import sigmoid_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, S, N, K, H, V = 2, 9, 13, 4, 2, 8, 5
IMPLEMENTATIONS = ("xla", "reference")
SLOPES = np.array([0.5, 0.2, 0.1, 0.0])

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(queries=T, keys=S, dtype=jnp.float32, heads=N, batch=B):
    return (
        _normal(0, batch, queries, heads, H, dtype=dtype),
        _normal(1, batch, keys, K, H, dtype=dtype),
        _normal(2, batch, keys, K, V, dtype=dtype),
    )


CAUSAL = np.tril(np.ones((T, S), bool))
IDS = (
    np.array([[0] * 4 + [1] * 5, [2] * 9]),
    np.array([[-1] + [0] * 6 + [1] * 6, [2] * 11 + [-1] * 2]),
)
PAIRS = ((IDS[0][:, :, None] == IDS[1][:, None]) | (IDS[1][:, None] == -1))[:, None]
LENGTHS = np.array([5, 13])
VALID = (np.arange(S) < LENGTHS[:, None])[:, None, None]
# Each case: arguments, and what they are to the oracle.
CASES = {
    "plain": ({}, {"logit_bias": -np.log(S)}),
    "causal": ({"is_causal": True}, {"logit_bias": -np.log(S), "allowed": CAUSAL}),
    "window": (
        {"local_window_size": (2, 0), "query_offset": 3},
        {"logit_bias": -np.log(S), "allowed": masks.window(2, 0, 3).to_dense(T, S)},
    ),
    "lengths": (
        {"key_value_seq_lengths": LENGTHS},
        {"logit_bias": -np.log(LENGTHS)[:, None, None, None], "allowed": VALID},
    ),
    "documents": (
        {"segment_ids": IDS},
        {"logit_bias": -np.log(PAIRS.sum(-1, keepdims=True)), "allowed": PAIRS},
    ),
    "documents and lengths": (
        {"segment_ids": IDS, "key_value_seq_lengths": LENGTHS, "bias": _normal(5, T, S)},
        {
            "logit_bias": -np.log((PAIRS & VALID).sum(-1, keepdims=True).clip(1)),
            "allowed": PAIRS & VALID,
            "bias": _normal(5, T, S),
        },
    ),
    "documents of key heads": (
        {"segment_ids": tuple(np.repeat(ids[:, None], K, axis=1) for ids in IDS)},
        {"logit_bias": -np.log(PAIRS.sum(-1, keepdims=True)), "allowed": PAIRS},
    ),
    "documents, bias given": (
        {"segment_ids": IDS, "logit_bias": -1.0},
        {"logit_bias": -1.0, "allowed": PAIRS},
    ),
    "alibi": (
        {"alibi_slopes": SLOPES, "query_offset": np.array([4, 1]), "temperature": 0.5},
        {"slopes": SLOPES, "offset": np.array([4, 1]), "temperature": 0.5, "logit_bias": 0.0},
    ),
    "everything": (
        {
            "scale": 0.5,
            "temperature": -0.3,
            "logit_bias": -2.0,
            "bias": _normal(5, 1, N, T, S),
            "mask": CAUSAL,
            "alibi_slopes": SLOPES,
        },
        {
            "scale": 0.5,
            "temperature": -0.3,
            "logit_bias": -2.0,
            "bias": _normal(5, 1, N, T, S),
            "allowed": CAUSAL,
            "slopes": SLOPES,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case):
    options, defined = CASES[case]
    expected = oracle.sigmoid_attention(*_arrays(), **defined)
    for implementation in IMPLEMENTATIONS if case == "everything" else (None,):
        call = functools.partial(
            attention.sigmoid_attention, **options, implementation=implementation
        )
        assert_close(jax.jit(call)(*_arrays()), expected)


def test_gradients():
    """Also of the bias and the temperature, which may be arrays."""
    cotangent = _normal(3, B, T, N, V)

    def loss(implementation, arrays, logit_bias, temperature):
        out = attention.sigmoid_attention(
            *arrays,
            logit_bias=logit_bias,
            temperature=temperature,
            alibi_slopes=SLOPES,
            is_causal=True,
            implementation=implementation,
        )
        return jnp.vdot(out, cotangent)

    run = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    arguments = _arrays(), jnp.float32(-1.5), jnp.float32(0.4)
    assert_close(run("xla", *arguments), run("reference", *arguments))
    static = jax.jit(loss, static_argnums=(0, 2, 3))
    assert_close(static("xla", _arrays(), -1.5, 0.4), loss("reference", *arguments), factor=4)


def test_equal_keys_weigh_one_of_n_plus_one():
    _, key, value = _arrays()
    out = attention.sigmoid_attention(jnp.zeros((B, T, N, H)), key, value)
    mean = jnp.repeat(value.mean(1, keepdims=True), N // K, axis=2)
    assert_close(out, jnp.broadcast_to(S / (S + 1) * mean, out.shape))


def test_adds_up_over_keys_and_does_not_see_their_order():
    query, key, value = _arrays()
    call = functools.partial(attention.sigmoid_attention, query, logit_bias=-2.0)
    whole = call(key, value)
    parts = [call(key[:, part], value[:, part]) for part in (slice(0, 4), slice(4, None))]
    assert_close(sum(parts), whole)
    order = np.random.default_rng(0).permutation(S)
    assert_close(call(key[:, order], value[:, order]), whole)


def test_is_a_softmax_where_the_bias_is_low():
    """exp(-b) sigmoid(s + b) tends to exp(s), so o over its row sum to the average of a softmax."""
    query, key, value = _arrays()
    call = functools.partial(attention.sigmoid_attention, query, key, logit_bias=-30.0)
    ratio = call(value) / call(jnp.ones_like(value))
    assert_close(ratio, attention.softmax_attention(query, key, value))


def test_a_weight_does_not_depend_on_other_keys():
    """Unlike an average: a key that is hidden takes its own part away and changes no other."""
    query, key, value = _arrays()
    call = functools.partial(attention.sigmoid_attention, query, key, logit_bias=-1.0)
    others, one = call(value.at[:, 3].set(0)), call(value * (jnp.arange(S) == 3)[:, None, None])
    hidden = call(value, mask=(jnp.arange(S) != 3)[None])
    assert_close(hidden, others)
    assert_close(hidden + one, call(value))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_and_queries_without_keys(implementation):
    query, key, value = _arrays()

    def loss(query, key, value):
        out = attention.sigmoid_attention(
            1e4 * query, key, value, mask=masks.causal(-2), implementation=implementation
        )
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    chex.assert_tree_all_finite((gradients, out))
    np.testing.assert_array_equal(out[:, :2], 0)
    np.testing.assert_array_equal(gradients[0][:, :2], 0)
    assert (out[:, 2:] != 0).any()


def test_without_a_batch_and_in_low_precision():
    query, key, value = _arrays(dtype=jnp.bfloat16)
    out = attention.sigmoid_attention(query, key, value)
    assert out.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in (query, key, value)]
    assert_close(out, oracle.sigmoid_attention(*exact, logit_bias=-np.log(S)), jnp.bfloat16)
    np.testing.assert_array_equal(attention.sigmoid_attention(query[0], key[0], value[0]), out[0])


def test_what_lies_beyond_the_lengths_may_be_anything():
    query, key, value = _arrays()
    beyond = ~VALID[:, 0, 0, :, None, None]
    call = functools.partial(attention.sigmoid_attention, key_value_seq_lengths=LENGTHS)
    poisoned = (jnp.where(beyond, jnp.nan, x) for x in (key, value))
    np.testing.assert_array_equal(call(query, *poisoned), call(query, key, value))


STEP_OPTIONS = {
    "default": {},
    "bias given": {"logit_bias": -1.0, "local_window_size": (3, 0), "scale": 0.3},
    "alibi": {"alibi_slopes": SLOPES, "temperature": 0.2},
}


@pytest.mark.parametrize("case", STEP_OPTIONS)
def test_steps_are_one_pass(case):
    """With the default bias, of as many tokens as the cache holds."""
    options, arrays = STEP_OPTIONS[case], _arrays(T, T)
    expected = attention.sigmoid_attention(*arrays, is_causal=True, **options)
    step = jax.jit(functools.partial(attention.sigmoid_attention_step, **options))
    length = 12 if "logit_bias" in options else T
    state = attention.init_sigmoid_attention_state(B, length, N, K, H, V, jnp.float32)
    parts, start = [], 0
    for count in (4, 1, 4):
        out, state = step(state, *(x[:, start : start + count] for x in arrays))
        parts.append(out)
        start += count
    assert int(state.length) == T
    assert_close(jnp.concatenate(parts, axis=1), expected)


def test_wrong_arguments():
    query, key, value = _arrays()
    call = functools.partial(attention.sigmoid_attention, query, key, value)
    with pytest.raises(ValueError, match=r"value: dtype bfloat16 must be query's"):
        attention.sigmoid_attention(query, key, value.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"logit_bias: must have shape \(\); got \(2,\)"):
        call(logit_bias=jnp.ones(2))
    with pytest.raises(ValueError, match=r"temperature: must be a number; got shape \(4,\)"):
        call(temperature=jnp.ones(4))
    with pytest.raises(ValueError, match=r"key_value_seq_lengths: must be int32\[B\]"):
        call(key_value_seq_lengths=jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"segments: key_ids must be given"):
        call(segment_ids=IDS[0])
    with pytest.raises(ValueError, match=r"segments: query_ids must be .* got shape"):
        call(segment_ids=(IDS[0][:, :4], IDS[1]))
    wide = jnp.tile(value, 50)
    with pytest.raises(
        NotImplementedError, match=r"sigmoid_attention: .*'pallas_gpu'.*at most 128"
    ):
        attention.sigmoid_attention(query, key, wide, implementation="pallas_gpu")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_is_unsharded(kind):
    arrays = _arrays(6, 6, batch=8)
    ids = np.sort(np.random.default_rng(0).integers(0, 2, (8, 6)), axis=1)

    def loss(query, key, value, ids):
        return (attention.sigmoid_attention(query, key, value, segment_ids=ids) ** 2).sum()

    def run(*arguments):
        return jax.value_and_grad(loss, (0, 1, 2))(*arguments)

    devices = mesh(kind)
    with axes(batch="data", heads="tensor"):
        placed = [place(devices, x, "data", None, "tensor") for x in arrays]
        placed.append(place(devices, jnp.asarray(ids), "data"))
        assert_close(jax.jit(run)(*placed), jax.jit(run)(*arrays, ids), factor=2)
        assert collectives(lambda *x: jax.grad(loss)(*x), *placed) == []
