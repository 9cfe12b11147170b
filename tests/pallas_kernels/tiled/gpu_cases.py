"""What is compiled for Hopper GPUs: all features, and what the benchmarks' table has."""

from unittest import mock

import jax
import jax.numpy as jnp

from experiments.benchmark import tiled_hopper
from experiments.compile_report import Case
from pallas_kernels import gpu
from tests.pallas_kernels.tiled.features import FEATURES, Call


def _gradients(call: Call) -> Case:
    """Returns a case with all kernels of a call, persistent ones where there could be."""

    def run(arrays, mask):
        def loss(arrays):
            results = call(arrays, mask=mask, implementation="pallas_gpu")
            return sum(jnp.sum(x.astype(jnp.float32)) for x in results), results

        with mock.patch.object(gpu, "PROCESSORS", 1):
            return jax.grad(loss, has_aux=True)(arrays)

    return Case(run, (call.shapes, call.options.get("mask")))


def cases() -> dict[str, Case]:
    """Returns the cases by name."""
    return {name: _gradients(call) for name, call in FEATURES.items()} | tiled_hopper.cases()
