"""Attention to listed blocks of keys in plain JAX: what is not listed is not computed.

The rows of a list, blocks of queries, are taken several at a time, so that their tiles together are
as many scores as suits a processor. They go through their lists in step, some blocks of keys at a
time, up to the longest list among them: the blocks are gathered, and in the backward their
gradients are added where they came from. Time is that of the longest lists, memory O(T + S).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import masks
from pallas_kernels.masks import ListedTile
from pallas_kernels.tiled.inputs import Inputs, Options, as_divisor, zero_outside
from pallas_kernels.tiled.xla_tile import TILE_SCORES, Call, Sums, cut, full, loop

ROWS = 256
"""Queries of the blocks that longer ones are cut into."""

COLUMNS = 512
"""Keys that are gathered at a time for a row of a list; longer blocks are cut."""


def serves(x: Inputs, gradients: Sequence[str] = ()) -> bool:
    """Whether a call has block lists, and no terms or gradients that are laid out by diagonals."""
    lists = x.mask is not None and any(isinstance(m, masks.Blocks) for m in masks.parts(x.mask))
    return lists and x.table is None and "bias" not in gradients


def forward(options: Options, x: Inputs) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp."""
    lists = _Lists.of(options, x)
    call = lists.call
    query, statistic = call.by_feature(call.x.query), call.statistic()

    def some_rows(first: Array) -> tuple[Array, Array | None]:
        numbers, indices, counts = lists.some_rows(first)
        starts = lists.starts(numbers)

        def step(j: Array, sums: Sums) -> Sums:
            def one(start: Array, blocks: Array, listed: Array, sums: Sums) -> Sums:
                log_sum = None
                if statistic is not None:
                    log_sum = as_divisor(cut(statistic, -1, start, call.rows))
                query_tile = cut(query, -1, start, call.rows)
                tile, seen = lists.tile(start, blocks, listed)
                key, value = lists.gathered(blocks, seen)
                return call.attended(sums, query_tile, key, value, log_sum, tile, seen)

            return jax.vmap(one)(starts, *lists.part(indices, counts, j), sums)

        sums = loop((0, lists.steps(counts)), step, jax.vmap(call.begin)(starts))
        return jax.vmap(call.finish)(starts, sums)

    out, lse = jax.lax.map(some_rows, lists.first_rows)
    lse = statistic if lse is None else lists.together(lse)
    if lse is None:
        lse = full(query, (*call.sizes, query.shape[-1]), 0, call.dtype)
    return call.by_token(lists.together(out)), call.by_head(lse)


def backward(
    options: Options, names: Sequence[str], x: Inputs, *results: Array
) -> tuple[Array, ...]:
    """Returns gradients, as `xla.backward`."""
    lists = _Lists.of(options, x)
    call = lists.call
    rows, d_sink = call.all_rows(*results)

    def some_rows(carry: tuple, first: Array) -> tuple[tuple, tuple]:
        numbers, indices, counts = lists.some_rows(first)
        starts = lists.starts(numbers)

        def step(j: Array, carry: tuple) -> tuple:
            d_key, d_value, d_slopes, d_query, d_statistic = carry

            def one(number: Array, start: Array, blocks: Array, listed: Array) -> tuple:
                tile, seen = lists.tile(start, blocks, listed)
                own = call.own_queries(tile, number * lists.block_q)
                key, value = lists.gathered(blocks, seen)
                tile_rows = rows.cut(start, call.rows)
                new = call.gradients(tile_rows, key, value, tile, seen, own)
                slopes = None if d_slopes is None else call.slopes_gradient(new.scores, tile)
                return new._replace(scores=None), slopes

            blocks, listed = lists.part(indices, counts, j)
            new, slopes = jax.vmap(one)(numbers, starts, blocks, listed)
            d_value = lists.added(d_value, new.value, blocks)
            if "query" in names:
                d_key = lists.added(d_key, new.key, blocks)
                d_query += new.query
            if d_slopes is not None:
                d_slopes += slopes.sum(axis=0)
            if d_statistic is not None:
                d_statistic += new.statistic
            return d_key, d_value, d_slopes, d_query, d_statistic

        def zeros(array: Array) -> Array:
            shape = (len(numbers), *array.shape[:-1], call.rows)
            return full(array, shape, 0, call.dtype)

        d_statistic = zeros(rows.lse) if "statistic" in names else None
        begin = *carry, zeros(rows.query), d_statistic
        *carry, d_query, d_statistic = loop((0, lists.steps(counts)), step, begin)
        return tuple(carry), (d_query, d_statistic)

    d_slopes = full(x.query, x.slopes.shape, 0, call.dtype) if "slopes" in names else None
    begin = *(jnp.zeros_like(y, call.dtype) for y in (lists.key, lists.value)), d_slopes
    carry, (d_query, d_statistic) = jax.lax.scan(some_rows, begin, lists.first_rows)
    d_key, d_value, d_slopes = carry
    found = {
        "query": call.by_token(lists.together(d_query)).astype(x.query.dtype),
        "key": lists.tokens(d_key, x.key),
        "value": lists.tokens(d_value, x.value),
        "slopes": d_slopes,
        "sink": d_sink,
    }
    if "statistic" in names:
        found["statistic"] = call.statistic_gradient(lists.together(d_statistic))
    return tuple(found[name] for name in names)


class _Lists(NamedTuple):
    """Block lists, and keys and values in blocks.

    Keys and values are [B, blocks, tokens, K, H], or where lists are of heads [B, K, blocks,
    tokens, H]. Rows of a list are numbered; a tile has the queries of one.
    """

    call: Call
    key: Array
    value: Array
    indices: Int[Array, "B|1 K|1 Q L"]
    counts: Int[Array, "B|1 K|1 Q"]
    block_q: int
    block_k: int
    at_once: int
    """Blocks of keys in a step."""
    first_rows: Int[Array, "Q/R"]
    some: int
    """R, number of rows that go through their lists together."""

    @classmethod
    def of(cls, options: Options, x: Inputs) -> "_Lists":
        batch, queries, heads, _ = x.query.shape
        keys, kv_heads = x.key.shape[1:3]
        parts = list(masks.parts(x.mask))
        lists = next(mask for mask in parts if isinstance(mask, masks.Blocks))
        parts.remove(lists)
        lists = _shorter(lists, queries, options.group_size or 1)
        if lists.indices.shape[1] == heads > kv_heads:
            # Query heads of one key head read different keys.
            key, value = (jnp.repeat(y, heads // kv_heads, axis=2) for y in (x.key, x.value))
            x = x._replace(key=key, value=value)
        call = Call.of(options, x._replace(mask=masks.all_of(parts)))
        block_q, block_k = lists.block_q, lists.block_k
        longest = lists.indices.shape[-1]
        at_once = max(min(COLUMNS // block_k, longest), 1)
        call = call._replace(rows=min(block_q, queries), columns=at_once * block_k)
        rows = -(-queries // block_q)
        some = TILE_SCORES // (batch * heads * call.rows * call.columns)
        some = min(max(some, 1), rows)
        blocks = -(-keys // block_k)
        indices = jnp.pad(lists.indices, ((0, 0),) * 3 + ((0, -longest % at_once),))

        def in_blocks(array: Array) -> Array:
            array = zero_outside(array, 0, *call.key_range).astype(call.x.query.dtype)
            array = jnp.pad(array, ((0, 0), (0, blocks * block_k - keys), (0, 0), (0, 0)))
            array = array.reshape(batch, blocks, block_k, *array.shape[2:])
            return array if indices.shape[1] == 1 else jnp.moveaxis(array, 3, 1)

        return cls(
            call,
            in_blocks(x.key),
            in_blocks(x.value),
            indices,
            lists.counts,
            block_q,
            block_k,
            at_once,
            jnp.arange(0, rows, some),
            some,
        )

    def some_rows(self, first: Array) -> tuple[Array, Array, Array]:
        """Returns numbers of rows from one on, [R], their lists and counts, [R, B|1, K|1, ...]."""
        numbers = first + jnp.arange(self.some)
        exists = numbers < self.counts.shape[2]
        numbers = jnp.minimum(numbers, self.counts.shape[2] - 1)
        indices, counts = (
            jnp.moveaxis(jnp.take(x, numbers, axis=2), 2, 0) for x in (self.indices, self.counts)
        )
        return numbers, indices, jnp.where(exists[:, None, None], counts, 0)

    def starts(self, numbers: Array) -> Array:
        """Returns the first query of the tile of each row: the last tile ends with the queries."""
        last = self.call.x.query.shape[1] - self.call.rows
        return jnp.minimum(numbers * self.block_q, last)

    def steps(self, counts: Array) -> Array:
        """Returns in how many steps rows have gone through their lists."""
        return -(-jnp.max(counts) // self.at_once)

    def part(self, indices: Array, counts: Array, j: Array) -> tuple[Array, Bool[Array, "..."]]:
        """Returns the blocks of a step for each row, and which of them are listed."""
        blocks = cut(indices, -1, j * self.at_once, self.at_once)
        return blocks, j * self.at_once + jnp.arange(self.at_once) < counts[..., None]

    def tile(self, start: Array, blocks: Array, listed: Array) -> tuple[ListedTile, Array]:
        """Returns the tile of a row in a step, and which of its keys are listed and exist."""
        keys = self.call.x.key.shape[1]
        index = blocks[..., None] * self.block_k + jnp.arange(self.block_k)
        seen = listed[..., None] & (index < keys)
        index = jnp.clip(index, 0, keys - 1)
        index, seen = (x.reshape(*x.shape[:2], -1) for x in (index, seen))
        return ListedTile(start, self.call.rows, index), seen[:, :, None]

    def gathered(self, blocks: Array, seen: Array) -> tuple[Array, Array]:
        """Returns keys and values of a row's blocks as [B, columns, K, H], 0 where unseen."""
        batch, kv_heads, _ = self.call.sizes
        blocks = self.existing(blocks)

        def of(array: Array) -> Array:
            if blocks.shape[1] == 1:
                index = jnp.broadcast_to(blocks[:, 0], (batch, self.at_once))
                taken = jax.vmap(lambda x, i: x[i])(array, index)
                taken = taken.reshape(batch, -1, *taken.shape[3:])
            else:
                index = jnp.broadcast_to(blocks, (batch, kv_heads, self.at_once))
                taken = jax.vmap(jax.vmap(lambda x, i: x[i]))(array, index)
                taken = jnp.swapaxes(taken.reshape(batch, kv_heads, -1, taken.shape[-1]), 1, 2)
            return jnp.where(jnp.moveaxis(seen, 3, 1), taken, 0)

        return of(self.key), of(self.value)

    def existing(self, blocks: Array) -> Array:
        """Returns numbers of blocks, some one's for those that do not exist."""
        number = -(-self.call.x.key.shape[1] // self.block_k)
        return jnp.clip(blocks, 0, number - 1)

    def added(self, sums: Array, new: Array, blocks: Array) -> Array:
        """Adds gradients [R, B, K, columns, H] of the rows' blocks to those of all blocks."""
        some, batch, kv_heads, _, features = new.shape
        new = new.reshape(some, batch, kv_heads, self.at_once, self.block_k, features)
        rows, blocks = jnp.arange(batch)[None, :, None], self.existing(blocks)
        if blocks.shape[2] == 1:
            index = jnp.broadcast_to(blocks[:, :, 0], (some, batch, self.at_once))
            return sums.at[rows, index].add(jnp.moveaxis(new, 2, 4))
        index = jnp.broadcast_to(blocks, (some, batch, kv_heads, self.at_once))
        heads = jnp.arange(kv_heads)[:, None]
        return sums.at[rows[..., None], heads, index].add(new)

    def together(self, tiles: Array) -> Array:
        """Returns what was computed for all rows, [Q/R, R, ..., queries], as [..., T]."""
        tiles = tiles.reshape(-1, *tiles.shape[2:])[: self.counts.shape[2]]
        *tiles, last = jnp.split(tiles, [len(tiles) - 1])
        queries = self.call.x.query.shape[1]
        left = queries - (self.counts.shape[2] - 1) * self.block_q
        last = last[0, ..., self.call.rows - left :]
        before = jnp.moveaxis(tiles[0], 0, -2)
        before = before.reshape(*before.shape[:-2], math.prod(before.shape[-2:]))
        return jnp.concatenate([before, last], axis=-1)

    def tokens(self, blocks: Array, like: Array) -> Array:
        """Returns gradients of blocks of keys or values as those of the argument."""
        batch, keys, kv_heads, features = like.shape
        if self.indices.shape[1] > 1:
            blocks = jnp.moveaxis(blocks, 1, 3)
        heads = blocks.shape[3]
        tokens = blocks.reshape(batch, -1, heads, features)[:, :keys]
        tokens = tokens.reshape(batch, keys, kv_heads, heads // kv_heads, features).sum(axis=3)
        return tokens.astype(like.dtype)


def _shorter(lists: masks.Blocks, queries: int, group: int) -> masks.Blocks:
    """Returns the same lists in blocks, of whole groups, no longer than a tile should be."""
    rows, columns = _divisor(lists.block_q, ROWS), _divisor(lists.block_k, COLUMNS, group)
    repeats, cuts = lists.block_q // rows, lists.block_k // columns
    indices, counts = (
        jnp.repeat(x, repeats, axis=2)[:, :, : -(-queries // rows)]
        for x in (lists.indices, lists.counts * cuts)
    )
    indices = indices[..., None] * cuts + jnp.arange(cuts, dtype=indices.dtype)
    return masks.Blocks(indices.reshape(*indices.shape[:3], -1), counts, rows, columns)


def _divisor(block: int, most: int, unit: int = 1) -> int:
    """Returns the largest divisor of a length up to a limit, and multiple of a unit.

    It is the length if none is worth a tile.
    """
    sizes = range(unit, min(block, most) + 1, unit)
    best = max((size for size in sizes if block % size == 0), default=block)
    return best if best >= min(block, 64) else block
