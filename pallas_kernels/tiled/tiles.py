"""How the TPU kernels of tiled attention get what a tile of scores needs.

A kernel's grid step has one tile of rows and visits tiles of columns, one step after the other, as
its schedule says. What belongs to the rows is there when the step starts. What belongs to the
columns stays in HBM and is copied to VMEM one step ahead, into one of two slots; a step may gather
several short pieces, blocks of a block list, into one tile. Every other array of the call (bias,
slopes, leaves of the mask) is an operand: numbers in SMEM, a value for every row, a value for every
column, or a value for every score.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

LANES = 128


class Tiling(NamedTuple):
    """The shape of a kernel's tiles: rows stay, columns stream."""

    rows: int  # in a tile
    row_tiles: int
    columns: int  # in a piece
    column_tiles: int
    pieces: int  # pieces of columns that a step gathers into one tile
    sub: int  # columns of the part of a tile that is computed at a time
    heads: int  # of the queries

    @property
    def width(self) -> int:
        """Returns the columns of a step."""
        return self.columns * self.pieces


class Operand:
    """An array of which a tile of scores needs a part.

    Attributes:
      kind: "number", "rows", "columns" or "scores".
      array: as the kernel gets it.
      spec: its BlockSpec.
      scratch: what it needs in VMEM, or None.
    """

    def __init__(self, array: Array, dims: str, tiling: Tiling, transposed: bool = False):
        """Prepares an array.

        Args:
          array: an array of the call.
          dims: its dimensions, as in `partition`.
          tiling: the tiles.
          transposed: whether rows are keys.
        """
        array = _four_dimensional(array, dims)
        if transposed:
            array = jnp.swapaxes(array, 2, 3)
        has_rows, has_columns = (size > 1 for size in array.shape[2:])
        self.tiling = tiling
        self.batch, self.heads = array.shape[:2]
        if has_rows and has_columns:
            self.kind = "scores"
            array = array.astype(jnp.int8) if array.dtype == bool else array
        else:
            # Registers of 32 bits are what scalars, transpositions and comparisons are made of.
            wide = jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32
            array = array.astype(wide)
            self.kind = "rows" if has_rows else "columns" if has_columns else "number"
        if has_rows:
            array = padded(array, 2, tiling.row_tiles * tiling.rows)
        if has_columns:
            array = padded(array, 3, tiling.column_tiles * tiling.columns)
        hbm = pl.BlockSpec(memory_space=pl.ANY)
        if self.kind == "number":
            self.spec = pl.BlockSpec(
                (None, None, 1, 1), lambda b, n, i: (*self._at(b, n), 0, 0), memory_space=pltpu.SMEM
            )
            self.scratch = None
        elif self.kind == "rows":
            array = array.reshape(*array.shape[:2], tiling.row_tiles, 1, tiling.rows)
            self.spec = pl.BlockSpec(
                (None, None, None, 1, tiling.rows), lambda b, n, i: (*self._at(b, n), i, 0, 0)
            )
            self.scratch = pltpu.VMEM((tiling.rows, LANES), array.dtype)
        elif self.kind == "columns":
            array = array.reshape(*array.shape[:2], tiling.column_tiles, 1, tiling.columns)
            array = padded(array, 4, max(tiling.columns, LANES))
            self.spec = hbm
            self.scratch = pltpu.VMEM((2, tiling.pieces, 1, array.shape[-1]), array.dtype)
        else:
            self.spec = hbm
            self.scratch = pltpu.VMEM((2, tiling.rows, tiling.columns), array.dtype)
        self.array = array

    def _at(self, b: Array, n: Array) -> tuple[Array | int, Array | int]:
        heads = self.tiling.heads // self.heads
        return b if self.batch > 1 else 0, n // heads if self.heads > 1 else 0

    def prepare(self, ref: Any, scratch: Any) -> None:
        """Turns values of rows, which lie along lanes, into columns of a register."""
        if self.kind == "rows":
            scratch[...] = column(ref[...])

    def copies(self, ref: Any, scratch: Any, number: Array, piece: int, slot: Array) -> list:
        """Returns (source, target) of what is copied for one piece of columns."""
        b, n, i = (pl.program_id(axis) for axis in range(3))
        if self.kind == "columns":
            return [(ref.at[(*self._at(b, n), number)], scratch.at[slot, piece])]
        if self.kind == "scores":
            rows = pl.ds(pl.multiple_of(i * self.tiling.rows, self.tiling.rows), self.tiling.rows)
            source = ref.at[(*self._at(b, n), rows, tokens(number, self.tiling.columns))]
            return [(source, scratch.at[slot])]
        return []

    def value(self, ref: Any, scratch: Any, slot: Array, start: int) -> Array:
        """Returns the values for the columns start .. start + sub - 1 of a step's tile."""
        size = self.tiling.sub
        if self.kind == "number":
            return ref[0, 0]
        if self.kind == "rows":
            return across(scratch[...], size)
        if self.kind == "columns":
            pieces = [scratch[slot, piece] for piece in range(self.tiling.pieces)]
            return joined(pieces, self.tiling.columns, start, size)
        value = scratch[slot, :, pl.ds(start, size)]
        return value.astype(jnp.int32) != 0 if value.dtype == jnp.int8 else value


def joined(pieces: Sequence[Array], columns: int, start: int, size: int) -> Array:
    """Returns a part of a row that is made of pieces [1, max(columns, 128)], as [1, size]."""
    if columns >= LANES:
        parts = []
        for begin in range(start - start % columns, start + size, columns):
            piece = pieces[begin // columns]
            low, high = max(start - begin, 0), min(start + size - begin, columns)
            parts.append(piece[:, low:high])
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    parts = []
    for begin in range(start, start + size, LANES):
        part = pieces[begin // columns]
        for offset in range(columns, LANES, columns):
            piece = pltpu.roll(pieces[(begin + offset) // columns], offset, 1)
            part = jnp.where(lane < offset, part, piece)
        parts.append(part)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def visit(
    schedule: Any,
    tiling: Tiling,
    buffers: Sequence[tuple[Any, Any]],
    copies: Callable[[Array, int, Array], list],
    semaphores: Any,
    compute: Callable[[Array, Array, bool], None],
    branches: tuple[bool, bool],
) -> None:
    """Visits the tiles of columns that a row of tiles needs, copying one step ahead.

    Args:
      schedule: window of the schedule, in SMEM.
      tiling: the tiles.
      buffers: (array in HBM [.., tokens, features], its two slots in VMEM) of what streams.
      copies: returns (source, target) of everything else, of piece `number`, in place `piece` of a
        slot.
      semaphores: one for each slot.
      compute: computes on a slot; gets the numbers of the pieces, and whether to mask.
      branches: whether there are tiles without a mask, and with one.
    """
    count = schedule[0, 0, 0]
    steps = pl.cdiv(count, tiling.pieces)

    def entry(index: Array) -> Array:
        return schedule[0, 0, 1 + jnp.minimum(index, count - 1)]

    def descriptors(numbers: Sequence[Array], slot: Array) -> list:
        return [
            pltpu.make_async_copy(source, target, semaphores.at[slot])
            for piece, number in enumerate(numbers)
            for source, target in [
                *(
                    (
                        hbm.at[tokens(number, tiling.columns)],
                        slots.at[slot, pl.ds(piece * tiling.columns, tiling.columns)],
                    )
                    for hbm, slots in buffers
                ),
                *copies(number, piece, slot),
            ]
        ]

    def start(step: Array, slot: Array) -> None:
        numbers = [entry(step * tiling.pieces + p) >> 1 for p in range(tiling.pieces)]
        for descriptor in descriptors(numbers, slot):
            descriptor.start()

    @pl.when(steps > 0)
    def _() -> None:
        start(0, 0)

    def body(step: Array, carry: None) -> None:
        slot = jax.lax.rem(step, 2)

        @pl.when(step + 1 < steps)
        def _() -> None:
            start(step + 1, 1 - slot)

        for descriptor in descriptors([0] * tiling.pieces, slot):
            descriptor.wait()
        first = step * tiling.pieces
        entries = [entry(first + piece) for piece in range(tiling.pieces)]
        numbers = [
            jnp.where(first + piece < count, entry >> 1, tiling.column_tiles)
            for piece, entry in enumerate(entries)
        ]
        partial = functools.reduce(jnp.bitwise_or, entries) & 1
        if tiling.pieces > 1:
            partial |= (first + tiling.pieces > count).astype(jnp.int32)
        if all(branches):
            pl.when(partial == 0)(lambda: compute(slot, numbers, False))
            pl.when(partial == 1)(lambda: compute(slot, numbers, True))
        else:
            compute(slot, numbers, branches[1])

    jax.lax.fori_loop(0, steps, body, None)


def tokens(number: Array, size: int) -> Any:
    """Returns the slice of tokens of a tile."""
    return pl.ds(pl.multiple_of(number * size, size), size)


def column_numbers(numbers: Sequence[Array], tiling: Tiling, start: int) -> Array:
    """Returns the numbers of the columns start .. start + sub - 1 of a step, as [1, sub]."""
    if tiling.pieces == 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, tiling.sub), 1)
        return numbers[0] * tiling.columns + start + lane
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, max(tiling.columns, LANES)), 1)
    pieces = [number * tiling.columns + lane for number in numbers]
    return joined(pieces, tiling.columns, start, tiling.sub)


def column(row: Array) -> Array:
    """Returns a row of values [1, rows] as [rows, 128], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: Array) -> Array:
    """Returns the first lane of [rows, 128] as [1, rows]."""
    return column.T[:1]


def across(column: Array, size: int) -> Array:
    """Returns [rows, 128], the same in every lane, as [rows, size]."""
    if size <= LANES:
        return column[:, :size]
    if size % LANES == 0:
        return jnp.tile(column, (1, size // LANES))
    return jnp.broadcast_to(column[:, :1], (column.shape[0], size))


def padded(array: Array, axis: int, size: int) -> Array:
    """Fills an axis up with zeros."""
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def _four_dimensional(array: Array, dims: str) -> Array:
    """Returns an array of a call as [B|1, N|K|1, T|1, S|1]."""
    if dims.endswith("ts"):
        return array
    if dims.endswith("t") and len(dims) == 3:
        return array[:, :, :, None]
    if dims.endswith("s"):
        return array[:, :, None, :]
    return array.reshape(array.shape + (1,) * (4 - array.ndim))
