"""`softmax_attention`: a drop-in for JAX's own, what it adds, and its steps."""

import doctest
import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import masks
from attention.dense import softmax_attention as module
from attention.parallel import axes
from tests.numerics import assert_close
from tests.oracles import softmax_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, S, N, K, H = 2, 9, 13, 4, 2, 8
IMPLEMENTATIONS = ("xla", "reference")


pytestmark = pytest.mark.usefixtures("quick_compilation")


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(queries=T, keys=S, kv_heads=K, width=H, dtype=jnp.float32):
    return (
        _normal(0, B, queries, N, H, dtype=dtype),
        _normal(1, B, keys, kv_heads, H, dtype=dtype),
        _normal(2, B, keys, kv_heads, width, dtype=dtype),
    )


def test_signature_begins_as_jax_nn():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(attention.softmax_attention).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["query", "key", "value", "bias", "mask"]


DROP_IN = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"bias": _normal(5, B, N, T, S)},
    "bias of one head": {"bias": _normal(5, 1, 1, T, S)},
    "bias of keys": {"bias": _normal(5, B, N, 1, S)},
    "bias without batch": {"bias": _normal(5, N, T, S)},
    "bias of a matrix": {"bias": _normal(5, T, S)},
    "mask": {"mask": np.random.default_rng(0).random((B, N, T, S)) < 0.6},
    "mask of keys": {"mask": np.random.default_rng(0).random((B, 1, 1, S)) < 0.6},
    "mask without batch": {"mask": np.random.default_rng(0).random((N, T, S)) < 0.6},
    "query lengths": {"query_seq_lengths": jnp.array([4, 9], jnp.int32)},
    "key lengths": {"key_value_seq_lengths": jnp.array([13, 5], jnp.int32)},
    "all lengths": {
        "query_seq_lengths": jnp.array([9, 2], jnp.int32),
        "key_value_seq_lengths": jnp.array([3, 13], jnp.int32),
    },
    "window": {"local_window_size": 3},
    "window of two sides": {"local_window_size": (4, 1)},
    "causal window": {"local_window_size": (2, 2), "is_causal": True},
    "everything": {
        "scale": 0.5,
        "bias": _normal(5, 1, N, T, S),
        "mask": np.random.default_rng(0).random((B, 1, T, S)) < 0.9,
        "is_causal": True,
        "query_seq_lengths": jnp.array([9, 7], jnp.int32),
        "key_value_seq_lengths": jnp.array([13, 5], jnp.int32),
        "local_window_size": (6, 2),
    },
}


@pytest.mark.parametrize("case", DROP_IN)
def test_is_a_drop_in_for_jax_nn(case):
    options = DROP_IN[case]
    arrays = _arrays()
    results = jax.jit(lambda *x: attention.softmax_attention(*x, **options, return_residual=True))(
        *arrays
    )
    theirs = jax.jit(lambda *x: jax.nn.dot_product_attention(*x, **options, return_residual=True))(
        *arrays
    )
    assert [x.shape for x in results] == [x.shape for x in theirs]
    seen = np.isfinite(results[1])  # a query without keys is the one difference
    for ours, expected in zip(results, theirs, strict=True):
        assert_close(ours[seen], expected[seen])
    np.testing.assert_array_equal(results[0][~seen], 0)
    np.testing.assert_array_equal(results[1][~seen], -np.inf)
    assert seen.all() == ("query_seq_lengths" not in options)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_positional_arguments_grouped_queries_and_gradients_as_jax_nn(kv_heads):
    arrays = _arrays(kv_heads=kv_heads)
    bias, mask = _normal(5, B, N, T, S), np.random.default_rng(0).random((1, 1, T, S)) < 0.8
    cotangent = _normal(3, B, T, N, H)

    def run(function):
        out, vjp = jax.vjp(lambda *x: function(*x, mask), *arrays, bias)
        return out, vjp(cotangent)

    ours, theirs = (
        jax.jit(run, static_argnums=0)(f)
        for f in (attention.softmax_attention, jax.nn.dot_product_attention)
    )
    assert_close(ours, theirs)


def test_without_a_batch_as_jax_nn():
    query, key, value = (x[0] for x in _arrays())
    options = {
        "is_causal": True,
        "bias": _normal(5, N, T, S),
        "key_value_seq_lengths": jnp.array([6], jnp.int32),
        "return_residual": True,
    }
    results = attention.softmax_attention(query, key, value, **options)
    theirs = jax.nn.dot_product_attention(query, key, value, **options)
    assert [x.shape for x in results] == [(T, N, H), (T, N)]
    assert_close(results, theirs)
    assert attention.softmax_attention(query, key, value).shape == (T, N, H)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_against_the_oracle(implementation):
    """All arguments that JAX does not have, V != H, and T != S."""
    query, key, value = _arrays(width=5)
    segments = (
        np.array([[0] * 4 + [1] * 5, [2] * 9]),
        np.array([[-1] + [0] * 6 + [1] * 6, [2] * 11 + [3] * 2]),
    )
    slopes, sink = np.array([0.5, 0.2, 0.1, 0.0]), np.array([0.0, 1.0, -1.0, 2.0])
    offset = np.array([4, 1])
    results = attention.softmax_attention(
        query,
        key,
        value,
        is_causal=True,
        local_window_size=(6, 0),
        segment_ids=segments,
        query_offset=offset,
        alibi_slopes=slopes,
        logits_soft_cap=2.0,
        sink=sink,
        return_residual=True,
        implementation=implementation,
    )
    i, j = np.arange(T)[None, :, None] + offset[:, None, None], np.arange(S)
    queries, keys = segments[0][:, :, None], segments[1][:, None]
    allowed = (j <= i) & (j >= i - 6) & ((queries == keys) | (keys == -1))
    expected = oracle.softmax_attention(
        query,
        key,
        value,
        allowed=allowed[:, None],
        soft_cap=2.0,
        slopes=slopes,
        sink=sink,
        offset=offset,
    )
    assert results[0].shape == (B, T, N, 5)
    assert_close(results, expected)


def test_packed_documents_are_those_documents():
    query, key, value = _arrays(12, 12)
    cuts = [0, 5, 6, 12]
    ids = np.repeat([7, 3, 9], np.diff(cuts))[None].repeat(B, 0)
    packed = attention.softmax_attention(query, key, value, is_causal=True, segment_ids=ids)
    parts = [
        attention.softmax_attention(*(x[:, a:b] for x in (query, key, value)), is_causal=True)
        for a, b in itertools.pairwise(cuts)
    ]
    assert_close(packed, jnp.concatenate(parts, axis=1))


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (masks.causal(), {"is_causal": True}),
        (masks.window(3, 1), {"local_window_size": (3, 1)}),
        (masks.lengths(key=jnp.array([5, 9])), {"key_value_seq_lengths": jnp.array([5, 9])}),
        (
            masks.causal(2) & masks.window(1, None, 2),
            {"is_causal": True, "local_window_size": 1, "query_offset": 2},
        ),
    ],
)
def test_arguments_are_shorthand_for_masks(mask, options):
    arrays = _arrays()
    expected = attention.softmax_attention(*arrays, **options)
    assert_close(attention.softmax_attention(*arrays, mask=mask), expected)
    dense = mask.to_dense(T, S)
    assert_close(attention.softmax_attention(*arrays, mask=dense), expected)


def test_no_query_sees_the_future():
    query, key, value = _arrays(T, T)
    run = jax.jit(functools.partial(attention.softmax_attention, is_causal=True))
    out = run(query, key, value)
    for t in (1, 5, T - 1):
        after = (jnp.arange(T) >= t)[None, :, None, None]
        changed = run(*(jnp.where(after, 7.0, x) for x in (query, key, value)))
        np.testing.assert_array_equal(changed[:, :t], out[:, :t])
        assert (changed[:, t:] != out[:, t:]).any()


def test_is_an_average_of_values():
    """Weights sum to 1; equal keys weigh equally; a common shift of the logits changes nothing."""
    query, key, value = _arrays()
    assert_close(
        attention.softmax_attention(query, key, jnp.ones_like(value)), jnp.ones_like(query)
    )
    mean = jnp.repeat(value.mean(1, keepdims=True), N // K, axis=2)
    same = attention.softmax_attention(query, jnp.ones_like(key), value)
    assert_close(same, jnp.broadcast_to(mean, same.shape))
    shifted = attention.softmax_attention(query, key, value, _normal(6, B, N, T, 1))
    assert_close(shifted, attention.softmax_attention(query, key, value))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    arrays = _arrays(dtype=dtype)
    out, lse = attention.softmax_attention(*arrays, is_causal=True, return_residual=True)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in arrays]
    allowed = masks.causal().to_dense(T, S)
    assert_close((out, lse), oracle.softmax_attention(*exact, allowed=allowed), dtype)


def test_vmap_over_examples():
    query, key, value = _arrays()
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, T)), axis=1)

    def one(query, key, value, ids):
        return attention.softmax_attention(query, key, value, is_causal=True, segment_ids=ids)

    mapped = jax.jit(jax.vmap(one))(query, key[:, :T], value[:, :T], ids)
    assert_close(mapped, one(query, key[:, :T], value[:, :T], ids))


STEP_OPTIONS = {
    "plain": {},
    "window": {"local_window_size": (3, 0)},
    "everything": {
        "scale": 0.4,
        "alibi_slopes": np.array([0.5, 0.2, 0.1, 0.0]),
        "logits_soft_cap": 2.0,
        "sink": np.array([0.0, 1.0, -1.0, 2.0]),
    },
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", STEP_OPTIONS)
def test_steps_are_one_pass(case, implementation):
    options = STEP_OPTIONS[case] | {"implementation": implementation, "return_residual": True}
    arrays = _arrays(T, T, width=5)
    expected = attention.softmax_attention(*arrays, is_causal=True, **options)
    step = jax.jit(functools.partial(attention.softmax_attention_step, **options))
    state = attention.init_softmax_attention_state(B, 12, N, K, H, 5, jnp.float32)
    parts, start = [], 0
    for count in (4, 1, 1, 3):
        out, state = step(state, *(x[:, start : start + count] for x in arrays))
        parts.append(out)
        start += count
    assert int(state.length) == T
    results = tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    assert_close(results, expected)


def test_steps_under_scan_compile_once():
    query, key, value = (jnp.swapaxes(x, 0, 1)[:, :, None] for x in _arrays(T, T))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def body(state, token):
        out, state = attention.softmax_attention_step(state, *token)
        return state, out

    state = attention.init_softmax_attention_state(B, T, N, K, H, H, jnp.float32)
    _, outs = jax.lax.scan(body, state, (query, key, value))
    expected = attention.softmax_attention(*_arrays(T, T), is_causal=True)
    assert_close(jnp.swapaxes(outs[:, :, 0], 0, 1), expected)


def test_a_step_reads_nothing_beyond_the_cache():
    query, key, value = _arrays(3, 3)
    state = attention.init_softmax_attention_state(B, 8, N, K, H, H, jnp.float32)
    poisoned = attention.KVCache(
        *(jnp.full_like(x, jnp.nan) for x in (state.key, state.value)), state.length
    )
    step = jax.jit(attention.softmax_attention_step)
    np.testing.assert_array_equal(
        step(poisoned, query, key, value)[0], step(state, query, key, value)[0]
    )


def test_a_step_with_masks_and_a_cache_of_lower_precision():
    query, key, value = _arrays(T, T)
    ids = np.array([[0] * 4 + [1] * 5] * B)
    expected = attention.softmax_attention(query, key, value, is_causal=True, segment_ids=ids)
    state = attention.init_softmax_attention_state(B, T, N, K, H, H, jnp.bfloat16)
    _, state = attention.softmax_attention_step(state, query[:, :7], key[:, :7], value[:, :7])
    out, state = attention.softmax_attention_step(
        state, query[:, 7:], key[:, 7:], value[:, 7:], segment_ids=(ids[:, 7:], ids)
    )
    assert out.dtype == jnp.float32 and state.key.dtype == jnp.bfloat16
    assert_close(out, expected[:, 7:], jnp.bfloat16)


def test_an_overflowing_step():
    query, key, value = _arrays(3, 3)
    state = attention.init_softmax_attention_state(B, 4, N, K, H, H, jnp.float32)
    _, state = attention.softmax_attention_step(state, query, key, value)
    with pytest.raises(ValueError, match="key: 3 more tokens do not fit into a cache of 4"):
        attention.softmax_attention_step(state, query, key, value)
    out, _ = jax.jit(attention.softmax_attention_step)(state, query, key, value)
    assert jnp.isnan(out[:, -1]).all()


QUERY, KEY, VALUE = _arrays()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"key": KEY.astype(jnp.bfloat16)},
            ValueError,
            r"key: dtype bfloat16 must be query's, float32",
        ),
        ({"value": VALUE.astype(jnp.float16)}, ValueError, r"value: dtype float16 must be query's"),
        (
            {"query": QUERY[:, :, :3]},
            ValueError,
            r"key: 2 heads do not divide the 3 heads of query",
        ),
        ({"mask": jnp.ones((T, S))}, TypeError, r"mask: must be boolean"),
        (
            {"mask": np.ones((3, 1, T, S), bool)},
            ValueError,
            r"mask: shape \(3, 1, 9, 13\) does not",
        ),
        ({"bias": jnp.ones((B, 3, T, S))}, ValueError, r"bias: shape \(2, 3, 9, 13\) does not"),
        (
            {"query_seq_lengths": jnp.ones(3, int)},
            ValueError,
            r"query_seq_lengths: must be int32\[B\]",
        ),
        ({"query_seq_lengths": jnp.ones(B)}, TypeError, r"query_seq_lengths must be integers"),
        ({"key_value_seq_lengths": 4}, ValueError, r"key_value_seq_lengths: must be int32\[B\]"),
        ({"local_window_size": (1, 2, 3)}, ValueError, r"local_window_size: must be .*\(1, 2, 3\)"),
        ({"local_window_size": -1}, ValueError, r"local_window_size: must be .* got -1"),
        ({"segment_ids": jnp.zeros((B, T), int)}, ValueError, r"segments: key_ids must be given"),
        ({"query_offset": 1.0, "is_causal": True}, TypeError, r"query_offset must be integers"),
        (
            {"implementation": "cudnn"},
            ValueError,
            r"softmax_attention: implementation must be None",
        ),
        (
            {"implementation": "pallas_gpu", "value": jnp.tile(VALUE, 50)},
            NotImplementedError,
            r"softmax_attention: implementation 'pallas_gpu' does not .* must have at most 128 fea",
        ),
    ],
)
def test_wrong_arguments(options, error, match):
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    with pytest.raises(error, match=match):
        attention.softmax_attention(**(arrays | options))


def test_wrong_steps():
    state = attention.init_softmax_attention_state(B, T, N, K, H, H, jnp.float32)
    with pytest.raises(ValueError, match="key: 2 tokens must be as many as query's 1"):
        attention.softmax_attention_step(state, QUERY[:, :1], KEY[:, :2], VALUE[:, :2])
    with pytest.raises(TypeError, match="segment_ids: must be a pair"):
        attention.softmax_attention_step(
            state, QUERY[:, :1], KEY[:, :1], VALUE[:, :1], segment_ids=jnp.zeros((B, 1), int)
        )


def test_examples_run():
    results = doctest.testmod(module)
    assert results.attempted > 8 and results.failed == 0


def test_the_record_states_what_is_there():
    record = attention.catalogue.get("softmax_attention")
    assert record.function is attention.softmax_attention
    assert record.step is attention.softmax_attention_step
    assert set(record.implementations) == {*IMPLEMENTATIONS, "pallas_tpu", "pallas_gpu"}
    assert len(record.patterns) == 4 and record.kernel == "tiled" and not record.has_weights


SHARDED_BATCH = 8


def _sharded_case(kv_heads):
    """Returns a loss with everything that can be sharded or is learned, and its arguments."""
    shapes = [(SHARDED_BATCH, 6, heads, 4) for heads in (N, kv_heads, kv_heads)]
    arrays = [_normal(i, *shape) for i, shape in enumerate(shapes)]
    learned = _normal(3, 1, N, 6, 6), jnp.arange(N) / 8, jnp.arange(N) - 1.0
    ids = np.sort(np.random.default_rng(0).integers(0, 2, (SHARDED_BATCH, 6)), axis=1)
    lengths = np.arange(SHARDED_BATCH) % 5 + 2

    def results(query, key, value, bias, slopes, sink, ids, lengths):
        out, lse = attention.softmax_attention(
            query,
            key,
            value,
            bias,
            is_causal=True,
            segment_ids=ids,
            key_value_seq_lengths=lengths,
            alibi_slopes=slopes,
            sink=sink,
            return_residual=True,
        )
        return out, lse

    def gradients(*args):
        out, vjp = jax.vjp(lambda *x: results(*x, *args[6:]), *args[:6])
        return out, vjp((out[0], jnp.ones_like(out[1])))

    return gradients, (*arrays, *learned, jnp.asarray(ids), jnp.asarray(lengths))


def _placed(devices, args, heads, kv_heads):
    specs = [("data", None, heads), *[("data", None, kv_heads)] * 2]
    specs += [(None, heads), (heads,), (heads,), ("data",), ("data",)]
    return [place(devices, x, *spec) for x, spec in zip(args, specs, strict=True)]


@pytest.mark.parametrize(
    ("kind", "context"),
    [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, False)],
)
def test_sharded_over_batch_and_heads_is_the_same(kind, context):
    function, args = _sharded_case(K)
    expected = jax.jit(function)(*args)
    devices = mesh(kind)
    placed = _placed(devices, args, "tensor", "tensor")
    with axes(**({"batch": "data", "heads": "tensor"} if context else {})), jax.set_mesh(devices):
        results = jax.jit(function)(*placed)
        sent = collectives(function, *placed)
    assert_close(results, expected)
    (out, _), gradients = results
    for array in (out, *gradients[:3]):
        assert tuple(array.sharding.spec)[:3] == ("data", None, "tensor")
    # The gradients of bias, slopes and sink; optimisation makes them one all-reduce.
    assert set(sent) == {"all-reduce"} and len(sent) <= 3


@pytest.mark.optimized
def test_sharded_gradients_take_one_all_reduce():
    function, args = _sharded_case(K)
    devices = mesh(AxisType.Auto)
    with axes(batch="data", heads="tensor"), jax.set_mesh(devices):
        placed = _placed(devices, args, "tensor", "tensor")
        assert collectives(function, *placed) == ["all-reduce"]
        forward = lambda *x: function(*x)[0]  # noqa: E731
        assert collectives(forward, *placed) == []


def test_key_heads_that_the_mesh_does_not_divide():
    function, args = _sharded_case(kv_heads=1)
    expected = jax.jit(function)(*args)
    devices = mesh(AxisType.Auto)
    with axes(batch="data", heads="tensor"), jax.set_mesh(devices):
        assert_close(jax.jit(function)(*_placed(devices, args, None, None)), expected)
        assert set(collectives(function, *_placed(devices, args, None, None))) == {"all-reduce"}
    devices = mesh(AxisType.Explicit)
    with pytest.raises(ValueError, match="key: its 1 heads do not divide over the mesh axes"):
        jax.jit(function)(*_placed(devices, args, "tensor", None))


def test_the_backward_may_be_traced_outside_of_the_context():
    function, args = _sharded_case(K)
    expected = jax.jit(function)(*args)
    devices = mesh(AxisType.Auto)
    placed = _placed(devices, args, "tensor", "tensor")

    def loss(*learned_or_not):
        return attention.softmax_attention(*learned_or_not, is_causal=True)

    with axes(batch="data", heads="tensor"), jax.set_mesh(devices):
        out, vjp = jax.vjp(jax.jit(loss), *placed[:3])
    gradients = vjp(out)
    assert tuple(gradients[0].sharding.spec)[:3] == ("data", None, "tensor")
    single, single_vjp = jax.vjp(loss, *args[:3])
    assert_close((out, gradients), (single, single_vjp(single)))
    assert expected is not None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_steps_are_the_same(kind):
    _, args = _sharded_case(K)
    expected = attention.softmax_attention(*args[:3], is_causal=True)
    devices = mesh(kind)
    query, key, value = _placed(devices, args, "tensor", "tensor")[:3]
    state = attention.init_softmax_attention_state(SHARDED_BATCH, 8, N, K, 4, 4, jnp.float32)
    state = attention.KVCache(
        *(place(devices, x, "data", None, "tensor") for x in (state.key, state.value)),
        place(devices, state.length),
    )
    step = jax.jit(attention.softmax_attention_step)
    with axes(batch="data", heads="tensor"), jax.set_mesh(devices):
        first, state = step(state, *(x[:, :4] for x in (query, key, value)))
        assert collectives(step, state, *(x[:, 4:5] for x in (query, key, value))) == []
        parts = [first]
        for t in (4, 5):
            out, state = step(state, *(x[:, t : t + 1] for x in (query, key, value)))
            parts.append(out)
    assert_close(np.concatenate(parts, axis=1), expected)
