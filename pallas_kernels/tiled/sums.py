"""What the TPU backward of tiled attention sums besides gradients of queries, keys and values.

Every such gradient is a sum of a term that each score has, over those scores that one of its
entries had a part in: all of a head, those of a key, of a query, of a distance, or just one. The
array of a call says which by its shape. Rows of a tile are keys, columns queries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tiled import tiles
from pallas_kernels.tiled.inputs import Inputs, unbroadcast
from pallas_kernels.tiled.scores import Operands
from pallas_kernels.tiled.tiles import Tiling
from pallas_kernels.tpu import LANES


class Step(NamedTuple):
    """A tile of scores."""

    numbers: Sequence[Array]
    """Of the tiles of queries that it is made of; beyond the last one, where nothing is."""
    inside: Sequence[Array]
    """The same, counted from the first one that the kernel has, and within those."""


class Sum:
    """The sum over all scores of a head.

    Attributes:
      shape: of the result of a kernel, [B, N, ...].
      spec: its BlockSpec.
      scratch: what it needs in VMEM, or None.
      in_place: whether the result of one kernel is what the next one adds to.
      stays: whether the block of a head stays while its rows of tiles come; else each has its own.
    """

    in_place = False
    stays = False
    scratch: Any = None

    def __init__(self, x: Inputs, tiling: Tiling):
        """Prepares the sum of a call."""
        self.batch, _, self.heads, _ = x.query.shape
        self.tiling = tiling
        self._by_row(1, tiling.column_part)

    def _by_row(self, *block: int) -> None:
        """Says that each row of tiles has a block of its own."""
        self.shape = (self.batch, self.heads, self.tiling.row_tiles, *block)
        self.spec = pl.BlockSpec((None, None, None, *block), lambda b, n, i: (b, n, i, 0, 0))

    def _by_head(self, *block: int) -> None:
        """Says that the block of a head stays while its rows of tiles come."""
        self.stays = True
        self.shape = (self.batch, self.heads, *block)
        zeros = (0,) * len(block)
        self.spec = pl.BlockSpec((None, None, *block), lambda b, n, i: (b, n, *zeros))

    def begin_head(self, out: Any, scratch: Any) -> None:
        """Starts a head."""
        if self.stays:
            out[...] = jnp.zeros_like(out)

    def begin_row(self, out: Any, scratch: Any) -> None:
        """Starts a row of tiles."""
        if not self.stays:
            out[...] = jnp.zeros_like(out)

    def begin_step(self, out: Any, scratch: Any, step: Step) -> None:
        """Starts a tile."""

    def add(self, out: Any, scratch: Any, terms: Array, step: Step, row: int, start: int) -> None:
        """Adds the terms of a part of a tile.

        Args:
          out: the result, as the kernel sees it.
          scratch: as asked for.
          terms: [rows, columns].
          step: what the tile is.
          row: first row of the part.
          start: first column.
        """
        del scratch, step, row, start
        out[...] += jnp.sum(terms, axis=0, keepdims=True)

    def end_step(self, out: Any, scratch: Any, step: Step) -> None:
        """Ends a tile."""

    def end_row(self, out: Any, scratch: Any) -> None:
        """Ends a row of tiles."""

    def total(self, results: Array) -> Array:
        """Returns the sums from the results of the kernels, [kernels, *shape]."""
        return jnp.sum(results, axis=(0, 3, 4, 5))


class KeySum(Sum):
    """The sums over the scores of a key."""

    def __init__(self, x: Inputs, tiling: Tiling):
        """Prepares the sums of a call."""
        super().__init__(x, tiling)
        self._by_row(1, tiling.rows)
        self.scratch = pltpu.VMEM((tiling.rows, LANES), jnp.float32)

    def begin_row(self, out: Any, scratch: Any) -> None:
        """Starts a row of tiles."""
        scratch[...] = jnp.zeros_like(scratch)

    def add(self, out: Any, scratch: Any, terms: Array, step: Step, row: int, start: int) -> None:
        """Adds the terms of a part of a tile, in 128 parts."""
        scratch[pl.ds(row, self.tiling.row_part)] += tiles.lane_sums(terms)

    def end_row(self, out: Any, scratch: Any) -> None:
        """Ends a row of tiles."""
        sums = jnp.sum(scratch[...], axis=1, keepdims=True)
        out[...] = tiles.row(jnp.broadcast_to(sums, scratch.shape))

    def total(self, results: Array) -> Array:
        """Returns [B, N, keys]."""
        return jnp.sum(results, axis=0).reshape(self.batch, self.heads, -1)


class QuerySum(Sum):
    """The sums over the scores of a query."""

    def __init__(self, x: Inputs, tiling: Tiling, count: int):
        """Prepares the sums of a call, for kernels that have so many tiles of queries."""
        super().__init__(x, tiling)
        self._by_head(count, 1, max(tiling.columns, LANES))

    def add(self, out: Any, scratch: Any, terms: Array, step: Step, row: int, start: int) -> None:
        """Adds the terms of a part of a tile."""
        sums = jnp.sum(terms, axis=0, keepdims=True)
        tiles.add_to_columns(out, sums, step.inside, self.tiling, start)

    def total(self, results: Array) -> Array:
        """Returns [B, N, queries]."""
        results = jnp.moveaxis(results[..., 0, : self.tiling.columns], 0, 2)
        return results.reshape(self.batch, self.heads, -1)


class DistanceSum(Sum):
    """The sums over the scores of a distance."""

    def __init__(self, x: Inputs, tiling: Tiling, operands: Operands):
        """Prepares the sums of a call."""
        super().__init__(x, tiling)
        self._table = operands.table
        self._by_head(*self._table.sums)
        self.scratch = pltpu.VMEM(self._table.band, jnp.float32)

    def begin_step(self, out: Any, scratch: Any, step: Step) -> None:
        """Starts a tile."""
        scratch[...] = jnp.zeros_like(scratch)

    def add(self, out: Any, scratch: Any, terms: Array, step: Step, row: int, start: int) -> None:
        """Adds the terms of a part of a tile."""
        self._table.add(scratch, terms, row, start)

    def end_step(self, out: Any, scratch: Any, step: Step) -> None:
        """Ends a tile."""
        self._table.fold(scratch, out, step.numbers)

    def total(self, results: Array) -> Array:
        """Returns [B, N, distances]."""
        return jnp.sum(results, axis=(0, 3))


class ScoreSum(Sum):
    """The terms of the scores themselves, or their sums over batch or heads, in device memory.

    A tile is written when it was computed, part by part; if it is a sum, it is read before.
    """

    in_place = True

    def __init__(self, x: Inputs, tiling: Tiling, shape: Sequence[int]):
        """Prepares the sums of a call, to [B|1, N|1, queries, keys]."""
        super().__init__(x, tiling)
        size = tiling.row_tiles * tiling.rows, tiling.column_tiles * tiling.columns
        self.shape = (*shape[:2], *size)
        self.reads = self.shape[:2] != (self.batch, self.heads)
        self.spec = pl.BlockSpec(memory_space=pl.ANY)
        self.scratch = {
            "tile": pltpu.VMEM((tiling.rows, tiling.width), jnp.float32),
            "semaphores": pltpu.SemaphoreType.DMA((2,)),
        }

    def _tile(self, out: Any, step: Step) -> Any:
        b, n, i = (pl.program_id(axis) for axis in range(3))
        head = b if self.shape[0] > 1 else 0, n if self.shape[1] > 1 else 0
        rows = tiles.tokens(i, self.tiling.rows)
        return out.at[(*head, rows, tiles.tokens(step.numbers[0], self.tiling.columns))]

    def begin_row(self, out: Any, scratch: Any) -> None:
        """Starts a row of tiles."""

    def begin_step(self, out: Any, scratch: Any, step: Step) -> None:
        """Starts a tile."""
        if self.reads:
            self._read(out, scratch, step).start()

    def add(self, out: Any, scratch: Any, terms: Array, step: Step, row: int, start: int) -> None:
        """Adds the terms of a part of a tile."""
        part = pl.ds(row, self.tiling.row_part), pl.ds(start, self.tiling.column_part)
        tile, target = scratch["tile"], self._tile(out, step)
        if self.reads:
            if row == start == 0:
                self._read(out, scratch, step).wait()
            terms = tile[part] + terms
        tile[part] = terms
        pltpu.make_async_copy(tile.at[part], target.at[part], scratch["semaphores"].at[1]).start()

    def end_step(self, out: Any, scratch: Any, step: Step) -> None:
        """Ends a tile."""
        tile = scratch["tile"]
        pltpu.make_async_copy(tile, self._tile(out, step), scratch["semaphores"].at[1]).wait()

    def total(self, results: Array) -> Array:
        """Returns [B|1, N|1, queries, keys]."""
        return jnp.swapaxes(results, 2, 3)

    def _read(self, out: Any, scratch: Any, step: Step) -> Any:
        source, target = self._tile(out, step), scratch["tile"]
        return pltpu.make_async_copy(source, target, scratch["semaphores"].at[0])


def sums(names: Sequence[str], x: Inputs, tiling: Tiling, operands: Operands, count: int) -> dict:
    """Returns the sums of the gradients with these names.

    Args:
      names: of inputs; those that are not summed by the kernel are passed over.
      x: the call.
      tiling: the tiles.
      operands: the operands of the kernel.
      count: tiles of queries of a kernel.
    """
    wanted = {
        "slopes": lambda: Sum(x, tiling),
        "statistic": lambda: QuerySum(x, tiling, count),
        "table": lambda: DistanceSum(x, tiling, operands),
        "bias": lambda: _of_bias(x, tiling, count),
    }
    return {name: make() for name, make in wanted.items() if name in names}


def _of_bias(x: Inputs, tiling: Tiling, count: int) -> Sum:
    queries, keys = (size > 1 for size in x.bias.shape[2:])
    if queries and keys:
        return ScoreSum(x, tiling, x.bias.shape)
    if queries:
        return QuerySum(x, tiling, count)
    return KeySum(x, tiling) if keys else Sum(x, tiling)


def gradient_of_bias(total: Array, x: Inputs) -> Array:
    """Returns the gradient of the bias from its sums."""
    _, _, queries, keys = x.bias.shape
    match total.ndim:
        case 2:
            total = total[:, :, None, None]
        case 3:
            total = total[..., None] if queries > 1 else total[:, :, None]
    return unbroadcast(total[:, :, :queries, :keys], x.bias.shape)
