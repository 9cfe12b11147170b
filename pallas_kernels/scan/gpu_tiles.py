"""What the GPU kernels of scans share: how arrays are cut into tiles, and how blocks walk them.

A block of the grid has some channels of a batch row, one of them in each thread that computes. It
goes through time, forwards or backwards, in tiles of a few tokens: one warpgroup copies them to
shared memory, as far ahead as there is space, and the others take them from there to registers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool

from pallas_kernels import gpu
from pallas_kernels.scan.inputs import Options
from pallas_kernels.tpu import padded

CHANNELS = 128
"""Channels of a warpgroup."""

BLOCK = gpu.COMPUTING * CHANNELS
"""Channels of a block."""


def _layout(*lead: int) -> Any:
    """Returns a layout with a channel in each thread.

    Neighbours are eight channels apart: then addresses are a register and a constant. Of
    neighbours side by side, four and four would be moved as parts of matrices, at addresses which
    take a register pair each.
    """
    tiles = (*lead, CHANNELS), (32,), (8,), (1,)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
    )


OF_CHANNELS = _layout()
"""How rows of channels lie in registers."""

MATRIX = _layout(1)
"""How [rows, channels] lie: likewise, but rows cannot be taken out of it; they can be summed."""

OF_ROWS = MATRIX.reduce(1)
"""How values of the rows lie: every thread has all of them."""

BEGINS, ABSENT = 1, 2
"""Flags of tokens: one that begins a segment, and one behind the last."""

ALIGNED = 128
"""Bytes that what the copy engine writes is aligned to."""

MOST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut."""

    batch: int
    tokens: int
    """Filled up to whole tiles."""
    channels: int
    """Filled up to whole blocks."""
    rows: int
    """Tokens of a tile."""
    chunk: int
    """Tokens of a chunk, whole tiles."""
    spans: int = 1
    """Into how many batch rows one of the call is cut."""

    @property
    def tiles(self) -> int:
        """Returns the number of tiles."""
        return self.tokens // self.rows

    @property
    def chunks(self) -> int:
        """Returns the number of chunks, the last of which may be shorter."""
        return -(-self.tokens // self.chunk)

    @property
    def grid(self) -> dict[str, int]:
        """Returns the grid of a kernel; its first dimension may have over 65535."""
        return {"batch": self.batch, "block": self.channels // BLOCK}

    def by_token(self, array: Array) -> Array:
        """Fills tokens, dimension 1, up with zeros."""
        return padded(array, 1, self.tokens)

    def flags(self, begins: Bool[Array, "B T"] | None, tokens: int) -> dict[str, Array]:
        """Returns flags of tokens, [B, tiles, rows], as an argument, if there are any.

        Args:
          begins: whether a token begins a segment.
          tokens: those that are not filled up.
        """
        if begins is None and tokens == self.tokens:
            return {}
        flags = jnp.zeros((self.batch, self.tokens), jnp.int32)
        if begins is not None:
            flags = flags.at[:, :tokens].set(begins * BEGINS)
        flags = flags.at[:, tokens:].set(ABSENT).reshape(self.batch, self.tiles, self.rows)
        return {"flags": padded(flags, 2, gpu.whole(self.rows, ALIGNED // 4))}

    def by_chunk(self, arrays: Any) -> tuple["Tiling", Any]:
        """Returns whole chunks as so many batch rows, and arrays [B, tokens or tiles, ...]."""
        batch = self.batch * self.chunks

        def cut(array: Array) -> Array:
            return array.reshape(batch, array.shape[1] // self.chunks, *array.shape[2:])

        one = dataclasses.replace(
            self, batch=batch, tokens=self.chunk, chunk=self.rows, spans=self.chunks
        )
        return one, jax.tree.map(cut, arrays)

    def at(self, tile: Array) -> Any:
        """Returns the tokens of a tile."""
        return pl.ds(tile * self.rows, self.rows)


def tiling(
    options: Options, batch: int, tokens: int, channels: int, rows: int, *, whole: bool = False
) -> Tiling:
    """Returns how a call is cut.

    Args:
      options: of the call.
      batch: its rows.
      tokens: those of a row.
      channels: whole blocks.
      rows: the most tokens of a tile, a power of 2.
      whole: whether the last chunk is filled up.
    """
    rows = min(rows, 1 << (tokens - 1).bit_length())
    if options.chunk_size < tokens:
        chunk = options.chunk_size
        rows = math.gcd(chunk, rows)
    else:
        chunk = gpu.whole(tokens, rows)
    return Tiling(batch, gpu.whole(tokens, chunk if whole else rows), channels, rows, chunk)


def tile(tiling: Tiling, arrays: dict[str, Array]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a tile has of a block, by name."""

    def shape(name: str, array: Array) -> tuple[int, ...]:
        match name:
            case "flags":
                return array.shape[2:]
            case "before":
                return array.shape[2], BLOCK
            case "b" | "c":
                return tiling.rows, array.shape[3]
            case _:
                return tiling.rows, BLOCK

    return {
        name: jax.ShapeDtypeStruct(shape(name, array), array.dtype)
        for name, array in arrays.items()
    }


def sources(
    tiling: Tiling, arrays: dict[str, Any], place: dict[str, Array]
) -> dict[str, Callable[[Array], Any]]:
    """Returns functions of a tile's number, which return references to its parts."""
    b, columns = place["batch"], Columns(place)

    def source(name: str, tile: Array) -> Any:
        array, rows = arrays[name], tiling.at(tile)
        match name:
            case "flags":
                return array.at[b, tile]
            case "before":
                return array.at[b, tile, :, columns.block]
            case "b" | "c":
                blocks = tiling.channels // BLOCK // array.shape[2]
                return array.at[b, rows, place["block"] // blocks]
            case _:
                return array.at[b, rows, columns.block]

    return {name: functools.partial(source, name) for name in arrays}


def stages(tiling: Tiling, tile: dict[str, jax.ShapeDtypeStruct], fixed: int) -> dict[str, Any]:
    """Returns SMEM for as many tiles as there is space for, and barriers.

    Args:
      tiling: of the call.
      tile: what a tile has, by name.
      fixed: bytes that are taken.
    """
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in tile.values())
    count = min((gpu.SMEM_BYTES - 4096 - fixed) // size, MOST_STAGES, tiling.tiles)
    return {
        "tile": {name: plgpu.SMEM((count, *x.shape), x.dtype) for name, x in tile.items()},
        "ready": plgpu.Barrier(num_arrivals=len(tile), num_barriers=count),
        "free": plgpu.Barrier(num_arrivals=gpu.COMPUTING, num_barriers=count),
    }


def walk(
    tiling: Tiling,
    place: dict[str, Array],
    sources: dict[str, Callable[[Array], Any]],
    scratch: dict[str, Any],
    begin: Callable[[], Any],
    step: Callable[[Array, dict[str, Any], Any], Any],
    end: Callable[[Any], None],
    *,
    reverse: bool = False,
) -> None:
    """Goes through the tiles of a block.

    Args:
      tiling: of the call.
      place: of the block, and the warpgroup.
      sources: for each part of a tile, returns a reference to it, given the tile's number.
      scratch: what `stages` returned.
      begin: returns what is carried from tile to tile.
      step: gets a tile's number, references to its parts and what is carried, and returns that.
      end: gets what is carried from the last tile.
      reverse: whether to go backwards.
    """
    warpgroup, count = place["warpgroup"], scratch["ready"].shape[0]

    def tile_of(i: Array) -> tuple[Array, Array]:
        return tiling.tiles - 1 - i if reverse else i, lax.rem(i, count)

    @pl.when(warpgroup == gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS_COPYING, action="decrease")

        def copy(i: Array, _: None) -> None:
            tile, slot = tile_of(i)

            @pl.when(i >= count)
            def _() -> None:
                plgpu.barrier_wait(scratch["free"].at[slot])

            for name, source in sources.items():
                target = scratch["tile"][name].at[slot]
                plgpu.copy_gmem_to_smem(source(tile), target, scratch["ready"].at[slot])

        lax.fori_loop(0, tiling.tiles, copy, None)

    @pl.when(warpgroup < gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS, action="increase")

        def visit(i: Array, carry: Any) -> Any:
            tile, slot = tile_of(i)
            plgpu.barrier_wait(scratch["ready"].at[slot])
            parts = {name: ref.at[slot] for name, ref in scratch["tile"].items()}
            carry = step(tile, parts, carry)
            plgpu.commit_smem()  # what was read of the tile, before it is copied over
            plgpu.barrier_arrive(scratch["free"].at[slot])
            return carry

        end(lax.fori_loop(0, tiling.tiles, visit, begin()))


class Columns:
    """The channels of a block, and of one of its warpgroups, in arrays [..., channels]."""

    def __init__(self, place: dict[str, Array]):
        """Finds them."""
        block, warpgroup = place["block"] * BLOCK, place["warpgroup"]
        self.block = pl.ds(pl.multiple_of(block, BLOCK), BLOCK)
        own = warpgroup * CHANNELS
        self.inside = pl.ds(pl.multiple_of(own, CHANNELS), CHANNELS)
        self.own = pl.ds(pl.multiple_of(block + own, CHANNELS), CHANNELS)


def loaded(ref: Any, layout: Any = OF_CHANNELS) -> Array:
    """Returns an array of numbers in registers, in float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def rows_of(ref: Any, columns: Any) -> list[Array]:
    """Returns the rows of a tile."""
    if ref.shape[0] == 1:  # it could not be told apart from its only row
        return [loaded(ref.at[0, columns])]
    rows = loaded(ref.at[:, columns])
    return [rows[r] for r in range(ref.shape[0])]


def down(row: Array, rows: int) -> Array:
    """Returns a row of channels as a matrix."""
    return plgpu.layout_cast(gpu.down(row, (rows, CHANNELS)), MATRIX)


def across(values: Array) -> Array:
    """Returns values of rows as a matrix."""
    return plgpu.layout_cast(gpu.across(values, (values.shape[0], CHANNELS)), MATRIX)


def stacked(rows: list[Array]) -> Array:
    """Returns rows as a matrix."""
    return jnp.concatenate([down(row, 1) for row in rows])


def where(flag: Array, value: float, row: Array) -> Array:
    """Returns a value where a token has a flag, or else its row."""
    flag = jnp.broadcast_to(flag, row.shape)
    return jnp.where(flag, jnp.full(row.shape, value, row.dtype), row)
