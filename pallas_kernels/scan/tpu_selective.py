"""The selective scan as Pallas kernels for TPU.

The state of a block of channels is [N, channels]: its N numbers in the sublanes, channels in the
lanes. A token is a few operations on whole registers, and what is the same for a state's numbers
(the step, the input) or for all channels (the vectors B and C) is spread over sublanes or lanes.
The vectors come transposed, time along the lanes, and a token's is a column.

The backward computes the states of a tile once more, into VMEM, and walks through them backwards.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.scan import tiles
from pallas_kernels.scan.inputs import Inputs, Options, Parameters, ScanState, Selective
from pallas_kernels.scan.tiles import ROWS, STEP, Tiling
from pallas_kernels.tpu import LANES, compiler_params, result

LOG2E = math.log2(math.e)
"""Rates are in base 2, as is the exponential that a TPU has."""

WIDEST = 512
"""Channels in a tile, at most, if a state has 16 numbers; of larger states there are fewer."""


def _tiling(options: Options, x: Inputs, *, reverse: bool = False) -> Tiling:
    channels, groups = x.out.shape[2], x.tokens.b.shape[2]
    group = channels // groups if groups > 1 else None
    widest = min(max(WIDEST * 16 // _features(x), LANES), WIDEST)
    return tiles.tiling(
        x.out.shape, options.chunk_size, widest=widest, group=group, reverse=reverse
    )


def _features(x: Inputs) -> int:
    """Returns the size of the state's dimension N, filled up to whole registers."""
    return -(-x.state.hidden.shape[1] // ROWS) * ROWS


def _states(hidden: Float[Array, "... N D"], x: Inputs, tiling: Tiling) -> Array:
    missing = _features(x) - hidden.shape[-2]
    widths = [(0, 0)] * (hidden.ndim - 2) + [(0, missing), (0, 0)]
    return tiles.padded(jnp.pad(hidden, widths) if missing else hidden, tiling)


def _operands(x: Inputs, tiling: Tiling) -> tuple[dict[str, Array], dict[str, Any]]:
    """Returns the arrays of both kernels by name, with their blocks."""
    tokens, parameters = x.tokens, x.parameters
    features = _features(x)
    blocks = tiling.grid[1] // tokens.b.shape[2]  # of channels, in a group
    time = tiling.grid[2] * tiling.rows

    def columns(vectors: Float[Array, "B T G N"]) -> Float[Array, "B G N T"]:
        # Zeros after the last token: what stands there reaches all channels.
        widths = ((0, 0), (0, time - tiling.tokens), (0, 0), (0, features - vectors.shape[3]))
        return jnp.transpose(jnp.pad(vectors, widths), (0, 2, 3, 1))

    column = pl.BlockSpec(
        (None, None, features, tiling.rows), lambda b, c, i: (b, c // blocks, 0, tiling.time(i))
    )
    arrays = {
        name: tiles.padded(a, tiling) for name, a in (("x", tokens.x), ("delta", tokens.delta))
    }
    specs = dict.fromkeys(arrays, tiling.by_token())
    arrays |= {"b": columns(tokens.b), "c": columns(tokens.c)}
    specs |= dict.fromkeys(("b", "c"), column)
    arrays["a"] = _states(parameters.a * LOG2E, x, tiling)
    specs["a"] = tiling.shared(features, len(parameters.a))
    for name in ("skip", "bias"):
        array = getattr(parameters, name)
        if array is not None:
            arrays[name] = tiles.padded(array[:, None], tiling)
            specs[name] = tiling.shared(1, len(array))
    if x.begins is not None:
        arrays["continues"] = jnp.float32(~x.begins)[..., None]
        specs["continues"] = tiling.column()
    return arrays, specs


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    tiling = _tiling(options, x)
    arrays, specs = _operands(x, tiling)
    arrays["initial"] = _states(x.state.hidden, x, tiling)
    features, channels, like = _features(x), tiling.channels, arrays["x"]
    specs["initial"] = tiling.by_row(features)
    outs = {
        "out": result((*x.out.shape[:2], channels), x.out.dtype, like),
        "last": result((tiling.batch, features, channels), jnp.float32, like),
    }
    out_specs = {"out": tiling.by_token(), "last": tiling.by_row(features)}
    if keep:
        shape = tiling.batch, tiling.grid[2], features, channels
        outs["kept"] = result(shape, jnp.float32, like)
        out_specs["kept"] = tiling.by_chunk(features)
    wide = pltpu.VMEM((tiling.rows // ROWS, ROWS, tiling.lanes), jnp.float32)
    results = pl.pallas_call(
        functools.partial(_forward_kernel, tiling, options.softplus),
        name="selective_scan_forward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[out_specs],
        out_shape=[outs],
        scratch_shapes=[
            {
                "state": pltpu.VMEM((features, tiling.lanes), jnp.float32),
                "step": wide,
                "added": wide,
            }
            | ({"continues": wide} if x.begins is not None else {})
        ],
        compiler_params=compiler_params(),
    )(arrays)[0]
    size, width = x.state.hidden.shape[1:]
    states = [ScanState(results[n][..., :size, :width]) for n in ("last", "kept") if n in results]
    return results["out"][..., :width], *states


def _prepare(tiling: Tiling, softplus: bool, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Computes for a tile the steps, and the steps times the inputs."""

    def some(start: Any, _: None) -> None:
        rows = pl.ds(start, STEP)
        x, step = (refs[name][rows].astype(jnp.float32) for name in ("x", "delta"))
        if "bias" in refs:
            step += refs["bias"][...]
        step = _softplus(step) if softplus else step
        if tiling.ragged:
            valid = tiling.valid(start, STEP)
            x, step = jnp.where(valid, x, 0), jnp.where(valid, step, 0)
        if "d_out" in scratch:
            d_out = refs["d_out"][rows].astype(jnp.float32)
            d_out = jnp.where(valid, d_out, 0) if tiling.ragged else d_out
            _put(scratch["d_out"], start, d_out)
        _put(scratch["step"], start, step)
        _put(scratch["added"], start, step * x)
        if "continues" in scratch:
            goes_on = refs["continues"][rows]
            goes_on = jnp.where(valid, goes_on, 1) if tiling.ragged else goes_on
            _put(scratch["continues"], start, jnp.broadcast_to(goes_on, x.shape))

    tiles.loop(tiling.rows, some, None)


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _blocks(tiling: Tiling) -> list[Any]:
    """Returns the registers' columns of a tile."""
    return [pl.ds(at, LANES) for at in range(0, tiling.lanes, LANES)]


def _put(ref: Any, start: Any, rows: Array) -> None:
    """Writes rows to scratch memory [tokens / 8, 8, lanes], where each can be read by itself."""
    ref[pl.ds(start // ROWS, STEP // ROWS)] = rows.reshape(STEP // ROWS, ROWS, -1)


def _row(ref: Any, start: Any, token: int, lanes: Any) -> Array:
    """Returns the row of a token, counted from `start`, in one register's width, [1, 128]."""
    return ref[start // ROWS + token // ROWS, pl.ds(token % ROWS, 1), lanes]


def _columns(refs: dict[str, Any], start: Any) -> dict[str, Array]:
    """Returns the vectors from a token on, [N, 128] with that token's in the first lane."""
    columns = {}
    for name in ("b", "c"):
        tile = start // LANES * LANES
        vectors = refs[name][:, pl.ds(pl.multiple_of(tile, LANES), LANES)].astype(jnp.float32)
        columns[name] = pltpu.roll(vectors, (LANES - (start - tile)) % LANES, 1)
    return columns


def _spread(vectors: Array, token: int) -> Array:
    """Returns one token's vector in all lanes."""
    return jnp.broadcast_to(vectors[:, token : token + 1], (vectors.shape[0], LANES))


def _decay(rates: Array, scratch: dict, start: Any, token: int, lanes: Any) -> Array:
    """Returns what is left of the state before a token, [N, 128]."""
    decay = jnp.exp2(_row(scratch["step"], start, token, lanes) * rates)
    if "continues" in scratch:
        decay *= _row(scratch["continues"], start, token, lanes)
    return decay


def _push(parts: list[tuple[int, Array]], array: Array, *, reverse: bool = False) -> None:
    """Adds [N, 128] to the row sums that are made: those of eight arrays are one [8, 128].

    Two registers with sums of as many arrays each become one: every row has its own part added to
    that of a row 1, 2 or 4 before, of the same array.

    Args:
      parts: what has been pushed.
      array: the next one.
      reverse: whether the first of eight is the last row.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    count, array = 1, sum(array[at : at + ROWS] for at in range(0, array.shape[0], ROWS))
    while parts and parts[-1][0] == count < ROWS:
        pair = parts.pop()[1], array
        (even, odd), low = reversed(pair) if reverse else pair, row % (2 * count) < count
        array = jnp.where(low, even, odd) + pltpu.roll(jnp.where(low, odd, even), count, 0)
        count *= 2
    parts.append((count, array))


def _pushed(parts: list[tuple[int, Array]], *, reverse: bool = False) -> Array:
    """Returns the row sums of all arrays that were pushed."""
    return jnp.concatenate([array for _, array in (reversed(parts) if reverse else parts)])


def _forward_kernel(tiling: Tiling, softplus: bool, refs: dict, outs: dict, scratch: dict) -> None:
    state = scratch["state"]

    @pl.when(tiling.first)
    def _() -> None:
        state[...] = refs["initial"][...]

    if "kept" in outs:
        outs["kept"][...] = state[...]
    _prepare(tiling, softplus, refs, scratch)
    blocks = _blocks(tiling)

    def some(start: Any, states: list[Array]) -> list[Array]:
        columns, rates = _columns(refs, start), [refs["a"][:, lanes] for lanes in blocks]
        sums = [[] for _ in blocks]
        for token in range(STEP):
            b, c = (_spread(columns[name], token) for name in ("b", "c"))
            for i, lanes in enumerate(blocks):
                added = _row(scratch["added"], start, token, lanes) * b
                states[i] = _decay(rates[i], scratch, start, token, lanes) * states[i] + added
                _push(sums[i], c * states[i])
        rows = pl.ds(start, STEP)
        for i, lanes in enumerate(blocks):
            out = _pushed(sums[i])
            if "skip" in refs:
                out += refs["skip"][:, lanes] * refs["x"][rows, lanes].astype(jnp.float32)
            outs["out"][rows, lanes] = out.astype(outs["out"].dtype)
        return states

    states = tiles.loop(tiling.rows, some, [state[:, lanes] for lanes in blocks])
    for lanes, one in zip(blocks, states, strict=True):
        state[:, lanes] = one

    @pl.when(tiling.last)
    def _() -> None:
        outs["last"][...] = state[...]


def backward(
    options: Options, x: Inputs, kept: ScanState, d_out: Array, d_state: ScanState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    tiling = _tiling(options, x, reverse=True)
    arrays, specs = _operands(x, tiling)
    features, batch = _features(x), tiling.batch
    arrays |= {
        "d_out": tiles.padded(d_out, tiling),
        "kept": _states(kept.hidden, x, tiling),
        "d_last": _states(d_state.hidden, x, tiling),
    }
    by_row = tiling.by_row(features)
    specs |= {"d_out": tiling.by_token(), "kept": tiling.by_chunk(features), "d_last": by_row}

    vectors = batch, tiling.grid[1], features, tiling.grid[2] * tiling.rows
    column = pl.BlockSpec(
        (None, None, features, tiling.rows), lambda b, c, i: (b, c, 0, tiling.time(i))
    )
    state = batch, features, tiling.channels
    shapes = {
        "x": (arrays["x"].shape, x.tokens.x.dtype, tiling.by_token()),
        "delta": (arrays["x"].shape, x.tokens.delta.dtype, tiling.by_token()),
        "b": (vectors, jnp.float32, column),
        "c": (vectors, jnp.float32, column),
        "a": (state, jnp.float32, by_row),
        "initial": (state, jnp.float32, by_row),
    }
    shapes |= {
        name: ((batch, 1, tiling.channels), jnp.float32, tiling.by_row(1))
        for name in ("skip", "bias")
        if name in arrays
    }
    wide = pltpu.VMEM((tiling.rows // ROWS, ROWS, tiling.lanes), jnp.float32)
    names = ("step", "added", "d_out", *(["continues"] if x.begins is not None else []))
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, tiling, options.softplus),
        name="selective_scan_backward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[{name: spec for name, (_, _, spec) in shapes.items()}],
        out_shape=[
            {name: result(shape, dtype, arrays["x"]) for name, (shape, dtype, _) in shapes.items()}
        ],
        scratch_shapes=[
            {
                "d_state": pltpu.VMEM((features, tiling.lanes), jnp.float32),
                "hidden": pltpu.VMEM((tiling.rows + 1, features, tiling.lanes), jnp.float32),
            }
            | dict.fromkeys(names, wide)
        ],
        compiler_params=compiler_params(),
    )(arrays)[0]

    size, width = x.state.hidden.shape[1:]
    groups = x.tokens.b.shape[2]

    def summed(blocks: Array, like: Array) -> Array:
        """Sums what blocks of channels give to the vectors of their group."""
        blocks = blocks.reshape(batch, groups, -1, *blocks.shape[2:]).sum(2)
        return jnp.transpose(blocks, (0, 3, 1, 2))[:, : tiling.tokens, :, :size].astype(like.dtype)

    def by_parameter(name: str, like: Array | None) -> Array | None:
        if like is None:
            return None
        gradient = gradients[name][:, :size, :width].reshape(batch, *like.shape[1:])
        return gradient.sum(0, keepdims=True) if like.shape[0] == 1 else gradient

    tokens = Selective(
        *(gradients[name][..., :width] for name in ("x", "delta")),
        *(summed(gradients[name], getattr(x.tokens, name)) for name in ("b", "c")),
    )
    parameters = Parameters(*map(by_parameter, ("a", "skip", "bias"), x.parameters))
    return tokens, parameters, ScanState(gradients["initial"][:, :size, :width])


def _backward_kernel(tiling: Tiling, softplus: bool, refs: dict, outs: dict, scratch: dict) -> None:
    summed = [name for name in ("a", "skip", "bias") if name in outs]

    @pl.when(tiling.first)
    def _() -> None:
        scratch["d_state"][...] = refs["d_last"][...]
        for name in summed:
            outs[name][...] = jnp.zeros_like(outs[name])

    _prepare(tiling, softplus, refs, scratch)
    blocks, hidden = _blocks(tiling), scratch["hidden"]
    hidden[0] = refs["kept"][...]

    def again(start: Any, states: list[Array]) -> list[Array]:
        columns, rates = _columns(refs, start), [refs["a"][:, lanes] for lanes in blocks]
        for token in range(STEP):
            b = _spread(columns["b"], token)
            for i, lanes in enumerate(blocks):
                added = _row(scratch["added"], start, token, lanes) * b
                states[i] = _decay(rates[i], scratch, start, token, lanes) * states[i] + added
                hidden[start + token + 1, :, lanes] = states[i]
        return states

    tiles.loop(tiling.rows, again, [refs["kept"][:, lanes] for lanes in blocks])

    lane = jax.lax.broadcasted_iota(jnp.int32, (refs["a"].shape[0], tiling.rows), 1)
    zeros = [jnp.zeros((refs["a"].shape[0], LANES), jnp.float32) for _ in blocks]

    def some(start: Any, carry: tuple) -> tuple:
        """Goes backwards; `d_states` are the gradients of the states after these tokens."""
        d_states, d_a, d_b, d_c = carry
        start = tiling.rows - STEP - start
        columns, rates = _columns(refs, start), [refs["a"][:, lanes] for lanes in blocks]
        d_added, d_exponent = ([[] for _ in blocks] for _ in range(2))
        for token in reversed(range(STEP)):
            b, c = (_spread(columns[name], token) for name in ("b", "c"))
            for_b, for_c = 0, 0
            for i, lanes in enumerate(blocks):
                d_out = _row(scratch["d_out"], start, token, lanes)
                d_one = d_states[i] + d_out * c
                for_c += d_out * hidden[start + token + 1, :, lanes]
                for_b += d_one * _row(scratch["added"], start, token, lanes)
                _push(d_added[i], d_one * b, reverse=True)
                d_states[i] = d_one * _decay(rates[i], scratch, start, token, lanes)
                d_power = d_states[i] * hidden[start + token, :, lanes]
                d_a[i] += d_power * _row(scratch["step"], start, token, lanes)
                _push(d_exponent[i], d_power * rates[i], reverse=True)
            here = lane == start + token
            d_b = jnp.where(here, jnp.sum(for_b, axis=1, keepdims=True), d_b)
            d_c = jnp.where(here, jnp.sum(for_c, axis=1, keepdims=True), d_c)
        for i, lanes in enumerate(blocks):
            sums = (_pushed(parts[i], reverse=True) for parts in (d_added, d_exponent))
            _gradients_of_rows(tiling, softplus, refs, outs, start, lanes, *sums)
        return d_states, d_a, d_b, d_c

    nothing = jnp.zeros((refs["a"].shape[0], tiling.rows), jnp.float32)
    d_states = [scratch["d_state"][:, lanes] for lanes in blocks]
    d_states, d_a, d_b, d_c = tiles.loop(tiling.rows, some, (d_states, zeros, nothing, nothing))
    outs["b"][...], outs["c"][...] = d_b, d_c
    for i, lanes in enumerate(blocks):
        scratch["d_state"][:, lanes] = d_states[i]
        outs["a"][:, lanes] += d_a[i]

    @pl.when(tiling.last)
    def _() -> None:
        outs["initial"][...] = scratch["d_state"][...]


def _gradients_of_rows(
    tiling: Tiling,
    softplus: bool,
    refs: dict,
    outs: dict,
    start: Any,
    lanes: Any,
    d_added: Array,
    d_exponent: Array,
) -> None:
    """Writes the gradients of input and step of some tokens, of one register's channels.

    Args:
      tiling: of the call.
      softplus: whether the step is a softplus.
      refs: the operands.
      outs: the gradients.
      start: the first token.
      lanes: the channels.
      d_added: gradient of the product of step and input.
      d_exponent: gradient of the step through the decay, in base 2.
    """
    rows = pl.ds(start, STEP)
    x, step, d_out = (
        refs[name][rows, lanes].astype(jnp.float32) for name in ("x", "delta", "d_out")
    )
    if tiling.ragged:
        valid = tiling.valid(start, STEP)
        x, step, d_out, d_added, d_exponent = (
            jnp.where(valid, array, 0) for array in (x, step, d_out, d_added, d_exponent)
        )
    if "bias" in refs:
        step += refs["bias"][:, lanes]
    d_step = d_exponent / LOG2E + d_added * x
    d_x = d_added * (_softplus(step) if softplus else step)
    if softplus:
        d_step *= jax.nn.sigmoid(step)
    if "bias" in refs:
        outs["bias"][:, lanes] += jnp.sum(d_step, axis=0, keepdims=True)
    if "skip" in refs:
        d_x += refs["skip"][:, lanes] * d_out
        outs["skip"][:, lanes] += jnp.sum(d_out * x, axis=0, keepdims=True)
    outs["x"][rows, lanes] = d_x.astype(outs["x"].dtype)
    outs["delta"][rows, lanes] = d_step.astype(outs["delta"].dtype)
