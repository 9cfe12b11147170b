"""Our GPU kernels of tiled attention at every head dimension that has tiles of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from experiments.benchmark.measure import directed
from experiments.compile_report import Case
from pallas_kernels import masks
from pallas_kernels.tiled import gpu_tuned, tiled_attention

TOKENS, HEADS = 2048, 16
BLOCK, KEPT = 64, 8
"""Tokens of a block, and blocks of a list."""


def cases() -> dict[str, Case]:
    """Returns the cases, each of which has the forward and the backward kernels."""
    found = {
        f"causal, {dtype}, {features} features": _case(masks.causal(), features, dtype)
        for dtype, sizes in (("bfloat16", (64, 128, 192, 256)), ("float32", (128,)))
        for features in sizes
    }
    # What sums gradients in one pass, or in two where it is measured to be faster.
    found |= {
        f"causal, bfloat16, {features} features, two passes": _two_passes(features)
        for features in (64, 128)
    }
    # Every tile of queries has a list of its own.
    count = np.full((1, HEADS, TOKENS // BLOCK), KEPT, np.int32)
    indices = np.broadcast_to(np.arange(KEPT, dtype=np.int32), (*count.shape, KEPT))
    lists = masks.blocks(indices, count, BLOCK, BLOCK) & masks.causal()
    name = f"causal, block list of {BLOCK} tokens, bfloat16, 128 features"
    return found | {name: _case(lists, 128, jnp.bfloat16)}


def _case(mask: masks.Mask, features: int, dtype: DTypeLike, tokens: int = TOKENS) -> Case:
    attention = functools.partial(tiled_attention, mask=mask, implementation="pallas_gpu")
    array = jax.ShapeDtypeStruct((1, tokens, HEADS, features), dtype)
    return Case(directed("gradient", attention, range(3)), (array,) * 3)


def _two_passes(features: int) -> Case:
    # JAX would take what it has traced with other configurations and as many tokens.
    case = _case(masks.causal(), features, jnp.bfloat16, 2 * TOKENS)

    def run(*arrays: Array) -> tuple[Array, ...]:
        with gpu_tuned.trying("backward_keys", gpu_tuned.Config(128, True)):
            return case.function(*arrays)

    return Case(run, case.arguments)
