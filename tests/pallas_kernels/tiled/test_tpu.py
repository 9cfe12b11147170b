"""The TPU kernel of tiled attention, in numbers: on a CPU, in Pallas's TPU interpret mode.

There memory that nothing was written to is NaN, a copy arrives when it is waited for and not
before, reads beyond an array's end and races are errors.
"""

import contextlib
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention, tiles, tpu, tpu_backward
from tests.numerics import LIMITS, assert_close
from tests.pallas_kernels.tiled.features import FEATURES, Call, block_list, normal

pytestmark = pytest.mark.usefixtures("quick_compilation", "clean_state")


@pytest.fixture
def clean_state():
    yield
    pltpu.reset_tpu_interpret_mode_state()  # which an exception leaves as it was


@contextlib.contextmanager
def interpreted(**params):
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", **params)
    with pltpu.force_tpu_interpret_mode(params):
        yield


def _run(call, arrays, implementation, **options):
    """Returns results and gradients by all arrays."""

    @jax.jit
    def run(arrays):
        def loss(arrays):
            return call.loss(arrays, implementation=implementation, **options)

        return jax.grad(loss, has_aux=True)(arrays)

    gradients, results = run(arrays)
    return results, gradients


def _kernel(call, arrays=None, **params):
    with interpreted(**params):
        arrays = call.arrays if arrays is None else arrays
        return jax.block_until_ready(_run(call, arrays, "pallas_tpu"))


def _defined(call):
    """Returns the same in float32."""
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), call.arrays)
    return _run(call, arrays, "reference")


def _check(call, factor=1.0):
    actual = _kernel(call)
    results, gradients = actual
    assert results[0].dtype == call.dtype
    assert {x.dtype for x in results[1:]} <= {jnp.dtype("float32")}
    chex.assert_trees_all_equal_dtypes(gradients, call.arrays)
    assert_close(actual, _defined(call), call.dtype, factor)


@pytest.mark.parametrize("feature", FEATURES)
def test_results_and_gradients(feature):
    _check(FEATURES[feature])
