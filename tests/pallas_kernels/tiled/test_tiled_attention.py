"""Tiled attention: every feature of every implementation against the definition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention
from tests.numerics import LIMITS, assert_close
from tests.oracles import softmax_attention as oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, S, N, K, H, V = 2, 21, 29, 4, 2, 8, 6
TILES = (8, 12)  # neither divides its length


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(queries=T, keys=S, kv_heads=K, dtype=jnp.float32):
    return (
        _normal(0, B, queries, N, H, dtype=dtype),
        _normal(1, B, keys, kv_heads, H, dtype=dtype),
        _normal(2, B, keys, kv_heads, V, dtype=dtype),
    )


def _loss(implementation, arrays, cotangents, **options):
    """Returns a scalar that every result of a call enters, and the results."""
    arrays = dict(arrays)
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    out, lse = tiled_attention(
        query,
        key,
        value,
        **arrays,
        **options,
        return_lse=True,
        implementation=implementation,
        tile_sizes=TILES,
    )
    loss = jnp.vdot(out.astype(jnp.float32), cotangents[0])
    return loss + jnp.vdot(jnp.where(jnp.isneginf(lse), 0, lse), cotangents[1]), (out, lse)


@functools.cache
def _compiled(implementation, options):
    """Returns a function to gradients and results that compiles once for many tests."""

    @jax.jit
    def run(arrays, cotangents, **traced):
        loss = functools.partial(_loss, implementation, **traced, **dict(options))
        return jax.grad(loss, has_aux=True)(arrays, cotangents)

    return run


def _results(implementation, arrays, mask=None, query_offset=0, **options):
    """Returns results and gradients by all arrays."""
    queries = arrays["query"].shape[1]
    cotangents = _normal(3, B, queries, N, V), _normal(4, B, queries, N)
    run = _compiled(implementation, tuple(sorted(options.items())))
    gradients, results = run(arrays, cotangents, mask=mask, query_offset=query_offset)
    return results, gradients


SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
SINK = np.array([-1.0, 0.0, 1.0, 3.0], np.float32)
OFFSET = np.array([3, 11])
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (B, S)), axis=1)

# Every program takes seconds to compile, so terms of scores are tried together with masks.
FEATURES = {
    "plain": {},
    "soft cap, bias, lengths": {
        "logits_soft_cap": 1.5,
        "bias": _normal(5, B, N, T, S),
        "mask": masks.lengths(np.array([21, 9]), np.array([3, 29])),
    },
    "bias of batch, dilated": {"bias": _normal(5, B, 1, T, S), "mask": masks.dilated(3)},
    "bias of keys, dynamic window": {
        "bias": _normal(5, 1, 1, 1, S),
        "mask": masks.window(np.array([2, 6]), None, OFFSET),
    },
    "bias of queries, sink, window": {
        "bias": _normal(5, B, N, T, 1),
        "sink": SINK,
        "mask": masks.window(5, 2, 4),
    },
    "alibi with offsets, prefix": {
        "alibi_slopes": SLOPES,
        "query_offset": OFFSET,
        "mask": masks.prefix(np.array([4, 20]), 2),
    },
    "sink, dense of keys, causal that hides": {
        "sink": SINK,
        "mask": masks.causal(-4) & masks.dense(np.random.default_rng(6).random((B, 1, 1, S)) < 0.4),
    },
    "segments of heads": {
        "mask": masks.segments(np.tile(SEGMENTS[:, None], (1, K, 1))[..., :T], SEGMENTS)
    },
    "dense": {"mask": masks.dense(np.random.default_rng(6).random((1, N, T, S)) < 0.4)},
    "blocks": {
        "mask": masks.blocks(
            np.array([[[[0, 1, 3], [2, 3, 0], [1, 0, 0]], [[4, 0, 0], [0, 4, 0], [0, 1, 2]]]]),
            np.array([[[3, 2, 0], [1, 2, 3]]]),
            7,
            6,
        )
    },
    "rule": {"mask": masks.rule(jnp.less, _normal(7, B, N, T), _normal(8, 1, S))},
    "everything": {
        "scale": 0.5,
        "logits_soft_cap": 3.0,
        "bias": _normal(5, 1, N, T, S),
        "alibi_slopes": SLOPES,
        "sink": SINK,
        "query_offset": OFFSET,
        "mask": masks.causal(OFFSET)
        & masks.window(12, 0, OFFSET)
        & masks.segments(SEGMENTS[:, :T], SEGMENTS)
        & masks.lengths(key=np.array([20, 29])),
    },
}
LEARNED = ("bias", "alibi_slopes", "sink")


@pytest.mark.parametrize("feature", FEATURES)
def test_results_and_gradients(feature):
    options = dict(FEATURES[feature])
    arrays = dict(zip(("query", "key", "value"), _arrays(), strict=True))
    arrays |= {name: jnp.asarray(options.pop(name)) for name in LEARNED if name in options}

    defined, defined_gradients = _results("reference", arrays, **options)
    mask = options.get("mask")
    expected = oracle.softmax_attention(
        arrays["query"],
        arrays["key"],
        arrays["value"],
        scale=options.get("scale"),
        bias=arrays.get("bias"),
        allowed=None if mask is None else _by_head(mask.to_dense(T, S)),
        soft_cap=options.get("logits_soft_cap"),
        slopes=arrays.get("alibi_slopes"),
        sink=arrays.get("sink"),
        offset=options.get("query_offset", 0),
    )
    assert_close(defined, expected)

    results, gradients = _results("xla", arrays, **options)
    assert_close(results, expected)
    assert_close(gradients, defined_gradients)


def _by_head(dense):
    return np.repeat(dense, N // dense.shape[1], axis=1) if dense.shape[1] == K else dense


@settings(max_examples=8, deadline=None)
@given(
    queries=st.integers(1, 19),
    keys=st.integers(1, 19),
    tiles=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kv_heads=st.sampled_from([1, 2, 4]),
    offset=st.integers(-5, 20),
    left=st.one_of(st.none(), st.integers(0, 9)),
)
def test_any_lengths_and_tiles(queries, keys, tiles, kv_heads, offset, left):
    arrays = _arrays(queries, keys, kv_heads)
    mask = masks.causal(offset) & masks.window(left, None, offset)

    @jax.jit
    def run(*arrays):
        def loss(implementation):
            call = functools.partial(
                tiled_attention, mask=mask, implementation=implementation, tile_sizes=tiles
            )
            out, vjp = jax.vjp(call, *arrays)
            return out, vjp(_normal(3, *out.shape))

        return loss("xla"), loss("reference")

    assert_close(*run(*arrays), factor=2)  # a gradient may be one small number, not many


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_low_precision(dtype, implementation):
    arrays = dict(zip(("query", "key", "value"), _arrays(dtype=dtype), strict=True))
    arrays |= {"sink": jnp.asarray(SINK, dtype), "bias": _normal(5, 1, N, T, S, dtype=dtype)}
    options = {"mask": masks.causal(8), "logits_soft_cap": 5.0}
    (out, lse), gradients = _results(implementation, arrays, **options)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    exact = _results("reference", jax.tree.map(lambda x: x.astype(jnp.float32), arrays), **options)
    assert_close(((out, lse), gradients), exact, dtype=dtype)


def test_double_precision_gradients_are_those_of_the_oracle():
    """Directional derivatives by every argument against central differences of the oracle."""
    with jax.enable_x64(True):
        arrays = dict(
            zip(("query", "key", "value"), _arrays(9, 11, dtype=jnp.float64), strict=True)
        )
        arrays |= {
            "bias": _normal(5, 1, N, 9, 11, dtype=jnp.float64),
            "alibi_slopes": jnp.asarray(SLOPES, jnp.float64),
            "sink": jnp.asarray(SINK, jnp.float64),
        }
        cotangents = _normal(3, B, 9, N, V), _normal(4, B, 9, N)
        mask, cap, offset = masks.causal(OFFSET - 4), 2.0, OFFSET - 4
        dense = np.asarray(mask.to_dense(9, 11))

        def defined(arrays):
            out, lse = oracle.softmax_attention(
                arrays["query"],
                arrays["key"],
                arrays["value"],
                bias=arrays["bias"],
                allowed=dense,
                soft_cap=cap,
                slopes=arrays["alibi_slopes"],
                sink=arrays["sink"],
                offset=offset,
            )
            return np.vdot(out, cotangents[0]) + np.vdot(lse, cotangents[1])

        options = {"mask": mask, "logits_soft_cap": cap, "query_offset": offset}
        (loss, _), gradients = jax.jit(
            jax.value_and_grad(
                lambda arrays: _loss("xla", arrays, cotangents, **options), has_aux=True
            )
        )(arrays)
        assert float(loss) == pytest.approx(defined(arrays), rel=1e-6)
        for name, gradient in gradients.items():
            assert gradient.dtype == jnp.float64
            direction = _normal(9, *gradient.shape, dtype=jnp.float64)
            shifted = [
                defined(arrays | {name: arrays[name] + e * direction}) for e in (1e-5, -1e-5)
            ]
            slope = (shifted[0] - shifted[1]) / 2e-5
            assert float(jnp.vdot(gradient, direction)) == pytest.approx(slope, rel=1e-6), name


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_double_precision_results(implementation):
    with jax.enable_x64(True):
        arrays = dict(zip(("query", "key", "value"), _arrays(dtype=jnp.float64), strict=True))
        results, _ = _results(implementation, arrays, mask=masks.causal(8))
        dense = masks.causal(8).to_dense(T, S)
        assert_close(
            results, oracle.softmax_attention(*arrays.values(), allowed=dense), jnp.float64
        )


def test_logits_of_ten_thousand():
    # Integers, so that logits are exact. Of weights, exp(logit - lse), the backward can know no
    # more than lse holds: 24 bits of 1e4.
    query, key = (jnp.round(50 * _normal(seed, B, T, 2, 1)) for seed in (0, 1))
    arrays = {"query": query, "key": key, "value": _normal(2, B, T, 2, V)}
    assert jnp.abs(jnp.einsum("btnh,bsnh->bnts", query, key)).max() > 1e4
    cotangents = _normal(3, B, T, 2, V), _normal(4, B, T, 2)
    run = [
        jax.jit(jax.grad(functools.partial(_loss, implementation, scale=1.0), has_aux=True))(
            arrays, cotangents
        )
        for implementation in ("xla", "reference")
    ]
    expected = oracle.softmax_attention(*arrays.values(), scale=1.0)
    for gradients, results in run:
        assert_close(results, expected)
        chex.assert_tree_all_finite(gradients)
    assert_close(run[0][0], run[1][0], factor=1e4 * 2**-24 / LIMITS["float32"])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("hide", "sink"), [("mask", SINK), ("bias", None)])
def test_a_query_without_keys(implementation, sink, hide):
    arrays = dict(zip(("query", "key", "value"), _arrays(), strict=True))
    hidden = jnp.zeros((1, 1, T, S), bool).at[:, :, 5:9].set(True)
    options = {}
    if hide == "mask":
        options["mask"] = masks.dense(~hidden)
    else:
        arrays["bias"] = jnp.where(hidden, -jnp.inf, 0.0)
    if sink is not None:
        arrays["sink"] = jnp.asarray(sink)
    (out, lse), gradients = _results(implementation, arrays, **options)
    np.testing.assert_array_equal(out[:, 5:9], 0)
    np.testing.assert_array_equal(
        lse[:, 5:9], np.broadcast_to(-np.inf if sink is None else sink, (B, 4, N))
    )
    np.testing.assert_array_equal(gradients["query"][:, 5:9], 0)
    chex.assert_tree_all_finite((out, gradients))
    assert (gradients["query"][:, :5] != 0).all()


def test_a_query_without_keys_ignores_bad_cotangents():
    query, key, value = _arrays()
    call = functools.partial(
        tiled_attention, return_lse=True, mask=masks.causal(-4), tile_sizes=TILES
    )
    (out, lse), vjp = jax.vjp(call, query, key, value)
    bad = jnp.isneginf(lse)
    assert bad.any()
    gradients = vjp((jnp.where(bad[..., None], jnp.nan, out), jnp.where(bad, jnp.nan, 1.0)))
    chex.assert_tree_all_finite(gradients)


RANGES = [
    (masks.lengths(np.array([21, 9]), np.array([13, 2])), (21, 9), (13, 2)),
    (masks.causal(np.array([-3, 2])), (T, T), (18, 23)),
    (masks.window(3, 2), (T, T), (23, 23)),
    (masks.prefix(25), (T, T), (25, 25)),
    (masks.causal(5) & masks.lengths(key=np.array([4, 28])), (T, T), (4, 26)),
]


# The reference asks every mask for the same range; two are enough for it.
@pytest.mark.parametrize(
    ("implementation", "hidden"),
    [*(("xla", hidden) for hidden in RANGES), *(("reference", RANGES[i]) for i in (0, 4))],
)
def test_what_a_range_hides_may_be_anything(implementation, hidden):
    """NaN beyond lengths and ranges changes no bit of results and gradients."""
    mask, queries, keys = hidden
    arrays = dict(zip(("query", "key", "value"), _arrays(), strict=True))
    clean = _results(implementation, arrays, mask=mask)
    beyond_queries = np.arange(T) >= np.array(queries)[:, None]
    beyond_keys = np.arange(S) >= np.array(keys)[:, None]
    assert beyond_keys.any()
    poisoned = {
        name: jnp.where(
            (beyond_queries if name == "query" else beyond_keys)[..., None, None], jnp.nan, x
        )
        for name, x in arrays.items()
    }
    results = _results(implementation, poisoned, mask=mask)
    chex.assert_trees_all_equal(results, clean)
    _, gradients = results
    np.testing.assert_array_equal(gradients["key"][beyond_keys], 0)
    np.testing.assert_array_equal(gradients["value"][beyond_keys], 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_nan_that_is_seen_shows(implementation):
    query, key, value = _arrays()
    out = tiled_attention(
        query,
        key.at[0, 10].set(jnp.nan),
        value,
        mask=masks.causal(),
        implementation=implementation,
        tile_sizes=TILES,
    )
    sees = np.arange(T)[None, :] + np.array([[0], [-T]]) >= 10
    np.testing.assert_array_equal(jnp.isnan(out).any((2, 3)), sees)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_partial_results_merge_exactly(implementation):
    """Attention to two sets of keys, merged by their log-sum-exps, is attention to the union."""
    arrays = _arrays()
    cotangents = _normal(3, B, T, N, V), _normal(4, B, T, N)
    call = functools.partial(
        tiled_attention, return_lse=True, implementation=implementation, tile_sizes=TILES
    )

    def whole(query, key, value):
        return call(query, key, value, mask=masks.causal(5), sink=SINK)

    def parts(query, key, value):
        cut = 12
        a = call(query, key[:, :cut], value[:, :cut], mask=masks.causal(5), sink=SINK)
        b = call(query, key[:, cut:], value[:, cut:], mask=masks.causal(5 - cut))
        lse = jnp.logaddexp(a[1], b[1])
        return sum(jnp.exp(part - lse)[..., None] * out for out, part in (a, b)), lse

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, arrays):
        results, vjp = jax.vjp(function, *arrays)
        return results, vjp(cotangents)

    assert_close(run(parts, arrays), run(whole, arrays))


def _visited(mask, tiles, length=64):
    """Counts the tiles of scores that a forward and a backward visit."""
    count = [0]

    def seen(_):
        count[0] += 1

    def always(q, k):
        jax.debug.callback(seen, k.ravel()[0])
        return q >= k

    probe = masks.rule(always, jnp.ones((1, length)), jnp.zeros((1, length)))
    x = _normal(0, 1, length, 1, 4)
    call = functools.partial(tiled_attention, mask=mask & probe, tile_sizes=tiles)
    out, vjp = jax.vjp(call, x, x, x)
    jax.effects_barrier()
    forward = count[0]
    vjp(out)
    jax.effects_barrier()
    return forward, count[0] - forward


@pytest.mark.parametrize(
    ("mask", "tiles"),
    [
        (masks.lengths(), 64),
        (masks.causal(), 36),
        (masks.causal() & masks.window(8, None), 15),
        (masks.window(8, 8), 22),
        (masks.lengths(key=20), 24),
        (masks.lengths(query=np.array([10]), key=np.array([20])), 6),
        (masks.prefix(16), 37),
        # Rows of a list take their steps together: here four rows, one step.
        (masks.blocks(np.array([[[[1], [0], [3], [2]]]]), np.array([[[1, 0, 1, 1]]]), 16, 16), 4),
    ],
)
def test_tiles_that_a_mask_empties_are_not_visited(mask, tiles):
    assert _visited(mask, (8, 8)) == (tiles, tiles)


def _temporary_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
@pytest.mark.parametrize("mask", [None, masks.causal() & masks.window(64, 0)])
def test_memory_is_linear(mask):
    def call(query, key, value):
        return tiled_attention(
            query, key, value, mask=mask, sink=jnp.zeros(2), tile_sizes=(128, 128)
        )

    def gradient(*arrays):
        return jax.grad(lambda *x: call(*x).sum(), (0, 1, 2))(*arrays)

    for function in (call, gradient):
        short, long = (
            _temporary_bytes(function, *[(1, length, 2, 16)] * 3) for length in (4096, 16384)
        )
        # A quadratic program would need 16 times as much, and 2 GiB for each matrix of scores.
        assert long < 4.2 * short
        assert long < 40 * 4 * 16384 * 2 * 16


@pytest.mark.optimized
def test_gradients_that_nobody_asks_for_take_no_memory():
    shapes = [(1, 1024, 2, 16)] * 3 + [(1, 2, 1024, 1024)]

    def loss(query, key, value, bias):
        return tiled_attention(query, key, value, bias=bias, tile_sizes=(128, 128)).sum()

    bias_bytes = 4 * 2 * 1024 * 1024
    assert _temporary_bytes(jax.grad(loss, (0, 1, 2)), *shapes) < bias_bytes / 2


def test_default_tiles_agree_with_others():
    x = _normal(0, 1, 300, 2, 16)
    call = functools.partial(tiled_attention, x, x, x, mask=masks.causal(), return_lse=True)
    assert_close(jax.jit(call)(), jax.jit(functools.partial(call, tile_sizes=(64, 40)))())


def test_vmap_over_any_argument():
    query, key, value = _arrays()
    queries, keys, values, sinks = (jnp.stack([x, 2 * x, -x]) for x in (query, key, value, SINK))
    offsets = jnp.array([1, 5, 9])

    def results(query, key, value, sink, offset):
        def call(*arrays):
            query, key, value, sink = arrays
            mask = None if offset is None else masks.causal(offset)
            return tiled_attention(query, key, value, sink=sink, mask=mask, tile_sizes=TILES)

        out, vjp = jax.vjp(call, query, key, value, sink)
        return out, vjp(out)

    for axes, args in (
        ((0, 0, 0, None, None), (queries, keys, values, SINK, jnp.int32(4))),
        ((None, 0, None, None, 0), (query, keys, value, SINK, offsets)),
        ((None, None, None, 0, None), (query, key, value, sinks, None)),
    ):
        one = jax.jit(results)
        rows = [
            one(*(x if axis is None else x[i] for x, axis in zip(args, axes, strict=True)))
            for i in range(3)
        ]
        expected = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        assert_close(jax.jit(jax.vmap(results, axes))(*args), expected)


def test_vmap_sums_gradients_of_what_is_shared():
    query, key, value = _arrays()
    queries = jnp.stack([query, 2 * query, -query])
    bias = _normal(5, 1, N, T, S)

    def loss(implementation, queries, key, bias, sink):
        call = jax.vmap(
            lambda q: tiled_attention(
                q, key, value, bias=bias, sink=sink, implementation=implementation, tile_sizes=TILES
            )
        )
        return (call(queries) ** 2).sum()

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2, 3)))(queries, key, bias, SINK)
        for name in ("xla", "reference")
    ]
    assert_close(*gradients)


def test_nested_vmap_jacobian_scan_and_remat():
    query, key, value = _arrays(3, 4)
    call = functools.partial(tiled_attention, key=key, value=value, mask=masks.causal(1))
    defined = functools.partial(call, implementation="reference")

    jacobians = [
        jax.jit(jax.jacrev(lambda q, f=f: f(q)[:, :, :, :2]))(query) for f in (call, defined)
    ]
    assert_close(*jacobians)

    grid = jnp.stack([jnp.stack([query, -query]), jnp.stack([2 * query, 3 * query])])
    nested = jax.jit(jax.vmap(jax.vmap(call)))(grid)
    assert_close(nested, jnp.stack([jnp.stack([call(q) for q in row]) for row in grid]))

    @functools.partial(jax.jit, static_argnums=0)
    def deep(layer, query):
        def body(x, offset):
            x = jnp.pad(layer(x, mask=masks.causal(offset)), ((0, 0),) * 3 + ((0, H - V),))
            return x, None

        return jax.grad(lambda q: jax.lax.scan(body, q, jnp.arange(3))[0].sum())(query)

    plain = deep(functools.partial(tiled_attention, key=key, value=value), query)
    remat = deep(jax.checkpoint(lambda q, mask: tiled_attention(q, key, value, mask=mask)), query)
    assert_close(plain, remat)
    defined = functools.partial(tiled_attention, key=key, value=value, implementation="reference")
    assert_close(plain, deep(defined, query))


def test_the_reference_has_second_derivatives():
    query, key, value = (x[:1, :2, :2] for x in _arrays())

    def loss(query):
        return tiled_attention(query, key, value, implementation="reference").sum()

    direction = _normal(9, *query.shape)
    gradient = jax.jit(jax.grad(loss))
    product = jax.jvp(gradient, (query,), (direction,))[1]
    eps = 1e-2
    shifted = [gradient(query + sign * eps * direction) for sign in (1, -1)]
    difference = (shifted[0] - shifted[1]) / (2 * eps)
    np.testing.assert_allclose(product, difference, rtol=1e-2, atol=1e-4)


def test_a_traced_scale_is_differentiable():
    query, key, value = _arrays()

    def loss(scale, implementation):
        return (
            tiled_attention(query, key, value, scale=scale, implementation=implementation) ** 2
        ).sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    assert_close(run(jnp.float32(0.3), "xla"), run(jnp.float32(0.3), "reference"))
    assert_close(run(jnp.float32(0.3), "xla")[0], loss(0.3, "xla"))
    out = tiled_attention(*_arrays(dtype=jnp.bfloat16), scale=jnp.float32(0.3))
    assert out.dtype == jnp.bfloat16


def test_a_new_value_of_an_array_does_not_compile_again():
    arrays = _arrays()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(arrays, offset):
        return tiled_attention(*arrays, mask=masks.causal(offset) & masks.window(4, 0, offset))

    outs = [run(arrays, jnp.int32(offset)) for offset in (2, 6)]
    assert_close(outs[1], tiled_attention(*arrays, mask=masks.causal(6) & masks.window(4, 0, 6)))
    assert (outs[0] != outs[1]).any()


QUERY, KEY, VALUE = _arrays()


@pytest.mark.parametrize(
    ("arrays", "options", "error", "match"),
    [
        ((QUERY[0], KEY, VALUE), {}, ValueError, r"query: must be \[B, T, N, H\]; got shape"),
        ((QUERY, KEY, VALUE[0]), {}, ValueError, r"value: must be \[B, S, K, V\]; got shape"),
        (
            (QUERY.astype(int), KEY, VALUE),
            {},
            TypeError,
            r"query: must be floating point; got int32",
        ),
        (
            (QUERY[:, :0], KEY, VALUE),
            {},
            ValueError,
            r"query: shape \(2, 0, 4, 8\) has no elements",
        ),
        ((QUERY[:1], KEY, VALUE), {}, ValueError, r"key: shape .* must have the batch, 1"),
        ((QUERY[..., :4], KEY, VALUE), {}, ValueError, r"key: .* the head dimension, 4"),
        ((QUERY, KEY, VALUE[:, :4]), {}, ValueError, r"value: .* must start with \(2, 29\)"),
        (
            (QUERY[:, :, :3], KEY, VALUE),
            {},
            ValueError,
            r"key: 2 heads do not divide the 3 heads of query; num_heads must be a multiple",
        ),
        ((), {"scale": jnp.ones(2)}, ValueError, r"scale: must have shape \(\); got \(2,\)"),
        ((), {"logits_soft_cap": 0.0}, ValueError, r"logits_soft_cap: must be a positive .* 0\.0"),
        ((), {"logits_soft_cap": jnp.ones(())}, ValueError, r"logits_soft_cap: must be a positive"),
        ((), {"bias": jnp.ones((T, 3))}, ValueError, r"bias: shape \(1, 1, 21, 3\) does not broad"),
        ((), {"bias": jnp.ones((1, 1, T, S), bool)}, TypeError, r"bias: must be floating.*bool"),
        ((), {"alibi_slopes": jnp.ones(3)}, ValueError, r"alibi_slopes: must have shape \(4,\)"),
        (
            (),
            {"sink": jnp.ones((B, N))},
            ValueError,
            r"sink: must have shape \(4,\), or .*\(2, 4\)",
        ),
        (
            (),
            {"alibi_slopes": SLOPES, "query_offset": jnp.zeros(3, int)},
            ValueError,
            r"query_offset: shape \(3,\) does not fit the batch, 2",
        ),
        ((), {"query_offset": 0.5, "alibi_slopes": SLOPES}, TypeError, r"query_offset must be int"),
        ((), {"mask": jnp.ones((T, S), bool)}, TypeError, r"mask: must be a mask of the algebra"),
        ((), {"tile_sizes": (0, 8)}, ValueError, r"tile_sizes: must be two positive integers"),
        ((), {"implementation": "cudnn"}, ValueError, r"tiled_attention: implementation must be"),
        (
            (),
            {"implementation": "pallas_gpu", "group_size": 29},
            NotImplementedError,
            r"tiled_attention: .*pallas_gpu.*group_size",
        ),
    ],
)
def test_wrong_arguments(arrays, options, error, match):
    with pytest.raises(error, match=match):
        tiled_attention(*(arrays or (QUERY, KEY, VALUE)), **options)
