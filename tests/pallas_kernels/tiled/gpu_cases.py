"""What is compiled for Hopper GPUs: all features, and what the benchmarks' table has."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import tiled_hopper
from experiments.compile_report import Case
from pallas_kernels import gpu, masks
from tests.pallas_kernels.tiled.features import FEATURES, TABLES, Call, normal


def _wide(terms: dict[str, Any], features: int) -> Call:
    options = {"mask": masks.causal(), "tile_sizes": None} | terms
    return Call(options, 1, 200, 200, features=features, dtype=jnp.bfloat16)


# What takes registers beside matrices of many features.
WIDE = {
    f"{name}, causal, bfloat16, {features} features": _wide(terms, features)
    for name, terms in {
        "alibi, bias": {"alibi_slopes": np.float32([0.5, 0.1]), "bias": normal(4, 1, 2, 200, 200)},
        "soft cap, bias of keys": {"logits_soft_cap": 9.0, "bias": normal(4, 1, 2, 1, 200)},
    }.items()
    for features in (64, 128, 256)
}


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
    calls = FEATURES | TABLES | WIDE
    return {name: _gradients(call) for name, call in calls.items()} | tiled_hopper.cases()
