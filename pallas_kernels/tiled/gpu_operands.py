"""How the GPU kernels of tiled attention get what a tile of scores needs besides products.

A warpgroup computes a tile of 64 rows. Every array of the call apart from queries, keys and values
is an operand: a number, a value for every row, for every column, or for every score, which a
warpgroup reads from GMEM to its registers when it needs it. Values of columns may wait in SMEM, as
the columns do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu, masks
from pallas_kernels.tiled.inputs import Inputs, four_dimensional
from pallas_kernels.tiled.scores import Scores, distance, named_operands
from pallas_kernels.tiled.table import by_distance
from pallas_kernels.tpu import padded

COLUMNS = "mask: columns"
"""Operand of the columns' numbers."""

LATER = ("sink", "delta")
"""Operands that weights are not made of."""


class Tiling(NamedTuple):
    """The shape of a kernel's tiles: rows stay, columns stream."""

    rows: int
    """All rows, filled up to whole blocks of the grid."""
    columns: int
    """All columns, filled up to whole tiles."""
    tile: int
    """Columns of a tile."""
    heads: int
    """Of the queries."""
    transposed: bool
    """Whether rows are keys."""

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the shape of the scores that a warpgroup computes at a time."""
        return gpu.ROWS, self.tile


class Operand:
    """An array of which a tile of scores needs a part.

    Attributes:
      array: as the kernel gets it.
      in_slots: whether it is read from SMEM, by the slot of a tile.
      ahead: whether it is read where it says, not where its values are used.
    """

    in_slots = ahead = False

    def __init__(self, array: Array, dims: str, tiling: Tiling):
        """Prepares an array of a call, with its dimensions as in `partition`."""
        array = four_dimensional(array, dims)
        if tiling.transposed:
            array = jnp.swapaxes(array, 2, 3)
        self.tiling = tiling
        self.boolean = array.dtype == bool
        self.batch, self.heads, *tokens = array.shape
        self.has_rows, self.has_columns = (size > 1 for size in tokens)
        if jnp.issubdtype(array.dtype, jnp.floating):
            narrow = array.dtype if self.has_rows and self.has_columns else jnp.float32
            array = array.astype(narrow)
        else:
            array = array.astype(jnp.int32)
        if self.has_rows:
            array = padded(array, 2, tiling.rows)
        if self.has_columns:
            array = padded(array, 3, tiling.columns)
        axes = [2 + axis for axis, has in enumerate((self.has_rows, self.has_columns)) if not has]
        self.array = jnp.squeeze(array, axes)

    @property
    def of_columns(self) -> bool:
        """Returns whether there is a value for every column."""
        return self.has_columns and not self.has_rows

    def copy(self, ref: Any, at: "At", target: Any, ready: Any) -> None:
        """Has the copy engine fetch the values of a tile's columns."""
        columns = pl.ds(at.column, self.tiling.tile)
        plgpu.copy_gmem_to_smem(ref.at[(*self._lead(at), columns)], target.at[at.slot], ready)

    def value(self, ref: Any, at: "At") -> Array:
        """Returns the values for a tile, as a matrix or a number."""
        tiling = self.tiling
        rows, columns = pl.ds(at.row, gpu.ROWS), pl.ds(at.column, tiling.tile)
        match self.has_rows, self.has_columns:
            case False, False:
                value = ref[self._lead(at)]
            case True, False:
                value = self._loaded(ref.at[(*self._lead(at), rows)], gpu.OF_ROWS)
                value = gpu.across(value, tiling.shape)
            case False, True:
                if self.in_slots:
                    value = plgpu.load(ref.at[at.slot], layout=gpu.OF_COLUMNS, optimized=False)
                else:
                    value = self._loaded(ref.at[(*self._lead(at), columns)], gpu.OF_COLUMNS)
                value = gpu.down(value, tiling.shape)
            case _:
                value = self._loaded(ref.at[(*self._lead(at), rows, columns)], gpu.MATRIX)
        return value != 0 if self.boolean else value

    def of_rows(self, ref: Any, at: "At") -> Array:
        """Returns the values of the rows, if that is what they are of, or of all of them."""
        if self.has_rows:
            return self._loaded(ref.at[(*self._lead(at), pl.ds(at.row, gpu.ROWS))], gpu.OF_ROWS)
        return jnp.broadcast_to(ref[self._lead(at)], (gpu.ROWS,))

    def _loaded(self, ref: Any, layout: Any) -> Array:
        value = plgpu.load(ref, layout=layout, optimized=False)
        # Without a barrier the compiler would put it where values are used, and wait there.
        return lax.optimization_barrier(value) if self.ahead else value

    def _lead(self, at: "At") -> tuple[Array | int, Array | int]:
        head = at.head // (self.tiling.heads // self.heads)
        return at.batch if self.batch > 1 else 0, head if self.heads > 1 else 0


class Distances(Operand):
    """The operand of a table of relative positions.

    What it adds depends on distance only. Copies of the values by distance, each one further than
    the one before, are a band of 64 rows in which the values of every tile lie side by side.
    """

    of_columns = False

    def __init__(self, x: Inputs, tiling: Tiling, unit: float):
        """Prepares the table of a call, with `unit` for a score of 1."""
        values = by_distance(x.table, x, tiling.rows, tiling.columns, tiling.transposed) * unit
        self.tiling, (self.batch, self.heads, count) = tiling, values.shape
        size = count - gpu.ROWS
        band = [values[..., gpu.ROWS - row :][..., :size] for row in range(gpu.ROWS)]
        self.array = jnp.stack(band, axis=2)

    def value(self, ref: Any, at: "At") -> Array:
        """Returns the values for a tile."""
        start = at.column + (self.tiling.rows - gpu.ROWS) - at.row
        window = pl.ds(pl.multiple_of(start, gpu.ROWS), self.tiling.tile)
        return self._loaded(ref.at[(*self._lead(at), slice(None), window)], gpu.MATRIX)


class At(NamedTuple):
    """Where a tile is."""

    batch: Array
    head: Array
    row: Array
    column: Array
    slot: Array | None = None


class Operands:
    """The arrays of a call as a kernel gets them.

    Attributes:
      arrays: arguments of the kernel, by name.
      mask: the mask as it is evaluated on tiles that are not full.
      streamed: names of those that are copied to SMEM with the columns.
    """

    def __init__(
        self,
        call: Scores,
        x: Inputs,
        tiling: Tiling,
        *,
        ahead: bool = False,
        numbered: bool = False,
        **more: Array,
    ):
        """Prepares the inputs of a call, and more arrays [B, N, T] with a value for every query.

        Args:
          call: the call.
          x: its inputs.
          tiling: the kernel's.
          ahead: whether values are read ahead of where they are used; those of columns, to SMEM
            with the columns.
          numbered: whether the numbers of columns are read, too: made from those of threads, which
            compilers have ready at all times, they would take a register for every one.
          **more: the arrays.
        """
        keys = x.key.shape[1]
        end = keys if (tiling.rows if tiling.transposed else tiling.columns) != keys else None
        self.mask, named = named_operands(x, masks.lengths(None, end), **more)
        self.tiling = tiling
        self._operands = {n: Operand(array, dims, tiling) for n, (array, dims) in named.items()}
        if x.table is not None:
            self._operands["table"] = Distances(x, tiling, call.unit)
        if numbered and tiling.transposed:
            numbers = jnp.arange(tiling.columns, dtype=jnp.int32)[None, None]
            self._operands[COLUMNS] = Operand(numbers, "bnt", tiling)
        self.arrays = {name: operand.array for name, operand in self._operands.items()}
        self.streamed = [
            name
            for name, operand in self._operands.items()
            if ahead and operand.of_columns and not name.startswith("mask")
        ]
        for operand in self._operands.values():
            operand.ahead = ahead
        for name in self.streamed:
            self._operands[name].in_slots = True

    def __contains__(self, name: str) -> bool:
        """Says whether the call has an operand."""
        return name in self._operands

    def space(self, slots: int) -> dict[str, Any]:
        """Returns SMEM for what is streamed."""
        return {name: plgpu.SMEM((slots, self.tiling.tile), jnp.float32) for name in self.streamed}

    def copy(self, refs: dict[str, Any], at: At, space: dict[str, Any], ready: Any) -> None:
        """Has the copy engine fetch what is streamed of a tile."""
        for name in self.streamed:
            self._operands[name].copy(refs[name], at, space[name], ready)

    def of_rows(self, name: str, refs: dict[str, Any], at: At) -> Array:
        """Returns the values of an operand for the rows of a tile."""
        return self._operands[name].of_rows(refs[name], at)

    def values(self, refs: dict[str, Any], at: At) -> dict[str, Any]:
        """Returns the values that weights are made of, but for the mask and what is streamed."""
        names = (name for name in self._names if name not in self.streamed)
        return {name: self.value(name, refs, at) for name in names}

    def streamed_values(self, refs: dict[str, Any], at: At) -> dict[str, Any]:
        """Returns those of the values that are streamed."""
        names = (name for name in self._names if name in self.streamed)
        return {name: self.value(name, refs, at) for name in names}

    @property
    def _names(self) -> list[str]:
        return [n for n in self._operands if n not in LATER and not n.startswith("mask")]

    def value(self, name: str, refs: dict[str, Any], at: At) -> Array:
        """Returns the values of an operand for a tile."""
        return self._operands[name].value(refs[name], at)

    def masked(self, scores: Array, refs: dict[str, Any], at: At) -> Array:
        """Returns scores with -inf for pairs that the mask does not allow."""
        tree = jax.tree.structure(self.mask)
        names = (f"mask{k}" for k in range(tree.num_leaves))
        mask = tree.unflatten([self.value(name, refs, at) for name in names])
        return jnp.where(mask.allowed(*self.positions(refs, at)), scores, -jnp.inf)

    def positions(self, refs: dict[str, Any], at: At) -> tuple[Array, Array]:
        """Returns the numbers of the queries and of the keys of a tile."""
        shape = self.tiling.shape
        rows = gpu.across(gpu.iota(shape[0], gpu.OF_ROWS, at.row), shape)
        if COLUMNS in self:
            columns = self.value(COLUMNS, refs, at)
        else:
            columns = gpu.down(gpu.iota(shape[1], gpu.OF_COLUMNS, at.column), shape)
        return (columns, rows) if self.tiling.transposed else (rows, columns)

    def distances(self, refs: dict[str, Any], at: At) -> Array:
        """Returns the distances of queries and keys of a tile."""
        here = {"offset": self.value("offset", refs, at)}
        return distance(here, *self.positions(refs, at))
