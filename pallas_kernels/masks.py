# ruff: noqa: D102 -- the methods of all masks are documented in Mask
"""The mask algebra: which query may attend to which key.

A mask is made by one of the functions below, or of several by `&`. It is a pytree: arrays in it are
leaves, Python integers are static, so masks go through `jit`, `vmap` and `scan` like arrays, and
what is static is known when a call is traced. What a mask means is what `to_dense` returns; kernels
evaluate it a tile at a time and skip keys that no query of a tile can see.

Queries and keys are numbered from 0. Where queries continue a longer sequence (a cache), `offset`
is the position of query 0 among the keys; like every length here it may be an int, an int32 scalar
or, one for each batch row, an int32[B].

    causal        key <= query + offset
    window        -left <= key - (query + offset) <= right
    prefix        causal, and keys before the end of the prefix for every query
    segments      query and key carry the same id
    lengths       query and key lie before the end of their sequences
    dilated       query + offset - key is a multiple of a step
    dense         a boolean array
    blocks        the key's block is listed for the query's block
    rule          a function of values that every query and every key carries
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

Bound = int | Array
"""A bound on positions: static, a scalar, or one for each batch row."""


class Shape(NamedTuple):
    """The sizes that a mask is used with; None where they are not known."""

    queries: int
    keys: int
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


class Tile(NamedTuple):
    """A rectangle of query rows and key columns; the starts may be traced."""

    row: Bound
    rows: int
    column: Bound
    columns: int

    @property
    def queries(self) -> Int[Array, "1 1 rows 1"]:
        """Returns the numbers of the queries."""
        return (self.row + jnp.arange(self.rows, dtype=jnp.int32))[None, None, :, None]

    @property
    def keys(self) -> Int[Array, "1 1 1 columns"]:
        """Returns the numbers of the keys."""
        return (self.column + jnp.arange(self.columns, dtype=jnp.int32))[None, None, None]


class Tiles(NamedTuple):
    """Tiles of one size, of the queries or of the keys.

    `number` says which tiles are meant. It is [rows, 1] for queries and [1, columns] for keys, or
    for keys that are listed [B|1, N|K|1, rows, columns].
    """

    size: int
    tokens: int
    number: Array

    @property
    def first(self) -> Array:
        """Returns the first token of every tile."""
        return self.number * self.size

    @property
    def last(self) -> Array:
        """Returns the last token of every tile; the last tile may reach beyond all tokens."""
        last = self.number * self.size + (self.size - 1)
        numpy = np if isinstance(last, np.ndarray) else jnp
        return numpy.minimum(last, self.tokens - 1)

    def reduced(self, array: Array, axis: int, monoid: Callable[..., Array]) -> Array:
        """Reduces the tokens of every tile, all tiles of the array, along one axis."""
        pad = -array.shape[axis] % self.size
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, pad)
        array = jnp.pad(array, widths, mode="edge")
        shape = (*array.shape[:axis], -1, self.size, *array.shape[axis + 1 :])
        return monoid(array.reshape(shape), axis=axis + 1)

    def taken(self, values: Array) -> Array:
        """Takes from values [B|1, N|K|1, rows|1, all columns] those of the tiles of keys."""
        if self.number.ndim == 2:
            return values
        values, number = same_heads(values, self.number)
        return jnp.take_along_axis(values, number, axis=3)


class Mask:
    """A set of (query, key) pairs, per batch row and head; masks are joined by `&`.

    Kernels use a mask in three steps: `resolve` checks it against the shapes of a call and gives
    every leaf a batch dimension; `dims` names the dimensions of the leaves, for sharding and for
    cutting them to tiles; and what `prepared` returns is evaluated by `tile`, `key_range` and
    `query_range`. A Pallas kernel cuts the leaves itself, evaluates by `allowed`, and knows from
    `occupancy` what to visit.
    """

    def __and__(self, other: "Mask") -> "Mask":
        """Returns the mask of pairs that both masks allow."""
        if not isinstance(other, Mask):
            return NotImplemented
        return And(parts(self) + parts(other))

    def to_dense(self, queries: int, keys: int) -> Bool[Array, "B|1 N|1 queries keys"]:
        """Returns the mask as a boolean array, its definition.

        Batch and heads are 1 where the mask is the same for all.

        Args:
          queries: number of queries, T.
          keys: number of keys, S.
        """
        resolved = self.resolve(Shape(queries, keys)).prepared(queries, keys)
        tile = resolved.tile(Tile(0, queries, 0, keys))
        return jnp.broadcast_to(tile, (*tile.shape[:2], queries, keys))

    def resolve(self, shape: Shape) -> "Mask":
        """Returns the mask with a batch dimension on every leaf.

        Raises:
          ValueError: an array does not fit the shapes of the call.
        """
        raise NotImplementedError

    def dims(self) -> tuple[str, ...]:
        """Names the dimensions of the leaves of a resolved mask, as in `partition`."""
        raise NotImplementedError

    def prepared(self, queries: int, keys: int) -> "Mask":
        """Returns a resolved mask in the form that is cheapest to evaluate many times."""
        del queries, keys
        return self

    def tile(self, tile: Tile) -> Bool[Array, "B|1 N|K|1 rows|1 columns|1"]:
        """Evaluates a prepared mask on a tile that lies inside of the mask's shape."""
        leaves, tree = jax.tree.flatten(self)
        leaves = map(functools.partial(_on_tile, tile), leaves, self.dims())
        return tree.unflatten(same_heads(*leaves)).allowed(tile.queries, tile.keys)

    def allowed(self, queries: Array, keys: Array) -> Array:
        """Evaluates a mask whose leaves are cut to a tile: the definition of a mask.

        Args:
          queries: numbers of the queries, of a shape that broadcasts against keys and leaves.
          keys: numbers of the keys.
        """
        raise NotImplementedError

    def occupancy(self, rows: "Tiles", columns: "Tiles") -> tuple[Array, Array]:
        """Returns of tiles whether some pair, and whether every pair, may be allowed.

        The first may err towards True, the second towards False. Both broadcast to [B, N, rows,
        columns]; they are NumPy arrays where all that they depend on is static.
        """
        raise NotImplementedError

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        """Bounds the keys that some of the queries row .. row + rows - 1 can see.

        The bounds [start, stop) hold for each batch row; they may reach outside of 0 .. keys, and
        stop may be less than start where there is no key. Integers stay integers.
        """
        del row, rows
        return 0, keys

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        """Bounds the queries that can see some of the keys column .. column + columns - 1."""
        del column, columns
        return 0, queries


def _mask(cls: type) -> type:
    """Makes a class a frozen dataclass and a pytree whose leaves are its arrays."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten_with_keys(mask: Any) -> tuple[list[Any], Any]:
        values = [getattr(mask, name) for name in names]
        static = tuple(isinstance(v, int | None) or callable(v) for v in values)
        children = [
            (jax.tree_util.GetAttrKey(n), v)
            for n, v, fixed in zip(names, values, static, strict=True)
            if not fixed
        ]
        return children, tuple((f, v if f else None) for f, v in zip(static, values, strict=True))

    def unflatten(static: Any, children: Sequence[Any]) -> Any:
        children = iter(children)
        return cls(*(value if fixed else next(children) for fixed, value in static))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@_mask
class And(Mask):
    """All of several masks."""

    masks: tuple[Mask, ...]

    def resolve(self, shape: Shape) -> Mask:
        return And(tuple(mask.resolve(shape) for mask in self.masks))

    def dims(self) -> tuple[str, ...]:
        return tuple(dim for mask in self.masks for dim in mask.dims())

    def prepared(self, queries: int, keys: int) -> Mask:
        return And(tuple(mask.prepared(queries, keys) for mask in self.masks))

    def tile(self, tile: Tile) -> Array:
        return _all([mask.tile(tile) for mask in self.masks])

    def allowed(self, queries: Array, keys: Array) -> Array:
        return functools.reduce(operator.and_, (m.allowed(queries, keys) for m in self.masks))

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        some, every = zip(*(m.occupancy(rows, columns) for m in self.masks), strict=True)
        return _all(some), _all(every)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        starts, stops = zip(*(m.key_range(row, rows, keys) for m in self.masks), strict=True)
        return functools.reduce(_maximum, starts), functools.reduce(_minimum, stops)

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        ranges = (m.query_range(column, columns, queries) for m in self.masks)
        starts, stops = zip(*ranges, strict=True)
        return functools.reduce(_maximum, starts), functools.reduce(_minimum, stops)


@_mask
class Causal(Mask):
    """See `causal`."""

    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        return Causal(_per_row(self.offset, "causal: offset", shape))

    def dims(self) -> tuple[str, ...]:
        return _row_dims(self.offset)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return keys <= queries + self.offset

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        offset = _column(self.offset)
        return columns.first <= rows.last + offset, columns.last <= rows.first + offset

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        return 0, row + rows + self.offset

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        return column - self.offset, queries


@_mask
class Window(Mask):
    """See `window`."""

    left: Bound | None
    right: Bound | None
    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        left, right = (
            None if side is None else _per_row(side, f"window: {name}", shape)
            for name, side in (("left", self.left), ("right", self.right))
        )
        return Window(left, right, _per_row(self.offset, "window: offset", shape))

    def dims(self) -> tuple[str, ...]:
        sides = (side for side in (self.left, self.right) if side is not None)
        return tuple(d for bound in (*sides, self.offset) for d in _row_dims(bound))

    def allowed(self, queries: Array, keys: Array) -> Array:
        distance = keys - queries
        return self._holds(distance, distance)

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        least, most = columns.first - rows.last, columns.last - rows.first
        mask = jax.tree.map(_column, self)
        return mask._holds(most, least), mask._holds(least, most)

    def _holds(self, after_left: Array, before_right: Array) -> Array:
        """Says whether one distance obeys the left bound, and another one the right bound."""
        conditions = [after_left == after_left]  # True, of the shape that is asked for
        if self.left is not None:
            conditions.append(after_left - self.offset >= -self.left)
        if self.right is not None:
            conditions.append(before_right - self.offset <= self.right)
        return functools.reduce(operator.and_, conditions)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        start = 0 if self.left is None else row + self.offset - self.left
        stop = keys if self.right is None else row + rows + self.offset + self.right
        return start, stop

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        start = 0 if self.right is None else column - self.right - self.offset
        stop = queries if self.left is None else column + columns + self.left - self.offset
        return start, stop


@_mask
class Prefix(Mask):
    """See `prefix`."""

    length: Bound
    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        return Prefix(
            _per_row(self.length, "prefix: length", shape),
            _per_row(self.offset, "prefix: offset", shape),
        )

    def dims(self) -> tuple[str, ...]:
        return _row_dims(self.length) + _row_dims(self.offset)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return (keys <= queries + self.offset) | (keys < self.length)

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        mask = jax.tree.map(_column, self)
        return mask.allowed(rows.last, columns.first), mask.allowed(rows.first, columns.last)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        return 0, _maximum(row + rows + self.offset, self.length)

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        return _where(column < self.length, 0, column - self.offset), queries


@_mask
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


@_mask
class Lengths(Mask):
    """See `lengths`."""

    query: Bound | None
    key: Bound | None

    def resolve(self, shape: Shape) -> Mask:
        return Lengths(
            *(
                None if length is None else _per_row(length, f"lengths: {name}", shape)
                for name, length in (("query", self.query), ("key", self.key))
            )
        )

    def dims(self) -> tuple[str, ...]:
        given = (length for length in (self.query, self.key) if length is not None)
        return tuple(d for length in given for d in _row_dims(length))

    def allowed(self, queries: Array, keys: Array) -> Array:
        conditions = [queries == queries]  # True, of the shape that is asked for
        if self.query is not None:
            conditions.append(queries < self.query)
        if self.key is not None:
            conditions.append(keys < self.key)
        return functools.reduce(operator.and_, conditions)

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        mask = jax.tree.map(_column, self)
        return mask.allowed(rows.first, columns.first), mask.allowed(rows.last, columns.last)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        stop = keys if self.key is None else self.key
        if self.query is not None:
            stop = _where(row < self.query, stop, 0)
        return 0, stop

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        return Lengths(self.key, self.query).key_range(column, columns, queries)


@_mask
class Dilated(Mask):
    """See `dilated`."""

    step: int
    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        return Dilated(self.step, _per_row(self.offset, "dilated: offset", shape))

    def dims(self) -> tuple[str, ...]:
        return _row_dims(self.offset)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return (queries + self.offset - keys) % self.step == 0

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        offset = _column(self.offset)
        first, last = rows.first + offset - columns.last, rows.last + offset - columns.first
        return last // self.step >= -(-first // self.step), (first == first) & (self.step == 1)


@_mask
class Dense(Mask):
    """See `dense`."""

    array: Array

    def resolve(self, shape: Shape) -> Mask:
        array = jnp.asarray(self.array)
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        _check_dims("mask", array, (shape.batch, shape.heads, shape.queries, shape.keys))
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


@_mask
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


@_mask
class _BlockMap(Mask):
    """Blocks as a bitmap of query blocks by key blocks."""

    kept: Array
    block_q: int
    block_k: int

    def tile(self, tile: Tile) -> Array:
        rows = (tile.queries // self.block_q).ravel()
        columns = (tile.keys // self.block_k).ravel()
        return jnp.take(jnp.take(self.kept, rows, axis=2), columns, axis=3)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        return _listed_range(self.kept, row, rows, self.block_q, self.block_k)

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        kept = jnp.swapaxes(self.kept, 2, 3)
        return _listed_range(kept, column, columns, self.block_k, self.block_q)


@_mask
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


def causal(offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0) -> Mask:
    """Keys up to the query's own position: key <= query + offset."""
    return Causal(as_bound(offset, "causal: offset"))


def window(
    left: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] | None,
    right: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] | None,
    offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
) -> Mask:
    """Keys near the query: at most `left` before and `right` after query + offset.

    Args:
      left: number of keys before the query's own that it sees; None for all.
      right: number of keys after the query's own that it sees; None for all.
      offset: position of query 0 among the keys.
    """
    left, right = (
        None if side is None else _length(side, f"window: {name}")
        for name, side in (("left", left), ("right", right))
    )
    return Window(left, right, as_bound(offset, "window: offset"))


def prefix(
    length: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"],
    offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
) -> Mask:
    """A prefix language model: the first `length` keys for every query, later ones causally."""
    return Prefix(_length(length, "prefix: length"), as_bound(offset, "prefix: offset"))


def segments(
    query_ids: Int[ArrayLike, "B T"] | Int[ArrayLike, "B N T"],
    key_ids: Int[ArrayLike, "B S"] | Int[ArrayLike, "B N S"] | None = None,
) -> Mask:
    """Pairs with equal ids, such as tokens of one document in a packed row.

    Args:
      query_ids: id of every query; the batch may be 1, and a dimension of heads may follow it.
      key_ids: id of every key. Keys of id -1 are seen by every query (shared instructions, sinks).
        None: queries and keys are the same tokens, compared for equality only.
    """
    query_ids = _integers(query_ids, "segments: query_ids")
    if key_ids is None:
        return Segments(query_ids, None, shared=False)
    return Segments(query_ids, _integers(key_ids, "segments: key_ids"), shared=True)


def lengths(
    query: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] | None = None,
    key: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] | None = None,
) -> Mask:
    """Queries and keys before the ends of their sequences; None where all are valid."""
    query, key = (
        None if length is None else _length(length, f"lengths: {name}")
        for name, length in (("query", query), ("key", key))
    )
    return Lengths(query, key)


def dilated(step: int, offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0) -> Mask:
    """Keys whose distance from query + offset is a multiple of `step`."""
    if not isinstance(step, int | np.integer) or step < 1:
        raise ValueError(f"dilated: step must be a positive integer; got {step!r}")
    return Dilated(int(step), as_bound(offset, "dilated: offset"))


def dense(array: Bool[ArrayLike, "B|1 N|1 T|1 S|1"]) -> Mask:
    """A boolean array, True where a pair is allowed; missing leading dimensions are 1."""
    if not hasattr(array, "dtype"):
        array = np.asarray(array)
    if array.dtype != bool:
        raise TypeError(
            f"mask: must be boolean, True where a query may attend to a key; got {array.dtype}. An "
            "additive mask is a bias"
        )
    if not 1 <= array.ndim <= 4:
        raise ValueError(f"mask: must have 1 to 4 dimensions, [B, N, T, S]; got {array.shape}")
    return Dense(array)


def blocks(
    indices: Int[ArrayLike, "B|1 N|K|1 Q L"],
    counts: Int[ArrayLike, "B|1 N|K|1 Q"],
    block_q: int,
    block_k: int,
) -> Mask:
    """Block lists: the blocks of keys that each block of queries attends to.

    Heads are query heads, key heads (a list for each group of query heads) or 1.

    Args:
      indices: numbers of key blocks, unique and ascending in the first `counts` places of the last
        dimension. The places behind them are not read. Kernels do not check what they read; where
        lists are known, as outside of jit, they are checked when they are used, and at run time in
        a function that `jax.experimental.checkify` transforms.
      counts: how many blocks are listed.
      block_q: number of queries in a block.
      block_k: number of keys in a block.
    """
    indices, counts = _integers(indices, "blocks: indices"), _integers(counts, "blocks: counts")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"blocks: {name} must be a positive integer; got {size!r}")
    if indices.ndim != 4 or counts.shape != indices.shape[:-1]:
        raise ValueError(
            "blocks: indices must be [B|1, heads, query blocks, L] and counts the same without L; "
            f"got {indices.shape} and {counts.shape}"
        )
    return Blocks(indices, counts, int(block_q), int(block_k))


def rule(fn: Callable[[Any, Any], Array], query_tokens: Any, key_tokens: Any) -> Mask:
    """A pair rule on values that queries and keys carry: intervals, neighbourhoods, thresholds.

    Args:
      fn: maps the values of a tile, of shapes [..., rows, 1] and [..., 1, columns], to booleans by
        elementwise operations. It is static: give the same function at every call.
      query_tokens: an array [B|1, T] or [B|1, N|K|1, T], or a pytree of such.
      key_tokens: likewise, of length S.

    Example:
      >>> import jax.numpy as jnp
      >>> from attention.masks import rule
      >>> starts, stops = jnp.array([[0, 0, 2]]), jnp.array([[1, 2, 3]])
      >>> inside = lambda q, k: (q[0] <= k) & (k < q[1])
      >>> rule(inside, (starts, stops), jnp.arange(3)[None]).to_dense(3, 3)[0, 0].astype(int)
      Array([[1, 0, 0],
             [1, 1, 0],
             [0, 0, 1]], dtype=int32)
    """
    if not callable(fn):
        raise TypeError(f"rule: fn must be a function; got {fn!r}")
    return Rule(fn, query_tokens, key_tokens)


def all_of(masks: Sequence[Mask]) -> Mask | None:
    """Joins any number of masks; None, which allows all pairs, is what no masks are joined to."""
    return functools.reduce(operator.and_, masks) if masks else None


def as_bound(value: Any, name: str) -> Bound:
    """Returns an offset or length as a static int, or as an integer array of 0 or 1 dimensions."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    value = _integers(value, name)
    if value.ndim > 1:
        raise ValueError(f"{name} must be an integer, a scalar or [B]; got shape {value.shape}")
    return value


def sliced_tile(array: Array, tile: Tile) -> Array:
    """Returns the part of an array [.., T|1, S|1] that lies on a tile."""
    if array.shape[-2] > 1:
        array = _sliced(array, -2, tile.row, tile.rows)
    if array.shape[-1] > 1:
        array = _sliced(array, -1, tile.column, tile.columns)
    return array


def _on_tile(tile: Tile, leaf: Array, dims: str) -> Array:
    """Cuts a leaf with these dimensions to a tile and lets it broadcast against [B, N, T, S]."""
    if dims == "1":
        return _column(leaf)
    if dims == "1nt":
        return _sliced(leaf, -1, tile.row, tile.rows)[..., :, None]
    if dims == "1ns":
        return _sliced(leaf, -1, tile.column, tile.columns)[..., None, :]
    return sliced_tile(leaf, tile)


def _all(conditions: Sequence[Array]) -> Array:
    """Joins conditions, [rows, columns] or [B|1, N|K|1, rows, columns]."""
    return functools.reduce(operator.and_, same_heads(*conditions))


def _listed_range(
    kept: Array, start: Bound, size: int, block: int, other_block: int
) -> tuple[Array, Array]:
    """Bounds, per batch row, the positions that the blocks of start .. start + size - 1 list."""
    span = min((size + block - 2) // block + 1, kept.shape[2])
    first = _minimum(start // block, kept.shape[2] - span)
    number = first + jnp.arange(span)[:, None]
    touched = (number >= start // block) & (number <= (start + size - 1) // block)
    some = jnp.any(_sliced(kept, 2, first, span) & touched, axis=(1, 2))
    last = some.shape[1] - jnp.argmax(some[:, ::-1], axis=1)
    return jnp.argmax(some, axis=1) * other_block, jnp.where(some.any(1), last, 0) * other_block


def parts(mask: Mask) -> tuple[Mask, ...]:
    """Returns the masks that a mask is joined of."""
    return mask.masks if isinstance(mask, And) else (mask,)


def _length(value: Any, name: str) -> Bound:
    value = as_bound(value, name)
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} must not be negative; got {value}")
    return value


def _integers(value: Any, name: str) -> Array:
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers; got {value.dtype}")
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _per_row(value: Bound, name: str, shape: Shape) -> Bound:
    """Resolves a bound: an int, or [B|1]."""
    if isinstance(value, int):
        return value
    value = jnp.atleast_1d(value)
    _check_dims(name, value, (shape.batch,))
    return value


def _row_dims(value: Bound) -> tuple[str, ...]:
    return () if isinstance(value, int) else ("1",)


def _column(value: Bound) -> Bound:
    """Returns a resolved bound in a form that broadcasts against [B, N, rows, columns]."""
    return value if isinstance(value, int) else value[:, None, None, None]


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


def _check_dims(name: str, array: Array, sizes: Sequence[int | None]) -> None:
    """Checks that an array broadcasts to the sizes that are known."""
    fits = all(
        size is None or dim in (1, size) for dim, size in zip(array.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: shape {array.shape} does not broadcast to ({wanted})")


def same_heads(*arrays: Array) -> tuple[Array, ...]:
    """Repeats values of head groups, in dimension 1, for the heads of each group.

    Arrays of two dimensions have no heads, and stay as they are.
    """
    heads = max((array.shape[1] for array in arrays if array.ndim > 2), default=1)
    return tuple(
        array
        if array.ndim == 2 or array.shape[1] in (1, heads)
        else jnp.repeat(array, heads // array.shape[1], axis=1)
        for array in arrays
    )


def _sliced(array: Array, axis: int, start: Bound, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _maximum(a: Bound, b: Bound) -> Bound:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _minimum(a: Bound, b: Bound) -> Bound:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _where(condition: bool | Array, a: Bound, b: Bound) -> Bound:
    if isinstance(condition, bool):
        return a if condition else b
    return jnp.where(condition, a, b)
