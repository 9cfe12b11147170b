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
from jaxtyping import Array, Bool, Int

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


def divisor(block: int, most: int) -> int:
    """Returns the largest tile that divides a list's block, a multiple of 16, and suits the kernel.

    Tiles are a multiple or a fraction of the 128 lanes of a register.
    """
    sizes = range(most - most % 128, 0, -128)
    return next(size for size in (*sizes, 64, 32, FEWEST) if block % size == 0)


def schedule(mask: Mask | None, grid: Grid) -> Int[Array, "B|1 N|K|1 rows entries"]:
    """Makes the schedule of a resolved mask, with rows of queries.

    Args:
      mask: None for all pairs.
      grid: the tiles. Where the mask has a block list, its blocks are multiples of them.
    """
    lists, rest = split(mask)
    if len(lists) != 1:
        return _of_all_tiles(mask, grid, None)
    number, listed = _listed(*lists, grid)
    some, every = _occupancy(rest, grid, number)
    number, listed, some, every = masks.same_heads(number, listed, some, every)
    return _packed(some & listed, every, number)


def transposed_schedules(
    mask: Mask | None, grid: Grid, count: int
) -> Int[Array, "spans B|1 N|K|1 rows entries"]:
    """Makes the schedules of a resolved mask, with rows of keys, for spans of tiles of queries.

    Args:
      mask: None for all pairs.
      grid: the tiles, as for `schedule`.
      count: tiles of queries in a span; the last one may have fewer.
    """
    return _of_all_tiles(mask, grid, count)


def visited(
    schedule: Int[Array, "B|1 N|K|1 rows entries"], grid: Grid
) -> Bool[Array, "B|1 N|K|1 queries keys"]:
    """Returns which scores lie on tiles that a schedule, with rows of queries, lists."""
    schedule = jnp.asarray(schedule)
    listed = jnp.arange(schedule.shape[-1] - 1) < schedule[..., :1]
    number = jnp.where(listed, schedule[..., 1:] >> 1, grid.shape[1])
    here = jnp.zeros((*number.shape[:-1], grid.shape[1]), bool)
    here = jnp.put_along_axis(here, number, True, axis=-1, inplace=False, mode="drop")
    here = jnp.repeat(jnp.repeat(here, grid.rows, axis=2), grid.columns, axis=3)
    return here[:, :, : grid.queries, : grid.keys]


def _of_all_tiles(mask: Mask | None, grid: Grid, count: int | None) -> Any:
    """Returns the schedule, or transposed ones if there is a count, of a mask."""
    if not jax.tree.leaves(mask):
        return _static(jax.tree.structure(mask), grid, count)
    return _made(mask, grid, count, jnp)


@functools.cache
def _static(tree: Any, grid: Grid, count: int | None) -> np.ndarray:
    return _made(jax.tree.unflatten(tree, []), grid, count, np)


def _made(mask: Mask | None, grid: Grid, count: int | None, numpy: Any) -> Any:
    lists, rest = split(mask)
    some, every = _occupancy(rest, grid, _numbers(grid)[1])
    for blocks in lists:
        some, every, kept = masks.same_heads(some, every, _kept(blocks, grid))
        some = some & kept
    some, every = (
        numpy.broadcast_to(x, (1,) * (4 - x.ndim) + x.shape[:-2] + grid.shape)
        for x in (some, every)
    )
    if count is None:
        return _packed(some, every, np.arange(grid.shape[1], dtype=np.int32))
    spans = -(-grid.shape[0] // count)
    missing = ((0, 0),) * 2 + ((0, spans * count - grid.shape[0]), (0, 0))

    def in_spans(array: Any) -> Any:
        array = numpy.pad(array, missing)
        array = array.reshape(*array.shape[:2], spans, count, array.shape[3])
        return numpy.transpose(array, (2, 0, 1, 4, 3))

    number = np.arange(spans * count, dtype=np.int32).reshape(spans, 1, 1, 1, count)
    return _packed(in_spans(some), in_spans(every), number)


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
    number = jnp.where(listed, number, -1)
    # As a product of which digits a number has: faster than a scatter, and compiled in less time.
    count = grid.shape[1]
    high = jax.nn.one_hot(number // 128, -(-count // 128), dtype=jnp.bfloat16)
    low = jax.nn.one_hot(number % 128, 128, dtype=jnp.bfloat16)
    times = jnp.einsum("bnrla,bnrlc->bnrac", high, low, preferred_element_type=jnp.float32)
    return times.reshape(*times.shape[:3], -1)[..., :count] > 0


def _packed(some: Any, every: Any, number: Any) -> Any:
    """Writes the entries of tiles that hold something one after the other."""
    numpy = np if isinstance(some, np.ndarray) else jnp
    last = np.iinfo(np.int32).max
    entries = numpy.where(some, 2 * number + ~every, last).astype(numpy.int32)
    entries = numpy.sort(entries, axis=-1)
    count = numpy.sum(some, axis=-1, keepdims=True, dtype=numpy.int32)
    count = numpy.broadcast_to(count, (*entries.shape[:-1], 1))
    return numpy.concatenate([count, numpy.where(entries == last, 0, entries)], axis=-1)
