"""The backward of tiled attention in one pass, on an emulated GPU, and what its blocks do."""

import contextlib
import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, masks
from pallas_kernels.tiled import gpu_one_pass, gpu_tuned
from tests.gpu import compiled, emulated
from tests.numerics import assert_close
from tests.pallas_kernels.tiled.features import Call, block_list, defined, run_function

pytestmark = pytest.mark.usefixtures("quick_compilation", "nothing_traced")


@pytest.fixture
def nothing_traced():
    """Traces anew: neither the number of processors nor a configuration is an argument."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def _call(features, dtype=jnp.bfloat16, keys=400, key_heads=1, width=None, **options):
    options = {"tile_sizes": None} | options
    shape = dict(queries=300, keys=keys, heads=2, key_heads=key_heads)
    return Call(options, **shape, features=features, width=width, dtype=dtype)


CALLS = {
    "64 features": _call(64),
    "128 features": _call(128, key_heads=2),
    "64 features, causal, float16": _call(64, jnp.float16, mask=masks.causal(100)),
    "100 features, causal": _call(100, mask=masks.causal(-40)),
    "128 features, narrow values, window": _call(128, keys=300, width=64, mask=masks.window(50, 9)),
    "128 features, sigmoid": _call(128, weights="sigmoid"),
    "a list for each head": block_list(
        128, 128, queries=400, keys=600, longest=3, features=100, dtype=jnp.bfloat16
    ),
}


AGAIN = {"128 features", "64 features, causal, float16", "a list for each head"}
"""Of these all happens in another order, too, which changes no bit."""


def _run(call, seed=0):
    """Returns gradients and results, and the kernels."""
    with emulated(seed) as kernels:
        run = run_function(call, "pallas_gpu")
        found = jax.block_until_ready(run(call.arrays, call.options.get("mask")))
    return found, compiled(kernels)


@pytest.mark.parametrize(
    ("name", "processors"),
    [*((name, 3) for name in CALLS), ("128 features", 132), ("64 features, causal, float16", 132)],
)
def test_gradients(name, processors, monkeypatch):
    """With several shares of a head's keys, of several tiles each, or one tile."""
    monkeypatch.setattr(gpu, "PROCESSORS", processors)
    call = CALLS[name]
    found, kernels = _run(call)
    assert_close(found, defined(call), call.dtype, factor=2)
    assert [kernel.kernel for kernel in kernels] == ["tiled_backward_keys", "tiled_forward"]
    assert not any(kernel.spill_bytes or kernel.serialized for kernel in kernels)
    if processors == 3 and name in AGAIN:
        chex.assert_trees_all_equal(_run(call, seed=1)[0], found)


@pytest.mark.parametrize(
    ("batch", "heads", "blocks", "count"),
    [
        # Some of them wait for a second turn, or there are too few.
        (8, 16, 16, 1),
        (4, 16, 32, 2),
        (1, 16, 256, 8),
        (25, 8, 16, 8),
        (1, 1, 4, 4),
        (1, 4, 256, None),
        (1, 133, 2, 2),
    ],
)
def test_shares_leave_no_processor_idle(batch, heads, blocks, count):
    found = gpu_one_pass.shares(batch, heads, blocks)
    assert (found and found.count) == count
    if found:
        assert found.grid == {"head": heads, "share": count, "batch": batch}


@pytest.mark.parametrize("library", (np, jnp))
def test_first_visits(library):
    """Each share's first tile of keys to visit a tile of queries writes, the others add."""
    rng = np.random.default_rng(0)
    batch, heads, blocks, tiles, count = 2, 3, 7, 5, 3
    visits = rng.random((batch, heads, blocks, tiles)) < 0.3
    number = np.sort(np.where(visits, np.arange(tiles), 99))
    entries = np.where(number < 99, 2 * number + rng.integers(0, 2, number.shape), 0)
    schedule = np.concatenate([visits.sum(-1, keepdims=True), entries], -1).astype(np.int32)
    schedule = library.asarray(schedule)
    first = gpu_one_pass.first_visits(schedule, tiles, count)
    marked = np.asarray(gpu_one_pass.with_first(schedule, first))
    assert isinstance(first, np.ndarray) == (library is np)
    np.testing.assert_array_equal(marked[..., 0], schedule[..., 0])

    sums = np.full((count, batch, tiles, heads), np.nan)
    expected = np.zeros((batch, tiles, heads))
    for b, n, block in np.ndindex(batch, heads, blocks):
        for i in range(schedule[b, n, block, 0]):
            entry, before = marked[b, n, block, 1 + i], schedule[b, n, block, 1 + i]
            tile = entry >> 2
            assert 2 * tile + (entry & 1) == before
            place, value = (block % count, b, tile, n), 1.5**block
            sums[place] = value + (0 if entry & 2 else sums[place])
            expected[b, tile, n] += value
    sums = jnp.asarray(np.repeat(sums, 4, axis=2)[..., None]).reshape(-1, 4 * tiles, heads, 1)
    total = gpu_one_pass.total(sums, first, 4)
    np.testing.assert_allclose(total[..., 0], np.repeat(expected, 4, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("tried", "queries", "kernels"),
    [
        ({}, 300, ["keys"]),
        ({"backward_keys": gpu_tuned.Config(128, True, one_pass=True)}, 300, ["keys"]),
        # Measured, or to be measured, as two passes; half a tile of queries is none.
        ({"backward_keys": gpu_tuned.Config(128, True)}, 300, ["queries", "keys"]),
        ({"backward_queries": gpu_tuned.Config(128, True)}, 300, ["queries", "keys"]),
        ({"backward_keys": gpu_tuned.Config(64, True, one_pass=True)}, 300, ["queries", "keys"]),
        ({}, 64, ["queries", "keys"]),
    ],
)
def test_when_there_are_two_passes(tried, queries, kernels, monkeypatch):
    call = dataclasses.replace(CALLS["64 features"], queries=queries)
    with contextlib.ExitStack() as stack:
        for kernel, config in tried.items():
            stack.enter_context(gpu_tuned.trying(kernel, config))
        gradient = jax.grad(lambda x: call.loss(x, implementation="pallas_gpu")[0])
        text = str(jax.make_jaxpr(gradient)(call.arrays))
    found = re.findall(r"name=tiled_backward_(\w+)", text)
    assert found == kernels
