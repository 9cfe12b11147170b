"""The GPU kernels of tiled attention, in numbers: compiled for a GPU, and emulated on a CPU.

See tests/ptx. Memory that nothing was written to is NaN, and races are errors.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu as hopper
from pallas_kernels import masks
from pallas_kernels.gpu_proved import Proved
from pallas_kernels.tiled import (
    gpu,
    tiled_attention,
    tiled_attention_transposed,
)
from tests.gpu import PRODUCTS_IN_PARTS, compiled, emulated
from tests.numerics import LIMITS, assert_close
from tests.pallas_kernels.tiled.features import (
    FEATURES,
    TABLES,
    Call,
    block_list,
    check_queries_without_keys,
    defined,
    normal,
    poison,
    run_function,
    with_other_ends,
)
from tests.pallas_kernels.tiled.gpu_cases import FEW, TABLE
from tests.pallas_kernels.tiled.test_gpu_compiled import check_kernels
from tests.training import check_training

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_processors")


@pytest.fixture
def few_processors(monkeypatch):
    """Has blocks that are persistent do several items each."""
    monkeypatch.setattr(hopper, "PROCESSORS", FEW)


REFUSED = {
    "groups of 16, alibi, sink, bias, dense, causal": r"no groups of keys \(group_size\)",
    "groups of 128, bounded, lengths, bfloat16": r"no groups of keys \(group_size\)",
    "blocks of 16, statistic of heads, soft cap": "got block_q 16 and block_k 16",
    "blocks of 32 by 64, groups of 8": r"no groups of keys \(group_size\)",
    "blocks of 48 by 96, statistic of a sigmoid, bias of heads": "got block_q 48 and block_k 96",
}


def _kernel(call, seed=0):
    return _run(call, seed)[0]


def _run(call, seed=0):
    """Returns gradients and results, and the kernels."""
    with emulated(seed) as kernels:
        run = run_function(call, "pallas_gpu")
        found = jax.block_until_ready(run(call.arrays, call.options.get("mask")))
    return found, compiled(kernels)


def _check(call, factor=1.0):
    """Compares gradients and results with their definition; returns the kernels."""
    (gradients, results), kernels = _run(call)
    assert results[0].dtype == call.dtype
    assert {x.dtype for x in results[1:]} <= {jnp.dtype("float32")}
    chex.assert_trees_all_equal_dtypes(gradients, call.arrays)
    factor *= PRODUCTS_IN_PARTS if call.dtype == jnp.float32 else 1
    assert_close((gradients, results), defined(call), call.dtype, factor)
    return kernels


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in REFUSED])
def test_results_and_gradients(feature):
    check_kernels(feature, _check(FEATURES[feature]))


@pytest.mark.parametrize(("feature", "reason"), REFUSED.items())
def test_what_the_kernel_lacks_is_refused_by_name(feature, reason):
    call = FEATURES[feature]
    with pytest.raises(NotImplementedError, match=f"tiled_attention: .*'pallas_gpu'.*{reason}"):
        call(call.arrays, implementation="pallas_gpu")


X = normal(0, 1, 32, 2, 16)
WIDE = normal(0, 1, 32, 1, 130)


@pytest.mark.parametrize(
    ("dtype", "most"), [(jnp.float32, 128), (jnp.float16, 256), (jnp.bfloat16, 256)]
)
def test_wide_heads_are_refused_by_name(dtype, most):
    x = jnp.tile(WIDE, 2).astype(dtype)
    reason = f"heads of {jnp.dtype(dtype)} must have at most {most} features; got 260"
    with pytest.raises(NotImplementedError, match=f"tiled_attention: .*'pallas_gpu'.*{reason}"):
        tiled_attention(x, x, x, implementation="pallas_gpu")


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_by_name():
    x = jnp.asarray(X, jnp.float64)
    with pytest.raises(NotImplementedError, match=r"'pallas_gpu'.*it does not compute in float64"):
        tiled_attention(x, x, x, implementation="pallas_gpu")


# Two tiles of weights by 64 columns are more than the registers hold: keys and values apart.
APART = Call(
    {"mask": masks.causal(20)}, queries=70, keys=90, features=130, width=192, dtype=jnp.bfloat16
)
# More tiles than there is space for, and more than one block each way.
LONG = Call(
    {"mask": masks.causal(240), "tile_sizes": None},
    queries=260,
    keys=600,
    heads=1,
    key_heads=1,
    features=64,
    dtype=jnp.bfloat16,
)
STREAMS = block_list(
    64, 64, queries=200, keys=600, longest=6, features=16, dtype=jnp.bfloat16, heads=1, key_heads=1
)


@pytest.mark.parametrize(
    "call",
    [APART, LONG, STREAMS, Call(queries=1, keys=1)],
    ids=["wide heads", "long", "a list for each tile", "one query and one key"],
)
def test_tiles(call):
    _check(call, factor=2)  # a gradient may be one small number, not many


def test_the_same_twice(monkeypatch):
    """Nothing depends on what happens first, or on which block does what.

    But for gradients in one pass, see test_gpu_one_pass.py: that of slopes takes two.
    """
    options = LONG.options | {"alibi_slopes": np.float32([0.5])}
    call = dataclasses.replace(LONG, options=options, queries=300, keys=400)
    found = []
    for seed, processors in enumerate((2, 2, 132)):
        monkeypatch.setattr(hopper, "PROCESSORS", processors)
        found.append(_kernel(call, seed))
    for other in found[1:]:
        chex.assert_trees_all_equal(other, found[0])


def test_what_a_range_hides_may_be_anything():
    """NaN beyond lengths and ranges changes no bit of results and gradients."""
    lengths = FEATURES["soft cap, bias of keys, lengths, fewer key heads"].options["mask"]
    call = Call({"mask": lengths}, batch=2, heads=1, key_heads=1, dtype=jnp.bfloat16)
    hidden, poisoned = poison(call)
    with emulated():
        run = run_function(call, "pallas_gpu")
        clean, result = (
            jax.block_until_ready(run(x, call.options["mask"])) for x in (call.arrays, poisoned)
        )
    chex.assert_trees_all_equal(result, clean)
    for name, rows in hidden.items():
        np.testing.assert_array_equal(clean[0][name][rows], 0)


def test_what_stands_behind_the_end_of_a_list_may_be_anything():
    call = FEATURES["blocks of 128, of key heads, one idle, sigmoid, bfloat16"]
    with emulated():
        run = jax.jit(lambda arrays, mask: call(arrays, mask=mask, implementation="pallas_gpu"))
        clean, *others = (
            jax.block_until_ready(run(call.arrays, mask))
            for mask in with_other_ends(call.options["mask"])
        )
    for other in others:
        chex.assert_trees_all_equal(other, clean)


@pytest.mark.parametrize(("hide", "sink"), [("mask", None), ("bias", np.float32([-1, 3]))])
def test_a_query_without_keys(hide, sink):
    with emulated():
        check_queries_without_keys("pallas_gpu", hide, sink)


def test_a_nan_that_is_seen_shows():
    call = Call({"mask": masks.causal()}, heads=1, key_heads=1)
    arrays = call.arrays
    arrays["key"] = arrays["key"].at[0, 140].set(jnp.nan)
    with emulated():
        run = jax.jit(lambda x: call(x, implementation="pallas_gpu")[0])
        out = jax.block_until_ready(run(arrays))
    np.testing.assert_array_equal(jnp.isnan(out).any((0, 2, 3)), np.arange(call.queries) >= 140)


def test_logits_of_ten_thousand():
    # Integers, so that products of parts are exact.
    call = Call({"scale": 1.0}, heads=1, key_heads=1)
    arrays = call.arrays
    arrays |= {name: jnp.round(25 * arrays[name]) for name in ("query", "key")}
    assert jnp.abs(jnp.einsum("btnh,bsnh->bnts", arrays["query"], arrays["key"])).max() > 1e4
    with emulated():
        actual = jax.block_until_ready(run_function(call, "pallas_gpu")(arrays, None))
    chex.assert_tree_all_finite(actual)
    expected = run_function(call, "reference")(arrays, None)
    assert_close(actual[1], expected[1], factor=PRODUCTS_IN_PARTS)
    # Of weights, exp(logit - lse), the backward can know no more than lse holds: 24 bits of 1e4.
    assert_close(actual[0], expected[0], factor=1e4 * 2**-24 / LIMITS["float32"])


@pytest.mark.parametrize("name", TABLES)
def test_relative_bias(name):
    kernels = _check(TABLES[name], factor=2)
    if name == TABLE:
        check_kernels(name, kernels)


def test_relative_bias_of_more_keys_than_there_is_space_for():
    x = jax.ShapeDtypeStruct((1, 30_000, 1, 64), jnp.bfloat16)

    def loss(table, x):
        return tiled_attention(x, x, x, relative_bias=table, implementation="pallas_gpu").sum()

    reason = "30000 keys and heads of bfloat16 of 64 features there is no space in shared memory"
    with pytest.raises(NotImplementedError, match=f"gradient of relative_bias with {reason}"):
        jax.eval_shape(jax.grad(loss), jax.ShapeDtypeStruct((1, 5), jnp.float32), x)


def test_transposed_application():
    query, key, x = (normal(seed, 1, 70, 2, 16) for seed in range(3))

    def loss(implementation, *arrays):
        options = {"implementation": implementation, "mask": masks.causal()}
        return jnp.sum(jnp.sin(tiled_attention_transposed(*arrays, **options)))

    gradient = jax.value_and_grad(loss, argnums=(1, 2, 3))
    with emulated():
        actual = jax.block_until_ready(
            jax.jit(gradient, static_argnums=0)("pallas_gpu", query, key, x)
        )
    assert_close(actual, gradient("reference", query, key, x), factor=PRODUCTS_IN_PARTS)


def test_vmap():
    arrays = [normal(seed, 2, 1, 70, 2, 16, dtype=jnp.bfloat16) for seed in range(3)]

    def attend(implementation):
        call = functools.partial(tiled_attention, implementation=implementation)
        return jax.jit(jax.vmap(call))

    with emulated():
        actual = jax.block_until_ready(attend("pallas_gpu")(*arrays))
    expected = attend("reference")(*(x.astype(jnp.float32) for x in arrays))
    assert_close(actual, expected, jnp.bfloat16)


def test_a_language_model_trains():
    """Sharded over batch and heads: the steps on the kernels are the steps on plain JAX."""
    with emulated():
        check_training("softmax_attention", 4, length=40, layers=1, steps=2)


def test_none_chooses_what_has_passed_on_a_gpu(monkeypatch):
    """On a GPU; on a CPU the kernels are never traced."""

    def traced(*_):
        raise AssertionError("the GPU kernel is traced")

    monkeypatch.setattr(gpu, "forward", traced)
    call = Call({"mask": masks.causal(), "alibi_slopes": np.float32([0.5, 0.1])})

    def lowered(platform):
        jax.clear_caches()
        run = jax.jit(lambda arrays: call(arrays))
        return run.trace(call.arrays).lower(lowering_platforms=(platform,))

    lowered("cuda")
    parts = call.parts
    monkeypatch.setattr(Proved, "parts", lambda _: parts)
    with pytest.raises(AssertionError, match="the GPU kernel is traced"):
        lowered("cuda")
    lowered("cpu")
    monkeypatch.setattr(Proved, "parts", lambda _: parts - {"slopes"})
    lowered("cuda")
    jax.clear_caches()


def test_parts_of_a_call():
    """Whatever makes a kernel another one has a name of its own."""
    parts = {name: call.parts for name, call in FEATURES.items() if name not in REFUSED}
    assert len(set(parts.values())) == len(parts)
    blocks = parts["blocks of 128, of key heads, one idle, sigmoid, bfloat16"]
    assert {"mask: blocks of 128 by 128", "bfloat16", "sigmoid", "grouped heads"} <= blocks
    assert {"bias of pairs", "gradient of bias"} <= parts["everything"]
    assert "gradient of bias" not in blocks
