"""What is compiled for Hopper GPUs: calls that between them use all that the kernels can do."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import compile_report
from tests.pallas_kernels.scan.cases import Case

WIDE = ("A", "D", "delta_bias", "hidden", "maximum", "total", "weighted")
"""Arguments that are in float32."""


def _selective(batch: int, **features) -> Case:
    return Case("selective", 2048, batch, 1024, chunk=None, **{"features": 16} | features)


PLAIN = {"skip": False, "bias": False}
CALLS = {
    "gated, float32": (Case("gated", 2048, 17, 1024, chunk=None), jnp.float32),
    "gated, bfloat16": (Case("gated", 2048, 18, 1024, chunk=None), jnp.bfloat16),
    "gated, float16, segments, tokens behind the last": (
        Case("gated", 2000, 19, 1000, chunk=None, segments=True, state=True),
        jnp.float16,
    ),
    "gated, bfloat16, log decays in float32, segments": (
        Case("gated", 2048, 20, 1024, chunk=None, segments=True),
        jnp.bfloat16,
    ),
    "gated, bfloat16, few channels": (Case("gated", 2048, 1, 1024, chunk=None), jnp.bfloat16),
    "gated, float32, few channels, segments, tokens behind the last": (
        Case("gated", 2000, 2, 1000, chunk=None, segments=True, state=True),
        jnp.float32,
    ),
    "selective, float32": (_selective(1), jnp.float32),
    "selective, bfloat16": (_selective(2), jnp.bfloat16),
    "selective, bfloat16, segments, no softplus": (
        _selective(3, segments=True, softplus=False, **PLAIN),
        jnp.bfloat16,
    ),
    "selective, float16, groups, tokens behind the last": (
        Case("selective", 2000, 2, 1000, features=16, groups=4, chunk=None, state=True),
        jnp.float16,
    ),
    "selective, float32, 32 numbers, segments": (
        _selective(4, features=32, segments=True),
        jnp.float32,
    ),
    "selective, bfloat16, 32 numbers": (_selective(5, features=32), jnp.bfloat16),
    "selective, float32, 32 numbers, tokens behind the last": (
        Case("selective", 2000, 6, 1024, features=32, chunk=None, bias=False),
        jnp.float32,
    ),
    "softmax, float32": (Case("softmax", 2048, 1, 16, 64, chunk=None), jnp.float32),
    "softmax, bfloat16": (Case("softmax", 2048, 2, 16, 64, chunk=None), jnp.bfloat16),
    "softmax, bfloat16, shared values, segments, tokens behind the last": (
        Case("softmax", 2000, 3, 16, 64, groups=4, chunk=None, segments=True, state=True),
        jnp.bfloat16,
    ),
}
"""Calls, with their dtypes."""

STEPS = {
    "gated, one token": Case("gated", 1, 1, 128, state=True),
    "gated, chunks of one token": Case("gated", 6, 1, 128, chunk=1, segments=True),
    "softmax, one token": Case("softmax", 1, 1, 2, 64, state=True),
    "selective, one token": Case("selective", 1, 1, 128, 16, state=True),
    "selective, chunks of two tokens": Case("selective", 6, 1, 128, 32, chunk=2),
}
"""Calls that have few tokens in a tile, in float32."""


def _gradients(name: str, case: Case, dtype) -> compile_report.Case:
    """Returns a case with all kernels of a call."""
    arrays = {
        n: jax.ShapeDtypeStruct(shape, jnp.float32 if n in WIDE else dtype)
        for n, shape in case.shapes.items()
    }
    if "log decays in float32" in name:
        shape = arrays["log_decay"].shape
        arrays["log_decay"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((case.batch, case.tokens), np.int32)

    def run(arrays, segment_ids=None):
        def loss(arrays):
            results = case.traced(arrays, "pallas_gpu", segment_ids)
            return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(results)), results

        return jax.grad(loss, has_aux=True)(arrays)

    return compile_report.Case(run, (arrays, segment_ids) if case.segments else (arrays,))


def cases() -> dict[str, compile_report.Case]:
    """Returns the cases by name."""
    calls = CALLS | {name: (case, jnp.float32) for name, case in STEPS.items()}
    return {name: _gradients(name, *call) for name, call in calls.items()}
