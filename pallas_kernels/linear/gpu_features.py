"""Feature maps in the walks of linear attention on Hopper GPUs.

What features are made of has been copied to SMEM. Where the map is of each number by itself the
features take its place. The Taylor features are products of two numbers of [x, 1] each: matrices of
zeros and ones choose them, exactly, and the result has a place of its own.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear import features
from pallas_kernels.tpu import padded

MAPS: dict[str, Callable[[Array], Array]] = {
    "elu": lambda x: jnp.where(x > 0, x, gpu.expm1(jnp.minimum(x, 0))),
    "elu_plus_one": features.MAPS["elu_plus_one"],
    "relu": lambda x: jnp.maximum(x, 0),
}
"""Those of each number by itself, as in `features`."""

TAYLOR = "taylor"

NOTHING = {"elu_plus_one": -1e4}
"""What is mapped to 0, where that is not 0."""

NUMBERS = 32
"""What the H numbers and 1 that Taylor features are made of are filled up to: with H of them there
are (H + 1) (H + 2) / 2 features, more than there is space for from H = 31 on."""


def unmapped(name: str, x: Float[Array, "B T N H"]) -> Float[Array, "B T N n"]:
    """Returns what walks make features of; tokens that fill it up are of `NOTHING`, or zeros."""
    if name != TAYLOR:
        return x
    ones = jnp.ones_like(x, shape=(*x.shape[:3], 1))
    return padded(jnp.concatenate([x, ones], axis=3), 3, NUMBERS)


def taylor_arrays(count: int, columns: int) -> dict[str, Array]:
    """Returns what Taylor features are made with, by name, filled up to so many columns."""
    pairs, scales = features.taylor_products(features.taylor_size(count))
    chosen = np.zeros((2, NUMBERS, columns), np.float32)
    for column, pair in enumerate(pairs):
        chosen[range(2), pair, column] = 1
    first, second = jnp.asarray(chosen, jnp.bfloat16)
    return {"first": first, "second": second, "scales": padded(jnp.asarray(scales), 0, columns)}


def taylor_space(columns: int) -> dict[str, Any]:
    """Returns SMEM for the first two of them, and a barrier for when they are there."""
    space = {name: gpu.smem((NUMBERS, columns), jnp.bfloat16, 32) for name in ("first", "second")}
    return space | {"chosen": plgpu.Barrier(num_arrivals=2)}


def copy_taylor(arguments: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Has the copy engine fetch them."""
    for name in ("first", "second"):
        plgpu.copy_gmem_to_smem(arguments[name], scratch[name], scratch["chosen"])


def map_each(name: str, parts: gpu.Parts, put: Callable[[gpu.Parts, Array], None]) -> None:
    """Puts features in the place of a matrix.

    Args:
      name: one of `MAPS`.
      parts: of the matrix.
      put: puts float32 values into parts of a matrix.
    """
    width = parts[0].shape[1]
    size = min(width, gpu.FEATURES)  # at a time, as registers hold no more
    for start in range(0, width, size):
        here = [part.at[slice(None), pl.ds(start, size)] for part in parts]
        put(here, MAPS[name](gpu.loaded(here)))


def map_taylor(
    parts: gpu.Parts,
    target: gpu.Parts,
    put: Callable[[gpu.Parts, Array], None],
    arguments: dict[str, Any],
    scratch: dict[str, Any],
) -> None:
    """Puts Taylor features into `target`, see `map_each`."""
    for start in range(0, target[0].shape[1], gpu.FEATURES):
        columns = pl.ds(start, gpu.FEATURES)

        def scales(columns: Any = columns) -> Array:
            source = arguments["scales"].at[columns]
            return plgpu.load(source, layout=gpu.OF_COLUMNS, optimized=False)

        first, second = ([scratch[n].at[slice(None), columns]] for n in ("first", "second"))
        left, scale = gpu.product_and(parts, first, scales)
        values = left * gpu.product(parts, second)
        here = [part.at[slice(None), columns] for part in target]
        put(here, values * gpu.down(scale, values.shape))
