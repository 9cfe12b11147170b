# ruff: noqa: D102 -- the methods of all masks are documented in Mask
"""What a mask is, what masks are joined to, and what they are made with."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


class ListedTile(NamedTuple):
    """Query rows side by side, and key columns that are listed for every batch row and head."""

    row: Bound
    rows: int
    index: Int[Array, "B|1 K|1 columns"]

    @property
    def queries(self) -> Int[Array, "1 1 rows 1"]:
        """Returns the numbers of the queries."""
        return Tile(self.row, self.rows, 0, 0).queries

    @property
    def keys(self) -> Int[Array, "B|1 K|1 1 columns"]:
        """Returns the numbers of the keys."""
        return self.index[:, :, None]


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

    def tile(self, tile: Tile | ListedTile) -> Bool[Array, "B|1 N|K|1 rows|1 columns|1"]:
        """Evaluates a prepared mask on a tile that lies inside of the mask's shape."""
        leaves, tree = jax.tree.flatten(self)
        leaves = map(functools.partial(on_tile, tile), leaves, self.dims())
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


def mask_class(cls: type) -> type:
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


@mask_class
class And(Mask):
    """All of several masks."""

    masks: tuple[Mask, ...]

    def resolve(self, shape: Shape) -> Mask:
        return And(tuple(mask.resolve(shape) for mask in self.masks))

    def dims(self) -> tuple[str, ...]:
        return tuple(dim for mask in self.masks for dim in mask.dims())

    def prepared(self, queries: int, keys: int) -> Mask:
        return And(tuple(mask.prepared(queries, keys) for mask in self.masks))

    def tile(self, tile: Tile | ListedTile) -> Array:
        return joined([mask.tile(tile) for mask in self.masks])

    def allowed(self, queries: Array, keys: Array) -> Array:
        return functools.reduce(operator.and_, (m.allowed(queries, keys) for m in self.masks))

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        some, every = zip(*(m.occupancy(rows, columns) for m in self.masks), strict=True)
        return joined(some), joined(every)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        starts, stops = zip(*(m.key_range(row, rows, keys) for m in self.masks), strict=True)
        return functools.reduce(maximum, starts), functools.reduce(minimum, stops)

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        ranges = (m.query_range(column, columns, queries) for m in self.masks)
        starts, stops = zip(*ranges, strict=True)
        return functools.reduce(maximum, starts), functools.reduce(minimum, stops)


def all_of(masks: Sequence[Mask]) -> Mask | None:
    """Joins any number of masks; None, which allows all pairs, is what no masks are joined to."""
    return functools.reduce(operator.and_, masks) if masks else None


def parts(mask: Mask) -> tuple[Mask, ...]:
    """Returns the masks that a mask is joined of."""
    return mask.masks if isinstance(mask, And) else (mask,)


def as_bound(value: Any, name: str) -> Bound:
    """Returns an offset or length as a static int, or as an integer array of 0 or 1 dimensions."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    value = as_integers(value, name)
    if value.ndim > 1:
        raise ValueError(f"{name} must be an integer, a scalar or [B]; got shape {value.shape}")
    return value


def as_integers(value: Any, name: str) -> Array:
    """Returns an argument as an array of integers."""
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers; got {value.dtype}")
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def per_row(value: Bound, name: str, shape: Shape) -> Bound:
    """Resolves a bound: an int, or [B|1]."""
    if isinstance(value, int):
        return value
    value = jnp.atleast_1d(value)
    check_dims(name, value, (shape.batch,))
    return value


def row_dims(value: Bound) -> tuple[str, ...]:
    """Returns the dimensions of the leaf that a resolved bound is, if it is one."""
    return () if isinstance(value, int) else ("1",)


def as_column(value: Bound) -> Bound:
    """Returns a resolved bound in a form that broadcasts against [B, N, rows, columns]."""
    return value if isinstance(value, int) else value[:, None, None, None]


def check_dims(name: str, array: Array, sizes: Sequence[int | None]) -> None:
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


def joined(conditions: Sequence[Array]) -> Array:
    """Joins conditions, [rows, columns] or [B|1, N|K|1, rows, columns]."""
    return functools.reduce(operator.and_, same_heads(*conditions))


def on_tile(tile: Tile | ListedTile, leaf: Array, dims: str) -> Array:
    """Cuts a leaf with these dimensions to a tile and lets it broadcast against [B, N, T, S]."""
    if dims == "1":
        return as_column(leaf)
    if dims == "1nt":
        return sliced(leaf, -1, tile.row, tile.rows)[..., :, None]
    if dims == "1ns":
        return columns_of(leaf[..., None, :], tile)
    return sliced_tile(leaf, tile)


def sliced_tile(array: Array, tile: Tile | ListedTile) -> Array:
    """Returns the part of an array [.., T|1, S|1] that lies on a tile."""
    if array.shape[-2] > 1:
        array = sliced(array, -2, tile.row, tile.rows)
    return columns_of(array, tile) if array.shape[-1] > 1 else array


def columns_of(array: Array, tile: Tile | ListedTile) -> Array:
    """Returns the columns of a tile of an array [B|1, N|K|1, rows, S]."""
    if isinstance(tile, Tile):
        return sliced(array, -1, tile.column, tile.columns)
    array, keys = same_heads(array, tile.keys)
    return jnp.take_along_axis(array, keys, axis=-1)


def sliced(array: Array, axis: int, start: Bound, size: int) -> Array:
    """Returns `size` elements of an axis from `start` on."""
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def maximum(a: Bound, b: Bound) -> Bound:
    """Returns the larger bound, static if both are."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def minimum(a: Bound, b: Bound) -> Bound:
    """Returns the smaller bound, static if both are."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def where(condition: bool | Array, a: Bound, b: Bound) -> Bound:
    """Returns one of two bounds, static if the condition and the bound are."""
    if isinstance(condition, bool):
        return a if condition else b
    return jnp.where(condition, a, b)
