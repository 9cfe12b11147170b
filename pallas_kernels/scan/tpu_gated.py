"""The gated scan as Pallas kernels for TPU.

Eight tokens lie in the sublanes of a register. They are joined in three steps, each with the tokens
1, 2 and 4 rows before; then the state before them is added, the only thing that waits for what came
before.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.scan import tiles
from pallas_kernels.scan.inputs import Gated, Inputs, Options, Parameters, ScanState
from pallas_kernels.scan.tiles import ROWS, STEP, Tiling
from pallas_kernels.tpu import compiler_params, result

WIDEST = 1024
"""Channels in a tile, at most."""


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    tiling = tiles.tiling(x.out.shape, options.chunk_size, widest=WIDEST)
    tokens, rest, specs = _operands(x, tiling)
    channels = tiling.channels
    like = tokens[0]
    out = [
        result((*x.out.shape[:2], channels), x.out.dtype, like),
        result((tiling.batch, 1, channels), jnp.float32, like),
    ]
    out_specs = [tiling.by_token(), tiling.by_row(1)]
    if keep:
        chunks = tiling.grid[2]
        out.append(result((tiling.batch, chunks, 1, channels), jnp.float32, like))
        out_specs.append(tiling.by_chunk(1))
    state = tiles.padded(x.state.hidden[:, None], tiling)
    out, last, *kept = pl.pallas_call(
        functools.partial(_forward_kernel, tiling),
        name="gated_scan_forward",
        grid=tiling.grid,
        in_specs=[*specs, tiling.by_row(1)],
        out_specs=[out_specs],
        out_shape=[out],
        scratch_shapes=[pltpu.VMEM((1, tiling.lanes), jnp.float32)],
        compiler_params=compiler_params(),
    )(tokens, rest, state)[0]
    width = x.out.shape[2]
    states = [ScanState(array[..., 0, :width]) for array in (last, *kept)]
    return out[..., :width], *states


def _operands(x: Inputs, tiling: Tiling) -> tuple[Any, Any, list[Any]]:
    """Returns tokens and, if there are any, whether a segment goes on, with their blocks."""
    tokens = tuple(tiles.padded(array, tiling) for array in x.tokens)
    rest = () if x.begins is None else (jnp.float32(~x.begins)[..., None],)
    return tokens, rest, [(tiling.by_token(),) * 2, (tiling.column(),) * len(rest)]


def _loaded(tiling: Tiling, tokens: Any, rest: Any, start: Any) -> tuple[Array, Array]:
    """Returns the decays and inputs of some rows."""
    rows = pl.ds(start, STEP)
    x, log_decay = (ref[rows].astype(jnp.float32) for ref in tokens)
    decay = jnp.exp(log_decay) * rest[0][rows] if rest else jnp.exp(log_decay)
    if tiling.ragged:
        valid = tiling.valid(start, STEP)
        x, decay = jnp.where(valid, x, 0), jnp.where(valid, decay, 1)
    return decay, x


def _joined(decay: Array, x: Array, *, reverse: bool = False) -> tuple[Array, Array]:
    """Returns the products of decays, and states that begin from zero, within eight rows."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for step in (1, 2, 4):
        inside = row < ROWS - step if reverse else row >= step
        shift = ROWS - step if reverse else step
        x = x + jnp.where(inside, decay * pltpu.roll(x, shift, 0), 0)
        decay = jnp.where(inside, decay * pltpu.roll(decay, shift, 0), decay)
    return decay, x


def _forward_kernel(
    tiling: Tiling, tokens: Any, rest: Any, initial: Any, outs: Any, state: Any
) -> None:
    out, last, *kept = outs

    @pl.when(tiling.first)
    def _() -> None:
        state[...] = initial[...]

    for ref in kept:
        ref[...] = state[...]

    def step(start: Any, before: Array) -> Array:
        decay, x = _loaded(tiling, tokens, rest, start)
        states = []
        for at in range(0, STEP, ROWS):
            passed, hidden = _joined(decay[at : at + ROWS], x[at : at + ROWS])
            hidden += passed * before
            before = hidden[ROWS - 1 :]
            states.append(hidden)
        out[pl.ds(start, STEP)] = jnp.concatenate(states).astype(out.dtype)
        return before

    state[...] = tiles.loop(tiling.rows, step, state[...])

    @pl.when(tiling.last)
    def _() -> None:
        last[...] = state[...]


def backward(
    options: Options, x: Inputs, kept: ScanState, d_out: Array, d_state: ScanState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    tiling = tiles.tiling(x.out.shape, options.chunk_size, widest=WIDEST, reverse=True)
    tokens, rest, specs = _operands(x, tiling)
    d_out, before, after = (
        tiles.padded(array, tiling)
        for array in (d_out, kept.hidden[:, :, None], d_state.hidden[:, None])
    )
    d_x, d_log_decay, d_initial = pl.pallas_call(
        functools.partial(_backward_kernel, tiling),
        name="gated_scan_backward",
        grid=tiling.grid,
        in_specs=[*specs, tiling.by_token(), tiling.by_chunk(1), tiling.by_row(1)],
        out_specs=[tiling.by_token(), tiling.by_token(), tiling.by_row(1)],
        out_shape=[
            *(result(array.shape, array.dtype, d_out) for array in tokens),
            result(after.shape, jnp.float32, d_out),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiling.rows, tiling.lanes), jnp.float32),
            pltpu.VMEM((1, tiling.lanes), jnp.float32),
        ],
        compiler_params=compiler_params(),
    )(tokens, rest, d_out, before, after)
    width = x.out.shape[2]
    gradients = Gated(d_x[..., :width], d_log_decay[..., :width])
    return gradients, Parameters(), ScanState(d_initial[:, 0, :width])


def _backward_kernel(
    tiling: Tiling,
    tokens: Any,
    rest: Any,
    d_out: Any,
    kept: Any,
    d_last: Any,
    d_x: Any,
    d_log_decay: Any,
    d_initial: Any,
    befores: Any,
    d_state: Any,
) -> None:
    @pl.when(tiling.first)
    def _() -> None:
        d_state[...] = d_last[...]

    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, tiling.lanes), 0)

    def again(start: Any, before: Array) -> Array:
        decay, x = _loaded(tiling, tokens, rest, start)
        for at in range(0, STEP, ROWS):
            passed, hidden = _joined(decay[at : at + ROWS], x[at : at + ROWS])
            hidden += passed * before
            shifted = jnp.where(row == 0, before, pltpu.roll(hidden, 1, 0))
            befores[pl.ds(pl.multiple_of(start + at, ROWS), ROWS)] = shifted
            before = hidden[ROWS - 1 :]
        return before

    tiles.loop(tiling.rows, again, kept[...])

    def step(start: Any, after: Array) -> Array:
        """Goes backwards; `after` is the gradient of the state after these rows."""
        start = tiling.rows - STEP - start
        rows = pl.ds(start, STEP)
        decay, _ = _loaded(tiling, tokens, rest, start)
        d_hidden = d_out[rows].astype(jnp.float32)
        if tiling.ragged:
            d_hidden = jnp.where(tiling.valid(start, STEP), d_hidden, 0)
        d_xs = []
        for at in reversed(range(0, STEP, ROWS)):
            here = decay[at : at + ROWS]
            # A row is passed on by the decay of the next; the last row's is in `after` already.
            following = jnp.where(row == ROWS - 1, 1, pltpu.roll(here, ROWS - 1, 0))
            passed, d_one = _joined(following, d_hidden[at : at + ROWS], reverse=True)
            d_one += passed * after
            after = (here * d_one)[:1]
            d_xs.insert(0, d_one)
        d_one = jnp.concatenate(d_xs)
        d_x[rows] = d_one.astype(d_x.dtype)
        d_log_decay[rows] = (d_one * decay * befores[rows]).astype(d_log_decay.dtype)
        return after

    d_state[...] = tiles.loop(tiling.rows, step, d_state[...])

    @pl.when(tiling.last)
    def _() -> None:
        d_initial[...] = d_state[...]
