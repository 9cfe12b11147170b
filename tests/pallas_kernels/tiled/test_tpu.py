"""The TPU kernel of tiled attention, in numbers: on a CPU, in Pallas's TPU interpret mode.

There memory that nothing was written to is NaN, a copy arrives when it is waited for and not
before, reads beyond an array's end and races are errors.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention, tiles, tpu, tpu_backward
from tests.numerics import LIMITS, assert_close
from tests.pallas_kernels.tiled.features import (
    FEATURES,
    SHARDED,
    Call,
    block_list,
    check_queries_without_keys,
    defined,
    normal,
    poison,
    run_function,
    run_sharded,
    with_other_ends,
)
from tests.tpu import interpreted

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _kernel(call, **params):
    with interpreted(**params):
        run = run_function(call, "pallas_tpu")
        return jax.block_until_ready(run(call.arrays, call.options.get("mask")))


def _check(call, factor=1.0, actual=None):
    gradients, results = actual or _kernel(call)
    assert results[0].dtype == call.dtype
    assert {x.dtype for x in results[1:]} <= {jnp.dtype("float32")}
    chex.assert_trees_all_equal_dtypes(gradients, call.arrays)
    assert_close((gradients, results), defined(call), call.dtype, factor)


@functools.cache
def _kernel_of(feature):
    return _kernel(FEATURES[feature])


@pytest.mark.parametrize("feature", FEATURES)
def test_results_and_gradients(feature):
    _check(FEATURES[feature], actual=_kernel_of(feature))


def test_one_query_and_one_key():
    _check(Call(queries=1, keys=1), factor=2)  # a gradient may be one small number, not many


DEFAULT_TILES = Call(
    {"mask": masks.causal(900), "tile_sizes": None}, queries=1200, keys=2100, heads=1, key_heads=1
)
ODD_TILES = Call({"mask": masks.causal(), "tile_sizes": (33, 500)}, keys=600)


@pytest.mark.parametrize("call", [DEFAULT_TILES, ODD_TILES], ids=["default", "odd"])
def test_tile_sizes(call):
    _check(call)


@pytest.fixture
def generation_6(monkeypatch):
    """Makes the kernels those of v6e: other tiles, and sums that are kept transposed."""
    asked = []

    def generation():
        asked.append(True)
        return 6

    monkeypatch.setattr(tiles, "generation", generation)
    jax.clear_caches()
    yield
    assert asked
    jax.clear_caches()


@pytest.mark.usefixtures("generation_6")
@pytest.mark.parametrize(
    "feature",
    [
        "everything",
        "blocks of 128 by 256, relu, sink, bias, dense",
        "default tiles",
    ],
)
def test_generation_6(feature):
    _check(FEATURES.get(feature, DEFAULT_TILES))


SLOPED = Call(
    {
        "mask": masks.causal(-20),
        "alibi_slopes": np.float32([0.5, 0.2]),
        "bias": normal(5, 600, 500),
        "row_statistic": normal(6, 1, 600, 2),
    },
    queries=600,
    keys=500,
)
LISTED = block_list(128, 128, queries=600, heads=2, key_heads=1)


@pytest.mark.parametrize(
    ("call", "fixture"),
    [(SLOPED, None), (LISTED, None), (SLOPED, "generation_6")],
    ids=["rows", "blocks", "generation 6"],
)
def test_spans_of_queries(call, fixture, request, monkeypatch):
    """A kernel holds the gradients of so many queries only, so it is called several times."""
    if fixture is not None:
        request.getfixturevalue(fixture)
    spans = []

    def recorded(*args, original=tpu_backward._call):
        spans.append((args[2].column_tiles, args[5]))
        return original(*args)

    monkeypatch.setattr(tpu_backward, "SPAN_BYTES", 2**18)
    monkeypatch.setattr(tpu_backward, "_call", recorded)
    jax.clear_caches()
    _check(call, factor=2)  # a gradient of slopes is two numbers, sums of terms of either sign
    jax.clear_caches()
    assert spans in ([(3, 2)], [(5, 3)])


@pytest.mark.parametrize(
    "feature",
    [
        "alibi with offsets, causal, segments of one sequence, grouped",
        "blocks of 128, of key heads and batch, segments of heads",
    ],
)
def test_the_order_of_the_grid_does_not_matter(feature):
    """What is summed over tiles of a grid must not be called parallel."""
    # A seed is an order of the parallel dimensions; without one it is the plain one.
    actual = _kernel(FEATURES[feature], random_seed=1)
    chex.assert_trees_all_equal(actual, _kernel_of(feature))


def test_what_a_range_hides_may_be_anything():
    """NaN beyond lengths and ranges changes no bit of results and gradients."""
    call = FEATURES["soft cap, bias of keys, lengths, fewer key heads"]
    mask, arrays = call.options["mask"], call.arrays
    hidden, poisoned = poison(call)
    with interpreted():
        run = run_function(call, "pallas_tpu")
        clean, result = (jax.block_until_ready(run(x, mask)) for x in (arrays, poisoned))
    chex.assert_trees_all_equal(result, clean)
    for name, rows in hidden.items():
        np.testing.assert_array_equal(clean[0][name][rows], 0)


def test_what_stands_behind_the_end_of_a_list_may_be_anything():
    call = FEATURES["blocks of 128, of key heads, one idle, sigmoid, bfloat16"]
    mask = call.options["mask"]
    with interpreted():
        run = run_function(call, "pallas_tpu")
        clean, *others = (run(call.arrays, mask) for mask in with_other_ends(mask))
    for other in others:
        chex.assert_trees_all_equal(other, clean)


def test_a_nan_that_is_seen_shows():
    call = Call({"mask": masks.causal()}, batch=2)
    arrays = call.arrays
    arrays["key"] = arrays["key"].at[0, 140].set(jnp.nan)
    with interpreted():
        run = jax.jit(lambda x: call(x, implementation="pallas_tpu")[0])
        out = jax.block_until_ready(run(arrays))
    sees = (np.arange(call.queries) >= 140) & np.array([[True], [False]])
    np.testing.assert_array_equal(jnp.isnan(out).any((2, 3)), sees)


@pytest.mark.parametrize(("hide", "sink"), [("mask", None), ("bias", np.float32([-1, 3]))])
def test_a_query_without_keys(hide, sink):
    with interpreted():
        check_queries_without_keys("pallas_tpu", hide, sink)


@pytest.mark.parametrize("weights", ["softmax", "softplus"])
def test_logits_of_ten_thousand(weights):
    # Integers, so that logits are exact. Of weights, exp(logit - lse), the backward can know no
    # more than lse holds: 24 bits of 1e4.
    call = Call({"weights": weights, "scale": 1.0})
    arrays = call.arrays
    arrays |= {name: jnp.round(25 * arrays[name]) for name in ("query", "key")}
    assert jnp.abs(jnp.einsum("btnh,bsnh->bnts", arrays["query"], arrays["key"])).max() > 1e4
    with interpreted():
        actual = jax.block_until_ready(run_function(call, "pallas_tpu")(arrays, None))
    chex.assert_tree_all_finite(actual)
    expected = run_function(call, "reference")(arrays, None)
    assert_close(actual[1], expected[1])
    assert_close(actual[0], expected[0], factor=1e4 * 2**-24 / LIMITS["float32"])


def test_sharded():
    """Over eight devices, each with its part of batch and heads."""
    call = SHARDED
    expected = defined(call)
    with interpreted():
        assert_close(run_sharded(call, "pallas_tpu"), expected)


X = normal(0, 1, 32, 2, 16)
LISTS = masks.blocks(np.zeros((1, 1, 2, 1), int), np.ones((1, 1, 2), int), 16, 16)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"relative_bias": jnp.ones((1, 3)), "mask": LISTS},
            "with a relative_bias, blocks of a list must be multiples of 128 tokens",
        ),
        (
            {"mask": masks.blocks(np.zeros((1, 1, 2, 1), int), np.ones((1, 1, 2), int), 24, 16)},
            "blocks of a list must be multiples of 16 tokens; got block_q 24 and block_k 16",
        ),
        (
            {"mask": LISTS & masks.dense(np.ones((32, 32), bool))},
            "with a bias or dense mask over queries and keys, blocks of a list must be multiples "
            "of 128 tokens; got block_q 16 and block_k 16",
        ),
    ],
)
def test_what_the_kernel_lacks_is_refused_by_name(options, reason):
    with pytest.raises(NotImplementedError, match=f"tiled_attention: .*'pallas_tpu'.*{reason}"):
        tiled_attention(X, X, X, **options, implementation="pallas_tpu")
    # Whoever does not ask for it gets another one.
    chex.assert_tree_all_finite(tiled_attention(X, X, X, **options))


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_by_name():
    x = jnp.asarray(X, jnp.float64)
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*it does not compute in float64"):
        tiled_attention(x, x, x, implementation="pallas_tpu")


def test_a_gradient_that_the_kernel_lacks_is_refused_by_name(monkeypatch):
    def supports(*, gradients=(), **_):
        return "it has no gradient of bias" if "bias" in gradients else None

    monkeypatch.setattr(tpu, "supports", supports)

    def loss(bias):
        return tiled_attention(X, X, X, bias=bias, implementation="pallas_tpu").sum()

    with interpreted(), pytest.raises(NotImplementedError, match=r"it has no gradient of bias"):
        jax.grad(loss)(jnp.zeros((1, 2, 32, 32)))


def test_a_user_without_tpu_never_traces_the_kernel(monkeypatch):
    def traced(*_):
        raise AssertionError("the TPU kernel is traced")

    monkeypatch.setattr(tpu, "forward", traced)
    monkeypatch.setattr(tpu, "backward", traced)
    jax.clear_caches()

    def loss(query):
        return tiled_attention(query, X, X).sum()

    gradient = jax.jit(jax.value_and_grad(loss))
    chex.assert_tree_all_finite(gradient(X))
    with pytest.raises(AssertionError, match="the TPU kernel is traced"):
        gradient.trace(X).lower(lowering_platforms=("tpu",))
    jax.clear_caches()
