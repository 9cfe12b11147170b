"""How the TPU kernels of tiled attention get what a tile of scores needs.

A kernel's grid step has one tile of rows and visits tiles of columns, one step after the other, as
its schedule says. What belongs to the rows is there when the step starts. What belongs to the
columns stays in HBM and is copied to VMEM one step ahead, into one of two slots; a step may gather
several short pieces, blocks of a block list, into one tile. Every other array of the call (bias,
slopes, leaves of the mask) is an operand: numbers in SMEM, a value for every row, a value for every
column, or a value for every score.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.masks import Blocks, Mask
from pallas_kernels.tiled.inputs import Inputs, Options, four_dimensional
from pallas_kernels.tiled.schedule import Grid, divisor, schedule, split, transposed_schedules
from pallas_kernels.tpu import LANES, generation, padded

BUNDLES_OF_A_STEP, BUNDLES_OF_A_ROW = 100, 300
"""What visiting a tile takes besides its scores, and a row of tiles besides its visits, about."""


class Tiling(NamedTuple):
    """The shape of a kernel's tiles: rows stay, columns stream."""

    rows: int  # in a tile
    row_tiles: int
    columns: int  # in a piece
    column_tiles: int
    pieces: int  # pieces of columns that a step gathers into one tile
    row_part: int  # rows of the part of a tile that is computed at a time
    column_part: int  # its columns
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
        array = four_dimensional(array, dims)
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

    def copies(
        self, ref: Any, scratch: Any, row: Array, number: Array, piece: int, slot: Array
    ) -> list:
        """Returns (source, target) of what a row of tiles needs for one piece of columns."""
        b, n = pl.program_id(0), pl.program_id(1)
        if self.kind == "columns":
            return [(ref.at[(*self._at(b, n), number)], scratch.at[slot, piece])]
        if self.kind == "scores":
            rows, columns = self.tiling.rows, self.tiling.columns
            source = ref.at[(*self._at(b, n), tokens(row, rows), tokens(number, columns))]
            return [(source, scratch.at[slot])]
        return []

    def filled(self, scratch: Any, slot: Array) -> list:
        """Returns the targets of all copies to a slot."""
        return [scratch.at[slot]] if self.kind in ("columns", "scores") else []

    def arrive(self, ref: Any, scratch: Any, slot: Array) -> None:
        """Prepares what was copied to a slot, where values are not taken from it directly."""

    def value(self, ref: Any, scratch: Any, slot: Array, row: int, start: int) -> Array:
        """Returns the values for the part of a step's tile that starts at a row and a column."""
        size, rows = self.tiling.column_part, pl.ds(row, self.tiling.row_part)
        if self.kind == "number":
            return ref[0, 0]
        if self.kind == "rows":
            return across(scratch[rows], size)
        if self.kind == "columns":
            pieces = [scratch[slot, piece] for piece in range(self.tiling.pieces)]
            return joined(pieces, self.tiling.columns, start, size)
        value = scratch[slot, rows, pl.ds(start, size)]
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


def add_to_columns(
    sums: Any, row: Array, numbers: Sequence[Array], tiling: Tiling, start: int
) -> None:
    """Adds values of the columns of a part of a tile to sums by tile of columns: undoes `joined`.

    Args:
      sums: [tiles, 1, max(columns, 128)]. What is beyond the columns is of no meaning.
      row: [1, column_part].
      numbers: of the tiles.
      tiling: the tiles.
      start: first column of the part.
    """
    size = min(tiling.columns, row.shape[1])
    for begin in range(0, row.shape[1], size):
        piece, inside = divmod(start + begin, tiling.columns)
        if size < LANES:
            first = begin % LANES
            lanes = row[:, begin - first : begin - first + LANES]
            sums[numbers[piece]] += pltpu.roll(lanes, LANES - first, 1) if first else lanes
        else:
            sums[numbers[piece], :, pl.ds(inside, size)] += row[:, begin : begin + size]


def visit(
    schedule: Any,
    tiling: Tiling,
    buffers: Sequence[tuple[Any, Any]],
    copies: Callable[[Array, Array, Array | int, Array], list],
    slots_of: Callable[[Array], list],
    scratch: dict[str, Any],
    compute: Callable[[Array, Array, bool], None],
    branches: tuple[bool, bool],
) -> None:
    """Visits the tiles of columns that a row of tiles needs, copying one step ahead.

    The last step of a row copies what the first step of the next row of the same head needs, so
    rows of a head are visited in order.

    Args:
      schedule: window of the schedule, in SMEM.
      tiling: the tiles.
      buffers: (array in HBM [.., tokens, features], its two slots in VMEM) of what streams.
      copies: returns (source, target) of everything else that a row of tiles needs of piece
        `number`, in place `piece` of a slot.
      slots_of: returns all targets of `copies` in a slot.
      scratch: `visit_scratch()`.
      compute: computes on a slot; gets the numbers of the pieces, and whether to mask.
      branches: whether there are tiles without a mask, and with one.
    """
    row, first_slot = pl.program_id(2), scratch["slot"]
    count, count_after = schedule[0, 0, 0], schedule[0, 0, 1]
    steps = pl.cdiv(count, tiling.pieces)
    header = 2 + tiling.pieces

    def entry(index: Array) -> Array:
        return schedule[0, 0, header + jnp.minimum(index, count - 1)]

    def start(row: Array, number_of: Callable[[Array | int], Array], slot: Array) -> None:
        def start_piece(piece: Array | int) -> None:
            number = number_of(piece)
            streams = [
                (
                    hbm.at[tokens(number, tiling.columns)],
                    slots.at[slot, tokens(piece, tiling.columns)],
                )
                for hbm, slots in buffers
            ]
            for source, target in streams + copies(row, number, piece, slot):
                pltpu.make_async_copy(source, target, scratch["semaphores"].at[slot]).start()

        _for_each(tiling.pieces, start_piece)

    def wait(slot: Array) -> None:
        # For as many bytes as fill the slot, however many copies they came by.
        for filled in [slots.at[slot] for _, slots in buffers] + slots_of(slot):
            pltpu.make_async_copy(filled, filled, scratch["semaphores"].at[slot]).wait()

    def start_step(step: Array, slot: Array) -> None:
        start(row, lambda piece: entry(step * tiling.pieces + piece) >> 1, slot)

    def start_row_after(slot: Array) -> None:
        start(row + 1, lambda piece: schedule[0, 0, 2 + piece] >> 1, slot)

    @pl.when(row == 0)
    def _() -> None:
        first_slot[0] = 0
        pl.when(steps > 0)(lambda: start_step(0, 0))

    def body(step: Array, carry: None) -> None:
        slot = (first_slot[0] + step) & 1
        pl.when(step + 1 < steps)(lambda: start_step(step + 1, 1 - slot))
        last = step + 1 == steps
        pl.when(last & (count_after > 0))(lambda: start_row_after(1 - slot))
        wait(slot)
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
    first_slot[0] = (first_slot[0] + steps) & 1
    pl.when((steps == 0) & (count_after > 0))(lambda: start_row_after(first_slot[0]))


def _for_each(count: int, function: Callable[[Array | int], None]) -> None:
    """Calls a function with 0 .. count - 1, in a loop where that many copies of it are too many."""
    if count <= 8:
        for index in range(count):
            function(index)
        return

    def eight(first: Array, carry: None) -> None:
        for index in range(8):
            function(first * 8 + index)

    jax.lax.fori_loop(0, count // 8, eight, None)


def visit_scratch() -> dict[str, Any]:
    """Returns what `visit` needs from one grid step to the next."""
    return {"semaphores": pltpu.SemaphoreType.DMA((2,)), "slot": pltpu.SMEM((1,), jnp.int32)}


def tokens(number: Array | int, size: int) -> Any:
    """Returns the slice of tokens of a tile or piece."""
    if isinstance(number, int):
        return pl.ds(number * size, size)
    return pl.ds(pl.multiple_of(number * size, size), size)


def positions(
    numbers: Sequence[Array], tiling: Tiling, row: int, start: int
) -> tuple[Array, Array]:
    """Returns the numbers of the rows, one in each lane, and of the columns of a part of a tile."""
    shape = (tiling.row_part, tiling.column_part)
    rows = pl.program_id(2) * tiling.rows + row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if tiling.pieces == 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, tiling.column_part), 1)
        return rows, numbers[0] * tiling.columns + start + lane
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, max(tiling.columns, LANES)), 1)
    pieces = [number * tiling.columns + lane for number in numbers]
    return rows, joined(pieces, tiling.columns, start, tiling.column_part)


def column(row: Array) -> Array:
    """Returns a row of values [1, rows] as [rows, 128], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: Array) -> Array:
    """Returns the first lane of [rows, 128] as [1, rows]."""
    return column.T[:1]


def lane_sums(weights: Array) -> Array:
    """Sums the columns, in as many parts as there are lanes."""
    parts = (weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES))
    return functools.reduce(jnp.add, parts)


def across(column: Array, size: int) -> Array:
    """Returns [rows, 128], the same in every lane, as [rows, size]."""
    if size <= LANES:
        return column[:, :size]
    if size % LANES == 0:
        return jnp.tile(column, (1, size // LANES))
    return jnp.broadcast_to(column[:, :1], (column.shape[0], size))


def by_head(x: Inputs, tiling: Tiling, transposed: bool = False) -> tuple[Array, Array, Array]:
    """Returns query, key and value as [B, heads, tokens, features], filled up to whole tiles."""
    # float16 does not compile on TPU.
    dtype = jnp.float32 if x.query.dtype == jnp.float16 else x.query.dtype
    rows, columns = tiling.row_tiles * tiling.rows, tiling.column_tiles * tiling.columns
    queries, keys = (columns, rows) if transposed else (rows, columns)
    arrays = (jnp.swapaxes(array, 1, 2).astype(dtype) for array in x[:3])
    return tuple(map(padded, arrays, (2, 2, 2), (queries, keys, keys)))


def windows(schedule: Any, tiling: Tiling) -> tuple[pl.BlockSpec, Array]:
    """Returns how a grid step gets its window of a schedule, and the schedule as it is passed.

    A window has the number of entries of its own row and of the next, the first entries of the
    next, and its own entries.
    """
    heads, (batch, groups, count, _) = tiling.heads, schedule.shape
    numpy = np if isinstance(schedule, np.ndarray) else jnp
    after = numpy.concatenate([schedule[:, :, 1:], numpy.zeros_like(schedule[:, :, :1])], axis=2)
    first = numpy.minimum(numpy.arange(tiling.pieces), numpy.maximum(after[..., :1] - 1, 0))
    first = numpy.take_along_axis(after, 1 + first, axis=3)
    parts = [schedule[..., :1], after[..., :1], first, schedule[..., 1:]]
    schedule = numpy.concatenate(parts, axis=3)
    size = -(-schedule.shape[3] // LANES) * LANES
    schedule = padded(jnp.asarray(schedule), 3, size).reshape(batch * groups * count, 1, size)

    def index(b: Array, n: Array, i: Array) -> tuple[Array, int, int]:
        b = b if batch > 1 else 0
        n = n // (heads // groups) if groups > 1 else 0
        return (b * groups + n) * count + i, 0, 0

    return pl.BlockSpec((1, 1, size), index, memory_space=pltpu.SMEM), schedule


def branches(schedule: Any, masked: bool) -> tuple[bool, bool]:
    """Returns whether a schedule has, as far as is known, full tiles, and partial ones."""
    if not isinstance(schedule, np.ndarray):
        return True, masked
    listed = np.arange(schedule.shape[-1] - 1) < schedule[..., :1]
    partial = schedule[..., 1:] % 2 == 1
    some = bool((listed & partial).any())
    return bool((listed & ~partial).any()) or not some, some


def chosen(
    table: Mapping[int, Mapping[tuple[int, ...], int]], grid: Grid, mask: Mask | None, rows: int
) -> tuple[int, ...]:
    """Returns the entry of a table of tiles that suits a mask.

    It is the first one, for the generation, unless the mask is known and leaves so little of large
    tiles that smaller ones are clearly cheaper, as a window does.

    Args:
      table: by generation from which on, tiles, queries and keys first, and the bundles of the
        compiler's schedule that they take for 512 x 512 scores.
      grid: the numbers of queries and keys.
      mask: the mask.
      rows: which of the tiles' sizes is that of rows: 0 queries, 1 keys.
    """
    tiles = table[max(known for known in table if known <= max(generation(), min(table)))]
    default, lists = next(iter(tiles)), split(mask)[0]
    if mask is None or lists or jax.tree.leaves(mask):
        return default

    def cost(tile: tuple[int, ...]) -> float:
        cut = grid._replace(rows=even(grid.queries, tile[0]), columns=even(grid.keys, tile[1]))
        listed = transposed_schedules(mask, cut, cut.shape[0]) if rows else schedule(mask, cut)
        visited = listed[..., 0]
        step = tiles[tile] * cut.rows * cut.columns / 512**2 + BUNDLES_OF_A_STEP
        return visited.sum() * step + visited.size * BUNDLES_OF_A_ROW

    best = min(tiles, key=cost)
    return best if cost(best) < 0.75 * cost(default) else default


def limited(options: Options, x: Inputs, size: int) -> int:
    """Returns the size of a tile: less where more is copied, or scores take more operations."""
    several = x.query.dtype != jnp.bfloat16 or options.reweight is not None
    several |= options.group_size is not None
    return min(size, 512) if several or has_scores(x) else size


def even(count: int, most: int) -> int:
    """Returns the size of tiles, of about equal sizes, that cover a number of tokens."""
    # 32 rows are a register of 8-bit values. Multiples of 256 have parts of a good size.
    step = 256 if count > 256 else LANES if count > 32 else 32
    number = -(-count // most)
    return -(-count // (number * step)) * step


def listed(x: Inputs, lists: Sequence[Blocks], transposed: bool) -> tuple[int, int, int, int]:
    """Returns for block lists rows and columns of a tile, pieces in a step, columns in a part."""
    most = 512 if has_scores(x) else 1024
    rows, columns = (divisor(block, most) for block in common_blocks(lists))
    rows, columns = (columns, rows) if transposed else (rows, columns)
    pieces = 1 if has_scores(x) else min(max(512 // columns, 1), 16)
    width = columns * pieces
    return rows, columns, pieces, 512 if width % 512 == 0 else width if width < 512 else LANES


def common_blocks(lists: Sequence[Blocks]) -> tuple[int, int]:
    """Returns the largest blocks of queries and keys that divide those of all lists."""
    return tuple(math.gcd(*(getattr(x, name) for x in lists)) for name in ("block_q", "block_k"))


def has_scores(x: Inputs) -> bool:
    """Returns whether a bias or a mask has a value for every score, which has to be copied."""
    arrays = [] if x.bias is None else [x.bias]
    if x.mask is not None:
        arrays += [
            a
            for a, d in zip(jax.tree.leaves(x.mask), x.mask.dims(), strict=True)
            if d.endswith("ts")
        ]
    return any(array.shape[-2] > 1 and array.shape[-1] > 1 for array in arrays)
