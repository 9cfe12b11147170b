"""The selective scan as Pallas kernels for Hopper GPUs.

A thread has one channel, with all numbers of its state. What is the same for all channels, the
vectors B and C, every thread reads from shared memory.

Sums over channels, of which gradients of B and C are made, are sums over threads: products go to
shared memory, where a few threads sum each row. Blocks of channels have sums of their own, which
XLA adds up.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.scan import gpu_tiles
from pallas_kernels.scan.gpu_tiles import (
    ABSENT,
    BEGINS,
    BLOCK,
    CHANNELS,
    MATRIX,
    OF_ROWS,
    Columns,
    Tiling,
    across,
    down,
    loaded,
    rows_of,
    stacked,
    where,
)
from pallas_kernels.scan.inputs import Inputs, Options, ScanState
from pallas_kernels.tpu import padded, result

LOG2E, LN2 = math.log2(math.e), math.log(2)
"""Rates are in base 2, as is the exponential that a GPU has."""

FEATURES = 16
"""The numbers of a state are filled up to a multiple of it."""

MOST_FEATURES = 32
"""What a thread has space for in its registers: states, rates, and the gradients of both."""

PRODUCTS = 128
"""Products of a channel that are summed at a time: numbers of a state times tokens of a tile."""

SUMMED = plgpu.Layout.TILED(
    plgpu.Tiling(((FEATURES, CHANNELS), (4, 32), (4,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
"""How products lie in registers to be summed over channels: eight threads have a row."""


def cut(options: Options, x: Inputs, *, whole: bool = False) -> Tiling:
    """Returns how a call is cut: groups of channels are whole blocks.

    Args:
      options: of the call.
      x: its arrays.
      whole: whether the last chunk is filled up.
    """
    batch, tokens, channels = x.out.shape
    groups = x.tokens.b.shape[2]
    channels = groups * gpu.whole(channels // groups, BLOCK)
    rows = PRODUCTS // gpu.whole(x.state.hidden.shape[1], FEATURES)
    return gpu_tiles.tiling(options, batch, tokens, channels, rows, whole=whole)


class Call:
    """A call, cut into tiles."""

    def __init__(self, options: Options, x: Inputs, *, whole: bool = False):
        """Fills up whatever needs it; the last chunk of tokens, too, if it is to be `whole`."""
        self.softplus, self.x, self.exact = options.softplus, x, x.out.dtype == jnp.float32
        self.tiling = cut(options, x, whole=whole)
        self.groups, tokens, self.channels = x.tokens.b.shape[2], *x.out.shape[1:]
        # A token's vector by itself is no less than what the copy engine aligns to.
        least = gpu_tiles.ALIGNED // 4 if self.tiling.rows == 1 else FEATURES
        self.features = gpu.whole(x.state.hidden.shape[1], least)
        by_token = self.tiling.by_token
        self.tile = {
            name: by_token(self.filled(getattr(x.tokens, name))) for name in ("x", "delta")
        }
        self.tile |= {
            name: by_token(padded(getattr(x.tokens, name), 3, self.features).astype(jnp.float32))
            for name in ("b", "c")
        }
        self.tile |= self.tiling.flags(x.begins, tokens)
        a, skip, bias = x.parameters
        self.parameters = {"rates": self.states(a * LOG2E)}
        for name, array in (("skip", skip), ("bias", bias)):
            if array is not None:
                self.parameters[name] = self.filled(array)

    def filled(self, array: Array) -> Array:
        """Fills up the channels of an array [..., D]."""
        *lead, channels = array.shape
        array = array.reshape(*lead, self.groups, channels // self.groups)
        array = padded(array, array.ndim - 1, self.tiling.channels // self.groups)
        return array.reshape(*lead, self.tiling.channels)

    def states(self, array: Array) -> Array:
        """Fills up states [..., N, D]."""
        return padded(self.filled(array), array.ndim - 2, self.features)

    def own(self, array: Array) -> Array:
        """Returns the channels that are not filled up."""
        array = array.reshape(*array.shape[:-1], self.groups, -1)
        return array[..., : self.channels // self.groups].reshape(*array.shape[:-2], self.channels)

    def own_states(self, array: Array) -> Array:
        """Returns what is not filled up of states."""
        return self.own(array)[..., : self.x.state.hidden.shape[1], :]

    def vectors(self, sums: Array, like: Array) -> Array:
        """Returns vectors of groups from the sums of blocks, [B, blocks, T N]."""
        shape = self.tiling.batch, self.groups, -1, self.tiling.tokens, self.features
        sums = jnp.moveaxis(sums.reshape(shape).sum(2), 1, 2)
        return sums[:, : like.shape[1], :, : like.shape[3]].astype(like.dtype)


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    call = Call(options, x)
    tiling, like = call.tiling, call.tile["x"]
    state = tiling.batch, call.features, tiling.channels
    results = {
        "out": result(like.shape, x.out.dtype, like),
        "last": result(state, jnp.float32, like),
    }
    if keep:
        results["kept"] = result((state[0], tiling.chunks, *state[1:]), jnp.float32, like)
    initial = call.states(x.state.hidden)
    results = run_forward(call, tiling, call.tile, initial, results, "selective_scan_forward")
    states = (ScanState(call.own_states(results[n])) for n in ("last", "kept") if n in results)
    return call.own(results["out"][:, : x.out.shape[1]]), *states


def run_forward(
    call: Call, tiling: Tiling, tile: Any, initial: Array, results: Any, name: str
) -> dict[str, Array]:
    """Goes forwards through tiles.

    Args:
      call: has the parameters.
      tiling: how its tiles are cut, which may be chunk by chunk.
      tile: the arrays that tiles are parts of, by name.
      initial: the states before the first tiles.
      results: the types of what to compute, of "out", "last", "kept" and "c": the states before
        all chunks, and the gradient of C instead of the output.
      name: of the kernel.
    """
    return gpu.run(
        functools.partial(_kernel, tiling, call.softplus),
        {"tile": tile, "initial": initial, **call.parameters},
        results,
        scratch_of(call, tiling, tile, summed="c" in results),
        name=name,
        grid=tiling.grid,
        exact=call.exact,
    )


def scratch_of(
    call: Call, tiling: Tiling, tile: dict[str, Array], *, summed: bool
) -> dict[str, Any]:
    """Returns SMEM for tiles and, if there are any, for products that are summed over channels."""
    shape = gpu.COMPUTING, call.tiling.rows * call.features, CHANNELS
    products = {"products": plgpu.SMEM(shape, jnp.float32)} if summed else {}
    taken = math.prod(shape) * 4 if summed else 0
    return products | gpu_tiles.stages(tiling, gpu_tiles.tile(tiling, tile), taken)


def _kernel(
    tiling: Tiling,
    softplus: bool,
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    b, columns = place["batch"], Columns(place)
    every = tiling.chunk // tiling.rows

    def begin() -> tuple[dict[str, Array], Array]:
        state = loaded(arguments["initial"].at[b, :, columns.own], MATRIX)
        return parameters_of(tiling, arguments, b, columns), state

    def step(tile: Array, parts: dict[str, Any], carry: tuple) -> tuple:
        parameters, state = carry
        if "kept" in results:

            @pl.when(jax.lax.rem(tile, every) == 0)
            def _() -> None:
                gpu.store(results["kept"].at[b, tile // every, :, columns.own], state)

        tokens = Tokens(tiling.rows, softplus, parameters, parts, columns)
        d_out = tokens.rows("d_out") if "c" in results else None
        out = []
        for t in range(tiling.rows):
            state = tokens.after(t, state)
            if "c" in results:
                put(scratch["products"], place, t, state * down(d_out[t], state.shape[0]))
            else:
                out.append(jnp.sum(state * tokens.vector("c", t), axis=0))
                if "skip" in parameters:
                    out[t] += parameters["skip"] * tokens.x[t]
        if "c" in results:
            store_sums(tiling, results["c"], scratch["products"], place, tile)
        else:
            target = results["out"].at[b, tiling.at(tile), columns.own]
            gpu.store(target, stacked(out).astype(results["out"].dtype))
        return parameters, state

    def end(carry: tuple) -> None:
        if "last" in results:
            gpu.store(results["last"].at[b, :, columns.own], carry[1])

    sources = gpu_tiles.sources(tiling, arguments["tile"], place)
    gpu_tiles.walk(tiling, place, sources, scratch, begin, step, end)


def parameters_of(
    tiling: Tiling, arguments: dict[str, Any], b: Array, columns: Columns
) -> dict[str, Array]:
    """Returns the parameters of a warpgroup's channels."""

    def one(name: str) -> Array:
        array = arguments[name]
        row = b // tiling.spans if array.shape[0] > 1 else 0
        if name == "rates":
            return loaded(array.at[row, :, columns.own], MATRIX)
        return loaded(array.at[row, columns.own])

    return {name: one(name) for name in ("rates", "skip", "bias") if name in arguments}


class Tokens:
    """The tokens of a tile, with a row of channels for each."""

    def __init__(
        self,
        count: int,
        softplus: bool,
        parameters: dict[str, Array],
        parts: dict[str, Any],
        columns: Columns,
    ):
        """Reads input and step."""
        self.parts, self.count, self.columns = parts, count, columns.inside
        self.rates, self.softplus = parameters["rates"], softplus
        self.x, self.given = self.rows("x"), self.rows("delta")
        if "bias" in parameters:
            self.given = [row + parameters["bias"] for row in self.given]
        self.steps = self.present(map(_softplus, self.given) if softplus else self.given)

    def rows(self, name: str) -> list[Array]:
        """Returns rows that were copied."""
        return rows_of(self.parts[name], self.columns)

    def present(self, rows: Iterable[Array]) -> list[Array]:
        """Returns rows with zeros for tokens behind the last."""
        if "flags" not in self.parts:
            return list(rows)
        return [where(self.parts["flags"][t] == ABSENT, 0, row) for t, row in enumerate(rows)]

    def vector(self, name: str, t: int) -> Array:
        """Returns the vector B or C of a token as a matrix."""
        return across(loaded(self.parts[name].at[t], OF_ROWS))

    def decay(self, t: int) -> Array:
        """Returns what is left of the state before a token."""
        features = self.rates.shape[0]
        exponent = self.rates * down(self.steps[t], features)
        if "flags" in self.parts:
            gap = jnp.zeros_like(self.steps[t])
            gap = where(self.parts["flags"][t] == BEGINS, -jnp.inf, gap)
            exponent += down(gap, features)
        return jnp.exp2(exponent)

    def added(self, t: int) -> Array:
        """Returns what a token multiplies its vector B by, as a matrix."""
        return down(self.steps[t] * self.x[t], self.rates.shape[0])

    def after(self, t: int, state: Array) -> Array:
        """Returns the state after a token."""
        return self.decay(t) * state + self.added(t) * self.vector("b", t)


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + gpu.log1p(jnp.exp(-jnp.abs(x)))


def put(products: Any, place: dict[str, Array], t: int, value: Array) -> None:
    """Writes the products of a token."""
    of_token(products, place, t, value.shape[0])[...] = value


def of_token(products: Any, place: dict[str, Array], t: int, features: int) -> Any:
    """Returns a reference to the products of a token."""
    return products.at[place["warpgroup"], pl.ds(t * features, features)]


def store_sums(
    tiling: Tiling, target: Any, products: Any, place: dict[str, Array], tile: Array
) -> None:
    """Sums the products of a tile over channels."""
    rows = products.shape[1]
    sums = jnp.sum(loaded(products.at[place["warpgroup"]], SUMMED), axis=1)
    block = place["block"] * gpu.COMPUTING + place["warpgroup"]
    gpu.store(target.at[place["batch"], block, pl.ds(tile * rows, rows)], sums)
