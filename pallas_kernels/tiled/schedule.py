"""What a Pallas kernel visits: for every tile of rows the tiles of columns that a mask leaves.

The rows are queries and the columns keys, or, where gradients of keys are summed, the other way
round. A schedule is an int32 array [B|1, N|K|1, rows, 1 + entries], of which every row of tiles
gets its part as a window in SMEM: how many tiles of columns it visits and, ascending, an entry for
each, twice the tile's number, plus 1 where the mask forbids some of the tile's pairs. Tiles without
any pair are not listed, so they are neither loaded nor computed.

A mask that is known at trace time makes a NumPy array, once; one that depends on data makes a few
operations of XLA. Block lists are used as they are: a list is not compared with anything that is as
large as the number of all blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels import masks
from pallas_kernels.masks import Blocks, Mask, Tiles

FEWEST = 16
"""Fewest tokens in a tile: the rows of a register of bfloat16."""


class Grid(NamedTuple):
    """How scores are cut into tiles."""

    queries: int
    keys: int
    rows: int  # queries in a tile
    columns: int  # keys in a tile

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the number of tiles of queries and of keys."""
        return -(-self.queries // self.rows), -(-self.keys // self.columns)


def split(mask: Mask | None) -> tuple[list[Blocks], Mask | None]:
    """Splits a mask into its block lists and the rest."""
    parts = () if mask is None else masks.parts(mask)
    lists = [part for part in parts if isinstance(part, Blocks)]
    return lists, masks.all_of([part for part in parts if not isinstance(part, Blocks)])


def divisor(block: int, most: int) -> int | None:
    """Returns the largest tile that divides a list's block and suits the kernel, or None.

    Tiles are a multiple or a fraction of the 128 lanes of a register.
    """
    sizes = range(most - most % 128, 0, -128)
    return next((size for size in (*sizes, 64, 32, FEWEST) if block % size == 0), None)


def schedule(
    mask: Mask | None, grid: Grid, transposed: bool = False, span: tuple[int, int] | None = None
) -> Int[Array, "B N rows W"]:
    """Makes the schedule of a resolved mask.

    Args:
      mask: None for all pairs.
      grid: the tiles. Where the mask has a block list, its blocks are multiples of them.
      transposed: whether the rows are keys.
      span: the tiles of columns from which on, and before which, any are listed; None for all.
    """
    lists, rest = split(mask)
    if not lists and not jax.tree.leaves(rest):
        return _static(jax.tree.structure(rest), grid, transposed, span)
    if lists and not transposed:
        number, listed = _listed(*lists, grid)
        some, every = _occupancy(rest, grid, number)
        number, listed, some, every = masks.same_heads(number, listed, some, every)
        return _packed(some & listed, every, number, span)
    some, every = _occupancy(rest, grid, _numbers(grid)[1])
    if lists:
        some, every, kept = masks.same_heads(some, every, _kept(*lists, grid))
        some = some & kept
    if transposed:
        some, every = jnp.swapaxes(some, -1, -2), jnp.swapaxes(every, -1, -2)
    return _packed(some, every, jnp.arange(some.shape[-1], dtype=jnp.int32), span)


@functools.cache
def _static(tree: Any, grid: Grid, transposed: bool, span: tuple[int, int] | None) -> np.ndarray:
    some, every = _occupancy(jax.tree.unflatten(tree, []), grid, _numbers(grid)[1])
    some, every = (np.broadcast_to(x, grid.shape)[None, None] for x in (some, every))
    if transposed:
        some, every = np.swapaxes(some, -1, -2), np.swapaxes(every, -1, -2)
    return _packed(some, every, np.arange(some.shape[-1], dtype=np.int32), span)


def _numbers(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = (np.arange(count, dtype=np.int32) for count in grid.shape)
    return rows[:, None], columns[None]


def _occupancy(mask: Mask | None, grid: Grid, number: Any) -> tuple[Any, Any]:
    """Returns of the tiles whether they hold some pair and whether they hold nothing else.

    Keys that fill the last tile up are no pairs.
    """
    if grid.keys % grid.columns:
        mask = masks.all_of([*(() if mask is None else (mask,)), masks.lengths(None, grid.keys)])
    if mask is None:
        return np.ones((1, 1), bool), np.ones((1, 1), bool)
    rows = Tiles(grid.rows, grid.queries, _numbers(grid)[0])
    # Tokens that fill a tile up count here: a tile that has them is not full.
    columns = Tiles(grid.columns, grid.shape[1] * grid.columns, number)
    return mask.occupancy(rows, columns)


def _listed(blocks: Blocks, grid: Grid) -> tuple[Array, Array]:
    """Returns numbers of listed tiles, [B|1, heads, rows, L], and whether they are in the list."""
    down, across = blocks.block_q // grid.rows, blocks.block_k // grid.columns
    indices = blocks.indices.astype(jnp.int32)
    listed = jnp.arange(indices.shape[-1]) < blocks.counts[..., None]
    indices = jnp.where(listed, indices, 0)
    number = (indices[..., None] * across + jnp.arange(across)).reshape(*indices.shape[:3], -1)
    number, listed = (
        jnp.repeat(x, down, axis=2)[:, :, : grid.shape[0]]
        for x in (number, jnp.repeat(listed, across, axis=-1))
    )
    return number, listed & (number < grid.shape[1])


def _kept(blocks: Blocks, grid: Grid) -> Array:
    """Returns the listed tiles as a bitmap, [B|1, heads, rows, columns]."""
    number, listed = _listed(blocks, grid)
    number = jnp.where(listed, number, grid.shape[1])
    kept = jnp.zeros((*number.shape[:3], grid.shape[1]), bool)
    return jnp.put_along_axis(kept, number, True, axis=-1, inplace=False, mode="drop")


def _packed(some: Any, every: Any, number: Any, span: tuple[int, int] | None) -> Any:
    """Writes the entries of tiles that hold something one after the other."""
    numpy = np if isinstance(some, np.ndarray) and isinstance(number, np.ndarray) else jnp
    if span is not None:
        some = some & (span[0] <= number) & (number < span[1])
    some, every, number = numpy.broadcast_arrays(some, every, number)
    some, every, number = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (some, every, number))
    last = np.iinfo(np.int32).max
    entries = numpy.where(some, 2 * number + ~every, last).astype(numpy.int32)
    entries = numpy.sort(entries, axis=-1)
    count = numpy.sum(some, axis=-1, keepdims=True, dtype=numpy.int32)
    return numpy.concatenate([count, numpy.where(entries == last, 0, entries)], axis=-1)
