"""Tiled attention in two passes: a row statistic, and weights that are made with it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import masks
from pallas_kernels.partition import axes
from pallas_kernels.tiled import tiled_attention, tiled_attention_transposed
from tests.numerics import assert_close
from tests.oracles import tiled_attention as oracle
from tests.sharding import collectives, mesh, place

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, S, N, K, H, V = 2, 13, 19, 4, 2, 8, 6
TILES = (5, 8)  # neither divides its length
IMPLEMENTATIONS = ("xla", "reference")
LEARNED = ("row_statistic", "bias", "alibi_slopes", "logit_bias")


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(queries=T, keys=S, dtype=jnp.float32):
    return {
        "query": _normal(0, B, queries, N, H, dtype=dtype),
        "key": _normal(1, B, keys, K, H, dtype=dtype),
        "value": _normal(2, B, keys, K, V, dtype=dtype),
    }


@functools.cache
def _compiled(implementation, function):
    def loss(arrays):
        results = jax.tree.leaves(function(arrays, implementation))
        finite = (jnp.where(jnp.isneginf(x), 0, x.astype(jnp.float32)) for x in results)
        return sum(jnp.vdot(x, _normal(3 + x.ndim, *x.shape)) for x in finite), results

    return jax.jit(jax.grad(loss, has_aux=True))


def _results(implementation, function, arrays):
    """Returns the results of a function of the arrays and an implementation, and gradients."""
    gradients, results = _compiled(implementation, function)(arrays)
    return results, gradients


def _call(arrays, implementation, **options):
    options |= {"implementation": implementation, "tile_sizes": TILES}
    return tiled_attention(**arrays, **options, return_lse="reweight" in options)


def _defined(arrays, mask=None, **options):
    allowed = None if mask is None else mask.to_dense(T, S)
    out, lse = oracle.tiled_attention(**arrays, **options, allowed=allowed)
    return [out, lse] if "reweight" in options else [out]


OFFSET = np.array([3, 8])
CASES = {
    "softmax": {"normalise": False, "row_statistic": 1 + _normal(5, B, T, N)},
    "sigmoid": {"weights": "sigmoid", "row_statistic": _normal(5, 1, T, N)},
    "softplus, everything": {
        "weights": "softplus",
        "row_statistic": _normal(5, B, 1, N),
        "scale": 0.7,
        "logits_soft_cap": 3.0,
        "logit_bias": -0.5,
        "bias": _normal(6, 1, N, T, S),
        "mask": masks.causal(OFFSET) & masks.window(9, None, OFFSET),
    },
    "reweighted softplus": {
        "weights": "softplus",
        "row_statistic": -0.3 + 0.1 * _normal(5, B, T, N),
        "reweight": (3.0, 0.5),
        "mask": masks.causal(-2),
    },
    "reweighted relu, everything": {
        "weights": "relu",
        "row_statistic": -1 + 0.1 * _normal(5, 1, T, N),
        "reweight": (1, 0.5),
        "bias": _normal(6, B, 1, T, S),
        "alibi_slopes": np.array([0.1, 0.05, 0.0, 0.0], np.float32),
        "query_offset": OFFSET,
        "mask": masks.causal(OFFSET),
    },
    "reweighted softmax": {"row_statistic": 1 + 0.1 * _normal(5, N), "reweight": (2.5, 0.0)},
}


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case):
    options = dict(CASES[case])
    arrays = _arrays()
    arrays |= {name: jnp.asarray(options.pop(name)) for name in LEARNED if name in options}
    expected = _defined(arrays, **options)
    function = functools.partial(_call, **options)
    (results, gradients), defined = (_results(name, function, arrays) for name in IMPLEMENTATIONS)
    assert_close(results, expected)
    assert_close(defined[0], expected)
    assert_close(gradients, defined[1], factor=2)


def _decayed(arrays, implementation, mask=None):
    """Attention with a decay after the softmax: the log-sum-exp has no decay, the scores do."""
    query, key, value, decay = (arrays[name] for name in ("query", "key", "value", "decay"))
    call = functools.partial(
        tiled_attention,
        query,
        key,
        value,
        mask=mask,
        implementation=implementation,
        tile_sizes=TILES,
    )
    lse = call(return_lse=True)[1]
    return call(bias=jnp.log(decay), row_statistic=lse)


def test_decay_after_softmax():
    """For large logits too, and with gradients that go through both calls."""
    mask = masks.causal(-2)
    arrays = _arrays() | {"decay": jnp.exp(-jnp.abs(_normal(8, N, T, S)))}
    arrays["query"] *= 10

    def direct(arrays, _):
        key, value = (jnp.repeat(arrays[name], N // K, axis=2) for name in ("key", "value"))
        scores = jnp.einsum("btnh,bsnh->bnts", arrays["query"], key) / np.sqrt(H)
        allowed = mask.to_dense(T, S)
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e9)) * arrays["decay"]
        return jnp.einsum("bnts,bsnv->btnv", jnp.where(allowed, weights, 0), value)

    function = functools.partial(_decayed, mask=mask)
    expected = _results("", direct, arrays)
    for implementation in IMPLEMENTATIONS:
        # Products in another order: large logits differ in their last digits.
        assert_close(_results(implementation, function, arrays), expected, factor=5)
    out = _decayed(arrays | {"decay": jnp.ones(1)}, "xla", mask)
    plain = {name: x for name, x in arrays.items() if name != "decay"}
    assert_close(out, tiled_attention(**plain, mask=mask), factor=5)


def _reweighted(arrays, implementation, reweight=(3.0, 1.0), mask=None):
    """Weights relative to the mean of a row of all keys, reweighted."""
    call = functools.partial(
        tiled_attention,
        **arrays,
        weights="softplus",
        mask=mask,
        return_lse=True,
        implementation=implementation,
        tile_sizes=TILES,
    )
    statistic = call()[1] - np.log(S)
    return call(row_statistic=statistic, reweight=reweight)


def test_reweighted_by_the_mean():
    arrays, power = _arrays(), 15.0
    options = {"weights": "softplus", "reweight": (power, 1.0)}
    _, lse = oracle.tiled_attention(**arrays, weights="softplus")
    expected = oracle.tiled_attention(**arrays, **options, row_statistic=lse - np.log(S))
    function = functools.partial(_reweighted, reweight=options["reweight"])
    (results, gradients), defined = (_results(name, function, arrays) for name in IMPLEMENTATIONS)
    # A relative error of a weight grows by w / (w - 1), and with the power.
    assert_close(results, list(expected), factor=1 + power)
    assert_close((results, gradients), defined, factor=1 + power)


def test_limits_of_reweighting():
    arrays = _arrays()
    reweighted = jax.jit(_reweighted, static_argnums=(1, 2))
    out = reweighted(arrays, None, (1.0, 0.0))[0]
    assert_close(out, tiled_attention(**arrays, weights="softplus"))
    matrix, _ = oracle.tiled_weights(arrays["query"], arrays["key"])
    largest = np.argmax(matrix, axis=-1)
    value = np.repeat(arrays["value"], N // K, axis=2)
    expected = np.stack([value[b, largest[b].T, np.arange(N)] for b in range(B)])
    assert_close(reweighted(arrays, None, (1e4, 1.0))[0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reweight", [None, (15.0, 1.0), (0.5, 0.0)])
def test_empty_rows(implementation, reweight):
    """Of weights that are barely above the offset, of a statistic of -inf, and of no keys."""
    arrays = _arrays()
    arrays["query"] = arrays["query"].at[:, 3:5].set(0)
    equal = np.log(np.log(2))
    statistic = jnp.zeros((B, T, N)).at[:, 5].set(-jnp.inf)
    arrays["row_statistic"] = statistic.at[:, 3].set(equal - 5e-6).at[:, 4].set(equal - 2e-5)
    allowed = jnp.ones((T, S), bool).at[7].set(False)
    options = {"weights": "softplus", "mask": masks.dense(allowed)}
    if reweight is not None:
        options["reweight"] = reweight
    results, gradients = _results(implementation, functools.partial(_call, **options), arrays)
    rows = [5, 7] if reweight is None or reweight[1] == 0 else [3, 5, 7]
    np.testing.assert_array_equal(results[0][:, rows], 0)
    assert (results[0][:, 4] != 0).all()
    if reweight is not None:
        np.testing.assert_array_equal(results[1][:, rows], -np.inf)
    for name in ("query", "row_statistic"):
        np.testing.assert_array_equal(gradients[name][:, rows], 0)
        assert (gradients[name][:, :3] != 0).any()
    chex.assert_tree_all_finite((results[0], gradients))


def test_weights_that_nearly_vanish():
    """Scores of any size leave gradients finite: an excess may be the smallest number there is."""
    arrays = _arrays()
    arrays["query"] = arrays["query"] * jnp.logspace(0, 4, T)[:, None, None]
    function = functools.partial(_reweighted, reweight=(1.0, 0.0))
    (out, _), gradients = _results("xla", function, arrays)
    chex.assert_tree_all_finite((out, gradients))
    assert (gradients["query"][:, 0] != 0).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    arrays = _arrays(dtype=dtype) | {"decay": jnp.exp(-jnp.abs(_normal(8, N, T, S)))}
    out, gradients = _results("xla", _decayed, arrays)
    assert out[0].dtype == dtype
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    exact = _results("reference", _decayed, jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    assert_close((out, gradients), exact, dtype=dtype)


def test_transposed():
    arrays = {name: x for name, x in _arrays().items() if name != "value"}
    arrays |= {"x": _normal(8, B, T, N, V), "row_statistic": _normal(5, B, T, N)}
    options = {"weights": "softplus", "reweight": (2.0, 0.5)}

    def function(arrays, implementation):
        return tiled_attention_transposed(
            **arrays, **options, implementation=implementation, tile_sizes=TILES
        )

    scored = {name: x for name, x in arrays.items() if name != "x"}
    matrix, _ = oracle.tiled_weights(**scored, **options)
    expected = np.einsum("bnts,btnv->bsnv", matrix, np.asarray(arrays["x"], np.float64))
    expected = expected.reshape(B, S, K, N // K, V).sum(3)
    (results, gradients), defined = (_results(name, function, arrays) for name in IMPLEMENTATIONS)
    assert_close(results, [expected])
    assert_close(defined[0], [expected])
    assert_close(gradients, defined[1], factor=2)


def test_vmap_of_statistics():
    arrays = _arrays()
    statistics = _normal(5, 3, T, N)

    def results(statistic):
        call = functools.partial(tiled_attention, **arrays, weights="softplus", reweight=(2.0, 0.5))
        out, vjp = jax.vjp(lambda x: call(row_statistic=x), statistic[None])
        return out, vjp(out)

    one = jax.jit(results)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *map(one, statistics))
    assert_close(jax.jit(jax.vmap(results))(statistics), expected)


def test_sharded():
    """Over batch and heads; one all-reduce, for the gradient of a statistic without a batch."""
    batch = 4
    arrays = (
        _normal(0, batch, T, N, H),
        _normal(1, batch, S, K, H),
        _normal(2, batch, S, K, V),
        _normal(5, 1, T, N),
    )

    def gradients(*arrays):
        def loss(*arrays):
            *arrays, statistic = arrays
            call = functools.partial(
                tiled_attention, *arrays, weights="softplus", row_statistic=statistic
            )
            return (call() ** 2).sum() + (call(reweight=(2.0, 0.5)) ** 2).sum()

        return jax.grad(loss, (0, 1, 2, 3))(*arrays)

    expected = jax.jit(gradients)(*arrays)
    devices = mesh(AxisType.Auto)
    specs = (("data", None, "tensor"),) * 3 + ((None, None, "tensor"),)
    with axes(batch="data", heads="tensor"):
        placed = [place(devices, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
        assert_close(jax.jit(gradients)(*placed), expected)
        assert set(collectives(gradients, *placed)) <= {"all-reduce"}


@pytest.mark.optimized
def test_memory():
    """No matrix of scores is held, not of one head."""

    def gradients(query, key, value):
        def loss(query, key, value):
            arrays = {"query": query, "key": key, "value": value}
            return sum(x.sum() for x in _reweighted(arrays, None, mask=masks.causal()))

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    x = jax.ShapeDtypeStruct((1, 16384, 2, 16), jnp.float32)
    memory = jax.jit(gradients).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert memory < 16384**2


STATISTIC = {"row_statistic": jnp.zeros((B, T, N))}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"row_statistic": jnp.zeros((B, T))},
            ValueError,
            r"row_statistic: must have shape \(4,\), or .*; got \(2, 13\)",
        ),
        ({"reweight": (2.0, 1.0)}, ValueError, r"reweight: .* a row_statistic .*; got none"),
        (
            STATISTIC | {"reweight": (0.0, 1.0)},
            ValueError,
            r"reweight: .* power > 0 and offset >= 0; got \(0.0, 1.0\)",
        ),
        (STATISTIC | {"reweight": 3.0}, ValueError, r"reweight: must be two numbers .* got 3.0"),
        (STATISTIC | {"normalise": True}, ValueError, r"normalise: must be None or False.*True"),
        (
            STATISTIC | {"normalise": False, "reweight": (2.0, 1.0)},
            ValueError,
            r"normalise: must be None or True.*False",
        ),
        (STATISTIC | {"return_lse": True}, ValueError, r"return_lse: .* not normalised"),
        (STATISTIC | {"sink": jnp.zeros(N)}, ValueError, r"sink: .* takes normalise=True"),
        (
            STATISTIC | {"sink": jnp.zeros(N), "reweight": (2.0, 1.0)},
            ValueError,
            r"sink: belongs to the call that the row_statistic comes from",
        ),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        tiled_attention(**_arrays(), **options)
