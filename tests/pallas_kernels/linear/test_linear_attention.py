"""Linear attention: every implementation against the equations, in values and gradients."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear import (
    CHUNK_SIZE,
    KEPT,
    LinearState,
    features,
    init_linear_state,
    linear_attention,
)
from tests.numerics import assert_close, error_ratio
from tests.pallas_kernels.linear.cases import CASES, STATE, VARIANTS, Case, called

NAMES = ("xla", "reference")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def differentiated(case, name):
    """Returns results and gradients at the arrays of a case."""
    return case.differentiated(case.arrays(), name)


@functools.cache
def by_the_oracle(case):
    """Returns, at the arrays of a case, results, and slopes of the loss in random directions."""
    arrays, rng = case.arrays(), np.random.default_rng(3)
    directions = {n: rng.standard_normal(x.shape) for n, x in arrays.items()}
    return case.expected(arrays), directions, case.expected_slopes(arrays, directions)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_equations(case, name, x64):
    results, gradients = differentiated(case, name)
    expected, directions, expected_slopes = by_the_oracle(case)
    assert_close(results, expected, jnp.float64)
    assert gradients.keys() == directions.keys()
    for n, direction in directions.items():
        slope, size = np.sum(gradients[n] * direction), np.linalg.norm(gradients[n])
        assert abs(slope - expected_slopes[n]) <= 1e-11 * size, n


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case, x64):
    expected = differentiated(case, "reference")[1]
    assert_close(differentiated(case, "xla")[1], expected, jnp.float64)


# Three spans from one state that is kept to the next; the last, and its last chunk, are shorter.
SPANS = dict(tokens=2 * KEPT + 12, batch=1, heads=2, kv_heads=1, chunk=KEPT // 32, state=True)


@pytest.mark.parametrize(
    "case",
    (
        Case(**SPANS, decay=(-0.1, -0.003)),
        Case(**SPANS, decay="channel", beta=True),
        Case(**SPANS, decay="step", beta=True, momentum=True, segments=True),
    ),
    ids=("decay", "delta, channels", "momentum"),
)
def test_spans(case, x64):
    actual, expected = (case.differentiated(case.arrays(), name) for name in NAMES)
    assert_close(actual, expected, jnp.float64)


PRECISE = {
    "decay": Case(128, kv_heads=2, chunk=32, state=True, segments=True),
    "delta, channels": Case(96, chunk=16, beta=True, decay="channel", state=True),
    "taylor": Case(96, feature_map="taylor", normalize=True, decay="step"),
    "all": Case(96, chunk=32, causal=False, decay=None, segments=True, state=True),
}


@pytest.mark.parametrize(
    "case, dtype, name",
    (
        ("decay", "float32", "xla"),
        *(("decay", "float16", name) for name in NAMES),
        *((case, "bfloat16", "xla") for case in PRECISE),
    ),
)
def test_precision(case, dtype, name):
    case = dataclasses.replace(PRECISE[case], heads=2, kv_heads=1, features=6, width=16)
    arrays = case.arrays(dtype)
    results, gradients = case.differentiated(arrays, name)
    wide = {n: jnp.float32 for n in STATE} | {"out": dtype}
    assert {n: x.dtype for n, x in results.items()} == {n: wide[n] for n in results}
    assert {n: x.dtype for n, x in gradients.items()} == {n: x.dtype for n, x in arrays.items()}
    assert_close((results, gradients), case.defined(arrays), dtype)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_strong_decays_over_many_tokens(dtype):
    decay = (-np.inf, -1e30, -100, -8, -1e-4, 0)
    case = Case(4096, 1, 6, 3, chunk=CHUNK_SIZE, decay=decay)
    arrays = case.arrays(dtype)
    results, gradients = case.differentiated(arrays, "xla")
    np.testing.assert_array_equal(gradients["log_decay"][:2], 0)
    assert_close((results, gradients), case.defined(arrays), dtype)


@pytest.mark.parametrize(
    "tokens, decay, dtype", ((4096, "step", "float32"), (65536, "channel", "bfloat16"))
)
def test_strong_gates_over_many_tokens(tokens, decay, dtype):
    case = Case(tokens, 1, 1, 1, features=4, width=4, chunk=16, decay=decay, beta=True)
    arrays = case.arrays(dtype)
    assert_close(case.differentiated(arrays, "xla"), case.defined(arrays), dtype)


def test_equal_keys_by_the_delta_rule(x64):
    """With beta = 1 the memory of one key is the last value, whatever came before."""
    rng = np.random.default_rng(0)
    query, value = rng.standard_normal((2, 1, 200, 1, 4))
    key = np.broadcast_to([0.6, 0.0, 0.8, 0.0], query.shape)
    out = linear_attention(query, key, value, beta=np.ones((1, 200, 1)))
    assert_close(out, np.sum(query * key, -1, keepdims=True) * value, jnp.float64)


def test_taylor_features(x64):
    q, k = np.random.default_rng(0).standard_normal((2, 9))
    s = q @ k / 3
    assert_close(features.taylor(q) @ features.taylor(k), 1 + s + s**2 / 2, jnp.float64)
    assert features.taylor(q).shape == (features.count("taylor", 9),)


def test_float16_memories_beyond_its_range():
    tokens = 1024
    query, key, value = (jnp.full((1, tokens, 1, 4), x, jnp.float16) for x in (0.5, 16, 16))
    out, state = linear_attention(query, key, value, scale=1e-3, return_state=True)
    assert state.memory.max() == 256 * tokens > float(jnp.finfo(jnp.float16).max)
    expected = 0.5 * 4 * 256 * 1e-3 * np.arange(1, tokens + 1)
    assert_close(out[0, :, 0, 0], expected, jnp.float16)


SIZES = st.integers(1, 20)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_chunks_and_splits_do_not_matter(data):
    heads = ((1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 1, 1), (1, 1, 3), (2, 1, 4))
    heads = data.draw(st.sampled_from(heads), "heads of queries, keys and values")
    sizes = {n: data.draw(SIZES, n) for n in ("tokens", "width", "chunk", "other_chunk")}
    case = Case(
        tokens=sizes["tokens"],
        batch=1,
        heads=heads[0],
        kv_heads=heads[1],
        value_heads=heads[2],
        features=data.draw(st.integers(1, 5), "features"),
        width=sizes["width"],
        chunk=sizes["chunk"],
        segments=data.draw(st.booleans(), "segments"),
        state=True,
        **VARIANTS[data.draw(st.sampled_from(sorted(VARIANTS)), "variant")],
    )
    cut = data.draw(st.integers(1, case.tokens), "cut")
    with jax.enable_x64(True):
        arrays, ids = case.arrays(), case.segment_ids()
        other = dataclasses.replace(case, chunk=sizes["other_chunk"])

        @jax.jit
        def split(arrays):
            state, outs = {n: x for n, x in arrays.items() if n in STATE}, []
            for part in (slice(0, cut), slice(cut, None))[: 1 + (cut < case.tokens)]:
                if part.start and ids is not None and ids[0, cut] != ids[0, cut - 1]:
                    # The state of a segment that has ended is the caller's to drop.
                    state = jax.tree.map(jnp.zeros_like, state)
                tokens = {n: x if x.ndim == 1 else x[:, part] for n, x in arrays.items()}
                part_ids = None if ids is None else ids[:, part]
                state = called(other, tokens | state, "xla", segment_ids=part_ids)
                outs.append(state.pop("out"))
            return {"out": jnp.concatenate(outs, axis=1)} | state

        assert_close(split(arrays), case.call(arrays, "xla"), jnp.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_after_a_prompt(variant, x64):
    """A prompt and token after token, with the state as the carry of a scan, are one pass."""
    case = Case(tokens=13, features=3, chunk=4, heads=2, kv_heads=1, **VARIANTS[variant])
    arrays = case.arrays()

    def of_tokens(part):
        return {n: x if x.ndim == 1 else x[:, part] for n, x in arrays.items()}

    def step(state, token):
        constant = {n: x for n, x in arrays.items() if x.ndim == 1}
        state = {n: x for n, x in state.items() if n != "out"}
        results = called(case, token | constant | state, "xla")
        return {n: x for n, x in results.items() if n != "out"}, results["out"]

    @jax.jit
    def stepped():
        state = called(case, of_tokens(slice(0, 7)), "xla")
        out = state.pop("out")
        rest = {n: x for n, x in of_tokens(slice(7, None)).items() if x.ndim > 1}
        state, outs = jax.lax.scan(
            step, state, {n: jnp.moveaxis(x[:, :, None], 1, 0) for n, x in rest.items()}
        )
        return {"out": jnp.concatenate([out, jnp.moveaxis(outs[:, :, 0], 0, 1)], 1)} | state

    assert_close(stepped(), case.expected(arrays), jnp.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_state(variant):
    case = Case(1, heads=2, kv_heads=1, **VARIANTS[variant])
    options = dict(feature_map=case.feature_map, normalize=case.normalize, momentum=case.momentum)
    empty = init_linear_state(2, 2, 8, 6, **options)
    results = jax.eval_shape(lambda: case.call(case.arrays(np.float32), "xla"))
    for name in STATE:
        array = getattr(empty, name)
        assert (array is None) == (name not in results)
        if array is not None:
            assert (array.shape, array.dtype) == (results[name].shape, results[name].dtype)
            assert not array.any()


def test_causal():
    case = Case(16, decay="channel", beta=True)
    arrays = case.arrays(np.float32)
    out = case.call(arrays, "xla")["out"]
    for token in (0, 7, 8, 15):
        changed = {n: x.at[:, token].add(0.3) for n, x in arrays.items() if n != "log_decay"}
        differs = np.any(case.call(arrays | changed, "xla")["out"] != out, axis=(0, 2, 3))
        assert not differs[:token].any()
        assert differs[token]


@pytest.mark.parametrize("name", NAMES)
def test_traced_scale(name):
    case = Case(scale=0.3)
    arrays = case.arrays(np.float32)

    def loss(scale, dtype):
        inputs = {n: arrays[n].astype(dtype) for n in ("query", "key", "value")}
        out = linear_attention(**inputs, scale=scale, chunk_size=16, implementation=name)
        assert out.dtype == dtype
        return jnp.sum(out.astype(jnp.float32)), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(0.3, np.float32)
    case = dataclasses.replace(case, decay=None)
    del arrays["log_decay"]
    expected = case.expected(arrays)["out"]
    assert_close(out, expected)
    assert_close(gradient, np.sum(expected) / 0.3, factor=20)
    _, out = jax.jit(loss, static_argnums=1)(0.3, jnp.bfloat16)
    assert_close(out, expected, jnp.bfloat16)


def test_without_jit():
    case = Case(1, batch=1)
    arrays = case.arrays(np.float32)
    with jax.disable_jit():
        actual = case.call(arrays, "xla")
    assert_close(actual, case.call(arrays, "xla"))


@pytest.mark.parametrize(
    "mapped, name",
    (("query", "xla"), ("all twice", "xla"), ("decay", "reference")),
)
def test_vmap(mapped, name):
    case = Case(16, kv_heads=2, state=True, segments=True, decay=(-1, -0.3, -0.1, 0))
    arrays = case.arrays(np.float32)
    axes = {
        "decay": dict.fromkeys(arrays) | {"log_decay": 0},
        "query": dict.fromkeys(arrays) | {"query": 0},
        "all twice": dict.fromkeys(arrays, 0),
    }[mapped]

    def widened(x, axis, size):
        return x if axis is None else jnp.stack([x * (1 + 0.1 * i) for i in range(size)])

    def mapping(fn):
        fn = jax.vmap(fn, in_axes=(axes,))
        return jax.vmap(fn, in_axes=(axes,)) if mapped == "all twice" else fn

    def calls(fn, arrays, depth):
        if not depth:
            return fn(arrays)
        size = next(x.shape[0] for n, x in arrays.items() if axes[n] is not None)
        each = [
            calls(fn, {n: x if axes[n] is None else x[i] for n, x in arrays.items()}, depth - 1)
            for i in range(size)
        ]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *each)

    depth = 2 if mapped == "all twice" else 1
    for size in (2, 3)[:depth]:
        arrays = {n: widened(x, axes[n], size) for n, x in arrays.items()}
    actual = jax.jit(mapping(lambda arrays: case.differentiated(arrays, name)))(arrays)
    expected = calls(lambda arrays: case.differentiated(arrays, name), arrays, depth)
    assert_close(actual, expected, factor=2)


def test_reference_has_all_derivatives(x64):
    case = Case(tokens=3, batch=1, heads=1, kv_heads=1, features=2, width=2)
    arrays = case.arrays()

    def loss(value):
        return jnp.sum(jnp.sin(case.call(arrays | {"value": value}, "reference")["out"]))

    hessian = jax.hessian(loss)(arrays["value"]).reshape(6, 6)
    assert_close(hessian, hessian.T, jnp.float64)
    assert error_ratio(hessian, np.zeros((6, 6))) > 0.1


def test_default_chunk_does_not_matter(x64):
    case = Case(tokens=CHUNK_SIZE + 3, batch=1, heads=1, kv_heads=1)
    arrays = case.arrays()
    out = linear_attention(**arrays)
    assert isinstance(out, jax.Array)
    assert_close(out, case.expected(arrays)["out"], jnp.float64)


ARRAYS = Case(tokens=4, heads=4, kv_heads=2).arrays(np.float32)
EMPTY = LinearState(jnp.zeros((2, 4, 8, 6)))
WRONG = {
    "query of 3 dimensions": (
        dict(query=jnp.zeros((4, 4, 8))),
        ValueError,
        r"query: .*\(4, 4, 8\)",
    ),
    "integer query": (dict(query=jnp.zeros((2, 4, 4, 8), int)), TypeError, "query: .*int32"),
    "no tokens": (
        dict(query=jnp.zeros((2, 0, 4, 8)), key=jnp.zeros((2, 0, 2, 8))),
        ValueError,
        "query: .*no elements",
    ),
    "other tokens": (dict(key=jnp.zeros((2, 5, 2, 8))), ValueError, r"key: .*\(2, 5, 2, 8\)"),
    "other features": (dict(key=jnp.zeros((2, 4, 2, 9))), ValueError, r"key: .*\(2, 4, 2, 9\)"),
    "other value tokens": (dict(value=jnp.zeros((2, 3, 2, 6))), ValueError, "value: .*start with"),
    "key heads": (
        dict(key=jnp.zeros((2, 4, 3, 8)), value=jnp.zeros((2, 4, 3, 6))),
        ValueError,
        "key: 3 heads do not divide the 4 heads of query",
    ),
    "key dtype": (
        dict(key=ARRAYS["key"].astype(jnp.bfloat16)),
        ValueError,
        "key: dtype bfloat16 must be query's, float32",
    ),
    "values of other heads": (
        dict(value=jnp.zeros((2, 4, 6, 6))),
        ValueError,
        r"value: .*\(2, 4, 6, 6\)",
    ),
    "unknown features": (dict(feature_map="gelu"), ValueError, "feature_map: .*taylor; got 'gelu'"),
    "negative epsilon": (dict(normalize=True, epsilon=-1.0), ValueError, "epsilon: .*-1.0"),
    "decay without an order": (
        dict(causal=False, log_decay=jnp.zeros(4)),
        ValueError,
        "log_decay: .*causal",
    ),
    "beta without an order": (
        dict(causal=False, log_decay=None, beta=jnp.ones((2, 4, 4))),
        ValueError,
        "beta: .*causal",
    ),
    "momentum without an order": (
        dict(causal=False, log_decay=None, log_momentum=jnp.zeros((2, 4, 4))),
        ValueError,
        "log_momentum: .*causal",
    ),
    "normalised delta rule": (
        dict(normalize=True, beta=jnp.ones((2, 4, 4))),
        ValueError,
        "beta: .*normalize",
    ),
    "normalised momentum": (
        dict(normalize=True, log_momentum=jnp.zeros((2, 4, 4))),
        ValueError,
        "log_momentum: .*normalize",
    ),
    "momentum of channels": (
        dict(log_momentum=jnp.zeros((2, 4, 4)), log_decay=jnp.zeros((2, 4, 4, 8))),
        ValueError,
        "log_decay: .*log_momentum",
    ),
    "channels of the Taylor features": (
        dict(feature_map="taylor", log_decay=jnp.zeros((2, 4, 4, 8))),
        ValueError,
        "log_decay: .*taylor",
    ),
    "segments of other keys": (
        dict(
            causal=False,
            log_decay=None,
            segment_ids=jnp.zeros((2, 4), int),
            key=jnp.zeros((2, 5, 2, 8)),
            value=jnp.zeros((2, 5, 2, 6)),
        ),
        ValueError,
        "segment_ids: .*4 tokens.*5",
    ),
    "beta of key heads": (dict(beta=jnp.zeros((2, 4, 2))), ValueError, r"beta: .*\(2, 4, 4\)"),
    "integer beta": (dict(beta=jnp.zeros((2, 4, 4), int)), TypeError, "beta: .*int32"),
    "steps of other tokens": (
        dict(log_decay=jnp.zeros((2, 5, 4))),
        ValueError,
        r"log_decay: .*\(2, 4, 4\).*\(2, 5, 4\)",
    ),
    "positive steps": (
        dict(log_decay=np.full((2, 4, 4), 0.1)),
        ValueError,
        "log_decay: .*at most 0; got one of 0.1",
    ),
    "positive momentum": (
        dict(log_momentum=np.full((2, 4, 4), 0.1)),
        ValueError,
        "log_momentum: .*at most 0",
    ),
    "state without a sum of keys": (
        dict(normalize=True, initial_state=EMPTY),
        ValueError,
        r"initial_state: key_sum must have shape \(2, 4, 8\).*None",
    ),
    "state with momentum": (
        dict(initial_state=LinearState(EMPTY.memory, momentum=EMPTY.memory)),
        ValueError,
        "initial_state: momentum must be None.*array",
    ),
    "decays of key heads": (
        dict(log_decay=jnp.zeros(2)),
        ValueError,
        r"log_decay: .*\(4,\).*\(2,\)",
    ),
    "positive decay": (dict(log_decay=(0.0, -1.0, 0.1, 0.0)), ValueError, "log_decay: .*at most 0"),
    "NaN decay": (dict(log_decay=np.full(4, np.nan)), ValueError, "log_decay: .*at most 0"),
    "integer decay": (dict(log_decay=jnp.zeros(4, int)), TypeError, "log_decay: .*int32"),
    "segment shape": (
        dict(segment_ids=jnp.zeros((2, 5), int)),
        ValueError,
        r"segment_ids: .*\(2, 5\)",
    ),
    "float segments": (dict(segment_ids=jnp.zeros((2, 4))), TypeError, "segment_ids: .*float32"),
    "array as state": (dict(initial_state=EMPTY.memory), TypeError, "initial_state: .*LinearState"),
    "state of key heads": (
        dict(initial_state=LinearState(jnp.zeros((2, 2, 8, 6)))),
        ValueError,
        r"initial_state: .*\(2, 2, 8, 6\).*\(2, 4, 8, 6\)",
    ),
    "integer state": (
        dict(initial_state=LinearState(jnp.zeros((2, 4, 8, 6), int))),
        TypeError,
        "initial_state: .*int32",
    ),
    "positive bound": (dict(min_log_decay=0.5), ValueError, "min_log_decay: .*at most 0.*0.5"),
    "name as a bound": (dict(min_log_decay="-5"), ValueError, "min_log_decay: .*number.*'-5'"),
    "chunk of 0": (dict(chunk_size=0), ValueError, "chunk_size: .*0"),
    "chunk of half a token": (dict(chunk_size=0.5), ValueError, "chunk_size: .*0.5"),
    "scale for each head": (dict(scale=jnp.ones(4)), ValueError, r"scale: .*\(4,\)"),
    "unknown implementation": (
        dict(implementation="cuda"),
        ValueError,
        "linear_attention: implementation .*reference.*'cuda'",
    ),
    "kernel that does not serve it": (
        dict(implementation="pallas_gpu", chunk_size=100),
        NotImplementedError,
        "linear_attention: implementation 'pallas_gpu'",
    ),
}


@pytest.mark.parametrize("wrong, error, message", WRONG.values(), ids=WRONG)
def test_wrong_input(wrong, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: linear_attention(**(ARRAYS | wrong)))
    assert linear_attention(**ARRAYS, initial_state=EMPTY).shape == (2, 4, 4, 6)
