"""What the Pallas kernels for TPU share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

LANES = 128
"""Columns of a register."""

FEWEST_TOKENS = 16
"""Tokens from which on a kernel that carries a state is worth its start; fewer are steps."""

VMEM_BYTES = 64 * 2**20
"""What a kernel may take of a core's vector memory: half of it, on v5e and v6e."""


def result(shape: Sequence[int], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """Returns the type of a kernel's result, which in a shard_map varies as an argument does."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def padded(array: Array, axis: int, size: int, value: float = 0) -> Array:
    """Fills an axis up with a value."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=value)


def generation() -> int:
    """Returns the generation of the TPU that a kernel is lowered for, 5 where it is not known."""
    try:
        return pltpu.get_tpu_info().generation
    except Exception:  # it has no error of its own for "there is none"
        return 5


def compiler_params(*, parallel: bool = True) -> pltpu.CompilerParams:
    """Returns how kernels with a grid of three dimensions are compiled.

    Args:
      parallel: whether several cores may share the first two dimensions.
    """
    outer = "parallel" if parallel else "arbitrary"
    return pltpu.CompilerParams(
        dimension_semantics=(outer, outer, "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )
