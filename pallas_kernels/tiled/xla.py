"""Tiled attention in plain JAX: loops over tiles of queries and keys, on any platform.

No more of the scores exists at a time than one tile of them, so memory is O(T + S), forward and
backward; of the forward only the output and the log-sum-exp are kept. Tiles of keys that no query
of a tile can see, by the ranges of the mask, are not visited: a window takes linear time.

A tile of scores is [B, K, keys, G, queries], G query heads to a key head: keys before queries,
because then the large operand of no product has to be transposed, which XLA does by copying it. For
the same reason queries are kept as [B, K, H, G, T]; keys and values are cut out of their arrays as
they are. Where tiles do not divide a length, the last tile moves back to end at the end: what it
shares with the tile before it is masked where it would count twice.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import masks
from pallas_kernels.masks import Bound, Tile
from pallas_kernels.tiled.inputs import (
    LEAST_EXCESS,
    WEIGHTS,
    Inputs,
    Options,
    as_divisor,
    of_rows,
    sink_gradient,
    unbroadcast,
    zero_outside,
)

TILE_SCORES = 2**21
"""Scores in a tile, over batch and heads. On CPU, more of them leave its caches."""

DERIVATIVES = {
    "sigmoid": lambda scores, weights: weights * (1 - weights),
    "softplus": lambda scores, weights: jax.nn.sigmoid(scores),
    "relu": lambda scores, weights: (scores > 0).astype(weights.dtype),
}
"""Derivatives of the weights by the scores; softmax has its own way."""


def supports(**call: object) -> str | None:
    """Returns None: plain JAX serves every call."""
    del call


def forward(
    options: Options, *inputs: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp, by sums over tiles of keys: online for a softmax."""
    call = _Call.of(options, Inputs(*inputs))
    x, dtype = call.x, call.dtype
    batch, queries, heads, _ = x.query.shape
    kv_heads, width = x.value.shape[2:]
    group = heads // kv_heads
    query, statistic = call.by_feature(x.query), call.statistic()

    def row_tile(i: Bound, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        row = call.row(i)
        query_tile = _cut(query, -1, row, call.rows)
        log_sum = None
        if statistic is not None:
            log_sum = as_divisor(_cut(statistic, -1, row, call.rows))

        def key_tile(j: Bound, carry: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
            maximum, total, sums = carry
            column = call.column(j)
            tile = Tile(row, call.rows, column, call.columns)
            scores, _ = call.scores(query_tile, call.key(column), tile)
            scores = call.masked(scores, tile, j * call.columns)
            if options.reweight is not None:
                # It is a softmax of logarithms.
                scores = call.log_reweighted(call.weights(scores, log_sum)[0])
            if maximum is None:
                weights, _ = call.weights(scores, log_sum)
            else:
                new_maximum = jnp.maximum(maximum, scores.max(axis=2))
                finite = jnp.where(jnp.isneginf(new_maximum), 0, new_maximum)
                weights = jnp.exp(scores - finite[:, :, None])
                decay = jnp.exp(maximum - finite)
                maximum, total, sums = new_maximum, total * decay, sums * decay[:, :, None]
            product = call.product("bskv,bksgq->bkvgq", call.value(column), weights)
            total = None if total is None else total + weights.sum(axis=2)
            return maximum, total, sums + product

        shape = (batch, kv_heads, group, call.rows)
        maximum = _full(x.query, shape, -jnp.inf, dtype) if call.online else None
        total = _full(x.query, shape, 0, dtype) if options.normalise else None
        if call.online and x.sink is not None:
            # The sink is a key with a value of zero, seen by every query before all others.
            maximum, total = call.sink_logits(row, shape), total + 1
        sums = _full(x.query, (batch, kv_heads, width, group, call.rows), 0, dtype)
        maximum, total, sums = _loop(call.key_tiles(row), key_tile, (maximum, total, sums))
        if not options.normalise:
            return _put(out, sums.astype(out.dtype), -1, row), lse
        if not call.online and x.sink is not None:
            sink = call.sink_logits(row, shape)
            maximum = jnp.maximum(sink, 0)
            decay = jnp.exp(-maximum)
            total, sums = total * decay + jnp.exp(sink - maximum), sums * decay[:, :, None]
        seen = ~(total < jnp.finfo(dtype).tiny)  # a NaN stays one
        if options.reweight is not None:
            seen &= ~(maximum < options.reweight[0] * math.log(LEAST_EXCESS))
        total = jnp.where(seen, total, 1)
        log_total = jnp.log(total) if maximum is None else maximum + jnp.log(total)
        out_tile = jnp.where(seen[:, :, None], sums / total[:, :, None], 0)
        lse_tile = jnp.where(seen, log_total, -jnp.inf)
        return _put(out, out_tile.astype(out.dtype), -1, row), _put(lse, lse_tile, -1, row)

    out = _full(x.query, (batch, kv_heads, width, group, queries), 0, x.query.dtype)
    lse = statistic
    if lse is None:
        lse = _full(x.query, (batch, kv_heads, group, queries), 0, dtype)
    out, lse = _loop((0, -(-queries // call.rows)), row_tile, (out, lse))
    return call.by_token(out), jnp.moveaxis(lse.reshape(batch, heads, queries), 1, 2)


def backward(options: Options, names: Sequence[str], *args: Array) -> tuple[Array, ...]:
    """Returns gradients, from the inputs, the results and the cotangents of the results.

    Args:
      options: static part of the call.
      names: of the inputs whose gradients are returned: query, key, value, then any of bias,
        slopes, table, sink and statistic; or value alone.
      *args: the inputs, then output, log-sum-exp, and the cotangents of both.
    """
    *inputs, out, lse, d_out, d_lse = args
    call = _Call.of(options, Inputs(*inputs))
    x, dtype = call.x, call.dtype
    batch, queries, heads, features = x.query.shape
    keys, kv_heads, width = x.value.shape[1:]
    group = heads // kv_heads

    # With weights w(S) and P = w / Z, dS = w'(S) / Z (dP - delta), for a softmax P (dP - delta);
    # as they are, or where Z is given, with no delta; reweighted, see `_Call.reweighted`.
    d_out, lse, delta = of_rows(out, lse, d_out, d_lse)
    d_sink = sink_gradient(x, lse, delta) if "sink" in names else None
    query, d_out = call.by_feature(x.query), call.by_feature(d_out)
    lse, delta = (
        jnp.moveaxis(y, 1, 2).reshape(batch, kv_heads, group, queries) for y in (lse, delta)
    )
    log_sum = lse if options.normalise or x.statistic is not None else None
    if options.reweight is not None:
        log_sum = as_divisor(call.statistic())

    def key_tile(j: Bound, carry: _Gradients) -> _Gradients:
        column = call.column(j)
        key, value = call.key(column), call.value(column)

        def row_tile(i: Bound, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            gradients, d_key, d_value = carry
            row = call.row(i)
            tile = Tile(row, call.rows, column, call.columns)
            query_tile, d_out_tile, lse_tile, delta_tile, log_sum_tile = (
                None if y is None else _cut(y, -1, row, call.rows)
                for y in (query, d_out, lse, delta, log_sum)
            )
            scores, slope = call.scores(query_tile, key, tile)
            scores = call.masked(scores, tile, j * call.columns, i * call.rows)
            weights, derivative = call.weights(scores, log_sum_tile)
            by_statistic = weights  # the derivative by the statistic, but for its sign
            if options.reweight is not None:
                weights, by_weights = call.reweighted(weights, lse_tile)
                derivative, by_statistic = derivative * by_weights, by_statistic * by_weights
            d_value += call.product("bksgq,bkvgq->bksv", weights, d_out_tile)
            if "query" not in names:
                return gradients, d_key, d_value
            d_weights = call.product("bskv,bkvgq->bksgq", value, d_out_tile)
            if options.normalise:
                d_weights -= delta_tile[:, :, None]
            d_scores = derivative * d_weights
            d_bias, d_slopes, d_table = gradients.bias, gradients.slopes, gradients.table
            d_statistic = gradients.statistic
            if d_statistic is not None:
                row_sums = -jnp.sum(by_statistic * d_weights, axis=2)
                d_statistic = _add(d_statistic, row_sums, -1, row)
            if d_bias is not None:
                d_bias = _add_tile(d_bias, call.ungrouped(d_scores), tile)
            if d_slopes is not None:
                d_slopes -= unbroadcast(
                    jnp.sum(d_scores * call.distance(tile), axis=(2, 4)).reshape(batch, heads),
                    d_slopes.shape,
                )
            if d_table is not None:
                d_table = call.add_to_table(d_table, call.ungrouped(d_scores), tile)
            d_products = d_scores * (options.scale * slope)
            d_key += call.product("bksgq,bkhgq->bksh", d_products, query_tile)
            d_query = call.product("bskh,bksgq->bkhgq", key, d_products)
            d_query = _add(gradients.query, d_query, -1, row)
            gradients = gradients._replace(
                query=d_query, bias=d_bias, slopes=d_slopes, table=d_table, statistic=d_statistic
            )
            return gradients, d_key, d_value

        d_key = _full(x.query, (batch, kv_heads, call.columns, features), 0, dtype)
        d_value = _full(x.query, (batch, kv_heads, call.columns, width), 0, dtype)
        carry, d_key, d_value = _loop(call.row_tiles(column), row_tile, (carry, d_key, d_value))
        d_key, d_value = (jnp.swapaxes(y, 1, 2) for y in (d_key, d_value))
        return carry._replace(
            key=_add(carry.key, d_key.astype(x.key.dtype), 1, column),
            value=_add(carry.value, d_value.astype(x.value.dtype), 1, column),
        )

    gradients = _Gradients(
        query=_full(x.query, query.shape, 0, dtype),
        key=_full(x.query, x.key.shape, 0, x.key.dtype),
        value=_full(x.query, x.value.shape, 0, x.value.dtype),
        bias=_full(x.query, x.bias.shape, 0, dtype) if "bias" in names else None,
        slopes=_full(x.query, x.slopes.shape, 0, dtype) if "slopes" in names else None,
        table=_full(x.query, x.table.shape, 0, dtype) if "table" in names else None,
        statistic=_full(x.query, lse.shape, 0, dtype) if "statistic" in names else None,
    )
    gradients = _loop((0, -(-keys // call.columns)), key_tile, gradients)
    query = call.by_token(gradients.query).astype(x.query.dtype)
    results = gradients._replace(query=query)._asdict() | {"sink": d_sink}
    if "statistic" in names:
        d_statistic = gradients.statistic.reshape(batch, heads, queries)
        results["statistic"] = unbroadcast(d_statistic, x.statistic.shape)
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


class _Call(NamedTuple):
    """The parts that forward and backward share."""

    options: Options
    x: Inputs
    rows: int
    columns: int
    dtype: Any
    key_range: tuple[Bound, Bound]

    @classmethod
    def of(cls, options: Options, x: Inputs) -> "_Call":
        queries, keys = x.query.shape[1], x.key.shape[1]
        rows, columns = _tile_sizes(options, x)
        key_range = (0, keys)
        if x.mask is not None:
            x = x._replace(mask=x.mask.prepared(queries, keys))
            key_range = x.mask.key_range(0, queries, keys)
            query = zero_outside(x.query, 0, *x.mask.query_range(0, keys, queries))
            x = x._replace(query=query)
        dtype = jnp.promote_types(x.query.dtype, jnp.float32)
        return cls(options, x, rows, columns, dtype, key_range)

    @property
    def online(self) -> bool:
        """Whether weights are relative to the maximum of the row so far."""
        if self.options.reweight is not None or not self.options.normalise:
            return self.options.normalise
        # Products are in the precision of the query, and the bound is one for float32 and bfloat16.
        bounded = self.options.bounded and self.x.query.dtype != jnp.float16
        return self.options.weights == "softmax" and not bounded

    def row(self, i: Bound) -> Bound:
        return _minimum(i * self.rows, self.x.query.shape[1] - self.rows)

    def column(self, j: Bound) -> Bound:
        return _minimum(j * self.columns, self.x.key.shape[1] - self.columns)

    def key_tiles(self, row: Bound) -> tuple[Bound, Bound]:
        """Returns the range of key tiles that some of the queries of a tile see."""
        keys = self.x.key.shape[1]
        bounds = (0, keys) if self.x.mask is None else self.x.mask.key_range(row, self.rows, keys)
        return _tiles(bounds, keys, self.columns)

    def row_tiles(self, column: Bound) -> tuple[Bound, Bound]:
        """Returns the range of query tiles that see some of the keys of a tile."""
        queries, mask = self.x.query.shape[1], self.x.mask
        bounds = (0, queries) if mask is None else mask.query_range(column, self.columns, queries)
        return _tiles(bounds, queries, self.rows)

    def key(self, column: Bound) -> Array:
        return self._tokens(self.x.key, column)

    def value(self, column: Bound) -> Array:
        return self._tokens(self.x.value, column)

    def _tokens(self, array: Array, column: Bound) -> Array:
        tile = zero_outside(_cut(array, 1, column, self.columns), column, *self.key_range)
        return tile.astype(self.x.query.dtype)

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        """Multiplies in the precision of the query and sums in at least float32."""
        a, b = (y.astype(self.x.query.dtype) for y in (a, b))
        return jnp.einsum(subscripts, a, b, preferred_element_type=self.dtype)

    def scores(self, query: Array, key: Array, tile: Tile) -> tuple[Array, Array | float]:
        """Returns the scores of a tile before masking, and the derivative of the soft cap."""
        scores = self.options.scale * self.product("bskh,bkhgq->bksgq", key, query)
        slope, cap = 1.0, self.options.logits_soft_cap
        if cap is not None:
            bounded = jnp.tanh(scores / cap)
            scores, slope = cap * bounded, 1 - bounded**2
        if self.x.bias is not None:
            scores += self.grouped(masks.sliced_tile(self.x.bias, tile))
        if self.x.slopes is not None:
            slopes = self.x.slopes[:, :, None, None].astype(self.dtype)
            scores -= self.grouped(slopes) * self.distance(tile)
        if self.x.table is not None:
            entries = self.table_entries(tile)[:, None]
            entries = jnp.take_along_axis(self.x.table, entries, axis=-1).astype(self.dtype)
            scores += self.grouped(_by_diagonal(entries, tile.rows, tile.columns))
        if self.options.logit_bias:
            scores += self.options.logit_bias
        return scores, slope

    def weights(self, scores: Array, log_sum: Array | None) -> tuple[Array, Array]:
        """Returns the weights of a tile and their derivatives by the scores at fixed row sums.

        Args:
          scores: masked.
          log_sum: logarithms of the row sums that the weights are divided by; None for sums of 1.
        """
        if self.options.weights == "softmax":
            weights = jnp.exp(scores if log_sum is None else scores - log_sum[:, :, None])
            return weights, weights
        weights = WEIGHTS[self.options.weights](scores)
        derivative = DERIVATIVES[self.options.weights](scores, weights)
        if log_sum is None:
            return weights, derivative
        inverse = jnp.exp(-log_sum)[:, :, None]
        return weights * inverse, derivative * inverse

    def log_reweighted(self, weights: Array) -> Array:
        """Returns the logarithms of reweighted weights, before their normalisation."""
        power, offset = self.options.reweight
        return power * jnp.log(jnp.maximum(weights - offset, 0))

    def reweighted(self, weights: Array, lse: Array) -> tuple[Array, Array]:
        """Returns reweighted weights and their derivatives by the weights at fixed row sums.

        With r = max(w - o, 0)^p and P = r / Z, dP/dw = p P / (w - o), 0 where r is.
        """
        power, offset = self.options.reweight
        results = jnp.exp(self.log_reweighted(weights) - lse[:, :, None])
        excess = jnp.maximum(weights - offset, jnp.finfo(self.dtype).tiny)
        return results, power * (results / excess)

    def statistic(self) -> Array | None:
        """Returns the row statistic as [B, K, G, T]."""
        if self.x.statistic is None:
            return None
        batch, queries, heads, _ = self.x.query.shape
        kv_heads = self.x.key.shape[2]
        statistic = jnp.broadcast_to(self.x.statistic, (batch, heads, queries)).astype(self.dtype)
        return statistic.reshape(batch, kv_heads, heads // kv_heads, queries)

    def masked(
        self, scores: Array, tile: Tile, first_key: Bound, first_query: Bound | None = None
    ) -> Array:
        """Returns scores with -inf where the mask says so, and before the tile's first tokens.

        These are tokens that a last tile, moved back, shares with the tile before it. Queries may
        be computed twice, if nothing is summed over them: then there is no `first_query`.
        """
        conditions = []
        if self.x.mask is not None:
            conditions.append(self.x.mask.tile(tile))
        if self.x.key.shape[1] % self.columns:
            conditions.append(tile.keys >= first_key)
        if self.x.query.shape[1] % self.rows and first_query is not None:
            conditions.append(tile.queries >= first_query)
        if not conditions:
            return scores
        allowed = functools.reduce(operator.and_, map(self.grouped, conditions))
        return jnp.where(allowed, scores, -jnp.inf)

    def distance(self, tile: Tile) -> Array:
        """Returns the distances between queries and keys, in the layout of scores."""
        offset = jnp.reshape(self.x.offset, (-1, 1, 1, 1))
        distance = jnp.abs(tile.queries + offset - tile.keys)
        return self.grouped(distance.astype(self.dtype))

    def table_entries(self, tile: Tile) -> Array:
        """Returns, for every diagonal of a tile from the lower left on, its place in the table."""
        reach = self.x.table.shape[-1] // 2
        first = tile.column - (tile.row + tile.rows - 1)
        distance = first + jnp.arange(tile.rows + tile.columns - 1) - self.x.offset[:, None]
        return jnp.clip(distance, -reach, reach) + reach

    def add_to_table(self, table: Array, tile_gradient: Array, tile: Tile) -> Array:
        """Returns the gradient of the table with that of the scores of a tile, [B, N, ...]."""
        entries = self.table_entries(tile)
        heads = table.shape[1]
        batch = max(table.shape[0], entries.shape[0])
        sums = _sum_diagonals(unbroadcast(tile_gradient, (batch, heads, *tile_gradient.shape[2:])))
        row = jnp.arange(batch)[:, None] % table.shape[0]
        return table.at[row, :, entries].add(jnp.swapaxes(sums, 1, 2))

    def sink_logits(self, row: Bound, shape: Sequence[int]) -> Array:
        """Returns the sinks of a tile of queries in a shape [B, K, G, queries]."""
        sink = self.x.sink.astype(self.dtype)
        if sink.shape[2] > 1:
            sink = _cut(sink, 2, row, self.rows)
        return jnp.broadcast_to(sink.reshape(-1, *shape[1:3], sink.shape[2]), shape)

    def grouped(self, tile: Array) -> Array:
        """Returns a tile [B, heads, queries, keys] in the layout of scores."""
        batch, heads, rows, columns = tile.shape
        kv_heads = min(heads, self.x.key.shape[2])
        tile = tile.reshape(batch, kv_heads, heads // kv_heads, rows, columns)
        return jnp.moveaxis(tile, 4, 2)

    def ungrouped(self, tile: Array) -> Array:
        """Returns a tile in the layout of scores as [B, N, queries, keys]."""
        batch, kv_heads, columns, group, rows = tile.shape
        return jnp.moveaxis(tile, 2, 4).reshape(batch, kv_heads * group, rows, columns)

    def by_feature(self, array: Array) -> Array:
        """Returns [B, T, N, H] as [B, K, H, G, T]."""
        batch, queries, heads, features = array.shape
        kv_heads = self.x.key.shape[2]
        array = array.reshape(batch, queries, kv_heads, heads // kv_heads, features)
        return jnp.transpose(array, (0, 2, 4, 3, 1))

    def by_token(self, array: Array) -> Array:
        """Returns [B, K, H, G, T] as [B, T, N, H]."""
        batch, kv_heads, features, group, queries = array.shape
        array = jnp.transpose(array, (0, 4, 1, 3, 2))
        return array.reshape(batch, queries, kv_heads * group, features)


def _tile_sizes(options: Options, x: Inputs) -> tuple[int, int]:
    """Returns the number of queries and keys in a tile, by default about TILE_SCORES scores."""
    batch, queries, heads, _ = x.query.shape
    keys = x.key.shape[1]
    bits = int(math.log2(max(TILE_SCORES // (batch * heads), 1)))
    rows = min(max(2 ** ((bits + 1) // 2), 64), 256)
    # Large tiles take less time, but a mask leaves more of them.
    columns = min(max(2**bits // rows, 64), 1024 if x.mask is None else 512)
    if queries < rows:
        columns = min(columns * (rows // queries), 1024)
    return min(queries, options.tile_q or rows), min(keys, options.tile_k or columns)


def _loop(bounds: tuple[Bound, Bound], body: Callable[[Bound, Any], Any], carry: Any) -> Any:
    """Is `fori_loop`, without a loop for no or one round."""
    start, stop = bounds
    if isinstance(start, int) and isinstance(stop, int) and stop <= start + 1:
        return body(start, carry) if start < stop else carry
    return jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, carry)


def _tiles(bounds: tuple[Bound, Bound], length: int, size: int) -> tuple[Bound, Bound]:
    """Returns the range of tiles that cover a range of tokens of any batch row."""
    start, stop = bounds
    start = start if isinstance(start, int) else jnp.min(start)
    stop = stop if isinstance(stop, int) else jnp.max(stop)
    if isinstance(start, int) and isinstance(stop, int):
        return max(start, 0) // size, -(-min(stop, length) // size)
    return jnp.maximum(start, 0) // size, -(-jnp.minimum(stop, length) // size)


def _minimum(a: Bound, b: int) -> Bound:
    return min(a, b) if isinstance(a, int) else jnp.minimum(a, b)


def _full(like: Array, shape: Sequence[int], value: float, dtype: Any) -> Array:
    """Is `jnp.full`, varying over the same axes of a shard_map as `like`."""
    return jnp.full_like(like, value, shape=tuple(shape), dtype=dtype)


def _cut(array: Array, axis: int, start: Bound, size: int) -> Array:
    if size == array.shape[axis]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _put(array: Array, tile: Array, axis: int, start: Bound) -> Array:
    if tile.shape[axis] == array.shape[axis]:
        return tile
    return jax.lax.dynamic_update_slice_in_dim(array, tile, start, axis)


def _add(array: Array, tile: Array, axis: int, start: Bound) -> Array:
    return _put(array, _cut(array, axis, start, tile.shape[axis]) + tile, axis, start)


def _add_tile(array: Array, tile: Array, at: Tile) -> Array:
    """Adds a tile of [B, N, T, S] to an array that broadcasts to it."""
    row = at.row if array.shape[2] > 1 else 0
    column = at.column if array.shape[3] > 1 else 0
    sizes = [min(a, b) for a, b in zip(array.shape, tile.shape, strict=True)]
    start = [jnp.int32(i) for i in (0, 0, row, column)]
    part = jax.lax.dynamic_slice(array, start, sizes) + unbroadcast(tile, sizes)
    return jax.lax.dynamic_update_slice(array, part, start)


def _by_diagonal(values: Array, rows: int, columns: int) -> Array:
    """Returns [..., rows, columns] with one value, of [..., rows + columns - 1], a diagonal.

    Element (i, j) is values[j - i + rows - 1]. Rows of the values and one more number, end to end,
    cut into rows without the one, are each shifted by one against the row before: no gather.
    """
    *lead, length = values.shape
    values = jnp.pad(values, (*((0, 0) for _ in lead), (0, 1)))
    values = jnp.broadcast_to(values[..., None, :], (*lead, rows, length + 1))
    values = values.reshape(*lead, -1)[..., : rows * length].reshape(*lead, rows, length)
    return values[..., rows - 1 :]


def _sum_diagonals(array: Array) -> Array:
    """Returns the sums over the diagonals of [..., rows, columns]: transposes `_by_diagonal`."""
    *lead, rows, columns = array.shape
    length = rows + columns - 1
    none = ((0, 0),) * len(lead)
    array = jnp.pad(array, (*none, (0, 0), (rows - 1, 0))).reshape(*lead, rows * length)
    array = jnp.pad(array, (*none, (0, rows))).reshape(*lead, rows, length + 1)
    return array.sum(axis=-2)[..., :length]
