"""A tile of scores in plain JAX: what is computed of it, and cutting arrays to tiles.

A tile of scores is [B, K, keys, G, queries], G query heads to a key head: keys before queries,
because then the large operand of no product has to be transposed, which XLA does by copying it. For
the same reason queries are kept as [B, K, H, G, T]; keys and values are cut out of their arrays as
they are.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import masks
from pallas_kernels.masks import Bound, ListedTile, Tile
from pallas_kernels.masks.algebra import minimum
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


class Sums(NamedTuple):
    """Sums of a tile of queries over keys, relative to the exponential of the maximum."""

    maximum: Array | None
    total: Array | None
    out: Array


class Rows(NamedTuple):
    """What the backward needs of queries, all or those of a tile: queries are the last dimension.

    `log_sum` is the logarithm of what the weights are divided by.
    """

    query: Array
    d_out: Array
    lse: Array
    delta: Array
    log_sum: Array | None

    def cut(self, row: Bound, rows: int) -> Rows:
        """Returns those of a tile."""
        return Rows(*(None if x is None else cut(x, -1, row, rows) for x in self))


class TileGradients(NamedTuple):
    """What a tile adds to gradients."""

    query: Array
    key: Array
    value: Array
    scores: Array
    statistic: Array


class Call(NamedTuple):
    """The parts that forward and backward share."""

    options: Options
    x: Inputs
    rows: int
    columns: int
    dtype: Any
    key_range: tuple[Bound, Bound]

    @classmethod
    def of(cls, options: Options, x: Inputs) -> Call:
        """Prepares the parts."""
        queries, keys = x.query.shape[1], x.key.shape[1]
        rows, columns = tile_sizes(options, x)
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

    def all_rows(self, out: Array, lse: Array, d_out: Array, d_lse: Array) -> tuple[Rows, Array]:
        """Returns what the backward needs of all queries, and the gradient of the sink."""
        d_out, lse, delta = of_rows(out, lse, d_out, d_lse)
        d_sink = None if self.x.sink is None else sink_gradient(self.x, lse, delta)
        batch, kv_heads, group = self.sizes
        lse, delta = (
            jnp.moveaxis(y, 1, 2).reshape(batch, kv_heads, group, -1) for y in (lse, delta)
        )
        log_sum = None
        if self.options.reweight is not None:
            log_sum = as_divisor(self.statistic())
        elif self.options.normalise or self.x.statistic is not None:
            log_sum = lse
        query, d_out = self.by_feature(self.x.query), self.by_feature(d_out)
        return Rows(query, d_out, lse, delta, log_sum), d_sink

    def row(self, i: Bound) -> Bound:
        """Returns the first query of a tile."""
        return minimum(i * self.rows, self.x.query.shape[1] - self.rows)

    def column(self, j: Bound) -> Bound:
        """Returns the first key of a tile."""
        return minimum(j * self.columns, self.x.key.shape[1] - self.columns)

    def key_tiles(self, row: Bound) -> tuple[Bound, Bound]:
        """Returns the range of key tiles that some of the queries of a tile see."""
        keys = self.x.key.shape[1]
        bounds = (0, keys) if self.x.mask is None else self.x.mask.key_range(row, self.rows, keys)
        return tile_range(bounds, keys, self.columns)

    def row_tiles(self, column: Bound) -> tuple[Bound, Bound]:
        """Returns the range of query tiles that see some of the keys of a tile."""
        queries, mask = self.x.query.shape[1], self.x.mask
        bounds = (0, queries) if mask is None else mask.query_range(column, self.columns, queries)
        return tile_range(bounds, queries, self.rows)

    def key(self, column: Bound) -> Array:
        """Returns the keys of a tile."""
        return self._tokens(self.x.key, column)

    def value(self, column: Bound) -> Array:
        """Returns the values of a tile."""
        return self._tokens(self.x.value, column)

    def _tokens(self, array: Array, column: Bound) -> Array:
        tile = zero_outside(cut(array, 1, column, self.columns), column, *self.key_range)
        return tile.astype(self.x.query.dtype)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Returns the batch, the number of key heads and of query heads to each."""
        batch, _, heads, _ = self.x.query.shape
        kv_heads = self.x.key.shape[2]
        return batch, kv_heads, heads // kv_heads

    def begin(self, row: Bound) -> Sums:
        """Returns the sums of a tile of queries before the first key."""
        batch, kv_heads, group = self.sizes
        shape = (batch, kv_heads, group, self.rows)
        maximum = full(self.x.query, shape, -jnp.inf, self.dtype) if self.online else None
        total = full(self.x.query, shape, 0, self.dtype) if self.options.normalise else None
        if self.online and self.x.sink is not None:
            # The sink is a key with a value of zero, seen by every query before all others.
            maximum, total = self.sink_logits(row, shape), total + 1
        shape = (batch, kv_heads, self.x.value.shape[3], group, self.rows)
        return Sums(maximum, total, full(self.x.query, shape, 0, self.dtype))

    def attended(
        self,
        sums: Sums,
        query: Array,
        key: Array,
        value: Array,
        log_sum: Array | None,
        tile: Tile | ListedTile,
        *conditions: Array | None,
    ) -> Sums:
        """Returns the sums of a tile of queries with those over a tile of keys, online."""
        maximum, total, out = sums
        scores, _ = self.scores(query, key, tile)
        scores = self.masked(scores, tile, *conditions)
        shares = None
        if self.options.group_size is not None:
            scores, shares = self.by_landmarks(scores)
        if self.options.reweight is not None:
            # It is a softmax of logarithms.
            scores = self.log_reweighted(self.weights(scores, log_sum)[0])
        if maximum is None:
            weights, _ = self.weights(scores, log_sum)
        else:
            new_maximum = jnp.maximum(maximum, scores.max(axis=2))
            finite = jnp.where(jnp.isneginf(new_maximum), 0, new_maximum)
            weights = jnp.exp(scores - finite[:, :, None])
            decay = jnp.exp(maximum - finite)
            maximum, total, out = new_maximum, total * decay, out * decay[:, :, None]
        if shares is not None:
            weights *= shares
        product = self.product("bskv,bksgq->bkvgq", value, weights)
        total = None if total is None else total + weights.sum(axis=2)
        return Sums(maximum, total, out + product)

    def finish(self, row: Bound, sums: Sums) -> tuple[Array, Array | None]:
        """Returns the output of a tile of queries, and its log-sum-exp if it is normalised."""
        maximum, total, out = sums
        if not self.options.normalise:
            return out.astype(self.x.query.dtype), None
        if not self.online and self.x.sink is not None:
            sink = self.sink_logits(row, total.shape)
            maximum = jnp.maximum(sink, 0)
            decay = jnp.exp(-maximum)
            total, out = total * decay + jnp.exp(sink - maximum), out * decay[:, :, None]
        seen = ~(total < jnp.finfo(self.dtype).tiny)  # a NaN stays one
        if self.options.reweight is not None:
            seen &= ~(maximum < self.options.reweight[0] * math.log(LEAST_EXCESS))
        total = jnp.where(seen, total, 1)
        log_total = jnp.log(total) if maximum is None else maximum + jnp.log(total)
        out = jnp.where(seen[:, :, None], out / total[:, :, None], 0)
        return out.astype(self.x.query.dtype), jnp.where(seen, log_total, -jnp.inf)

    def gradients(
        self,
        rows: Rows,
        key: Array,
        value: Array,
        tile: Tile | ListedTile,
        *conditions: Array | None,
    ) -> TileGradients:
        """Returns what a tile adds to the gradients.

        With weights w(S) and P = w / Z, dS = w'(S) / Z (dP - delta), for a softmax P (dP - delta);
        as they are, or where Z is given, with no delta; reweighted, see `reweighted`.
        """
        scores, slope = self.scores(rows.query, key, tile)
        scores = self.masked(scores, tile, *conditions)
        if self.options.group_size is not None:
            scores, shares = self.by_landmarks(scores)
        weights, derivative = self.weights(scores, rows.log_sum)
        if self.options.group_size is not None:
            weights = derivative = weights * shares
        by_statistic = weights  # the derivative by the statistic, but for its sign
        if self.options.reweight is not None:
            weights, by_weights = self.reweighted(weights, rows.lse)
            derivative, by_statistic = derivative * by_weights, by_statistic * by_weights
        d_weights = self.product("bskv,bkvgq->bksgq", value, rows.d_out)
        if self.options.normalise:
            d_weights -= rows.delta[:, :, None]
        d_scores = derivative * d_weights
        if self.options.group_size is not None:
            d_scores = self.before_landmarks(d_scores, shares)
        d_products = d_scores * (self.options.scale * slope)
        return TileGradients(
            query=self.product("bskh,bksgq->bkhgq", key, d_products),
            key=self.product("bksgq,bkhgq->bksh", d_products, rows.query),
            value=self.product("bksgq,bkvgq->bksv", weights, rows.d_out),
            scores=d_scores,
            statistic=-jnp.sum(by_statistic * d_weights, axis=2),
        )

    def slopes_gradient(self, d_scores: Array, tile: Tile | ListedTile) -> Array:
        """Returns what a tile adds to the gradient of the slopes."""
        batch, heads = self.x.query.shape[0], self.x.query.shape[2]
        sums = jnp.sum(d_scores * self.distance(tile), axis=(2, 4)).reshape(batch, heads)
        return -unbroadcast(sums, self.x.slopes.shape)

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        """Multiplies in the precision of the query and sums in at least float32."""
        a, b = (y.astype(self.x.query.dtype) for y in (a, b))
        return jnp.einsum(subscripts, a, b, preferred_element_type=self.dtype)

    def scores(
        self, query: Array, key: Array, tile: Tile | ListedTile
    ) -> tuple[Array, Array | float]:
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
            scores += self.grouped(by_diagonal(entries, tile.rows, tile.columns))
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

    def by_landmarks(self, scores: Array) -> tuple[Array, Array]:
        """Returns for keys of groups the scores of their landmarks, and their shares in groups.

        Args:
          scores: masked, of whole groups.
        """
        shape = scores.shape
        groups = scores.reshape(*shape[:2], -1, self.options.group_size, *shape[3:])
        shared, landmark = groups[:, :, :, :-1], groups[:, :, :, -1:]
        maximum = jnp.max(shared, axis=3, keepdims=True)
        empty = jnp.isneginf(maximum)
        shares = jnp.exp(shared - jnp.where(empty, 0, maximum))
        total = jnp.sum(shares, axis=3, keepdims=True)
        none = ((0, 0),) * 3 + ((0, 1),) + ((0, 0),) * 2
        shares = jnp.pad(shares / jnp.where(empty, 1, total), none)
        landmark = jnp.where(empty, -jnp.inf, landmark)
        return jnp.broadcast_to(landmark, groups.shape).reshape(shape), shares.reshape(shape)

    def before_landmarks(self, d_scores: Array, shares: Array) -> Array:
        """Returns gradients of scores from those of the logarithms of weights in groups."""
        size, shape = self.options.group_size, d_scores.shape
        groups = (*shape[:2], -1, size, *shape[3:])
        d_scores, shares = d_scores.reshape(groups), shares.reshape(groups)
        landmark = jnp.sum(d_scores, axis=3, keepdims=True)
        own = d_scores - shares * landmark
        last = jnp.arange(size)[:, None, None] == size - 1
        return jnp.where(last, landmark, own).reshape(shape)

    def statistic(self) -> Array | None:
        """Returns the row statistic as [B, K, G, T]."""
        if self.x.statistic is None:
            return None
        batch, queries, heads, _ = self.x.query.shape
        kv_heads = self.x.key.shape[2]
        statistic = jnp.broadcast_to(self.x.statistic, (batch, heads, queries)).astype(self.dtype)
        return statistic.reshape(batch, kv_heads, heads // kv_heads, queries)

    def masked(self, scores: Array, tile: Tile | ListedTile, *conditions: Array | None) -> Array:
        """Returns scores with -inf where the mask, or another condition on the tile, says so."""
        if self.x.mask is not None:
            conditions = (self.x.mask.tile(tile), *conditions)
        conditions = [self.grouped(condition) for condition in conditions if condition is not None]
        if not conditions:
            return scores
        return jnp.where(functools.reduce(operator.and_, conditions), scores, -jnp.inf)

    def own_keys(self, tile: Tile, first: Bound) -> Array | None:
        """Returns which keys of a tile are its own; it may share its first with the tile before."""
        return tile.keys >= first if self.x.key.shape[1] % self.columns else None

    def own_queries(self, tile: Tile | ListedTile, first: Bound) -> Array | None:
        """Returns which queries of a tile are its own."""
        return tile.queries >= first if self.x.query.shape[1] % self.rows else None

    def distance(self, tile: Tile | ListedTile) -> Array:
        """Returns the distances between queries and keys, in the layout of scores."""
        offset = jnp.reshape(self.x.offset, (-1, 1, 1, 1))
        distance = jnp.abs(tile.queries + offset - tile.keys)
        return self.grouped(distance.astype(self.dtype))

    def table_entries(self, tile: Tile | ListedTile) -> Array:
        """Returns, for every diagonal of a tile from the lower left on, its place in the table."""
        reach = self.x.table.shape[-1] // 2
        first = tile.column - (tile.row + tile.rows - 1)
        distance = first + jnp.arange(tile.rows + tile.columns - 1) - self.x.offset[:, None]
        return jnp.clip(distance, -reach, reach) + reach

    def add_to_table(self, table: Array, tile_gradient: Array, tile: Tile | ListedTile) -> Array:
        """Returns the gradient of the table with that of the scores of a tile, [B, N, ...]."""
        entries = self.table_entries(tile)
        heads = table.shape[1]
        batch = max(table.shape[0], entries.shape[0])
        sums = sum_diagonals(unbroadcast(tile_gradient, (batch, heads, *tile_gradient.shape[2:])))
        row = jnp.arange(batch)[:, None] % table.shape[0]
        return table.at[row, :, entries].add(jnp.swapaxes(sums, 1, 2))

    def sink_logits(self, row: Bound, shape: Sequence[int]) -> Array:
        """Returns the sinks of a tile of queries in a shape [B, K, G, queries]."""
        sink = self.x.sink.astype(self.dtype)
        if sink.shape[2] > 1:
            sink = cut(sink, 2, row, self.rows)
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

    def by_head(self, array: Array) -> Array:
        """Returns [B, K, G, T] as [B, T, N]."""
        batch, _, _, queries = array.shape
        return jnp.moveaxis(array.reshape(batch, -1, queries), 1, 2)

    def statistic_gradient(self, array: Array) -> Array:
        """Returns the gradient of the statistic from that of each row, [B, K, G, T]."""
        rows = jnp.moveaxis(self.by_head(array), 1, 2)
        return unbroadcast(rows, self.x.statistic.shape)


def tile_sizes(options: Options, x: Inputs) -> tuple[int, int]:
    """Returns the number of queries and keys in a tile, by default about TILE_SCORES scores."""
    batch, queries, heads, _ = x.query.shape
    keys = x.key.shape[1]
    bits = int(math.log2(max(TILE_SCORES // (batch * heads), 1)))
    rows = min(max(2 ** ((bits + 1) // 2), 64), 256)
    # Large tiles take less time, but a mask leaves more of them.
    columns = min(max(2**bits // rows, 64), 1024 if x.mask is None else 512)
    if queries < rows:
        columns = min(columns * (rows // queries), 1024)
    columns = options.tile_k or columns
    if options.group_size is not None:
        columns = max(columns - columns % options.group_size, options.group_size)
    return min(queries, options.tile_q or rows), min(keys, columns)


def loop(bounds: tuple[Bound, Bound], body: Callable[[Bound, Any], Any], carry: Any) -> Any:
    """Is `fori_loop`, without a loop for no or one round."""
    start, stop = bounds
    if isinstance(start, int) and isinstance(stop, int) and stop <= start + 1:
        return body(start, carry) if start < stop else carry
    return jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, carry)


def tile_range(bounds: tuple[Bound, Bound], length: int, size: int) -> tuple[Bound, Bound]:
    """Returns the range of tiles that cover a range of tokens of any batch row."""
    start, stop = bounds
    start = start if isinstance(start, int) else jnp.min(start)
    stop = stop if isinstance(stop, int) else jnp.max(stop)
    if isinstance(start, int) and isinstance(stop, int):
        return max(start, 0) // size, -(-min(stop, length) // size)
    return jnp.maximum(start, 0) // size, -(-jnp.minimum(stop, length) // size)


def full(like: Array, shape: Sequence[int], value: float, dtype: Any) -> Array:
    """Is `jnp.full`, varying over the same axes of a shard_map as `like`."""
    return jnp.full_like(like, value, shape=tuple(shape), dtype=dtype)


def cut(array: Array, axis: int, start: Bound, size: int) -> Array:
    """Returns `size` elements of an axis from `start` on."""
    if size == array.shape[axis]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def put(array: Array, tile: Array, axis: int, start: Bound) -> Array:
    """Returns the array with a tile in it."""
    if tile.shape[axis] == array.shape[axis]:
        return tile
    return jax.lax.dynamic_update_slice_in_dim(array, tile, start, axis)


def add_to(array: Array, tile: Array, axis: int, start: Bound) -> Array:
    """Returns the array with a tile added to it."""
    return put(array, cut(array, axis, start, tile.shape[axis]) + tile, axis, start)


def add_tile(array: Array, tile: Array, at: Tile) -> Array:
    """Adds a tile of [B, N, T, S] to an array that broadcasts to it."""
    row = at.row if array.shape[2] > 1 else 0
    column = at.column if array.shape[3] > 1 else 0
    sizes = [min(a, b) for a, b in zip(array.shape, tile.shape, strict=True)]
    start = [jnp.int32(i) for i in (0, 0, row, column)]
    part = jax.lax.dynamic_slice(array, start, sizes) + unbroadcast(tile, sizes)
    return jax.lax.dynamic_update_slice(array, part, start)


def by_diagonal(values: Array, rows: int, columns: int) -> Array:
    """Returns [..., rows, columns] with one value, of [..., rows + columns - 1], a diagonal.

    Element (i, j) is values[j - i + rows - 1]. Rows of the values and one more number, end to end,
    cut into rows without the one, are each shifted by one against the row before: no gather.
    """
    *lead, length = values.shape
    values = jnp.pad(values, (*((0, 0) for _ in lead), (0, 1)))
    values = jnp.broadcast_to(values[..., None, :], (*lead, rows, length + 1))
    values = values.reshape(*lead, -1)[..., : rows * length].reshape(*lead, rows, length)
    return values[..., rows - 1 :]


def sum_diagonals(array: Array) -> Array:
    """Returns the sums over the diagonals of [..., rows, columns]: transposes `by_diagonal`."""
    *lead, rows, columns = array.shape
    length = rows + columns - 1
    none = ((0, 0),) * len(lead)
    array = jnp.pad(array, (*none, (0, 0), (rows - 1, 0))).reshape(*lead, rows * length)
    array = jnp.pad(array, (*none, (0, rows))).reshape(*lead, rows, length + 1)
    return array.sum(axis=-2)[..., :length]
