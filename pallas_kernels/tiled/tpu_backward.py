"""The backward of tiled attention as a Pallas kernel for TPU: see docs/kernels.md.

One pass over the scores makes all gradients. A grid step has a tile of keys, and visits tiles of
queries; its scores are [keys, queries], so that what belongs to a query lies along lanes. Gradients
of its keys and values are summed in VMEM and written once. Gradients of the queries of a head are
summed in VMEM over all its tiles of keys, and written when the head is done.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tiled import groups, sums, tiles
from pallas_kernels.tiled.inputs import (
    Inputs,
    Options,
    of_rows,
    sink_gradient,
    unbroadcast,
    without_hidden,
)
from pallas_kernels.tiled.schedule import Grid, split, transposed_schedules
from pallas_kernels.tiled.scores import Operands, Scores, distance, dot, parts, row_operands
from pallas_kernels.tiled.sums import Step, Sum
from pallas_kernels.tiled.tiles import Tiling
from pallas_kernels.tpu import LANES, compiler_params, result

TILES = {
    4: {(1024, 1024, 1024, 512): 2250, (512, 512, 512, 512): 2339, (256, 256, 256, 256): 2716},
    6: {(1024, 1024, 512, 256): 1031, (512, 512, 512, 256): 1173, (256, 256, 256, 256): 1740},
}
"""By generation from which on: queries and keys of a tile, queries and keys that are computed at a
time, and the bundles that 512 x 512 scores take then, see docs/benchmarks.md."""

SPAN_BYTES = 8 * 2**20
"""How much of the queries' gradients one kernel holds in VMEM, in one of two buffers."""


def backward(options: Options, names: Sequence[str], *args: Array) -> tuple[Array, ...]:
    """Returns gradients, as `xla.backward` does."""
    *inputs, out, lse, d_out, d_lse = args
    x = without_hidden(Inputs(*inputs))
    batch, queries, heads, features = x.query.shape
    keys, kv_heads = x.value.shape[1:3]
    tiling, grid = _tiling(options, x)
    d_out, lse, delta = of_rows(out, lse, d_out, d_lse)
    call = Scores.of(options, x)
    more = row_operands(call, x, lse, delta, tiling.column_tiles * tiling.columns)
    operands = Operands(call, x, tiling, True, **more)
    query, key, value = tiles.by_head(x, tiling, True)
    d_out = tiles.by_head(x._replace(query=d_out.astype(x.query.dtype)), tiling, True)[0]

    # Sums over the heads of a group, or over spans of queries, are taken in float32.
    tokens = max(SPAN_BYTES // (4 * max(features, LANES)) // tiling.columns, 1)
    spans = -(-tiling.column_tiles // tokens)
    count = -(-tiling.column_tiles // spans)
    partial = heads > kv_heads or spans > 1
    dtypes = [jnp.float32 if partial else array.dtype for array in (key, value)]
    wanted = sums.sums(names, x, tiling, operands, count)
    rows = transposed_schedules(x.mask, grid, count)
    branches = tiles.branches(rows, operands.mask is not None)
    run = functools.partial(_call, call, x, tiling, operands, wanted, count, dtypes, branches)

    def add_span(carried: dict[str, Array], span: tuple[Array, Array]) -> tuple[dict, dict]:
        results = run(*span, key, value, query, d_out, carried)
        return {name: results.pop(name) for name in carried}, results

    # What one kernel after the other adds to.
    in_place = {name: total.shape for name, total in wanted.items() if total.in_place}
    if spans > 1:
        in_place |= {"key": (*key.shape[:1], heads, *key.shape[2:])}
        in_place |= {"value": (*value.shape[:1], heads, *value.shape[2:])}
    carried = {
        name: jnp.zeros_like(query, shape=shape, dtype=jnp.float32)
        for name, shape in in_place.items()
    }
    firsts = jnp.arange(0, spans * count, count, dtype=jnp.int32)
    if spans > 1:
        carried, results = jax.lax.scan(add_span, carried, (firsts, jnp.asarray(rows)))
    else:
        carried, results = add_span(carried, (firsts[0], rows[0]))
        results = jax.tree.map(lambda array: array[None], results)
    carried |= {name: results.pop(name)[0] for name in ("key", "value") if name in results}

    d_query = jnp.moveaxis(results["query"], 0, 2) * options.scale
    d_query = d_query.reshape(batch, heads, -1, features)[:, :, :queries]
    gradients = {"query": jnp.swapaxes(d_query, 1, 2).astype(x.query.dtype)}
    for name in ("key", "value"):
        gradient, array = carried[name][:, :, :keys], getattr(x, name)
        gradient = gradient.reshape(batch, kv_heads, heads // kv_heads, *gradient.shape[2:])
        gradient = jnp.sum(gradient, axis=2) if heads > kv_heads else gradient[:, :, 0]
        gradients[name] = jnp.swapaxes(gradient, 1, 2).astype(array.dtype)
    totals = {
        name: total.total(carried[name] if name in carried else results[name])
        for name, total in wanted.items()
    }
    if "slopes" in names:
        gradients["slopes"] = unbroadcast(-totals["slopes"], x.slopes.shape)
    if "table" in names:
        gradients["table"] = operands.table.gradient(totals["table"], x)
    if "bias" in names:
        gradients["bias"] = sums.gradient_of_bias(totals["bias"], x)
    if "statistic" in names:
        gradient = -totals["statistic"][..., :queries]
        gradients["statistic"] = unbroadcast(gradient, x.statistic.shape)
    if "sink" in names:
        gradients["sink"] = sink_gradient(x, lse, delta)
    return tuple(gradients[name] for name in names)


def _call(
    call: Scores,
    x: Inputs,
    tiling: Tiling,
    operands: Operands,
    wanted: dict[str, Sum],
    count: int,
    dtypes: Sequence[Any],
    branches: tuple[bool, bool],
    first: Array,
    rows: Array,
    key: Array,
    value: Array,
    query: Array,
    d_out: Array,
    carried: dict[str, Array],
) -> dict[str, Array]:
    """Calls the kernel, for so many tiles of queries.

    Args:
      call: what scores are.
      x: the inputs.
      tiling: the tiles.
      operands: of the scores.
      wanted: what to sum besides the gradients of queries, keys and values.
      count: tiles of queries.
      dtypes: of the gradients of keys and values.
      branches: see `tiles.visit`.
      first: number of the first tile of queries.
      rows: the schedule.
      key: by head, as are the next three.
      value: likewise.
      query: likewise.
      d_out: likewise.
      carried: what to add to, by name.
    """
    batch, _, heads, features = x.query.shape
    width = x.value.shape[3]
    group, queries = heads // x.key.shape[2], count * tiling.columns
    window, rows = tiles.windows(rows, tiling)
    transposed = _transposed_sums(tiling)
    dtype = query.dtype

    def sums(features: int) -> Any:
        shape = (features, tiling.rows) if transposed else (tiling.rows, features)
        return pltpu.VMEM(shape, jnp.float32)

    scratch = {
        "query": pltpu.VMEM((2, tiling.width, features), dtype),
        "d_out": pltpu.VMEM((2, tiling.width, width), dtype),
        "visit": tiles.visit_scratch(),
        "d_key": sums(features),
        "d_value": sums(width),
        "operands": operands.scratch,
        "sums": {name: x.scratch for name, x in wanted.items() if x.scratch is not None},
    }
    if transposed:
        scratch["key_t"] = pltpu.VMEM((features, tiling.rows), dtype)
        scratch["query_t"] = pltpu.VMEM((features, tiling.width), dtype)
        scratch["d_out_t"] = pltpu.VMEM((width, tiling.width), dtype)

    def of_tile(features: int, group: int) -> pl.BlockSpec:
        block = None, None, tiling.rows, features
        return pl.BlockSpec(block, lambda b, n, i: (b, n // group, i, 0))

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    keys = tiling.row_tiles * tiling.rows
    d_query = (features, queries) if transposed else (queries, features)
    specs = {
        "query": pl.BlockSpec((None, None, *d_query), lambda b, n, i: (b, n, 0, 0)),
        "key": of_tile(features, 1),
        "value": of_tile(width, 1),
    } | {name: total.spec for name, total in wanted.items()}
    shapes = {
        "query": ((batch, heads, *d_query), jnp.float32),
        "key": ((batch, heads, keys, features), dtypes[0]),
        "value": ((batch, heads, keys, width), dtypes[1]),
    } | {name: (total.shape, jnp.float32) for name, total in wanted.items()}
    args = (rows, jnp.reshape(first, (1, 1)), operands.arrays, key, value, query, d_out)
    place = len(jax.tree.leaves(args))  # arguments and results are numbered as leaves
    results = pl.pallas_call(
        functools.partial(_kernel, call, tiling, operands, wanted, count, branches, transposed),
        name="tiled_backward",
        grid=(batch, heads, tiling.row_tiles),
        in_specs=[
            window,
            pl.BlockSpec((1, 1), lambda b, n, i: (0, 0), memory_space=pltpu.SMEM),
            operands.specs,
            of_tile(features, group),
            of_tile(width, group),
            hbm,
            hbm,
            {name: specs[name] for name in carried},
        ],
        out_specs=specs,
        out_shape={name: result(*shape, x.query) for name, shape in shapes.items()},
        input_output_aliases={
            place + index: sorted(specs).index(name) for index, name in enumerate(sorted(carried))
        },
        scratch_shapes=[scratch],
        # What is summed over batch or heads in device memory is summed by one core.
        compiler_params=compiler_params(
            parallel=not any(total.in_place for total in wanted.values())
        ),
    )(*args, carried)
    if transposed:
        results["query"] = jnp.swapaxes(results["query"], 2, 3)
    return results


def _kernel(
    call: Scores,
    tiling: Tiling,
    operands: Operands,
    wanted: dict[str, Sum],
    count: int,
    branches: tuple[bool, bool],
    transposed: bool,
    schedule: Any,
    first: Any,
    refs: dict[str, Any],
    key: Any,
    value: Any,
    query: Any,
    d_out: Any,
    carried: dict[str, Any],
    out: dict[str, Any],
    scratch: dict[str, Any],
) -> None:
    """Adds what one tile of keys gives to all gradients.

    Sums are kept [features, tokens] if `transposed`, else [tokens, features].
    """
    b, n = pl.program_id(0), pl.program_id(1)
    options, exact = call.options, query.dtype == jnp.float32
    operands = operands.bound(refs, scratch["operands"])
    d_query, first = out["query"], first[0, 0]

    def each(method: str, *args: Any) -> None:
        for name, total in wanted.items():
            getattr(total, method)(out[name], scratch["sums"].get(name), *args)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_query[...] = jnp.zeros_like(d_query)
        each("begin_head")

    for name in ("d_key", "d_value"):
        scratch[name][...] = jnp.zeros_like(scratch[name])
    each("begin_row")
    if transposed:
        scratch["key_t"][...] = key[...].T

    def gradients(
        slot: Array, step: Step, masked: bool, row: int, start: int
    ) -> tuple[Array, Array]:
        """Returns weights and the gradient of products for a part of a tile."""
        here = operands.values(slot, row, start, masked)
        rows, columns = pl.ds(row, tiling.row_part), pl.ds(start, tiling.column_part)
        key_numbers, query_numbers = tiles.positions(step.numbers, tiling, row, start)
        products = dot(key[rows], scratch["query"][slot, columns], 1, 1)
        scores, slope = call.held(products, here, query_numbers, key_numbers)
        d_weights = dot(value[rows], scratch["d_out"][slot, columns], 1, 1)
        if options.normalise:
            d_weights -= here["delta"]
        group = options.group_size
        if group is not None:
            scores, shares = groups.by_landmarks(scores, group, call.exp)
        weights, derivative, by_statistic = call.differentiated(scores, here, exact)
        if group is not None:
            weights = derivative = weights * shares
        d_scores = derivative * d_weights
        if group is not None:
            d_scores = groups.before_landmarks(d_scores, shares, group)
        terms = dict.fromkeys(wanted, d_scores)
        if "statistic" in wanted:
            terms["statistic"] = by_statistic * d_weights
        if "slopes" in wanted:
            terms["slopes"] = d_scores * distance(here, query_numbers, key_numbers)
        for name, total in wanted.items():
            total.add(out[name], scratch["sums"].get(name), terms[name], step, row, start)
        return weights.astype(query.dtype), (d_scores * slope).astype(query.dtype)

    def add(slot: Array, step: Step, row: int, start: int, parts: tuple[Array, Array]) -> None:
        """Adds a part of a tile to the sums."""
        weights, d_products = parts
        rows, columns = pl.ds(row, tiling.row_part), pl.ds(start, tiling.column_part)
        if transposed:
            at = pl.multiple_of(step.inside[0] * tiling.columns + start, LANES)
            scratch["d_value"][:, rows] += dot(scratch["d_out_t"][:, columns], weights, 1, 1)
            scratch["d_key"][:, rows] += dot(scratch["query_t"][:, columns], d_products, 1, 1)
            at = pl.ds(at, tiling.column_part)
            d_query[:, at] += dot(scratch["key_t"][:, rows], d_products, 1, 0)
            return
        scratch["d_value"][rows] += dot(weights, scratch["d_out"][slot, columns], 1, 0)
        scratch["d_key"][rows] += dot(d_products, scratch["query"][slot, columns], 1, 0)
        product = dot(d_products, key[rows], 0, 0)
        size = min(tiling.columns, tiling.column_part)
        for begin in range(0, tiling.column_part, size):
            piece, offset = divmod(start + begin, tiling.columns)
            at = pl.multiple_of(step.inside[piece] * tiling.columns + offset, size)
            d_query[pl.ds(at, size)] += product[begin : begin + size]

    def compute(slot: Array, numbers: Sequence[Array], masked: bool) -> None:
        operands.arrive(slot)
        # A piece beyond the end has only zeros to add.
        inside = [jnp.minimum(number - first, count - 1) for number in numbers]
        step = Step(numbers, inside)
        each("begin_step", step)
        if transposed:
            scratch["query_t"][...] = scratch["query"][slot].T
            scratch["d_out_t"][...] = scratch["d_out"][slot].T
        # With transposed sums, a part's scores are computed before the sums of the part before it:
        # they overlap.
        waiting = []
        for row, start in parts(tiling):
            waiting.append((row, start, gradients(slot, step, masked, row, start)))
            if len(waiting) > transposed:
                add(slot, step, *waiting.pop(0))
        for part in waiting:
            add(slot, step, *part)
        each("end_step", step)

    head = (b, n)
    buffers = ((query.at[head], scratch["query"]), (d_out.at[head], scratch["d_out"]))
    copied = (operands.copies, operands.filled)
    tiles.visit(schedule, tiling, buffers, *copied, scratch["visit"], compute, branches)
    each("end_row")
    for name, factor in (("key", options.scale), ("value", 1)):
        total = scratch[f"d_{name}"][...]
        total = total.T if transposed else total
        total = total * factor if factor != 1 else total
        if name in carried:
            total += carried[name][...]
        out[name][...] = total.astype(out[name].dtype)


def _tiling(options: Options, x: Inputs) -> tuple[Tiling, Grid]:
    """Chooses the tiles of the backward."""
    queries, heads = x.query.shape[1:3]
    keys = x.key.shape[1]
    lists, _ = split(x.mask)
    if lists:
        rows, columns, pieces, column_part = tiles.listed(x, lists, transposed=True)
        row_part = rows
    else:
        tile_q, tile_k, column_part, row_part = tiles.chosen(
            TILES, Grid(queries, keys, 0, 0), x.mask, 1
        )
        tile_q, tile_k = tiles.limited(options, x, tile_q), tiles.limited(options, x, tile_k)
        rows = tiles.even(keys, options.tile_k or tile_k)
        rows += -rows % (options.group_size or 1)
        columns, pieces = max(tiles.even(queries, options.tile_q or tile_q), LANES), 1
        row_part = next(s for s in (row_part, 256, LANES, rows) if rows % s == 0)
        column_part = next(s for s in (column_part, 512, 256, LANES) if columns % s == 0)
    grid = Grid(queries, keys, columns, rows)
    counts = (-(-keys // rows), -(-queries // columns))
    return Tiling(rows, counts[0], columns, counts[1], pieces, row_part, column_part, heads), grid


def _transposed_sums(tiling: Tiling) -> bool:
    """Returns whether sums are kept [features, tokens].

    The matrix units of v6e are 256 wide, which 128 features do not fill, but tokens do. Gathered
    pieces are short, and do not start at a multiple of 128 lanes.
    """
    return tiles.generation() >= 6 and tiling.pieces == 1 and tiling.columns % LANES == 0
