"""Tiled attention as a Pallas kernel for Hopper GPUs: see docs/kernels.md.

A block of the grid has two tiles of 64 queries, each of a warpgroup that computes, and a third
warpgroup that copies tiles of keys and values ahead of them. Both tiles see the same keys, unless
they have block lists of their own: then keys are copied for each. The two take turns on the matrix
units: one multiplies while the other one takes exponentials. The backward is in `gpu_backward`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.tiled import gpu_tuned, tiles
from pallas_kernels.tiled.gpu_backward import backward, has_space_by_distance
from pallas_kernels.tiled.gpu_operands import At, Operands, Tiling
from pallas_kernels.tiled.gpu_proved import PROVED
from pallas_kernels.tiled.gpu_stream import (
    FUNCTIONS,
    Plan,
    Stream,
    of_blocks,
    scored,
    stream_barriers,
    tile_of,
)
from pallas_kernels.tiled.inputs import Inputs, Options, without_hidden
from pallas_kernels.tiled.schedule import Grid, schedule, split
from pallas_kernels.tiled.scores import LOG2E, Scores
from pallas_kernels.tpu import result

__all__ = ["backward", "forward", "supports", "unproved"]

unproved = PROVED.unproved

LOWEST = -1e30
"""Where the running maximum starts: finite, so that no difference of maxima is NaN."""

MOST_FEATURES, MOST_FEATURES_FLOAT32 = 256, 128


def supports(*, options: Options, inputs: Inputs, gradients: Sequence[str] = ()) -> str | None:
    """Returns why the kernels do not serve a call, or these gradients of it, or None."""
    dtype = inputs.query.dtype
    if dtype == jnp.float64:
        return "it does not compute in float64"
    most = MOST_FEATURES_FLOAT32 if dtype == jnp.float32 else MOST_FEATURES
    features = max(inputs.query.shape[3], inputs.value.shape[3])
    if features > most:
        return f"heads of {dtype} must have at most {most} features; got {features}"
    if options.group_size is not None:
        return "it has no groups of keys (group_size)"
    for blocks in split(inputs.mask)[0]:
        if blocks.block_q % gpu.ROWS or blocks.block_k % gpu.ROWS:
            return (
                f"blocks of a list must be multiples of {gpu.ROWS} tokens; got block_q "
                f"{blocks.block_q} and block_k {blocks.block_k}"
            )
    if "table" in gradients and not has_space_by_distance(options, inputs):
        keys, features = inputs.key.shape[1], inputs.query.shape[3]
        return (
            f"for the gradient of relative_bias with {keys} keys and heads of {dtype} of "
            f"{features} features there is no space in shared memory"
        )
    return None


def forward(
    options: Options, *inputs: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp."""
    x = without_hidden(Inputs(*inputs))
    batch, queries, heads, _ = x.query.shape
    features, width = (gpu.whole(array.shape[3]) for array in (x.query, x.value))
    plan = _plan(options, x, features, width)
    rows = schedule(x.mask, plan.grid)
    call = Scores.of(options, x, FUNCTIONS)
    more = {} if x.statistic is None else {"statistic": call.divisor(x.statistic)}
    operands = Operands(call, x, plan.tiling, **more)
    query = gpu.filled(x.query, plan.tiling.rows, features)
    key, value = (
        gpu.filled(array, plan.tiling.columns, size)
        for array, size in ((x.key, features), (x.value, width))
    )
    parts, dtype = len(query), query[0].dtype
    out_dtype = x.query.dtype
    ready, free = stream_barriers(plan, parts)
    slots, tile = plan.streams * plan.stages, plan.tiling.tile
    scratch = {
        "query": [gpu.smem((gpu.COMPUTING, gpu.ROWS, features), dtype, tile)] * parts,
        "key": [gpu.smem((slots, tile, features), dtype, tile)] * parts,
        "value": [gpu.smem((slots, tile, width), dtype, tile)] * parts,
        "lse": plgpu.SMEM((gpu.COMPUTING, gpu.ROWS), jnp.float32),
        "query_ready": plgpu.Barrier(num_arrivals=parts, num_barriers=gpu.COMPUTING),
        "key_ready": ready,
        "key_free": free,
        "value_ready": ready,
        "value_free": free,
        "turns": plgpu.Barrier(num_arrivals=1, num_barriers=gpu.COMPUTING),
    }
    if not _out_in_place(x.query, x.value):
        scratch["out"] = gpu.smem((gpu.COMPUTING, gpu.ROWS, width), out_dtype)
    branches = tiles.branches(rows, operands.mask is not None)
    arguments = {
        "schedule": of_blocks(rows, plan),
        "operands": operands.arrays,
        "query": query,
        "key": key,
        "value": value,
    }
    rows, work = plan.tiling.rows, plan.work(batch, rows)
    results = {
        "out": result((batch, rows, heads, width), out_dtype, x.query),
        "lse": result((batch, heads, rows), jnp.float32, x.query),
    }
    results = gpu.run(
        functools.partial(_kernel, call, plan, work, operands, branches),
        arguments,
        results,
        scratch,
        name="tiled_forward",
        grid=work.grid,
        exact=x.query.dtype == jnp.float32,
    )
    out = results["out"][:, :queries, :, : x.value.shape[3]]
    lse = results["lse"][:, :, :queries]
    if x.statistic is not None and not options.normalise:
        lse = jnp.broadcast_to(x.statistic, lse.shape).astype(lse.dtype)
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(
    call: Scores,
    plan: Plan,
    work: gpu.Work,
    operands: Operands,
    branches: tuple[bool, bool],
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    """Computes the results of a block's tiles of queries."""
    warpgroup, tile = place["warpgroup"], plan.tiling.tile
    turns = Turns(scratch["turns"], warpgroup, plan.streams == 1)

    def stream_of(place: dict[str, Array]) -> Stream:
        # The last rows of a causal mask have the most keys: they start first.
        block = plan.blocks - 1 - place["block"]
        return Stream(plan, arguments["schedule"], place["batch"], place["head"], block)

    def copy_all(place: dict[str, Array], before: list[Array]) -> list[Array]:
        stream = stream_of(place)
        head = stream.head // (plan.tiling.heads // arguments["key"][0].shape[2])

        def copy(name: str, number: Array, slot: Array) -> None:
            tokens = pl.ds(number * tile, tile)
            for source, target in zip(arguments[name], scratch[name], strict=True):
                ready = scratch[f"{name}_ready"].at[slot]
                source = source.at[stream.batch, tokens, head]
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready)

        return stream.copy(("key", "value"), copy, scratch, before)

    def attend(place: dict[str, Array], before: Array) -> Array:
        stream = stream_of(place)
        b, n, row = stream.batch, stream.head, stream.row(warpgroup)
        rows, ready = pl.ds(row, gpu.ROWS), scratch["query_ready"].at[warpgroup]
        query = gpu.at(scratch["query"], warpgroup)
        for source, target in zip(arguments["query"], query, strict=True):
            plgpu.copy_gmem_to_smem(source.at[b, rows, n], target, ready)
        plgpu.barrier_wait(ready)
        state, done = _attend(
            call, plan, operands, branches, stream, turns, row, arguments, scratch, before
        )
        out, lse = _finished(call, operands, arguments, At(b, n, row, 0), state)
        staged = scratch["out"].at[warpgroup] if "out" in scratch else query[0]
        staged[...] = out.astype(staged.dtype)
        scratch["lse"].at[warpgroup][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, results["out"].at[b, rows, n])
        plgpu.copy_smem_to_gmem(scratch["lse"].at[warpgroup], results["lse"].at[b, n, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return done

    @pl.when(warpgroup == gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS_COPYING, action="decrease")
        work.each(place, copy_all, [jnp.int32(0)] * plan.streams)

    @pl.when(warpgroup < gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS, action="increase")
        turns.begin()
        work.each(place, attend, jnp.int32(0))
        turns.end()


class Sums(NamedTuple):
    """What a warpgroup keeps of its rows; None where the weights do not need it."""

    values: Array
    total: Array | None
    maximum: Array | None


def _attend(
    call: Scores,
    plan: Plan,
    operands: Operands,
    branches: tuple[bool, bool],
    stream: Stream,
    turns: "Turns",
    row: Array,
    arguments: dict[str, Any],
    scratch: dict[str, Any],
    before: Array,
) -> tuple[Sums, Array]:
    """Visits the keys of a tile of queries; returns also the number of all tiles visited so far."""
    refs, exact = arguments["operands"], len(arguments["query"]) > 1
    warpgroup, narrow = turns.warpgroup, scratch["value"][0].dtype
    width = scratch["value"][0].shape[-1]

    def query_and_key(slot: Array) -> tuple[gpu.Parts, gpu.Parts]:
        # Descriptors of the queries, made ahead of the loop, would take registers.
        query = gpu.at(scratch["query"], lax.optimization_barrier(warpgroup))
        return query, gpu.transposed(gpu.at(scratch["key"], slot))

    def weigh(
        slot: Array, number: Array, masked: bool, sums: Sums, products: Array
    ) -> tuple[Array, Array | None, Sums]:
        plgpu.barrier_arrive(scratch["key_free"].at[slot])
        at = At(stream.batch, stream.head, row, number * plan.tiling.tile)
        scores, here = scored(call, operands, products, refs, at, masked)
        return _weighted(call, scores, here, sums, exact)

    def narrowed(weights: Array) -> list[Array]:
        parts = gpu.in_parts(weights) if exact else [weights.astype(narrow)]
        # The compiler would do this when the next tile has begun, and keep float32 till then.
        return lax.optimization_barrier(parts)

    def begin(slot: Array, number: Array, masked: bool, sums: Sums) -> tuple[list[Array], Sums]:
        plgpu.barrier_wait(scratch["key_ready"].at[slot])
        turns.wait()
        products = gpu.product(*query_and_key(slot), turns.give)
        weights, _, sums = weigh(slot, number, masked, sums, products)
        return narrowed(weights), sums

    def visit(
        before: Array, slot: Array, number: Array, masked: bool, carry: tuple[list[Array], Sums]
    ) -> tuple[list[Array], Sums]:
        weights, sums = carry
        plgpu.barrier_wait(scratch["key_ready"].at[slot])
        plgpu.barrier_wait(scratch["value_ready"].at[before])
        turns.wait()
        value = gpu.at(scratch["value"], before)
        (weights, decay, sums), values = gpu.product_beside(
            query_and_key(slot),
            [(weights, value)],
            turns.give,
            lambda products, _: weigh(slot, number, masked, sums, products),
            total=sums.values,
        )
        plgpu.barrier_arrive(scratch["value_free"].at[before])
        if decay is not None:
            values = values * gpu.across(decay, values.shape)
        return narrowed(weights), sums._replace(values=values)

    def end(slot: Array, carry: tuple[list[Array], Sums]) -> Sums:
        weights, sums = carry
        plgpu.barrier_wait(scratch["value_ready"].at[slot])
        turns.wait()
        value = gpu.at(scratch["value"], slot)
        values = gpu.accumulated(sums.values, weights, value, turns.give)
        plgpu.barrier_arrive(scratch["value_free"].at[slot])
        return sums._replace(values=values)

    sums = _started(call, operands, refs, At(stream.batch, stream.head, row, 0), width)
    return stream.visit_ahead(warpgroup, begin, visit, end, sums, branches, before)


def _started(call: Scores, operands: Operands, refs: dict[str, Any], at: At, width: int) -> Sums:
    """Returns the sums over no keys, or over the sink."""
    total = gpu.of_rows(0.0) if call.options.normalise else None
    maximum = gpu.of_rows(LOWEST) if call.online else None
    if call.online and "sink" in operands:
        # A key with a value of zero, seen by every query before all others.
        sink = operands.of_rows("sink", refs, at)
        total, maximum = gpu.of_rows(1.0), gpu.of_rows(0.0) + sink * call.unit
    return Sums(gpu.matrix(0.0, (gpu.ROWS, width)), total, maximum)


def _weighted(
    call: Scores, scores: Array, here: dict[str, Any], sums: Sums, exact: bool
) -> tuple[Array, Array | None, Sums]:
    """Returns the weights of a tile, what is left of those before, and the sums but for values."""
    reweight = call.options.reweight is not None
    if not call.online or reweight:
        weights, _ = call.divided(scores, here.get("statistic"), exact)
    if not call.online:
        total = None if sums.total is None else sums.total + jnp.sum(weights, axis=1)
        return weights, None, sums._replace(total=total)
    if reweight:
        scores = call.log_reweighted(weights)
    maximum = jnp.maximum(sums.maximum, jnp.max(scores, axis=1))
    decay = call.exp(sums.maximum - maximum)
    # Scaled first: a product and a difference are one operation.
    scores, shift = (x if call.factor == 1 else x * call.factor for x in (scores, maximum))
    weights = jnp.exp2(scores - gpu.across(shift, scores.shape))
    total = sums.total * decay + jnp.sum(weights, axis=1)
    return weights, decay, sums._replace(total=total, maximum=maximum)


def _finished(
    call: Scores, operands: Operands, arguments: dict[str, Any], at: At, sums: Sums
) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp of a tile of queries."""
    values, whole, maximum = sums
    if whole is None:
        return values, gpu.of_rows(0.0)
    logs, scale = None, None
    if maximum is not None:
        logs = maximum * (call.factor / LOG2E)
    elif "sink" in operands:
        # Relative to the sink if it is large: its exponential may be more than float32 holds.
        sink = gpu.of_rows(0.0) + operands.of_rows("sink", arguments["operands"], at)
        logs = jnp.maximum(sink, 0)
        scale = jnp.exp(-logs)
        whole = whole * scale + jnp.exp(sink - logs)
    if call.options.reweight is not None:
        whole = jnp.where(maximum < call.least, 0, whole)
    seen = whole != 0  # a NaN stays one
    whole = jnp.where(seen, whole, 1)
    inverse = jnp.where(seen, 1 / whole if scale is None else scale / whole, 0)
    lse = jnp.log(whole) if logs is None else jnp.log(whole) + logs
    return values * gpu.across(inverse, values.shape), jnp.where(seen, lse, -jnp.inf)


class Turns:
    """Whose turn it is on the matrix units, of two warpgroups that visit the same tiles.

    While one takes exponentials the other one multiplies: the weights of a tile by its values, and
    the queries by the keys of the next tile.
    """

    def __init__(self, barriers: Any, warpgroup: Array, shared: bool):
        """Prepares the turns of a warpgroup; if not `shared`, there are none."""
        self.barriers, self.warpgroup, self.shared = barriers, warpgroup, shared

    def begin(self) -> None:
        """Gives the first warpgroup the first turn of all."""
        pl.when(self.warpgroup == 1)(self.give)

    def end(self) -> None:
        """Takes the turn that is left."""
        pl.when(self.warpgroup == 0)(self.wait)

    def give(self) -> None:
        """Gives the other warpgroup its turn."""
        if self.shared:
            plgpu.barrier_arrive(self.barriers.at[1 - self.warpgroup])

    def wait(self) -> None:
        """Waits for its turn."""
        if self.shared:
            plgpu.barrier_wait(self.barriers.at[self.warpgroup])


def _out_in_place(query: Array, value: Array) -> bool:
    """Returns whether the output takes the place of the queries in SMEM."""
    narrow = query.dtype != jnp.float32
    return narrow and gpu.whole(query.shape[3]) == gpu.whole(value.shape[3])


def _plan(options: Options, x: Inputs, features: int, width: int) -> Plan:
    """Chooses the tiles of the forward."""
    queries, heads = x.query.shape[1:3]
    keys = x.key.shape[1]
    lists, _ = split(x.mask)
    block_q, block_k = tiles.common_blocks(lists) if lists else (0, 0)
    both = gpu.COMPUTING * gpu.ROWS
    streams = gpu.COMPUTING if block_q % both else 1
    parts = len(gpu.in_parts(jnp.zeros((), x.query.dtype)))
    out = 0 if _out_in_place(x.query, x.value) else width * x.query.dtype.itemsize
    fixed = both * (2 * parts * features + out)
    most, config = _most(options, x, width), gpu_tuned.config("forward", x)
    most = min(most, config.tile) if config else most
    column = streams * 2 * parts * (features + width)
    tile, stages = tile_of(fixed, column, most, block_k, keys)
    tiling = Tiling(gpu.whole(queries, both), gpu.whole(keys, tile), tile, heads, False)
    grid = Grid(queries, keys, both // streams, tile)
    persistent = config.persistent if config else True
    return Plan(tiling, grid, streams, stages, persistent)


def _most(options: Options, x: Inputs, width: int) -> int:
    """Returns the most columns of a tile for which the registers suffice."""
    several = x.table is not None or tiles.has_scores(x) or options.weights == "softplus"
    several |= x.query.dtype == jnp.float32 or options.reweight is not None
    several |= x.slopes is not None and x.bias is not None
    most = 64 if several or width > 128 else 128
    return min(most, options.tile_k or most)
