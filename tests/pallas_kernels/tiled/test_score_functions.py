"""Tiled attention: weights other than softmax, terms of the scores, and what is made of them."""

import doctest
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from pallas_kernels import masks
from pallas_kernels.partition import axes
from pallas_kernels.tiled import (
    merge,
    merge_partials,
    tiled_attention,
    tiled_attention_transposed,
    xla_tile,
)
from tests.numerics import assert_close
from tests.oracles import tiled_attention as oracle
from tests.sharding import collectives, mesh, place

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, S, N, K, H, V = 2, 13, 19, 4, 2, 8, 6
TILES = (5, 8)  # neither divides its length
LEARNED = ("bias", "alibi_slopes", "relative_bias", "sink", "logit_bias")
FORMS = {
    "softmax": {},
    "sigmoid": {"weights": "sigmoid"},
    "normalised sigmoid": {"weights": "sigmoid", "normalise": True},
    "softplus": {"weights": "softplus"},
    "relu": {"weights": "relu"},
    "relu as it is": {"weights": "relu", "normalise": False},
}
NORMALISED = ("softmax", "normalised sigmoid", "softplus", "relu")


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(queries=T, keys=S, dtype=jnp.float32):
    return {
        "query": _normal(0, B, queries, N, H, dtype=dtype),
        "key": _normal(1, B, keys, K, H, dtype=dtype),
        "value": _normal(2, B, keys, K, V, dtype=dtype),
    }


def _normalises(options):
    return options.get("normalise", options.get("weights") != "sigmoid")


def _loss(arrays, cotangents, **options):
    """Returns a scalar that every result of a call enters, and the results."""
    normalise = _normalises(options)
    results = tiled_attention(**arrays, **options, return_lse=normalise, tile_sizes=TILES)
    out, lse = results if normalise else (results, jnp.zeros(results.shape[:3]))
    loss = jnp.vdot(out.astype(jnp.float32), cotangents[0])
    return loss + jnp.vdot(jnp.where(jnp.isneginf(lse), 0, lse), cotangents[1]), (out, lse)


@functools.cache
def _compiled(options):
    @jax.jit
    def run(arrays, cotangents, **traced):
        return jax.grad(functools.partial(_loss, **traced, **dict(options)), has_aux=True)(
            arrays, cotangents
        )

    return run


def _results(implementation, arrays, mask=None, query_offset=0, **options):
    """Returns results and gradients by all arrays."""
    shape = arrays["query"].shape[:3]
    cotangents = _normal(3, *shape, arrays["value"].shape[-1]), _normal(4, *shape)
    run = _compiled(tuple(sorted((options | {"implementation": implementation}).items())))
    gradients, results = run(arrays, cotangents, mask=mask, query_offset=query_offset)
    return results, gradients


def _defined(arrays, mask=None, **options):
    options.pop("logits_bound", None)
    allowed = None if mask is None else mask.to_dense(T, S)
    options["normalise"] = _normalises(options)
    out, lse = oracle.tiled_attention(**arrays, **options, allowed=allowed)
    return out, lse if options["normalise"] else np.zeros_like(lse)


SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
SINK = np.array([-1.0, 0.0, 1.0, 3.0], np.float32)
OFFSET = np.array([3, 8])
ROWS = _normal(5, B, T, N)
EVERYTHING = {
    "scale": 0.7,
    "logits_soft_cap": 3.0,
    "logit_bias": -0.5,
    "bias": _normal(6, 1, N, T, S),
    "alibi_slopes": SLOPES,
    "relative_bias": _normal(7, N, 15),
    "query_offset": OFFSET,
    "mask": masks.causal(OFFSET) & masks.window(9, None, OFFSET),
}
CASES = {
    "softmax, everything": EVERYTHING | {"sink": ROWS},
    "sigmoid, everything": EVERYTHING | FORMS["sigmoid"],
    "softplus, everything": EVERYTHING | FORMS["softplus"] | {"sink": ROWS},
    "normalised sigmoid": FORMS["normalised sigmoid"] | {"sink": SINK},
    "relu, long table, sink of queries": {
        "weights": "relu",
        "relative_bias": _normal(7, N, 61),
        "query_offset": OFFSET,
        "sink": ROWS[:1],
    },
    "bounded, one table, sink of batch": {
        "logits_bound": 60.0,
        "relative_bias": _normal(7, 1, 5),
        "sink": ROWS[:, :1],
        "mask": masks.causal(-4),
    },
    "bounded by a soft cap": {"logits_soft_cap": 2.0, "logit_bias": 1.5},
}


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case):
    options = dict(CASES[case])
    arrays = _arrays()
    # To a softmax a common bias means next to nothing: there it is a static number.
    names = LEARNED if "weights" in options else LEARNED[:-1]
    arrays |= {name: jnp.asarray(options.pop(name)) for name in names if name in options}
    expected = _defined(arrays, **options)
    defined, defined_gradients = _results("reference", arrays, **options)
    assert_close(defined, expected)
    results, gradients = _results("xla", arrays, **options)
    assert_close(results, expected)
    assert_close(gradients, defined_gradients)


def test_what_is_bounded():
    """A bound spares the maximum where it is safe, and only there."""

    def maxima(**options):
        x = _normal(0, 1, 8, 2, 4)
        call = functools.partial(tiled_attention, **options)
        return str(jax.make_jaxpr(call)(x, x, x)).count("reduce_max")

    assert maxima() and maxima(logits_bound=61.0)
    assert not maxima(logits_bound=60.0)
    assert not maxima(logits_bound=60.0, sink=jnp.zeros(2))
    assert not maxima(logits_soft_cap=50.0, logit_bias=-10.0)
    assert maxima(logits_soft_cap=50.0, logit_bias=-11.0)
    assert maxima(logits_soft_cap=50.0, sink=jnp.zeros(2))
    assert not maxima(weights="relu")


@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(
    queries=st.integers(1, 12),
    keys=st.integers(1, 12),
    tiles=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    reach=st.integers(0, 9),
    offset=st.integers(-5, 9),
    form=st.sampled_from(["sigmoid", "relu as it is"]),  # no gradient of them cancels to nothing
)
def test_any_lengths_tables_and_tiles(queries, keys, tiles, reach, offset, form):
    arrays = _arrays(queries, keys) | {"relative_bias": _normal(7, N, 2 * reach + 1)}

    @jax.jit
    def run(arrays):
        def results(implementation):
            def call(arrays):
                return tiled_attention(
                    **arrays,
                    **FORMS[form],
                    query_offset=offset,
                    implementation=implementation,
                    tile_sizes=tiles,
                )

            out, vjp = jax.vjp(call, arrays)
            return out, vjp(_normal(3, *out.shape))

        return results("xla"), results("reference")

    assert_close(*run(arrays), factor=2)  # a gradient may be one small number, not many


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("softmax", jnp.bfloat16),
        ("softmax", jnp.float16),
        ("sigmoid", jnp.bfloat16),
        ("relu", jnp.float16),
    ],
)
def test_low_precision(form, dtype):
    arrays = _arrays(dtype=dtype)
    options = FORMS[form] | {"mask": masks.causal(4), "logits_bound": 60.0}
    (out, lse), gradients = _results("xla", arrays, **options)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    exact = _results("reference", jax.tree.map(lambda x: x.astype(jnp.float32), arrays), **options)
    assert_close(((out, lse), gradients), exact, dtype=dtype)


@pytest.mark.parametrize(
    ("form", "implementation"),
    [("sigmoid", "xla"), ("softplus", "xla"), ("relu", "xla"), ("softplus", "reference")],
)
def test_large_logits_and_queries_without_keys(form, implementation):
    arrays = _arrays() | {"bias": _normal(6, 1, N, T, S)}
    arrays["query"] *= 1e4 / 3
    hidden = jnp.zeros((1, 1, T, S), bool).at[:, :, 5:7].set(True)
    arrays["bias"] = arrays["bias"].at[:, :, :, 3].set(-jnp.inf)
    (out, lse), gradients = _results(
        implementation, arrays, mask=masks.dense(~hidden), **FORMS[form]
    )
    options = FORMS[form] | {"mask": masks.dense(~hidden)}
    assert_close((out, lse), _defined(arrays, **options), factor=20)
    np.testing.assert_array_equal(out[:, 5:7], 0)
    np.testing.assert_array_equal(gradients["query"][:, 5:7], 0)
    np.testing.assert_array_equal(lse[:, 5:7], -np.inf if form in NORMALISED else 0)
    chex.assert_tree_all_finite((out, gradients))
    if "relu" in form:  # the one form that such logits leave a gradient everywhere
        assert (gradients["query"][:, :5] != 0).any((1, 3)).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_sink_may_be_as_large_as_logits(implementation):
    arrays = _arrays() | {"sink": jnp.array([1e4, -1e4, 100.0, 0.0])}
    options = FORMS["softplus"]
    (out, lse), gradients = _results(implementation, arrays, **options)
    assert_close((out, lse), _defined(arrays, **options))
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(out[:, :, 0], 0)


def test_nothing_hidden_is_read():
    mask, arrays = masks.lengths(np.array([13, 9]), np.array([19, 11])), _arrays()
    clean = _results("xla", arrays, mask=mask, **FORMS["sigmoid"])
    poisoned = arrays | {
        "query": arrays["query"].at[1, 9:].set(jnp.nan),
        "key": arrays["key"].at[1, 11:].set(jnp.nan),
        "value": arrays["value"].at[1, 11:].set(jnp.nan),
    }
    chex.assert_trees_all_equal(_results("xla", poisoned, mask=mask, **FORMS["sigmoid"]), clean)


def test_weights_that_are_not_normalised_add_up_over_keys():
    arrays = _arrays()
    call = functools.partial(tiled_attention, arrays["query"], weights="sigmoid")
    parts = [
        call(arrays["key"][:, part], arrays["value"][:, part])
        for part in (slice(0, 7), slice(7, None))
    ]
    assert_close(sum(parts), call(arrays["key"], arrays["value"]))


@pytest.mark.parametrize(
    ("form", "implementation"),
    [("softmax", "xla"), ("relu", "xla"), ("softplus", "reference")],
)
def test_partial_results_merge_exactly(implementation, form):
    """Results and gradients are those of one call over the union of the keys."""
    arrays = _arrays() | {"sink": jnp.asarray(ROWS)}
    cotangents = _normal(3, B, T, N, V), _normal(4, B, T, N)
    cuts = (0, 4, 13, S)
    call = functools.partial(
        tiled_attention, **FORMS[form], return_lse=True, implementation=implementation
    )

    def whole(arrays):
        return call(**arrays, mask=masks.causal(2))

    def parts(arrays):
        query, key, value, sink = (arrays[n] for n in ("query", "key", "value", "sink"))
        results = [
            call(
                query,
                key[:, start:stop],
                value[:, start:stop],
                mask=masks.causal(2 - start),
                sink=None if start else sink,
            )
            for start, stop in itertools.pairwise(cuts)
        ]
        return merge_partials(*zip(*results, strict=True))

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, arrays):
        results, vjp = jax.vjp(function, arrays)
        return results, vjp(cotangents)

    assert_close(run(parts, arrays), run(whole, arrays))


def test_a_merge_of_nothing():
    outs = [_normal(i, 1, 2, 1, 3, dtype=jnp.bfloat16) for i in range(3)]
    lses = [jnp.array([[[-jnp.inf], [x]]]) for x in (-jnp.inf, 1e4, 1e4 - 1)]
    (out, lse), vjp = jax.vjp(merge_partials, outs, lses)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_array_equal(out[:, 0], 0)
    assert lse[0, 0, 0] == -np.inf
    assert float(lse[0, 1, 0]) == pytest.approx(1e4 + np.log1p(np.exp(-1)), abs=1e-3)
    d_outs, d_lses = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    chex.assert_tree_all_finite((d_outs, d_lses))
    for gradient in (*d_outs, *d_lses):
        np.testing.assert_array_equal(gradient[:, 0], 0)
    np.testing.assert_array_equal(d_outs[0], 0)
    assert (d_outs[1][:, 1] != 0).all()


def test_separate_value_heads():
    arrays = {
        "query": _normal(0, B, T, 6, H),
        "key": _normal(1, B, S, 3, H),
        "value": _normal(2, B, S, 2, V),
    }
    results, gradients = _results("xla", arrays)
    assert_close(results, oracle.tiled_attention(**arrays))
    assert_close((results, gradients), _results("reference", arrays))
    chex.assert_trees_all_equal_shapes(gradients, arrays)


TRANSPOSED = {
    "sigmoid": FORMS["sigmoid"] | {"logit_bias": -1.0},
    "relu": FORMS["relu"] | {"sink": SINK},
    "everything": EVERYTHING | {"sink": ROWS},
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed(case):
    options = dict(TRANSPOSED[case])
    arrays = {name: x for name, x in _arrays().items() if name != "value"}
    arrays |= {"x": _normal(8, B, T, N, V)}
    arrays |= {name: jnp.asarray(options.pop(name)) for name in LEARNED if name in options}

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, arrays):
        def call(arrays):
            return tiled_attention_transposed(
                **arrays, **options, implementation=implementation, tile_sizes=TILES
            )

        out, vjp = jax.vjp(call, arrays)
        return out, vjp(_normal(9, *out.shape))

    static = {name: x for name, x in options.items() if name not in ("mask", "logits_bound")}
    static["normalise"] = _normalises(options)
    if "mask" in options:
        static["allowed"] = options["mask"].to_dense(T, S)
    score_arrays = {name: x for name, x in arrays.items() if name != "x"}
    matrix, _ = oracle.tiled_weights(**score_arrays, **static)
    expected = np.einsum("bnts,btnv->bsnv", matrix, np.asarray(arrays["x"], np.float64))
    expected = expected.reshape(B, S, K, N // K, V).sum(3)

    out, gradients = run("xla", arrays)
    defined, defined_gradients = run("reference", arrays)
    assert_close(defined, expected)
    assert_close(out, expected)
    assert_close(gradients, defined_gradients)


def test_transposed_is_the_transpose():
    """<P V, X> = <V, P^T X>, in low precision too."""
    arrays, x = _arrays(dtype=jnp.bfloat16), _normal(8, B, T, N, V, dtype=jnp.bfloat16)
    out = tiled_attention(**arrays, mask=masks.causal(4))
    back = tiled_attention_transposed(arrays["query"], arrays["key"], x, mask=masks.causal(4))
    assert back.dtype == jnp.bfloat16 and back.shape == (B, S, K, V)
    a, b = (
        jnp.vdot(*(y.astype(jnp.float32) for y in pair))
        for pair in ((out, x), (back, arrays["value"]))
    )
    assert float(a) == pytest.approx(float(b), rel=3e-2)
    np.testing.assert_array_equal(back[:, T + 4 :], 0)


def test_vmap_of_tables_and_sinks():
    arrays = _arrays() | {"relative_bias": _normal(7, N, 15), "sink": jnp.asarray(SINK)}

    def results(arrays, offset):
        def call(arrays):
            return tiled_attention(**arrays, query_offset=offset, tile_sizes=TILES)

        out, vjp = jax.vjp(call, arrays)
        return out, vjp(out)

    mapped, offsets = ("relative_bias", "sink"), jnp.array([1, 6])
    stacked = arrays | {name: jnp.stack([arrays[name], 2 * arrays[name]]) for name in mapped}
    in_axes = {name: 0 if name in mapped else None for name in arrays}, 0
    one = jax.jit(results)
    rows = [one(arrays | {name: stacked[name][i] for name in mapped}, offsets[i]) for i in range(2)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    assert_close(jax.jit(jax.vmap(results, in_axes))(stacked, offsets), expected)


@pytest.mark.parametrize(
    ("kind", "transposed"), [(AxisType.Auto, False), (AxisType.Explicit, True)]
)
def test_sharded(kind, transposed):
    """Over batch and heads, with one all-reduce, for the gradients of what has no batch."""
    batch = 4
    arrays = {
        "query": _normal(0, batch, T, N, H),
        "key": _normal(1, batch, S, K, H),
        "value": _normal(2, batch, T if transposed else S, N, V),
        "relative_bias": _normal(7, 1, 9),
        "sink": _normal(5, batch, T, N),
    }

    def gradients(query, key, value, relative_bias, sink):
        function = tiled_attention_transposed if transposed else tiled_attention

        def loss(query, key, value, relative_bias, sink):
            out = function(query, key, value, relative_bias=relative_bias, sink=sink)
            return (out**2).sum()

        return jax.grad(loss, (0, 1, 2, 3, 4))(query, key, value, relative_bias, sink)

    expected = jax.jit(gradients)(*arrays.values())
    devices = mesh(kind)
    specs = (("data", None, "tensor"),) * 3 + ((), ("data", None, "tensor"))
    with axes(batch="data", heads="tensor"):
        placed = [place(devices, x, *spec) for x, spec in zip(arrays.values(), specs, strict=True)]
        assert_close(jax.jit(gradients)(*placed), expected)
        assert set(collectives(gradients, *placed)) <= {"all-reduce"}


@pytest.mark.optimized
def test_memory_is_linear():
    """Of the transpose and its gradients, which run all loops; with a long table."""

    def gradients(query, key, x, table):
        def loss(query, key, x, table):
            return tiled_attention_transposed(
                query, key, x, relative_bias=table, weights="relu", tile_sizes=(128, 128)
            ).sum()

        return jax.grad(loss, (0, 1, 2, 3))(query, key, x, table)

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        table = jax.ShapeDtypeStruct((2, 2 * length + 1), jnp.float32)
        compiled = jax.jit(gradients).lower(x, x, x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)


def test_a_table_of_diagonals():
    values = _normal(0, 2, 10)
    square = xla_tile.by_diagonal(values, 4, 7)
    for i, j in np.ndindex(4, 7):
        np.testing.assert_array_equal(square[:, i, j], values[:, j - i + 3])
    transpose = jax.linear_transpose(lambda x: xla_tile.by_diagonal(x, 4, 7), values)
    assert_close(xla_tile.sum_diagonals(square), transpose(square)[0])


ARRAYS = _arrays()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"weights": "tanh"}, ValueError, r"weights: must be one of softmax, .*'tanh'"),
        ({"normalise": False}, ValueError, r"normalise: must be None or True for softmax"),
        (
            {"weights": "sigmoid", "return_lse": True},
            ValueError,
            r"return_lse: .* not normalised",
        ),
        ({"weights": "sigmoid", "sink": SINK}, ValueError, r"sink: .* takes normalise=True"),
        ({"logits_bound": -1.0}, ValueError, r"logits_bound: must be a positive number .* -1.0"),
        ({"logit_bias": jnp.ones(2)}, ValueError, r"logit_bias: must have shape \(\); got \(2,\)"),
        ({"sink": jnp.ones((B, 2, N))}, ValueError, r"sink: must have shape .*\(2, 2, 4\)"),
        ({"relative_bias": jnp.ones((N, 4))}, ValueError, r"relative_bias: must be \[4 or 1, 2 R"),
        ({"relative_bias": jnp.ones((2, 5))}, ValueError, r"relative_bias: .*\(2, 5\)"),
        (
            {"relative_bias": jnp.ones((N, 5)), "query_offset": jnp.zeros(3, int)},
            ValueError,
            r"query_offset: shape \(3,\) does not fit",
        ),
        ({"value": jnp.ones((B, S, 3, V))}, ValueError, r"value: 3 heads do not divide the 4"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        tiled_attention(**(ARRAYS | options))


@pytest.mark.parametrize(
    ("x", "options", "error", "match"),
    [
        (jnp.ones((B, S, N, V)), {}, ValueError, r"x: must be \[B, T, N, V\], as query"),
        (jnp.ones((B, T, N, V), int), {}, TypeError, r"x: must be floating point"),
        (jnp.ones((B, T, N, V)), {"return_lse": True}, TypeError, r"return_lse"),
        (
            jnp.ones((B, T, N, V)),
            {"implementation": "pallas_gpu", "group_size": 19},
            NotImplementedError,
            r"tiled_attention_transposed: .*pallas_gpu.*group_size",
        ),
    ],
)
def test_wrong_arguments_of_the_transpose(x, options, error, match):
    with pytest.raises(error, match=match):
        tiled_attention_transposed(ARRAYS["query"], ARRAYS["key"], x, **options)


def test_examples_run():
    results = doctest.testmod(merge)
    assert results.attempted and not results.failed


def test_wrong_parts():
    out, lse = jnp.ones((1, 2, 1, 3)), jnp.ones((1, 2, 1))
    with pytest.raises(ValueError, match="lses: there must be one for each output"):
        merge_partials([out, out], [lse])
    with pytest.raises(ValueError, match="lses: there must be one"):
        merge_partials([], [])
    with pytest.raises(ValueError, match=r"outs: all must have the shape \(1, 2, 1, 3\); got"):
        merge_partials([out, out[:, :1]], [lse, lse])
    with pytest.raises(ValueError, match=r"lses: all must have the shape \(1, 2, 1\); got"):
        merge_partials([out, out], [lse, lse[:, :1]])
