"""Scans on Hopper GPUs whose state is a few numbers for each channel: rows of channels.

A thread has one channel: its state, and a tile of its tokens, are in registers. The backward goes
backwards through tiles, and needs the state before each: chunks of tokens are computed once more,
side by side, from the states that were kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.scan import gpu_tiles
from pallas_kernels.scan.gpu_tiles import BLOCK, Columns, Tiling, loaded, stacked
from pallas_kernels.scan.inputs import Options
from pallas_kernels.tpu import padded, result

ROWS = 16
"""Tokens of a tile, at most."""

State = list[Array]
"""Rows of channels."""


class Scan(NamedTuple):
    """What is computed of a tile."""

    name: str
    """Of the kernels, for reports."""
    exact: bool
    """Whether the hardware's approximations of functions are too coarse."""
    forward: Callable[[dict[str, Any], Columns, State], tuple[list[Array], State]]
    """Gets the parts of a tile, where a warpgroup's channels are in them, and the state before it.
    Returns the outputs of its tokens, and the state after it."""
    backward: Callable[[dict[str, Any], Columns, State], tuple[dict[str, list[Array]], State]]
    """Gets these, "d_out" and "before" among the parts, with the gradient of the state after it.
    Returns the gradients of its tokens, by name, and of the state before it."""


def cut(options: Options, shape: tuple[int, int, int], *, whole: bool = False) -> Tiling:
    """Returns how arrays [B, T, D] are cut; the last chunk is filled up if it is to be `whole`."""
    batch, tokens, channels = shape
    return gpu_tiles.tiling(options, batch, tokens, gpu.whole(channels, BLOCK), ROWS, whole=whole)


def channels(array: Array) -> Array:
    """Fills channels, the last dimension, up with zeros."""
    return padded(array, array.ndim - 1, gpu.whole(array.shape[-1], BLOCK))


def forward(
    scan: Scan,
    tiling: Tiling,
    tile: dict[str, Array],
    initial: Array,
    dtype: DTypeLike | None,
    *,
    keep: bool,
) -> dict[str, Array]:
    """Goes forwards through tiles.

    Args:
      scan: what is computed.
      tiling: how arrays are cut.
      tile: arrays that tiles are parts of, by name.
      initial: the states before the first tiles, [B, rows, D].
      dtype: of the output, "out"; None for none.
      keep: whether to return the states before all chunks, "kept".

    Returns:
      What is asked for and, unless that is "kept" alone, the states after the last tiles, "last".
    """
    like = next(iter(tile.values()))
    rows, shape = initial.shape[1], (tiling.tokens, tiling.channels)
    results = {}
    if dtype is not None:
        results["out"] = result((tiling.batch, *shape), dtype, like)
    if dtype is not None or not keep:
        results["last"] = result(initial.shape, jnp.float32, like)
    if keep:
        kept = tiling.batch, tiling.chunks, rows, tiling.channels
        results["kept"] = result(kept, jnp.float32, like)
    return gpu.run(
        functools.partial(_forward, scan, tiling),
        {"tile": tile, "initial": initial},
        results,
        gpu_tiles.stages(tiling, gpu_tiles.tile(tiling, tile), 0),
        name=f"{scan.name}_{'forward' if 'last' in results else 'again'}",
        grid=tiling.grid,
        exact=scan.exact,
    )


def _forward(
    scan: Scan,
    tiling: Tiling,
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    b, columns = place["batch"], Columns(place)
    every = tiling.chunk // tiling.rows

    def begin() -> State:
        return state_of(arguments["initial"].at[b], columns.own)

    def step(tile: Array, parts: dict[str, Any], state: State) -> State:
        if "kept" in results:

            @pl.when(jax.lax.rem(tile, every) == 0)
            def _() -> None:
                kept = results["kept"].at[b, tile // every, :, columns.own]
                gpu.store(kept, stacked(state))

        outs, state = scan.forward(parts, columns, state)
        if "out" in results:
            out = results["out"]
            gpu.store(out.at[b, tiling.at(tile), columns.own], stacked(outs).astype(out.dtype))
        return state

    def end(state: State) -> None:
        if "last" in results:
            gpu.store(results["last"].at[b, :, columns.own], stacked(state))

    sources = gpu_tiles.sources(tiling, arguments["tile"], place)
    gpu_tiles.walk(tiling, place, sources, scratch, begin, step, end)


def state_of(ref: Any, columns: Any) -> State:
    """Returns the rows of a state, [rows, channels]."""
    return [loaded(ref.at[row, columns]) for row in range(ref.shape[0])]


def backward(
    scan: Scan,
    tiling: Tiling,
    tile: dict[str, Array],
    d_out: Array,
    kept: Array,
    d_last: Array,
    dtypes: dict[str, DTypeLike],
) -> dict[str, Array]:
    """Goes backwards through tiles.

    Args:
      scan: what is computed.
      tiling: how arrays are cut: the last chunk is whole.
      tile: arrays that tiles are parts of, by name.
      d_out: the gradient of the output, filled up.
      kept: the states before all chunks, [B, chunks, rows, D].
      d_last: the gradients of the states after the last tiles, [B, rows, D].
      dtypes: of the gradients of tokens, by name.

    Returns:
      The gradients of tokens, and of the states before the first tiles, "initial".
    """
    tile = tile | {"d_out": d_out, "before": befores(scan, tiling, tile, kept)}
    return run_backward(scan, tiling, tile, d_last, dtypes)


def befores(scan: Scan, tiling: Tiling, tile: dict[str, Array], kept: Array) -> Array:
    """Returns the states before all tiles, from those before all chunks."""
    if tiling.chunk == tiling.rows:
        return kept
    chunks, (tile, initial) = tiling.by_chunk((tile, kept))
    kept = forward(scan, chunks, tile, initial[:, 0], None, keep=True)["kept"]
    return kept.reshape(tiling.batch, tiling.tiles, *kept.shape[2:])


def run_backward(
    scan: Scan,
    tiling: Tiling,
    tile: dict[str, Array],
    d_last: Array,
    dtypes: dict[str, DTypeLike],
) -> dict[str, Array]:
    """Is `backward`, given all parts of tiles."""
    shape, like = (tiling.batch, tiling.tokens, tiling.channels), tile["d_out"]
    results = {name: result(shape, dtype, like) for name, dtype in dtypes.items()}
    results["initial"] = result(d_last.shape, jnp.float32, like)
    return gpu.run(
        functools.partial(_backward, scan, tiling),
        {"tile": tile, "d_last": d_last},
        results,
        gpu_tiles.stages(tiling, gpu_tiles.tile(tiling, tile), 0),
        name=f"{scan.name}_backward",
        grid=tiling.grid,
        exact=scan.exact,
    )


def _backward(
    scan: Scan,
    tiling: Tiling,
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    b, columns = place["batch"], Columns(place)

    def begin() -> State:
        return state_of(arguments["d_last"].at[b], columns.own)

    def step(tile: Array, parts: dict[str, Any], d_state: State) -> State:
        gradients, d_state = scan.backward(parts, columns, d_state)
        for name, rows in gradients.items():
            target = results[name].at[b, tiling.at(tile), columns.own]
            gpu.store(target, stacked(rows).astype(results[name].dtype))
        return d_state

    def end(d_state: State) -> None:
        gpu.store(results["initial"].at[b, :, columns.own], stacked(d_state))

    sources = gpu_tiles.sources(tiling, arguments["tile"], place)
    gpu_tiles.walk(tiling, place, sources, scratch, begin, step, end, reverse=True)
