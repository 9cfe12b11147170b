"""Our GPU kernels of linear attention, at the head dimensions of models."""

from __future__ import annotations

from experiments.benchmark.linear_variants import VARIANTS
from experiments.compile_report import Case

TOKENS, HEADS = 2048, 2

ALL_SIZES, ONE_SIZE = (64, 128, 256), (128,)

KERNELS = {
    "lightning": ALL_SIZES,
    "gate per step": ONE_SIZE,
    "gate per channel (GLA)": ONE_SIZE,
    "gated delta rule (gated DeltaNet)": ONE_SIZE,
    "gated delta rule per channel (KDA)": (128, 256),
}
"""Variants that need kernels of their own, and the head dimensions that show how they scale."""


def cases() -> dict[str, Case]:
    """Returns the cases, each of which has the forward and the backward kernels."""
    found = {}
    for i, (name, sizes) in enumerate(KERNELS.items()):
        # A process compiles a kernel once, which would then be in the first case alone.
        tokens = TOKENS + 64 * i
        for dtype, features in (*(("bfloat16", size) for size in sizes), ("float32", 128)):
            inputs = VARIANTS[name].inputs(tokens, HEADS, features, dtype)
            function = VARIANTS[name].function("gradient", [*inputs], HEADS, "pallas_gpu")
            found[f"{name}, {dtype}, {features} features"] = Case(function, (*inputs.values(),))
    return found
