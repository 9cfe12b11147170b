# ruff: noqa: D102 -- the methods of all masks are documented in Mask
"""Masks that depend on what queries and keys carry, and those that are given pair by pair."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array

from pallas_kernels.masks.algebra import (
    Bound,
    ListedTile,
    Mask,
    Shape,
    Tile,
    Tiles,
    check_dims,
    mask_class,
    minimum,
    same_heads,
    sliced,
)


@mask_class
class Segments(Mask):
    """See `segments`. Keys of id -1 are seen by every query if `shared` is set."""

    query_ids: Array
    key_ids: Array | None
    shared: bool

    def resolve(self, shape: Shape) -> Mask:
        name = "segments: query_ids"
        query_ids = _tokens(self.query_ids, shape.queries, "query", name, shape)
        key_ids = query_ids
        if self.key_ids is not None:
            name = "segments: key_ids"
            key_ids = _tokens(self.key_ids, shape.keys, "key", name, shape)
        elif shape.queries != shape.keys:
            raise ValueError(
                f"segments: key_ids must be given where there are {shape.queries} queries and "
                f"{shape.keys} keys"
            )
        return Segments(query_ids, key_ids, self.shared)

    def dims(self) -> tuple[str, ...]:
        return "1nt", "1ns"

    def allowed(self, queries: Array, keys: Array) -> Array:
        same = self.query_ids == self.key_ids
        return same | (self.key_ids == -1) if self.shared else same

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        query_ids, key_ids = same_heads(self.query_ids, self.key_ids)
        query_low, query_high = (
            rows.reduced(query_ids, 2, monoid)[..., None] for monoid in (jnp.min, jnp.max)
        )
        key_low, key_high = (
            columns.reduced(key_ids, 2, monoid)[..., None, :] for monoid in (jnp.min, jnp.max)
        )
        some = (query_low <= key_high) & (key_low <= query_high)
        every = (query_low == key_high) & (key_low == query_high) & (key_low == key_high)
        if self.shared:
            some |= columns.reduced(key_ids == -1, 2, jnp.any)[..., None, :]
            every |= columns.reduced(key_ids == -1, 2, jnp.all)[..., None, :]
        return columns.taken(some), columns.taken(every)


@mask_class
class Dense(Mask):
    """See `dense`."""

    array: Array

    def resolve(self, shape: Shape) -> Mask:
        array = jnp.asarray(self.array)
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        check_dims("mask", array, (shape.batch, shape.heads, shape.queries, shape.keys))
        return Dense(array)

    def dims(self) -> tuple[str, ...]:
        return ("1nts",)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return self.array

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        def reduced(monoid: Callable[..., Array]) -> Array:
            array = self.array
            if array.shape[2] > 1:
                array = rows.reduced(array, 2, monoid)
            if array.shape[3] > 1:
                array = columns.reduced(array, 3, monoid)
                array = columns.taken(array)
            return array

        return reduced(jnp.any), reduced(jnp.all)


@mask_class
class Blocks(Mask):
    """See `blocks`."""

    indices: Array
    counts: Array
    block_q: int
    block_k: int

    def resolve(self, shape: Shape) -> Mask:
        rows = -(-shape.queries // self.block_q)
        for name, array in (("indices", self.indices), ("counts", self.counts)):
            name = f"blocks: {name}"
            _check_batch_and_heads(name, array, shape, (1, shape.kv_heads, shape.heads))
            if array.shape[2] != rows:
                raise ValueError(
                    f"{name}: shape {array.shape} has {array.shape[2]} query blocks, but "
                    f"{shape.queries} queries in blocks of {self.block_q} are {rows}"
                )
        self._check(-(-shape.keys // self.block_k))
        return self

    def _check(self, columns: int) -> None:
        """Checks the lists: where they are known, and at run time under `checkify`."""
        known = not any(isinstance(x, jax.core.Tracer) for x in (self.indices, self.counts))
        numpy = np if known else jnp
        indices, counts = numpy.asarray(self.indices), numpy.asarray(self.counts)
        places = indices.shape[-1]
        listed = numpy.arange(places) < counts[..., None]
        inside = (indices >= 0) & (indices < columns)
        ascends = indices[..., 1:] > indices[..., :-1]
        for fits, message in (
            ((counts >= 0) & (counts <= places), f"blocks: counts must be 0 to {places}"),
            (inside | ~listed, f"blocks: indices must be 0 to {columns - 1} where they count"),
            (ascends | ~listed[..., 1:], "blocks: indices must ascend where they count"),
        ):
            if not known:
                checkify.debug_check(numpy.all(fits), message)
            elif not fits.all():
                first = np.argwhere(~fits)[0]
                wrong = counts if fits.ndim == counts.ndim else indices[..., -fits.shape[-1] :]
                raise ValueError(f"{message}; got {wrong[tuple(first)]} at {first.tolist()}")

    def dims(self) -> tuple[str, ...]:
        return "1ntl", "1nt"

    def prepared(self, queries: int, keys: int) -> Mask:
        columns = -(-keys // self.block_k)
        listed = jnp.arange(self.indices.shape[-1]) < self.counts[..., None]
        indices = jnp.where(listed, self.indices, columns)
        mark = functools.partial(jnp.put_along_axis, axis=-1, inplace=False, mode="drop")
        kept = jnp.zeros((*self.indices.shape[:-1], columns), bool)
        return _BlockMap(mark(kept, indices, True), self.block_q, self.block_k)


@mask_class
class _BlockMap(Mask):
    """Blocks as a bitmap of query blocks by key blocks."""

    kept: Array
    block_q: int
    block_k: int

    def tile(self, tile: Tile | ListedTile) -> Array:
        rows = (tile.queries // self.block_q).ravel()
        kept, columns = same_heads(jnp.take(self.kept, rows, axis=2), tile.keys // self.block_k)
        return jnp.take_along_axis(kept, columns, axis=3)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        return _listed_range(self.kept, row, rows, self.block_q, self.block_k)

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        kept = jnp.swapaxes(self.kept, 2, 3)
        return _listed_range(kept, column, columns, self.block_k, self.block_q)


@mask_class
class Rule(Mask):
    """See `rule`."""

    fn: Callable[[Any, Any], Array]
    query_tokens: Any
    key_tokens: Any

    def resolve(self, shape: Shape) -> Mask:
        def resolve(tokens: Any, count: int, kind: str) -> Any:
            name = f"rule: {kind}_tokens"
            return jax.tree.map(lambda x: _tokens(x, count, kind, name, shape), tokens)

        return Rule(
            self.fn,
            resolve(self.query_tokens, shape.queries, "query"),
            resolve(self.key_tokens, shape.keys, "key"),
        )

    def dims(self) -> tuple[str, ...]:
        queries, keys = (len(jax.tree.leaves(x)) for x in (self.query_tokens, self.key_tokens))
        return ("1nt",) * queries + ("1ns",) * keys

    def allowed(self, queries: Array, keys: Array) -> Array:
        allowed = self.fn(self.query_tokens, self.key_tokens)
        if allowed.dtype != bool:
            raise TypeError(f"rule: fn must return booleans; got {allowed.dtype}")
        return allowed

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        return np.ones((1, 1), bool), np.zeros((1, 1), bool)


def _listed_range(
    kept: Array, start: Bound, size: int, block: int, other_block: int
) -> tuple[Array, Array]:
    """Bounds, per batch row, the positions that the blocks of start .. start + size - 1 list."""
    span = min((size + block - 2) // block + 1, kept.shape[2])
    first = minimum(start // block, kept.shape[2] - span)
    number = first + jnp.arange(span)[:, None]
    touched = (number >= start // block) & (number <= (start + size - 1) // block)
    some = jnp.any(sliced(kept, 2, first, span) & touched, axis=(1, 2))
    last = some.shape[1] - jnp.argmax(some[:, ::-1], axis=1)
    return jnp.argmax(some, axis=1) * other_block, jnp.where(some.any(1), last, 0) * other_block


def _tokens(value: Any, count: int, kind: str, name: str, shape: Shape) -> Array:
    """Resolves values of tokens, [B|1, count] or [B|1, heads, count], to the latter."""
    value = jnp.asarray(value)
    value = value[None] if value.ndim == 1 else value
    value = value[:, None] if value.ndim == 2 else value
    if value.ndim != 3 or value.shape[-1] != count:
        raise ValueError(
            f"{name} must be [B, tokens] or [B, heads, tokens] for {count} {kind} tokens; got "
            f"shape {value.shape}"
        )
    _check_batch_and_heads(name, value, shape, (1, shape.kv_heads, shape.heads))
    return value


def _check_batch_and_heads(
    name: str, array: Array, shape: Shape, heads: tuple[int | None, ...]
) -> None:
    if shape.batch is not None and array.shape[0] not in (1, shape.batch):
        raise ValueError(
            f"{name}: shape {array.shape} must start with the batch, {shape.batch}, or 1"
        )
    if shape.heads is not None and array.shape[1] not in heads:
        raise ValueError(f"{name}: the heads of shape {array.shape} must be one of {set(heads)}")
