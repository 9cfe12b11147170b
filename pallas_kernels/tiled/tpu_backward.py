"""The backward of tiled attention as a Pallas kernel for TPU: see docs/kernels.md.

One pass over the scores makes all gradients. A grid step has a tile of keys, and visits tiles of
queries; its scores are [keys, queries], so that what belongs to a query lies along lanes. Gradients
of its keys and values are summed in VMEM and written once. Gradients of the queries of a head are
summed in VMEM over all its tiles of keys, and written when the head is done.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tiled import tiles
from pallas_kernels.tiled.inputs import Inputs, Options, unbroadcast, without_hidden
from pallas_kernels.tiled.schedule import Grid, schedule, split
from pallas_kernels.tiled.scores import LOG2E, Operands, Scores, distance, dot, parts
from pallas_kernels.tiled.tiles import LANES, Tiling

TILES = {
    4: {(1024, 1024, 1024, 512): 2250, (512, 512, 512, 512): 2339, (256, 256, 256, 256): 2716},
    6: {(1024, 1024, 512, 256): 1027, (512, 512, 512, 256): 1173, (256, 256, 256, 256): 1740},
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
    padding = ((0, 0), (0, 0), (0, tiling.column_tiles * tiling.columns - queries))

    # Of a row without keys all is 0, whatever its cotangents are.
    hidden = jnp.isneginf(lse)
    d_out = jnp.where(hidden[..., None], 0, d_out)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    delta = jnp.where(hidden, 0, delta)
    lse = jnp.where(hidden, jnp.inf, lse)
    call, more = Scores.of(options, x), {}
    by_head = jnp.pad(jnp.swapaxes(lse, 1, 2), padding, constant_values=jnp.inf)
    if options.normalise:
        more["delta"] = jnp.pad(jnp.swapaxes(delta, 1, 2), padding)
    if options.reweight is not None:
        more["log_sum"] = by_head * LOG2E
        statistic = jnp.broadcast_to(x.statistic, (batch, heads, queries))
        more["divisor"] = call.divisor(jnp.pad(statistic, padding, constant_values=jnp.inf))
    elif options.normalise or x.statistic is not None:
        more["divisor"] = call.divisor(by_head)
    operands = Operands(call, x, tiling, True, **more)
    query, key, value = tiles.by_head(x, tiling, True)
    d_out = tiles.by_head(x._replace(query=d_out.astype(x.query.dtype)), tiling, True)[0]

    # Sums over the heads of a group, or over spans of queries, are taken in float32.
    tokens = max(SPAN_BYTES // (4 * max(features, LANES)) // tiling.columns, 1)
    spans = [
        (first, min(first + tokens, tiling.column_tiles))
        for first in range(0, tiling.column_tiles, tokens)
    ]
    partial = heads > kv_heads or len(spans) > 1
    dtypes = [jnp.float32 if partial else array.dtype for array in (key, value)]
    results = [
        _call(call, x, tiling, grid, operands, span, dtypes, names)(
            operands.arrays, key, value, query, d_out
        )
        for span in spans
    ]
    d_query, d_key, d_value, d_slopes, d_table, d_statistic = zip(*results, strict=True)
    d_query = jnp.concatenate(d_query, axis=2) * options.scale
    gradients = {"query": jnp.swapaxes(d_query[:, :, :queries], 1, 2).astype(x.query.dtype)}
    for name, spans_, array in (("key", d_key, x.key), ("value", d_value, x.value)):
        gradient = functools.reduce(jnp.add, spans_)[:, :, :keys]
        gradient = gradient.reshape(batch, kv_heads, heads // kv_heads, *gradient.shape[2:])
        gradient = jnp.sum(gradient, axis=2) if heads > kv_heads else gradient[:, :, 0]
        gradients[name] = jnp.swapaxes(gradient, 1, 2).astype(array.dtype)
    if "slopes" in names:
        gradient = -functools.reduce(jnp.add, d_slopes).sum((2, 3, 4))
        gradients["slopes"] = unbroadcast(gradient, x.slopes.shape)
    if "table" in names:
        gradient = functools.reduce(jnp.add, (sums[:, :, 0] for (sums,) in d_table))
        gradients["table"] = operands.table.gradient(gradient, x)
    if "statistic" in names:
        gradient = jnp.concatenate([sums for (sums,) in d_statistic], axis=2)
        gradient = -gradient[..., 0, : tiling.columns].reshape(batch, heads, -1)[..., :queries]
        gradients["statistic"] = unbroadcast(gradient, x.statistic.shape)
    if "sink" in names:
        sink = jnp.swapaxes(x.sink, 1, 2)
        gradient = unbroadcast(-jnp.exp(sink - lse) * delta, sink.shape)
        gradients["sink"] = jnp.swapaxes(gradient, 1, 2)
    return tuple(gradients[name] for name in names)


def _call(
    call: Scores,
    x: Inputs,
    tiling: Tiling,
    grid: Grid,
    operands: Operands,
    span: tuple[int, int],
    dtypes: Sequence[Any],
    names: Sequence[str],
) -> Any:
    """Makes the kernel for a span of tiles of queries."""
    batch, _, heads, features = x.query.shape
    width = x.value.shape[3]
    queries, keys = (span[1] - span[0]) * tiling.columns, tiling.row_tiles * tiling.rows
    kv_heads = x.key.shape[2]
    rows = schedule(x.mask, grid, True, None if queries >= grid.queries else span)
    branches = tiles.branches(rows, operands.mask is not None)
    window, rows = tiles.windows(rows, tiling)
    transposed = _transposed_sums(tiling)
    dtype = jnp.float32 if x.query.dtype == jnp.float16 else x.query.dtype

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
    }
    if transposed:
        scratch["key_t"] = pltpu.VMEM((features, tiling.rows), dtype)
        scratch["query_t"] = pltpu.VMEM((features, tiling.width), dtype)
        scratch["d_out_t"] = pltpu.VMEM((width, tiling.width), dtype)
    slopes, by_distance, by_query = "slopes" in names, [], []
    if "table" in names:
        by_distance = [operands.table.sums]
        scratch["d_table"] = pltpu.VMEM(operands.table.band, jnp.float32)
    if "statistic" in names:
        by_query = [(span[1] - span[0], 1, max(tiling.columns, LANES))]
    group = heads // kv_heads
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    d_query = (features, queries) if transposed else (queries, features)
    kernel = pl.pallas_call(
        functools.partial(_kernel, call, tiling, operands, branches, transposed, span, slopes),
        name="tiled_backward",
        grid=(batch, heads, tiling.row_tiles),
        in_specs=[
            window,
            operands.specs,
            pl.BlockSpec(
                (None, None, tiling.rows, features), lambda b, n, i: (b, n // group, i, 0)
            ),
            pl.BlockSpec((None, None, tiling.rows, width), lambda b, n, i: (b, n // group, i, 0)),
            hbm,
            hbm,
        ],
        out_specs=[
            pl.BlockSpec((None, None, *d_query), lambda b, n, i: (b, n, 0, 0)),
            pl.BlockSpec((None, None, tiling.rows, features), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec((None, None, tiling.rows, width), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec(
                (None, None, None, 1, tiling.column_part), lambda b, n, i: (b, n, i, 0, 0)
            ),
            [
                pl.BlockSpec((None, None, *shape), lambda b, n, i: (b, n, 0, 0))
                for shape in by_distance
            ],
            [
                pl.BlockSpec((None, None, *shape), lambda b, n, i: (b, n, 0, 0, 0))
                for shape in by_query
            ],
        ],
        out_shape=[
            tiles.result((batch, heads, *d_query), jnp.float32, x.query),
            tiles.result((batch, heads, keys, features), dtypes[0], x.query),
            tiles.result((batch, heads, keys, width), dtypes[1], x.query),
            tiles.result(
                (batch, heads, tiling.row_tiles, 1, tiling.column_part), jnp.float32, x.query
            ),
            [tiles.result((batch, heads, *shape), jnp.float32, x.query) for shape in by_distance],
            [tiles.result((batch, heads, *shape), jnp.float32, x.query) for shape in by_query],
        ],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_BYTES,
        ),
    )

    def run(*args: Any) -> tuple[Array, ...]:
        d_query, *others = kernel(rows, *args)
        return jnp.swapaxes(d_query, 2, 3) if transposed else d_query, *others

    return run


def _kernel(
    call: Scores,
    tiling: Tiling,
    operands: Operands,
    branches: tuple[bool, bool],
    transposed: bool,
    span: tuple[int, int],
    slopes: bool,
    schedule: Any,
    refs: dict[str, Any],
    key: Any,
    value: Any,
    query: Any,
    d_out: Any,
    d_query: Any,
    d_key: Any,
    d_value: Any,
    d_slopes: Any,
    d_table: Sequence[Any],
    d_statistic: Sequence[Any],
    scratch: dict[str, Any],
) -> None:
    """Adds what one tile of keys gives to all gradients.

    Sums are kept [features, tokens] if `transposed`, else [tokens, features]. `d_table` holds one
    array of sums by distance, or none, and `d_statistic` one of sums by query.
    """
    b, n = pl.program_id(0), pl.program_id(1)
    options, exact = call.options, query.dtype == jnp.float32
    operands = operands.bound(refs, scratch["operands"])
    table, band = operands.operands.get("table"), scratch.get("d_table")

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for sums in (d_query, *d_table, *d_statistic):
            sums[...] = jnp.zeros_like(sums)

    for sums in (scratch["d_key"], scratch["d_value"], d_slopes):
        sums[...] = jnp.zeros_like(sums)
    if transposed:
        scratch["key_t"][...] = key[...].T

    def inside_span(number: Array) -> Array:
        # A piece beyond the end has only zeros to add.
        number = number if tiling.pieces == 1 else jnp.minimum(number, span[1] - 1)
        return number - span[0]

    def gradients(
        slot: Array, numbers: Sequence[Array], masked: bool, row: int, start: int
    ) -> tuple[Array, Array]:
        """Returns weights and the gradient of products for a part of a tile."""
        here = operands.values(slot, row, start, masked)
        rows, columns = pl.ds(row, tiling.row_part), pl.ds(start, tiling.column_part)
        key_numbers, query_numbers = tiles.positions(numbers, tiling, row, start)
        products = dot(key[rows], scratch["query"][slot, columns], 1, 1)
        scores, slope = call.held(products, here, query_numbers, key_numbers)
        d_weights = dot(value[rows], scratch["d_out"][slot, columns], 1, 1)
        if options.normalise:
            d_weights -= here["delta"]
        weights, derivative = call.divided(scores, here.get("divisor"), exact)
        by_statistic = weights  # the derivative by the statistic, but for its sign
        if options.reweight is not None:
            weights, by_weights = call.reweighted(weights, here["log_sum"])
            derivative, by_statistic = derivative * by_weights, by_statistic * by_weights
        d_scores = derivative * d_weights
        for sums in d_statistic:
            row_sums = jnp.sum(by_statistic * d_weights, axis=0, keepdims=True)
            pieces = [inside_span(number) for number in numbers]
            tiles.add_to_columns(sums, row_sums, pieces, tiling, start)
        if slopes:
            moved = d_scores * distance(here, query_numbers, key_numbers)
            d_slopes[...] += jnp.sum(moved, axis=0, keepdims=True)
        if d_table:
            table.add(band, d_scores, row, start)
        return weights.astype(query.dtype), (d_scores * slope).astype(query.dtype)

    def add(
        slot: Array, numbers: Sequence[Array], row: int, start: int, parts: tuple[Array, Array]
    ) -> None:
        """Adds a part of a tile to the sums."""
        weights, d_products = parts
        rows, columns = pl.ds(row, tiling.row_part), pl.ds(start, tiling.column_part)
        if transposed:
            at = pl.multiple_of(inside_span(numbers[0]) * tiling.columns + start, LANES)
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
            piece, inside = divmod(start + begin, tiling.columns)
            at = pl.multiple_of(inside_span(numbers[piece]) * tiling.columns + inside, size)
            d_query[pl.ds(at, size)] += product[begin : begin + size]

    def compute(slot: Array, numbers: Sequence[Array], masked: bool) -> None:
        operands.arrive(slot)
        if d_table:
            band[...] = jnp.zeros_like(band)
        if transposed:
            scratch["query_t"][...] = scratch["query"][slot].T
            scratch["d_out_t"][...] = scratch["d_out"][slot].T
        # With transposed sums, a part's scores are computed before the sums of the part before it:
        # they overlap.
        waiting = []
        for row, start in parts(tiling):
            waiting.append((row, start, gradients(slot, numbers, masked, row, start)))
            if len(waiting) > transposed:
                add(slot, numbers, *waiting.pop(0))
        for part in waiting:
            add(slot, numbers, *part)
        if d_table:
            table.fold(band, *d_table, numbers)

    head = (b, n)
    buffers = ((query.at[head], scratch["query"]), (d_out.at[head], scratch["d_out"]))
    copied = (operands.copies, operands.filled)
    tiles.visit(schedule, tiling, buffers, *copied, scratch["visit"], compute, branches)
    for sums, out, factor in (
        (scratch["d_key"], d_key, options.scale),
        (scratch["d_value"], d_value, 1),
    ):
        total = sums[...].T if transposed else sums[...]
        out[...] = (total * factor if factor != 1 else total).astype(out.dtype)


def _tiling(options: Options, x: Inputs) -> tuple[Tiling, Grid]:
    """Chooses the tiles of the backward."""
    queries, heads = x.query.shape[1:3]
    keys = x.key.shape[1]
    lists, _ = split(x.mask)
    if lists:
        rows, columns, pieces, column_part = tiles.listed(lists[0], transposed=True)
        row_part = rows
    else:
        tile_q, tile_k, column_part, row_part = tiles.chosen(
            TILES, Grid(queries, keys, 0, 0), x.mask, 1
        )
        tile_q, tile_k = tiles.limited(options, x, tile_q), tiles.limited(options, x, tile_k)
        rows = tiles.even(keys, options.tile_k or tile_k)
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
