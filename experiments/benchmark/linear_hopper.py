"""Our GPU kernels of linear attention, at the head dimensions of models."""

from __future__ import annotations

from experiments.benchmark.linear_variants import VARIANTS
from experiments.compile_report import Case

TOKENS, HEADS = 8192, 4
"""So few heads that tokens are cut into spans; warpgroups have two chunks, if not a walk."""

BOTH = (("bfloat16", 128), ("float32", 128))

KERNELS = {
    "lightning": (("bfloat16", 64), ("bfloat16", 256), *BOTH),
    "gate per step": BOTH,
    "gate per channel (GLA)": BOTH,
    "gated delta rule (gated DeltaNet)": BOTH,
    "gated delta rule per channel (KDA)": (("bfloat16", 256), *BOTH),
    "momentum and delta rule (Titans)": (("bfloat16", 128), ("float32", 64)),
}
"""Variants that need kernels of their own, and the dtypes and head dimensions that are shown."""

PREPARED = [name for name in KERNELS if name not in ("lightning", "gate per step")]
"""Those whose chunks are prepared before the walk."""


def cases() -> dict[str, Case]:
    """Returns the cases, each of which has the forward and the backward kernels."""
    found = {}
    for i, (name, shown) in enumerate(KERNELS.items()):
        # A process compiles a kernel once, which would then be in the first case alone.
        tokens = TOKENS + 64 * i
        for dtype, features in shown:
            inputs = VARIANTS[name].inputs(tokens, HEADS, features, dtype)
            # These take all kernels of the backward; more is XLA's: in float32, and for momentum.
            by = ("query", "value") if name in PREPARED else None
            function = VARIANTS[name].function("gradient", [*inputs], HEADS, "pallas_gpu", by)
            found[f"{name}, {dtype}, {features} features"] = Case(function, (*inputs.values(),))
    return found
