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


_SLOPES, _BIAS = np.float32([0.5, 0.1]), normal(4, 1, 2, 200, 200)
_CAPPED = {"logits_soft_cap": 9.0, "bias": _BIAS[..., :1, :]}
# What takes registers beside matrices of many features.
WIDE = {
    f"{name}, causal, bfloat16, {features} features": _wide(terms, features)
    for name, features, terms in (
        ("alibi, bias", 128, {"alibi_slopes": _SLOPES, "bias": _BIAS}),
        ("alibi, bias", 256, {"alibi_slopes": _SLOPES, "bias": _BIAS}),
        ("soft cap, bias of keys", 128, _CAPPED),
    )
}
TABLE = "relative bias, short, causal"

FEW = 3
"""Processors, so that a persistent block does several items."""


def _gradients(call: Call) -> Case:
    """Returns a case with all kernels of a call, persistent ones where there could be."""

    def run(arrays, mask):
        def loss(arrays):
            results = call(arrays, mask=mask, implementation="pallas_gpu")
            return sum(jnp.sum(x.astype(jnp.float32)) for x in results), results

        with mock.patch.object(gpu, "PROCESSORS", FEW):
            return jax.grad(loss, has_aux=True)(arrays)

    return Case(run, (call.shapes, call.options.get("mask")))


def cases() -> dict[str, Case]:
    """Returns the cases by name."""
    calls = FEATURES | WIDE | {TABLE: TABLES[TABLE]}
    return {name: _gradients(call) for name, call in calls.items()} | tiled_hopper.cases()
