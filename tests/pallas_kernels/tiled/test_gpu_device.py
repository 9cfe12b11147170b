"""The GPU kernels of tiled attention on a GPU: what has passed is what is chosen there.

`make test-gpu ARGS=--write-proved` writes the names of the parts of all calls that passed, see
`pallas_kernels.gpu_proved` and tests/on_gpu.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu as hopper
from pallas_kernels import masks
from pallas_kernels.tiled.gpu_proved import PROVED  # noqa: F401
from tests.gpu import PRODUCTS_IN_PARTS
from tests.numerics import assert_close
from tests.pallas_kernels.tiled.features import (
    FEATURES,
    TABLES,
    Call,
    block_list,
    check_queries_without_keys,
    defined,
    poison,
    run_function,
)
from tests.pallas_kernels.tiled.test_gpu import APART, LONG, REFUSED, STREAMS
from tests.pallas_kernels.tiled.test_gpu_one_pass import CALLS as ONE_PASS
from tests.training import check_training

pytestmark = pytest.mark.gpu


def _plain(features, dtype, mask=None):
    options = {} if mask is None else {"mask": mask}
    return Call({"tile_sizes": None, **options}, 2, 1000, 1100, features=features, dtype=dtype)


CALLS = (
    {name: call for name, call in FEATURES.items() if name not in REFUSED}
    | TABLES
    | {"wide heads": APART, "long": LONG, "a list for each tile": STREAMS}
    | {f"one pass, {name}": call for name, call in ONE_PASS.items()}
    | {
        f"{jnp.dtype(dtype).name}, {features} features": _plain(features, dtype)
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        for features in (32, 64, 128, 192, 256)
        if dtype != jnp.float32 or features <= 128
    }
    | {
        f"{name}, bfloat16": _plain(64, jnp.bfloat16, mask)
        for name, mask in {
            "causal": masks.causal(100),
            "window": masks.window(200, 0, 100),
            "lengths": masks.lengths(key=np.array([900, 1100])),
        }.items()
    }
    | {
        f"lists of {q} by {k}": block_list(
            q, k, queries=1024, keys=1024, features=64, dtype=jnp.bfloat16
        )
        for q in (64, 128)
        for k in (64, 128)
    }
)


def parts(name):
    """Returns the parts of a call."""
    return CALLS[name].parts


def _run(call):
    run = run_function(call, "pallas_gpu")
    return run, jax.block_until_ready(run(call.arrays, call.options.get("mask")))


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name, monkeypatch):
    call = CALLS[name]
    run, (gradients, results) = _run(call)
    assert results[0].dtype == call.dtype
    chex.assert_trees_all_equal_dtypes(gradients, call.arrays)
    factor = 2 * (PRODUCTS_IN_PARTS if call.dtype == jnp.float32 else 1)
    assert_close((gradients, results), defined(call), call.dtype, factor)
    again = run(call.arrays, call.options.get("mask"))
    chex.assert_trees_all_equal(again, (gradients, results))
    if "mask" in call.options:
        # Too few blocks to be persistent, but for so few processors: the results are the same, but
        # for gradients in one pass, which has as many sums as there are processors for.
        passes = {"gradients in one pass" in call.parts}
        monkeypatch.setattr(hopper, "PROCESSORS", 3)
        passes.add("gradients in one pass" in call.parts)
        jax.clear_caches()
        _, (again, of_few) = _run(call)
        chex.assert_trees_all_equal(of_few, results)
        if True in passes:
            assert_close(again, defined(call)[0], call.dtype, factor)
        else:
            chex.assert_trees_all_equal(again, gradients)
        monkeypatch.undo()


def test_what_a_range_hides_may_be_anything():
    lengths = FEATURES["soft cap, bias of keys, lengths, fewer key heads"].options["mask"]
    call = Call({"mask": lengths}, batch=2, dtype=jnp.bfloat16)
    hidden, poisoned = poison(call)
    run, clean = _run(call)
    chex.assert_trees_all_equal(run(poisoned, call.options["mask"]), clean)
    for name, rows in hidden.items():
        np.testing.assert_array_equal(clean[0][name][rows], 0)


@pytest.mark.parametrize(("hide", "sink"), [("mask", None), ("bias", np.float32([-1, 3]))])
def test_a_query_without_keys(hide, sink):
    check_queries_without_keys("pallas_gpu", hide, sink)


@pytest.mark.parametrize("devices", [1, None], ids=["one device", "all devices"])
def test_a_language_model_trains(devices):
    """A few steps on the kernels are the steps on plain JAX, sharded over batch and heads too."""
    check_training("softmax_attention", devices)
