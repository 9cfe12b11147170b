"""Tiled attention as a Pallas kernel for TPU: see docs/kernels.md.

The forward has a tile of queries in each grid step and visits tiles of keys. A row's running
maximum and the sum of its weights lie in registers of 128 lanes: the maximum in all of them, the
sum in 128 parts, which are added up when the row is done. The backward is in `tpu_backward`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tiled import groups, tiles
from pallas_kernels.tiled.inputs import Inputs, Options, without_hidden
from pallas_kernels.tiled.schedule import FEWEST, Grid, schedule, split
from pallas_kernels.tiled.scores import LOG2E, Operands, Scores, dot, parts
from pallas_kernels.tiled.tiles import Tiling
from pallas_kernels.tiled.tpu_backward import backward
from pallas_kernels.tpu import LANES, compiler_params, result

__all__ = ["backward", "forward", "supports"]

TILES = {
    4: {(1024, 1024, 512): 1040, (512, 512, 512): 1078, (256, 512, 512): 1178},
    6: {
        (2048, 1024, 256): 632,
        (1024, 1024, 256): 683,
        (512, 512, 512): 890,
        (256, 512, 512): 1206,
    },
}
"""By generation from which on: queries and keys of a tile, keys that are computed at a time, and
the bundles that 512 x 512 scores take then, see docs/benchmarks.md."""

LOWEST = -1e30
"""Where the running maximum starts: finite, so that no difference of maxima is NaN."""


def supports(*, options: Options, inputs: Inputs, gradients: Sequence[str] = ()) -> str | None:
    """Returns why the kernels do not serve a call, or these gradients of it, or None."""
    del gradients
    if inputs.query.dtype == jnp.float64:
        return "it does not compute in float64"
    lists, _ = split(inputs.mask)
    multiple, where = FEWEST, ""
    if inputs.table is not None:
        multiple, where = LANES, "with a relative_bias, "
    elif tiles.has_scores(inputs):
        multiple, where = LANES, "with a bias or dense mask over queries and keys, "
    size = options.group_size
    if size is not None:
        if size not in groups.SIZES:
            return f"groups of keys must have {_named(groups.SIZES)} keys; got {size}"
    for blocks in lists:
        if blocks.block_q % multiple or blocks.block_k % multiple:
            return (
                f"{where}blocks of a list must be multiples of {multiple} tokens; got block_q "
                f"{blocks.block_q} and block_k {blocks.block_k}"
            )
    if size is not None and lists and tiles.listed(inputs, lists, transposed=False)[1] % size:
        return f"no tile of the lists' blocks has whole groups of {size} keys"
    return None


def _named(sizes: Sequence[int]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"


def forward(
    options: Options, *inputs: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp."""
    x = without_hidden(Inputs(*inputs))
    batch, queries, heads, features = x.query.shape
    width = x.value.shape[3]
    tiling, grid = _tiling(options, x)
    rows = schedule(x.mask, grid)
    call = Scores.of(options, x)
    more = {} if x.statistic is None else {"statistic": call.divisor(x.statistic)}
    operands = Operands(call, x, tiling, **more)
    query, key, value = tiles.by_head(x, tiling)
    dtype = query.dtype
    scratch = {
        "key": pltpu.VMEM((2, tiling.width, features), dtype),
        "value": pltpu.VMEM((2, tiling.width, width), dtype),
        "visit": tiles.visit_scratch(),
        "sums": pltpu.VMEM((tiling.rows, width), jnp.float32),
        "operands": operands.scratch,
    }
    if options.normalise:
        scratch["total"] = pltpu.VMEM((tiling.rows, LANES), jnp.float32)
    if call.online:
        scratch["maximum"] = pltpu.VMEM((tiling.rows, LANES), jnp.float32)
    branches = tiles.branches(rows, operands.mask is not None)
    window, rows = tiles.windows(rows, tiling)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, call, tiling, operands, branches),
        name="tiled_forward",
        grid=(batch, heads, tiling.row_tiles),
        in_specs=[
            window,
            operands.specs,
            pl.BlockSpec((None, None, tiling.rows, features), lambda b, n, i: (b, n, i, 0)),
            hbm,
            hbm,
        ],
        out_specs=[
            pl.BlockSpec((None, None, tiling.rows, width), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec((None, None, None, 1, tiling.rows), lambda b, n, i: (b, n, i, 0, 0)),
        ],
        out_shape=[
            result((*query.shape[:3], width), dtype, query),
            result((batch, heads, tiling.row_tiles, 1, tiling.rows), jnp.float32, query),
        ],
        scratch_shapes=[scratch],
        compiler_params=compiler_params(),
    )(rows, operands.arrays, query, key, value)
    out = jnp.swapaxes(out[:, :, :queries], 1, 2).astype(x.query.dtype)
    lse = lse.reshape(batch, heads, -1)[:, :, :queries]
    if x.statistic is not None and not options.normalise:
        lse = jnp.broadcast_to(x.statistic, lse.shape).astype(lse.dtype)
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(
    call: Scores,
    tiling: Tiling,
    operands: Operands,
    branches: tuple[bool, bool],
    schedule: Any,
    refs: dict[str, Any],
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    scratch: dict[str, Any],
) -> None:
    """Computes the results of one tile of queries."""
    b, n = pl.program_id(0), pl.program_id(1)
    head = n // (tiling.heads // key.shape[1])
    maximum, total, sums = scratch.get("maximum"), scratch.get("total"), scratch["sums"]
    exact, reweight = query.dtype == jnp.float32, call.options.reweight is not None
    operands, group = operands.bound(refs, scratch["operands"]), call.options.group_size

    sink = None
    if "sink" in operands.operands:
        sink = operands.value("sink", 0, 0, 0)
        sink = jnp.broadcast_to(sink[:, :LANES] if jnp.ndim(sink) else sink, (tiling.rows, LANES))
    if total is not None:
        total[...] = jnp.zeros_like(total)
    if maximum is not None and sink is None:
        maximum[...] = jnp.full_like(maximum, LOWEST)
    elif maximum is not None:
        # A key with a value of zero, seen by every query before all others. It counts in one lane.
        maximum[...] = sink * call.unit
        first = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1) == 0
        total[...] = first.astype(jnp.float32)
    sums[...] = jnp.zeros_like(sums)

    def compute(slot: Array, numbers: Sequence[Array], masked: bool) -> None:
        operands.arrive(slot)
        for row, start in parts(tiling):
            part = pl.ds(start, tiling.column_part)
            products = dot(query[...], scratch["key"][slot, part], 1, 1)
            values = scratch["value"][slot, part]
            here = operands.values(slot, row, start, masked)
            scores, _ = call.held(products, here, *tiles.positions(numbers, tiling, row, start))
            shares = None
            if group is not None:
                scores, shares = (x.T for x in groups.by_landmarks(scores.T, group, call.exp))
            if not call.online or reweight:
                weights, _ = call.divided(scores, here.get("statistic"), exact)
                weights = weights if shares is None else weights * shares
            if maximum is None:
                if total is not None:
                    total[...] += tiles.lane_sums(weights)
                sums[...] += dot(weights.astype(values.dtype), values, 1, 0)
                continue
            if reweight:
                scores = call.log_reweighted(weights)
            before = maximum[...]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            decay = call.exp(before - now)
            weights = call.exp(scores - tiles.across(now, tiling.column_part))
            weights = weights if shares is None else weights * shares
            maximum[...] = now
            total[...] = total[...] * decay + tiles.lane_sums(weights)
            product = dot(weights.astype(values.dtype), values, 1, 0)
            sums[...] = sums[...] * tiles.across(decay, sums.shape[1]) + product

    buffers = ((key.at[b, head], scratch["key"]), (value.at[b, head], scratch["value"]))
    copied = (operands.copies, operands.filled)
    tiles.visit(schedule, tiling, buffers, *copied, scratch["visit"], compute, branches)

    if total is None:
        out[...] = sums[...].astype(out.dtype)
        lse[...] = jnp.zeros_like(lse)
        return
    whole = jnp.sum(total[...], axis=1, keepdims=True)
    if maximum is None and sink is not None:
        # Relative to the sink if it is large: its exponential may be more than float32 holds.
        above = jnp.maximum(sink[:, :1], 0)
        whole = whole * jnp.exp(-above) + jnp.exp(sink[:, :1] - above)
        sums[...] *= jnp.exp(-above)
    seen = whole != 0  # a NaN stays one
    if reweight:
        seen &= ~(maximum[:, :1] < call.least)
    whole = jnp.where(seen, whole, 1)
    out[...] = jnp.where(seen, sums[...] / whole, 0).astype(out.dtype)
    logs = jnp.broadcast_to(jnp.log(whole), (tiling.rows, LANES))
    if maximum is not None:
        logs += maximum[...] * (call.factor / LOG2E)
    elif sink is not None:
        logs += above
    lse[...] = tiles.row(jnp.where(seen, logs, -jnp.inf))


def _tiling(options: Options, x: Inputs) -> tuple[Tiling, Grid]:
    """Chooses the tiles of the forward."""
    queries, heads = x.query.shape[1:3]
    keys = x.key.shape[1]
    lists, _ = split(x.mask)
    if lists:
        rows, columns, pieces, part = tiles.listed(x, lists, transposed=False)
    else:
        tile_q, tile_k, part = tiles.chosen(TILES, Grid(queries, keys, 0, 0), x.mask, 0)
        if x.table is not None and tile_q > 1024:  # registers would spill
            tile_q, part = 1024, 512
        if options.group_size is not None:  # a part is in registers, and scheduled, as one
            tile_q, part = min(tile_q, 256), 256
        tile_q, tile_k = tiles.limited(options, x, tile_q), tiles.limited(options, x, tile_k)
        rows = tiles.even(queries, options.tile_q or tile_q)
        columns, pieces = max(tiles.even(keys, options.tile_k or tile_k), LANES), 1
        part = next(size for size in (part, 256, LANES) if columns % size == 0)
    grid = Grid(queries, keys, rows, columns)
    return Tiling(rows, grid.shape[0], columns, grid.shape[1], pieces, rows, part, heads), grid
