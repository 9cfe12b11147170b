"""The backward of the selective scan on Hopper GPUs.

It goes backwards through tiles, and needs the state before each: chunks of tokens are computed once
more, side by side, from the states that were kept. That kernel has the states of all tokens, of
which the gradient of C is made; the one that goes backwards makes that of B.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.scan import gpu_tiles
from pallas_kernels.scan.gpu_selective import (
    LN2,
    Call,
    Tokens,
    of_token,
    parameters_of,
    put,
    run_forward,
    scratch_of,
    store_sums,
)
from pallas_kernels.scan.gpu_tiles import CHANNELS, MATRIX, Columns, Tiling, down, loaded, stacked
from pallas_kernels.scan.inputs import Inputs, Options, Parameters, ScanState, Selective
from pallas_kernels.tpu import result


def backward(
    options: Options, x: Inputs, kept: ScanState, d_out: Array, d_state: ScanState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    call = Call(options, x, whole=True)
    tiling, like = call.tiling, call.tile["x"]
    tile = call.tile | {"d_out": tiling.by_token(call.filled(d_out))}
    sums = tiling.batch, tiling.channels // CHANNELS, tiling.tokens * call.features
    tile["before"], d_c = _again(call, tile, call.states(kept.hidden))
    state = tiling.batch, call.features, tiling.channels
    results = {
        "x": result(like.shape, x.tokens.x.dtype, like),
        "delta": result(like.shape, x.tokens.delta.dtype, like),
        "b": result(sums, jnp.float32, like),
        "rates": result(state, jnp.float32, like),
        "initial": result(state, jnp.float32, like),
    }
    for name in call.parameters.keys() - {"rates"}:
        results[name] = result((tiling.batch, tiling.channels), jnp.float32, like)
    results = gpu.run(
        functools.partial(_kernel, tiling, call.softplus),
        {"tile": tile, "d_last": call.states(d_state.hidden), **call.parameters},
        results,
        scratch_of(call, tiling, tile, summed=True),
        name="selective_scan_backward",
        grid=tiling.grid,
        exact=call.exact,
    )

    def by_parameter(gradient: Array | None, array: Array | None) -> Array | None:
        if array is None:
            return None
        return gradient.sum(0, keepdims=True) if array.shape[0] == 1 else gradient

    tokens = Selective(
        *(call.own(results[name][:, : x.out.shape[1]]) for name in ("x", "delta")),
        call.vectors(results["b"], x.tokens.b),
        call.vectors(d_c, x.tokens.c),
    )
    others = (call.own(results[n]) if n in results else None for n in ("skip", "bias"))
    gradients = call.own_states(results["rates"]), *others
    parameters = Parameters(*map(by_parameter, gradients, x.parameters))
    return tokens, parameters, ScanState(call.own_states(results["initial"]))


def _again(call: Call, tile: dict[str, Array], kept: Array) -> tuple[Array, Array]:
    """Returns the states before all tiles, and the gradients of C as sums of blocks."""
    tiling, (tile, initial) = call.tiling.by_chunk((tile, kept))
    batch, channels = tiling.batch, tiling.channels
    tile = {name: array for name, array in tile.items() if name != "c"}
    like = tile["x"]
    sums = batch, channels // CHANNELS, tiling.tokens * call.features
    results = {
        "kept": result((batch, tiling.tiles, call.features, channels), jnp.float32, like),
        "c": result(sums, jnp.float32, like),
    }
    found = run_forward(call, tiling, tile, initial[:, 0], results, "selective_scan_again")
    d_c = found["c"].reshape(call.tiling.batch, tiling.spans, *sums[1:])
    d_c = jnp.moveaxis(d_c, 1, 2).reshape(call.tiling.batch, sums[1], -1)
    before = found["kept"].reshape(call.tiling.batch, -1, call.features, channels)
    return before, d_c


def _kernel(
    tiling: Tiling,
    softplus: bool,
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    b, columns = place["batch"], Columns(place)
    products = scratch["products"]

    def begin() -> tuple[dict[str, Array], dict[str, Array]]:
        parameters = parameters_of(tiling, arguments, b, columns)
        sums = {"initial": loaded(arguments["d_last"].at[b, :, columns.own], MATRIX)}
        for name, array in parameters.items():
            layout = MATRIX if name == "rates" else gpu_tiles.OF_CHANNELS
            sums[name] = plgpu.layout_cast(jnp.zeros(array.shape, jnp.float32), layout)
        return parameters, sums

    def step(tile: Array, parts: dict[str, Any], carry: tuple) -> tuple:
        """Goes backwards; "initial" is the gradient of the state after the tile."""
        parameters, sums = carry
        tokens = Tokens(tiling.rows, softplus, parameters, parts, columns)
        state = loaded(parts["before"].at[:, columns.inside], MATRIX)
        # Where there will be the products of a token is the state before it.
        for t in range(tiling.rows):
            put(products, place, t, state)
            if t < tiling.rows - 1:
                state = tokens.after(t, state)
        # All of it is read and computed once more: it would not fit in the registers.
        tokens = Tokens(tiling.rows, softplus, parameters, parts, columns)
        d_x, d_delta, sums = _gradients(tokens, parameters, sums, products, place)
        for name, gradient in (("x", d_x), ("delta", d_delta)):
            target = results[name].at[b, tiling.at(tile), columns.own]
            gpu.store(target, stacked(gradient).astype(results[name].dtype))
        store_sums(tiling, results["b"], products, place, tile)
        return parameters, sums

    def end(carry: tuple) -> None:
        for name, total in carry[1].items():
            lead = (b, slice(None)) if name in ("initial", "rates") else (b,)
            gpu.store(results[name].at[(*lead, columns.own)], total)

    sources = gpu_tiles.sources(tiling, arguments["tile"], place)
    gpu_tiles.walk(tiling, place, sources, scratch, begin, step, end, reverse=True)


def _gradients(
    tokens: Tokens,
    parameters: dict[str, Array],
    sums: dict[str, Array],
    products: Any,
    place: dict[str, Array],
) -> tuple[list[Array], list[Array], dict[str, Array]]:
    """Goes backwards through a tile.

    Args:
      tokens: those of the tile.
      parameters: of the channels.
      sums: what is carried from tile to tile, by name.
      products: has the states before the tokens, and gets the products that the gradient of B is
        the sum of.
      place: of the block, and the warpgroup.

    Returns:
      The gradients of input and step, and the sums with what is of this tile.
    """
    features = tokens.rates.shape[0]
    d_out, d_x, d_delta = tokens.rows("d_out"), [], []
    d_state, d_rates = sums["initial"], sums["rates"]
    # The order of these lines is one in which nothing spills.
    for t in reversed(range(tokens.count)):
        d_state += down(d_out[t], features) * tokens.vector("c", t)
        d_added = jnp.sum(d_state * tokens.vector("b", t), axis=0)
        decay = tokens.decay(t)
        d_power = d_state * decay * loaded(of_token(products, place, t, features), MATRIX)
        d_rates += d_power * down(tokens.steps[t], features)
        d_step = jnp.sum(d_power * tokens.rates, axis=0) * LN2 + d_added * tokens.x[t]
        put(products, place, t, d_state * tokens.added(t))
        d_state *= decay
        if tokens.softplus:
            d_step *= jnp.exp(tokens.given[t] - tokens.steps[t])  # the logistic function
        d_delta.insert(0, d_step)
        d_x.insert(0, d_added * tokens.steps[t])
    d_delta = tokens.present(d_delta)
    sums = sums | {"initial": d_state, "rates": d_rates}
    for t in range(tokens.count):
        if "bias" in sums:
            sums["bias"] += d_delta[t]
        if "skip" in sums:
            sums["skip"] += d_out[t] * tokens.x[t]
            d_x[t] += d_out[t] * parameters["skip"]
    return d_x, d_delta, sums
