"""The table of relative positions in the TPU kernels of tiled attention.

What a table adds to scores depends on distance only, so all that a tile needs of it is a window of
rows + columns values, one for each diagonal. Rolled one lane further for each row, copies of the
window are a band: rows of scores. The rows of a tile 128 further down are the same band, 128 lanes
further left. The gradient goes the same way back: gradients of scores are summed to a band, and
the rows of the band, rolled back, to a window.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tiled.inputs import Inputs, unbroadcast
from pallas_kernels.tiled.tiles import Operand, Tiling
from pallas_kernels.tpu import LANES


def by_distance(
    table: Float[Array, "B|1 N|1 2*R+1"], x: Inputs, first: int, columns: int, transposed: bool
) -> Float[Array, "B|1 N|1 distances"]:
    """Returns what a table adds at every distance of a column from a row, ascending.

    Args:
      table: by the distance of a key from a query.
      x: the call.
      first: index of the distance 0; as many are before it.
      columns: as many are from it on.
      transposed: whether rows are keys.
    """
    # A slice of a table with long ends, as gathering and scattering are slow.
    count = first + columns
    lowest = first + 1 - count if transposed else -first
    size = table.shape[-1]
    start = jnp.clip(lowest - x.offset + size // 2, -count, size) + count
    table = jnp.pad(table.astype(jnp.float32), ((0, 0), (0, 0), (count, count)), mode="edge")
    batch = max(len(table), len(start))
    table = jnp.broadcast_to(table, (batch, *table.shape[1:]))
    start = jnp.broadcast_to(start, (batch,))
    values = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count, 1))(table, start)
    return values[..., ::-1] if transposed else values


class Table(Operand):
    """The operand of values by distance, and the sums of its gradient.

    Attributes:
      sums: shape of the gradient by distance, of one head.
      band: shape of the band of a step.
    """

    def __init__(self, x: Inputs, tiling: Tiling, transposed: bool, unit: float):
        """Prepares the table of a call.

        Args:
          x: the call.
          tiling: the tiles.
          transposed: whether rows are keys.
          unit: what stands for a score of 1.
        """
        self.tiling, self.transposed, self.kind = tiling, transposed, "distances"
        array = self._by_distance(x.table, x) * unit
        self.batch, self.heads = array.shape[:2]
        self.array = array[:, :, None]
        self.spec = pl.BlockSpec(memory_space=pl.ANY)
        width = _lead(tiling) + tiling.columns
        self.sums = (1, array.shape[-1])
        self.band = (tiling.pieces, min(tiling.rows, LANES), width)
        self.scratch = {
            "window": pltpu.VMEM((2, tiling.pieces, 1, width), jnp.float32),
            "band": pltpu.VMEM(self.band, jnp.float32),
        }

    def copies(
        self, ref: Any, scratch: Any, row: Array, number: Array, piece: int, slot: Array
    ) -> list:
        """Returns (source, target) of the window for one piece of columns."""
        b, n = pl.program_id(0), pl.program_id(1)
        source = ref.at[(*self._at(b, n), slice(None), self._window(row, number))]
        return [(source, scratch["window"].at[slot, piece])]

    def filled(self, scratch: Any, slot: Array) -> list:
        """Returns the targets of all copies to a slot."""
        return [scratch["window"].at[slot]]

    def arrive(self, ref: Any, scratch: Any, slot: Array) -> None:
        """Makes the bands of the windows that were copied."""
        del ref
        for piece in range(self.tiling.pieces):
            band, height = scratch["band"].at[piece], 1
            band[:1] = scratch["window"][slot, piece]
            while height < self.band[1]:
                band[height : 2 * height] = pltpu.roll(band[:height], height, 1)
                height *= 2

    def value(self, ref: Any, scratch: Any, slot: Array, row: int, start: int) -> Array:
        """Returns what is added to the part of a step's tile that starts at a row and a column."""
        del ref, slot
        return jnp.concatenate(
            [
                jnp.concatenate([scratch["band"][at] for _, at in parts], axis=1)
                for _, parts in self._parts(row, start)
            ],
            axis=0,
        )

    def add(self, band: Any, d_scores: Array, row: int, start: int) -> None:
        """Adds the gradient of the scores of a part of a tile to a band."""
        for rows, parts in self._parts(row, start):
            for columns, at in parts:
                band[at] += d_scores[rows, columns]

    def fold(self, band: Any, sums: Any, numbers: Sequence[Array]) -> None:
        """Adds the band of a step to the sums by distance."""
        for piece, number in enumerate(numbers):
            window = band[piece]
            while window.shape[0] > 1:
                half = window.shape[0] // 2
                window = window[:half] + pltpu.roll(window[half:], self.band[2] - half, 1)
            # A piece beyond the end has only zeros to add.
            number = jnp.minimum(number, self.tiling.column_tiles - 1)
            sums[:, self._window(pl.program_id(2), number)] += window

    def gradient(self, sums: Array, x: Inputs) -> Array:
        """Returns the gradient of the table from the sums by distance of all heads."""

        def spread(table: Array) -> Array:
            return self._by_distance(table, x)

        values, transpose = jax.vjp(spread, x.table.astype(jnp.float32))
        return transpose(unbroadcast(sums, values.shape))[0]

    def _by_distance(self, table: Array, x: Inputs) -> Array:
        tiling = self.tiling
        first = (tiling.row_tiles - 1) * tiling.rows + _lead(tiling)
        return by_distance(table, x, first, tiling.column_tiles * tiling.columns, self.transposed)

    def _window(self, row: Array, number: Array) -> Any:
        """Returns the distances that a tile of scores needs."""
        tiling = self.tiling
        start = number * tiling.columns + (tiling.row_tiles - 1 - row) * tiling.rows
        return pl.ds(pl.multiple_of(start, LANES), self.band[2])

    def _parts(self, row: int, start: int) -> list:
        """Returns where the band holds a part of a tile.

        For every few rows of the part, as slices of it: the rows, and for all columns (columns,
        index of the band).
        """
        tiling, height = self.tiling, self.band[1]
        size = min(tiling.columns, tiling.column_part)
        parts = []
        for first in range(0, tiling.row_part, height):
            across = []
            for begin in range(0, tiling.column_part, size):
                piece, inside = divmod(start + begin, tiling.columns)
                lanes = pl.ds(_lead(tiling) - row - first + inside, size)
                across.append((slice(begin, begin + size), (piece, slice(None), lanes)))
            parts.append((slice(first, first + height), across))
        return parts


def _lead(tiling: Tiling) -> int:
    """Returns the place in a window of a tile's first score: its rows, in whole registers."""
    return max(tiling.rows, LANES)
