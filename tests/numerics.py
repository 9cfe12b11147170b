"""Comparison of arrays by error ratio, the measure of every numerical test here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

LIMITS = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}


def error_ratio(actual: ArrayLike, reference: ArrayLike) -> float:
    """RMS(actual - reference) / RMS(reference), in float64.

    Where the reference is zero everywhere it is RMS(actual), so that zeros must be zeros. Equal
    infinities (the log-sum-exp of an empty row) count as no error; a NaN on either side, or an
    infinity on one only, gives inf.
    """
    actual, reference = (np.asarray(x, dtype=np.float64) for x in (actual, reference))
    if actual.shape != reference.shape:
        raise AssertionError(f"shapes differ: {actual.shape} and {reference.shape}")
    agreed = np.isinf(actual) & (actual == reference)
    if not np.all((np.isfinite(actual) & np.isfinite(reference)) | agreed):
        return float("inf")
    actual, reference = actual[~agreed], reference[~agreed]
    if reference.size == 0:
        return 0.0
    error = np.sqrt(np.mean((actual - reference) ** 2))
    size = np.sqrt(np.mean(reference**2))
    return float(error / size) if size > 0 else float(error)


def assert_close(
    actual: Any, reference: Any, dtype: DTypeLike = jnp.float32, factor: float = 1.0
) -> None:
    """Asserts, leaf by leaf, that the error ratio stays under the limit of a dtype.

    Args:
      actual: a pytree of arrays, the result under test.
      reference: a pytree of the same structure.
      dtype: the precision in which `actual` was computed; it sets the limit (`LIMITS`).
      factor: multiplies the limit, for results that lose digits for a known reason.
    """
    limit = LIMITS[jnp.dtype(dtype).name] * factor
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    reference_leaves, reference_tree = jax.tree.flatten(reference)
    assert actual_tree == reference_tree, f"structures differ: {actual_tree} and {reference_tree}"
    for (path, leaf), expected in zip(actual_leaves, reference_leaves, strict=True):
        name = jax.tree_util.keystr(path) or "result"
        ratio = error_ratio(leaf, expected)
        assert ratio <= limit, f"{name}: error ratio {ratio:.3g} exceeds {limit:.3g}"
