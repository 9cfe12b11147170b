"""Sums of gradients by distance, for a table of relative positions, in GPU kernels.

For 64 queries, a warpgroup sums the gradients of scores [64, columns] of a tile along diagonals, to
`gpu.LINE` numbers, one for each distance: in SMEM rows have zeros before and behind them, so lines
that begin a number later in every row are of the same distances. They add up in SMEM, over all
keys; the sums of 64 queries are of distances from them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.tiled.gpu_operands import Tiling
from pallas_kernels.tiled.inputs import Inputs, unbroadcast
from pallas_kernels.tiled.table import by_distance

MOST_COLUMNS = gpu.ROWS
"""Of a tile: with its rows, there are no more distances than a line has numbers."""

_SHAPE = gpu.ROWS, gpu.ROWS + gpu.LINE
"""Of the rows with their zeros, of which `gpu.ROWS` are before them."""


def count(columns: int) -> int:
    """Returns how many sums 64 queries have, in whole lines."""
    return gpu.whole(columns + gpu.LINE, gpu.LINE)


def size(columns: int) -> int:
    """Returns the bytes of SMEM for so many columns."""
    return gpu.COMPUTING * 4 * (_SHAPE[0] * _SHAPE[1] + count(columns))


def space(columns: int) -> dict[str, Any]:
    """Returns SMEM."""
    return {
        "diagonals": plgpu.SMEM((gpu.COMPUTING, *_SHAPE), jnp.float32),
        "distances": plgpu.SMEM((gpu.COMPUTING, count(columns)), jnp.float32),
    }


def begin(scratch: dict[str, Any], warpgroup: Array) -> None:
    """Sets all to zero."""
    rows, sums = (scratch[name].at[warpgroup] for name in ("diagonals", "distances"))

    def clear(i: Array, carry: None) -> None:
        sums.at[pl.ds(i * gpu.LINE, gpu.LINE)][...] = gpu.line_of(0.0)

    def clear_row(i: Array, carry: None) -> None:
        for start in (0, _SHAPE[1] - gpu.LINE):
            rows.at[i, pl.ds(start, gpu.LINE)][...] = gpu.line_of(0.0)

    lax.fori_loop(0, sums.shape[0] // gpu.LINE, clear, None)
    lax.fori_loop(0, _SHAPE[0], clear_row, None)
    plgpu.commit_smem()


def add(scratch: dict[str, Any], warpgroup: Array, column: Array, d_scores: Array) -> None:
    """Adds the gradients of a tile that begins at a column."""
    rows = scratch["diagonals"].at[warpgroup]
    gpu.store(rows.at[slice(None), pl.ds(gpu.ROWS, d_scores.shape[1])], d_scores)
    plgpu.commit_smem()
    total = gpu.line_of(0.0)
    for row in range(gpu.ROWS):
        total += gpu.line(rows.at[row, pl.ds(1 + row, gpu.LINE)])
    sums = scratch["distances"].at[warpgroup, pl.ds(column, gpu.LINE)]
    sums[...] = gpu.line(sums) + total
    plgpu.commit_smem()  # before other threads read, or write, any of it


def end(scratch: dict[str, Any], warpgroup: Array, target: Any) -> None:
    """Writes the sums of 64 queries."""
    sums = scratch["distances"].at[warpgroup]

    def write(i: Array, carry: None) -> None:
        here = pl.ds(i * gpu.LINE, gpu.LINE)
        gpu.store(target.at[here], gpu.line(sums.at[here]))

    lax.fori_loop(0, sums.shape[0] // gpu.LINE, write, None)


def gradient(sums: Float[Array, "B N tiles n"], x: Inputs, tiling: Tiling) -> Array:
    """Returns the gradient of the table, from what `end` has written."""
    batch, heads, tiles, size = sums.shape
    # Those of a tile are of distances 64 lower than those of the tile before. Read as rows that are
    # 64 shorter, rows of equal length move on by 64 each.
    width = size + tiles * gpu.ROWS
    sums = jnp.pad(sums[:, :, ::-1], ((0, 0),) * 3 + ((0, width - size),))
    sums = sums.reshape(batch, heads, -1)[:, :, : tiles * (width - gpu.ROWS)]
    sums = jnp.sum(sums.reshape(batch, heads, tiles, -1), axis=2)
    # The lowest distance is that of a key before the first one: from the last row, none has it.
    sums = jnp.pad(sums[..., : tiling.rows + tiling.columns - 1], ((0, 0), (0, 0), (1, 0)))

    def spread(table: Array) -> Array:
        return by_distance(table, x, tiling.rows, tiling.columns, transposed=False)

    values, transpose = jax.vjp(spread, x.table.astype(jnp.float32))
    return transpose(unbroadcast(sums, values.shape))[0]
