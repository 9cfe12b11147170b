"""Tiled attention in plain JAX: loops over tiles of queries and keys, on any platform.

No more of the scores exists at a time than one tile of them, so memory is O(T + S), forward and
backward; of the forward only the output and the log-sum-exp are kept. Tiles of keys that no query
of a tile can see, by the ranges of the mask, are not visited: a window takes linear time. Of block
lists only what is listed is computed, see `xla_blocks`.

Where tiles do not divide a length, the last tile moves back to end at the end: what it shares with
the tile before it is masked where it would count twice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.masks import Bound, Tile
from pallas_kernels.tiled import xla_blocks
from pallas_kernels.tiled.inputs import Inputs, Options, as_divisor
from pallas_kernels.tiled.xla_tile import Call, Sums, add_tile, add_to, cut, full, loop, put


def supports(**call: object) -> str | None:
    """Returns None: plain JAX serves every call."""
    del call


def forward(
    options: Options, *inputs: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp, by sums over tiles of keys: online for a softmax."""
    x = Inputs(*inputs)
    if xla_blocks.serves(x):
        return xla_blocks.forward(options, x)
    call = Call.of(options, x)
    query, statistic = call.by_feature(call.x.query), call.statistic()
    batch, kv_heads, group = call.sizes
    queries, width = query.shape[-1], call.x.value.shape[3]

    def row_tile(i: Bound, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        row = call.row(i)
        query_tile = cut(query, -1, row, call.rows)
        log_sum = None
        if statistic is not None:
            log_sum = as_divisor(cut(statistic, -1, row, call.rows))

        def key_tile(j: Bound, sums: Sums) -> Sums:
            column = call.column(j)
            tile = Tile(row, call.rows, column, call.columns)
            own = call.own_keys(tile, j * call.columns)
            key, value = call.key(column), call.value(column)
            return call.attended(sums, query_tile, key, value, log_sum, tile, own)

        sums = loop(call.key_tiles(row), key_tile, call.begin(row))
        out_tile, lse_tile = call.finish(row, sums)
        out = put(out, out_tile, -1, row)
        return out, lse if lse_tile is None else put(lse, lse_tile, -1, row)

    out = full(query, (batch, kv_heads, width, group, queries), 0, query.dtype)
    lse = statistic
    if lse is None:
        lse = full(query, (batch, kv_heads, group, queries), 0, call.dtype)
    out, lse = loop((0, -(-queries // call.rows)), row_tile, (out, lse))
    return call.by_token(out), call.by_head(lse)


def backward(options: Options, names: Sequence[str], *args: Array) -> tuple[Array, ...]:
    """Returns gradients, from the inputs, the results and the cotangents of the results.

    Args:
      options: static part of the call.
      names: of the inputs whose gradients are returned: query, key, value, then any of bias,
        slopes, table, sink and statistic; or value alone.
      *args: the inputs, then output, log-sum-exp, and the cotangents of both.
    """
    *inputs, out, lse, d_out, d_lse = args
    x = Inputs(*inputs)
    if xla_blocks.serves(x, names):
        return xla_blocks.backward(options, names, x, out, lse, d_out, d_lse)
    call = Call.of(options, x)
    x, dtype = call.x, call.dtype
    batch, kv_heads, _ = call.sizes
    rows, d_sink = call.all_rows(out, lse, d_out, d_lse)
    like = x.query

    def key_tile(j: Bound, carry: _Gradients) -> _Gradients:
        column = call.column(j)
        key, value = call.key(column), call.value(column)

        def row_tile(i: Bound, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            sums, d_key, d_value = carry
            row = call.row(i)
            tile = Tile(row, call.rows, column, call.columns)
            own = (
                call.own_keys(tile, j * call.columns),
                call.own_queries(tile, i * call.rows),
            )
            new = call.gradients(rows.cut(row, call.rows), key, value, tile, *own)
            d_value += new.value
            if "query" not in names:
                return sums, d_key, d_value
            d_key += new.key
            sums = sums._replace(query=add_to(sums.query, new.query, -1, row))
            if sums.statistic is not None:
                sums = sums._replace(statistic=add_to(sums.statistic, new.statistic, -1, row))
            if sums.bias is not None:
                sums = sums._replace(bias=add_tile(sums.bias, call.ungrouped(new.scores), tile))
            if sums.slopes is not None:
                d_slopes = call.slopes_gradient(new.scores, tile)
                sums = sums._replace(slopes=sums.slopes + d_slopes)
            if sums.table is not None:
                d_table = call.add_to_table(sums.table, call.ungrouped(new.scores), tile)
                sums = sums._replace(table=d_table)
            return sums, d_key, d_value

        d_key = full(like, (batch, kv_heads, call.columns, x.key.shape[3]), 0, dtype)
        d_value = full(like, (batch, kv_heads, call.columns, x.value.shape[3]), 0, dtype)
        carry, d_key, d_value = loop(call.row_tiles(column), row_tile, (carry, d_key, d_value))
        d_key, d_value = (jnp.swapaxes(y, 1, 2) for y in (d_key, d_value))
        return carry._replace(
            key=add_to(carry.key, d_key.astype(x.key.dtype), 1, column),
            value=add_to(carry.value, d_value.astype(x.value.dtype), 1, column),
        )

    gradients = _Gradients(
        query=full(like, rows.query.shape, 0, dtype),
        key=full(like, x.key.shape, 0, x.key.dtype),
        value=full(like, x.value.shape, 0, x.value.dtype),
        bias=full(like, x.bias.shape, 0, dtype) if "bias" in names else None,
        slopes=full(like, x.slopes.shape, 0, dtype) if "slopes" in names else None,
        table=full(like, x.table.shape, 0, dtype) if "table" in names else None,
        statistic=full(like, rows.lse.shape, 0, dtype) if "statistic" in names else None,
    )
    gradients = loop((0, -(-x.key.shape[1] // call.columns)), key_tile, gradients)
    query = call.by_token(gradients.query).astype(like.dtype)
    results = gradients._replace(query=query)._asdict() | {"sink": d_sink}
    if "statistic" in names:
        results["statistic"] = call.statistic_gradient(gradients.statistic)
    return tuple(results[name] for name in names)


class _Gradients(NamedTuple):
    """What the backward adds up, tile by tile."""

    query: Float[Array, "B K H G T"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Array | None
    slopes: Array | None
    table: Array | None
    statistic: Float[Array, "B K G T"] | None
