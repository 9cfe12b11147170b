"""Our GPU kernels of linear attention, at the head dimensions of models."""

from __future__ import annotations

from experiments.benchmark.linear_variants import VARIANTS
from experiments.compile_report import Case

TOKENS, HEADS = 2048, 2

KERNELS = (
    "lightning",
    "gate per step",
    "gate per channel (GLA)",
    "gated delta rule (gated DeltaNet)",
    "gated delta rule per channel (KDA)",
)
"""Variants that need kernels of their own."""


def cases() -> dict[str, Case]:
    """Returns the cases, each of which has the forward and the backward kernels."""
    found = {}
    for i, name in enumerate(KERNELS):
        # A process compiles a kernel once, which would then be in the first case alone.
        tokens = TOKENS + 64 * i
        for dtype, sizes in (("bfloat16", (64, 128, 256)), ("float32", (128,))):
            for features in sizes:
                inputs = VARIANTS[name].inputs(tokens, HEADS, features, dtype)
                function = VARIANTS[name].function("gradient", [*inputs], HEADS, "pallas_gpu")
                case = Case(function, tuple(inputs.values()))
                found[f"{name}, {dtype}, {features} features"] = case
    return found
