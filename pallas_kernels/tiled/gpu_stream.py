"""How the GPU kernels of tiled attention go through their tiles.

A block of the grid has two tiles of 64 rows, each of a warpgroup that computes, and a third
warpgroup that copies what belongs to the columns ahead of them. Both tiles visit the same columns,
unless they have block lists of their own: then there is a stream of columns for each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.tiled.gpu_operands import COLUMNS, At, Operands, Tiling
from pallas_kernels.tiled.schedule import Grid
from pallas_kernels.tiled.scores import Functions, Scores
from pallas_kernels.tpu import padded

FUNCTIONS = Functions(
    lambda x, exact: 1 / x if exact else gpu.reciprocal(x),
    lambda x, exact: gpu.log1p(x) if exact else jnp.log(1 + x),
)


class Plan(NamedTuple):
    """How a kernel works through its tiles."""

    tiling: Tiling
    grid: Grid
    streams: int
    """How many streams of tiles a block needs: one, or one for each warpgroup that computes."""
    stages: int
    """How many tiles of a stream there is space for."""
    persistent: bool | None
    """Whether blocks are, where they are many; None if only where some have more to do."""

    @property
    def blocks(self) -> int:
        """Returns the number of blocks for the rows of a head."""
        return self.tiling.rows // (gpu.COMPUTING * gpu.ROWS)

    def work(self, batch: int, rows: Any) -> gpu.Work:
        """Returns what the blocks of a kernel do, by their schedule."""
        persistent = self.persistent
        if persistent is None:
            known = isinstance(rows, np.ndarray)
            persistent = not known or rows[..., 0].min() < rows[..., 0].max()
        sizes = {"head": self.tiling.heads, "block": self.blocks, "batch": batch}
        work = gpu.Work(sizes, persistent=False)
        return work._replace(persistent=bool(persistent) and work.count > gpu.processors())


class Stream:
    """The tiles of columns that a block visits, as its schedule says."""

    def __init__(self, plan: Plan, schedule: Any, b: Array, n: Array, block: Array):
        """Finds the schedule of a block."""
        self.plan, self.batch, self.head = plan, b, n
        groups = schedule.shape[1]
        lead = b if schedule.shape[0] > 1 else 0, n // (plan.tiling.heads // groups)
        self.schedule, self.block = schedule.at[lead], block

    def row(self, warpgroup: Array) -> Array:
        """Returns the first row of a warpgroup."""
        return (self.block * gpu.COMPUTING + warpgroup) * gpu.ROWS

    def _entry(self, stream: Array | int) -> Any:
        return self.schedule.at[self.block * self.plan.streams + stream]

    def copy(
        self,
        names: Sequence[str],
        copy: Callable[[str, Array, Array], None],
        scratch: dict[str, Any],
        before: Sequence[Array],
    ) -> list[Array]:
        """Copies all tiles, each as soon as there is space for it.

        Args:
          names: of what is copied.
          copy: gets a name, the number of a tile, and a slot.
          scratch: has the barriers.
          before: how many tiles of each stream the block has copied before.

        Returns:
          How many it has then.
        """
        plan = self.plan
        counts = [self._entry(stream)[1] for stream in range(plan.streams)]

        def copy_tile(stream: int, step: Array) -> None:
            number, turn = self._entry(stream)[2 + step], before[stream] + step
            slot = stream * plan.stages + lax.rem(turn, plan.stages)
            for name in names:
                free = scratch[f"{name}_free"].at[slot]
                pl.when(turn >= plan.stages)(functools.partial(plgpu.barrier_wait, free))
                copy(name, number, slot)

        def copy_step(step: Array, carry: None) -> None:
            for stream, count in enumerate(counts):
                if plan.streams == 1:
                    copy_tile(stream, step)
                else:
                    pl.when(step < count)(functools.partial(copy_tile, stream, step))

        lax.fori_loop(0, functools.reduce(jnp.maximum, counts), copy_step, None)
        return [done + count for done, count in zip(before, counts, strict=True)]

    def visit(
        self,
        warpgroup: Array,
        visit: Callable[[Array, Array, bool, Any], Any],
        carry: Any,
        branches: tuple[bool, bool],
        before: Array,
    ) -> tuple[Any, Array]:
        """Calls a function with slot, number, whether to mask, and what it returned before.

        Args:
          warpgroup: the one that visits.
          visit: the function.
          carry: what it gets first.
          branches: whether there are tiles without a mask, and with one.
          before: how many tiles the warpgroup has visited before.

        Returns:
          What the function returned last, and how many tiles have been visited then.
        """
        row, slot_of = self._visited(warpgroup, before)

        def step(masked: bool, step: Array, carry: Any) -> Any:
            return visit(slot_of(step), row[2 + step], masked, carry)

        return self._each(step, 0, row[0], row[1], carry, branches), before + row[1]

    def visit_ahead(
        self,
        warpgroup: Array,
        begin: Callable[[Array, Array, bool, Any], Any],
        visit: Callable[[Array, Array, Array, bool, Any], Any],
        end: Callable[[Array, Any], Any],
        carry: Any,
        branches: tuple[bool, bool],
        before: Array,
    ) -> tuple[Any, Array]:
        """As `visit`, but a tile is begun with before the one before it is done with.

        Args:
          warpgroup: the one that visits.
          begin: begins with the first tile: gets slot, number, whether to mask, and the carry.
          visit: gets the slot of the tile before, with which it ends, and as `begin` does what it
            begins with, and what was returned before.
          end: ends with the last tile: gets its slot, and what was returned before.
          carry: what is returned where there are no tiles.
          branches: whether there are tiles without a mask, and with one.
          before: how many tiles the warpgroup has visited before.
        """
        row, slot_of = self._visited(warpgroup, before)
        full, count = row[0], row[1]

        def step(masked: bool, step: Array, carry: Any) -> Any:
            return visit(slot_of(step - 1), slot_of(step), row[2 + step], masked, carry)

        def visit_all(carry: Any) -> Any:
            # The first tile has a mask if any has one.
            carry = begin(slot_of(jnp.int32(0)), row[2], branches[1], carry)
            carry = self._each(step, 1, jnp.maximum(full, 1), count, carry, branches)
            return end(slot_of(count - 1), carry)

        return lax.cond(count > 0, visit_all, lambda carry: carry, carry), before + count

    def _visited(self, warpgroup: Array, before: Array) -> tuple[Any, Callable[[Array], Array]]:
        """Returns the schedule of a warpgroup, and a function to find the slot of a step."""
        stream = warpgroup if self.plan.streams > 1 else 0
        first = stream * self.plan.stages
        return self._entry(stream), lambda step: first + lax.rem(before + step, self.plan.stages)

    def _each(
        self,
        step: Callable[[bool, Array, Any], Any],
        first: int,
        full: Array,
        count: Array,
        carry: Any,
        branches: tuple[bool, bool],
    ) -> Any:
        """Goes through steps: first those of tiles without a mask."""
        # Two loops, not two branches in one: registers need not hold what both would return.
        if all(branches):
            carry = lax.fori_loop(first, full, functools.partial(step, False), carry)
            return lax.fori_loop(full, count, functools.partial(step, True), carry)
        return lax.fori_loop(first, count, functools.partial(step, branches[1]), carry)


def stream_barriers(plan: Plan, copies: int) -> tuple[Any, Any]:
    """Returns barriers for tiles that are there, after so many copies, and that are done with."""
    slots = plan.streams * plan.stages
    readers = gpu.COMPUTING // plan.streams
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
    )


def of_blocks(rows: Any, plan: Plan) -> Array:
    """Returns a schedule with a row for every stream of every block.

    A row has the number of tiles without a mask, that of all tiles, and the tiles, those without a
    mask first.
    """
    numpy = np if isinstance(rows, np.ndarray) else jnp
    count, entries = rows[..., :1], rows[..., 1:]
    unlisted = numpy.arange(entries.shape[-1]) >= count
    kind = numpy.where(unlisted, 2, entries & 1)
    order = numpy.argsort(kind, axis=-1, stable=True)
    entries = numpy.take_along_axis(entries >> 1, order, axis=-1)
    full = numpy.sum(kind == 0, axis=-1, keepdims=True, dtype=count.dtype)
    rows = numpy.concatenate([full, count, entries], axis=-1)
    return padded(jnp.asarray(rows), 2, plan.blocks * plan.streams)


def scored(
    call: Scores,
    operands: Operands,
    products: Array,
    refs: dict[str, Any],
    at: At,
    masked: bool,
    here: dict[str, Any] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Returns scores of a tile, and the values of the operands, which may have been loaded."""
    here = operands.values(refs, at) if here is None else here
    here = here | operands.streamed_values(refs, at)
    # Numbers that would have to be read are not, where nothing depends on them.
    needed = "slopes" in here or COLUMNS not in operands
    positions = operands.positions(refs, at) if needed else (None, None)
    scores, here["slope"] = call.held(products, here, *positions)
    return operands.masked(scores, refs, at) if masked else scores, here


def tile_of(fixed: int, column: int, most: int, block: int, columns: int) -> tuple[int, int]:
    """Returns the columns of a tile, and the stages, that SMEM has space for; it may be none.

    Args:
      fixed: bytes that do not depend on them.
      column: bytes of a column in a stage.
      most: columns of a tile.
      block: columns of the blocks of a list, which tiles divide; 0 if there is none.
      columns: all columns.
    """
    space = gpu.SMEM_BYTES - 4096 - fixed  # some are barriers, and sums of rows
    for tile in (128, 64, 32):
        count = -(-columns // tile)
        stages = min(space // (tile * column), 4, count)
        needless = tile > 64 >= columns
        if tile <= most and block % tile == 0 and not needless and stages >= min(2, count):
            return tile, stages
    return tile, stages
