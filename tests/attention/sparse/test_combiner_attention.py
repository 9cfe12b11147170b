"""`combiner_attention`: its definition, weights that sum to 1, its limits, and its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import combiner_attention, init_combiner_attention_state, softmax_attention
from tests.numerics import assert_close
from tests.oracles import combiner_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H, V = 2, 15, 4, 2, 8, 15

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, batch=B, kv_heads=K):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, tokens, kv_heads, H), (batch, tokens, kv_heads, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _run(arrays, **options):
    return jax.jit(functools.partial(combiner_attention, **options))(*arrays)


# Documents end within spans and at their ends; some are shorter than a span, or one token.
IDS = np.array([[0] * 8 + [1] * 7, [3] * 1 + [4] * 6 + [3] * 2 + [5] * 6])
CAUSAL = dict(span_size=4, is_causal=True)
LOGSPARSE = dict(form="logsparse", is_causal=True)
CASES = {
    "causal": CAUSAL,
    "not causal": dict(span_size=4, scale=1.0),
    "causal documents": CAUSAL | dict(segment_ids=IDS),
    "documents, not causal": dict(span_size=4, segment_ids=IDS),
    "logsparse": LOGSPARSE,
    "logsparse documents": LOGSPARSE | dict(segment_ids=IDS),
}


RUNS = {
    case: jax.jit(functools.partial(combiner_attention, **options))
    for case, options in CASES.items()
}


def _defined(arrays, options):
    return oracle.combiner_attention(*arrays, **({"span_size": None} | options))


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    arrays = _arrays(jnp.float64)
    assert_close(RUNS[case](*arrays), _defined(arrays, CASES[case]), jnp.float64)


@pytest.mark.parametrize("case", ("causal documents", "logsparse"))
def test_gradients(case, x64):
    """Those through the summaries too, by finite differences along some directions."""
    arrays = [np.asarray(x) for x in _arrays(jnp.float64)]
    target = np.random.default_rng(1).standard_normal((B, T, N, V))

    def loss(*arrays):
        return jnp.sum(target * combiner_attention(*arrays, **CASES[case]))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(i).standard_normal(gradient.shape)
        moved = []
        for step in (1e-6, -1e-6):
            inputs = [x + step * direction if j == i else x for j, x in enumerate(arrays)]
            moved.append(np.sum(target * _defined(inputs, CASES[case])))
        expected = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-6)


@pytest.mark.parametrize("case", ("causal", "not causal", "logsparse"))
def test_weights_are_those_of_full_attention(case, x64):
    """All that may be seen is, with weights that sum to 1: the values are unit vectors."""
    query, key, value = _arrays(jnp.float64)
    value = jnp.broadcast_to(jnp.eye(T)[None, :, None], value.shape)
    weights = np.asarray(RUNS[case](query, key, value))
    assert_close(weights.sum(axis=-1), np.ones((B, T, N)), jnp.float64)
    seen = np.tri(T) if "is_causal" in CASES[case] else np.ones((T, T))
    assert ((weights > 0) == seen[None, :, None]).all()


def test_limits_are_full_attention():
    arrays = _arrays()
    full = jax.jit(functools.partial(softmax_attention, is_causal=True))(*arrays)
    for size in (1, T):
        assert_close(_run(arrays, span_size=size, is_causal=True), full, factor=2)


def test_constant_keys_make_summaries_means(x64):
    """Each of them then counts as much as a token that is seen directly."""
    query, key, value = _arrays(jnp.float64)
    key = jnp.broadcast_to(key[:, :1], key.shape)
    out = RUNS["causal"](query, key, value)
    value = np.repeat(value, N // K, axis=2)
    for t in range(T):
        first = t // 4 * 4
        means = [value[:, j : j + 4].mean(axis=1) for j in range(0, first, 4)]
        direct = [value[:, j] for j in range(first, t + 1)]
        assert_close(out[:, t], np.mean([*means, *direct], axis=0), jnp.float64)


def test_spans_of_about_the_square_root_by_default():
    arrays = _arrays()
    expected = oracle.combiner_attention(*arrays, 4, is_causal=True)
    assert_close(_run(arrays, is_causal=True), expected)
    query, key, value = (x[:, :1] for x in arrays)
    for options in ({}, LOGSPARSE):
        out = _run((query, key, value), **options)
        assert_close(out, jnp.repeat(value, N // K, axis=2))


@pytest.mark.parametrize("case", ("causal", "logsparse"))
def test_causal_at_every_token(case, x64):
    run, arrays = RUNS[case], [np.array(x) for x in _arrays(jnp.float64)]
    before = run(*arrays)
    for token in range(T):
        after = run(*(x + (np.arange(T) == token)[:, None, None] for x in arrays))
        differs = np.any(before != after, axis=(0, 2, 3))
        assert differs[token] and not differs[:token].any()


def test_steps():
    """Prompts that end anywhere in a span, tokens that begin new ones, and those beyond the room.

    The state has room for 3 spans, and so for the tokens up to the end of a fourth.
    """
    arrays = _arrays(tokens=17)
    step = jax.jit(attention.combiner_attention_step)
    whole = _defined(arrays, CAUSAL)
    for sizes in ([1] * 5 + [6] + [1] * 6, [6, 1, 6] + [1] * 4, [1] * 5 + [6] * 2):
        state = init_combiner_attention_state(B, T, N, K, H, V, span_size=4)
        parts, start = [], 0
        for size in sizes:
            out, state = step(state, *(x[:, start : start + size] for x in arrays))
            parts.append(out)
            start += size
        out = jnp.concatenate(parts, axis=1)
        fits = 16 if sizes[-1] == 1 else 11
        assert_close(out[:, :fits], whole[:, :fits], factor=2)
        assert np.isnan(out[:, 16:]).all()
        assert state.length == 17 and state.span_keys.shape == (B, 3, K, H)


@pytest.mark.parametrize("options", (CAUSAL, LOGSPARSE), ids=("fixed", "logsparse"))
def test_sharded(options):
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    run = jax.jit(functools.partial(combiner_attention, **options)).lower(*placed).compile()
    assert_close(run(*placed), _defined(arrays, options), factor=2)
    assert not COLLECTIVE.findall(run.as_text())


def test_bfloat16():
    arrays = _arrays(jnp.bfloat16)
    out = _run(arrays, **LOGSPARSE)
    assert out.dtype == jnp.bfloat16
    assert_close(out, _defined(arrays, LOGSPARSE), jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(form="axial"), ValueError, "form: must be 'fixed' or 'logsparse'; got 'axial'"),
        (dict(span_size=0), ValueError, "span_size: must be a positive integer or None; got 0"),
        (dict(form="logsparse"), ValueError, "is_causal: must be True for form 'logsparse'"),
        (LOGSPARSE | dict(span_size=4), ValueError, "span_size: is of form 'fixed'; got 4"),
        (
            LOGSPARSE | dict(implementation="pallas_tpu"),
            NotImplementedError,
            "combiner_attention: implementation 'pallas_tpu' does not serve this call",
        ),
        (dict(segment_ids=np.zeros((B, T))), TypeError, "segment_ids: must be integers"),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        combiner_attention(*_arrays(), **options)


def test_wrong_state():
    query, key, value = _arrays()
    step = attention.combiner_attention_step
    with pytest.raises(TypeError, match="state: must be a CombinerAttentionState; got int"):
        step(3, query, key, value)
    state = init_combiner_attention_state(B, 99, N, K, H, V, span_size=4)
    with pytest.raises(ValueError, match="span_size: 5, but the state's is 4"):
        step(state, query, key, value, span_size=5)
    with pytest.raises(ValueError, match="query: 2 heads do not fit the state's 4"):
        step(state, query[:, :, :2], key, value)
    with pytest.raises(ValueError, match=r"key: shape .* does not fit the state's"):
        step(state, query[:1], key[:1], value[:1])
