# ruff: noqa: D102 -- the methods of all masks are documented in Mask
"""Masks that depend on where queries and keys stand."""

import functools
import operator

import jax
from jaxtyping import Array

from pallas_kernels.masks.algebra import (
    Bound,
    Mask,
    Shape,
    Tiles,
    as_column,
    mask_class,
    maximum,
    per_row,
    row_dims,
    where,
)


@mask_class
class Causal(Mask):
    """See `causal`."""

    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        return Causal(per_row(self.offset, "causal: offset", shape))

    def dims(self) -> tuple[str, ...]:
        return row_dims(self.offset)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return keys <= queries + self.offset

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        offset = as_column(self.offset)
        return columns.first <= rows.last + offset, columns.last <= rows.first + offset

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        return 0, row + rows + self.offset

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        return column - self.offset, queries


@mask_class
class Window(Mask):
    """See `window`."""

    left: Bound | None
    right: Bound | None
    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        left, right = (
            None if side is None else per_row(side, f"window: {name}", shape)
            for name, side in (("left", self.left), ("right", self.right))
        )
        return Window(left, right, per_row(self.offset, "window: offset", shape))

    def dims(self) -> tuple[str, ...]:
        sides = (side for side in (self.left, self.right) if side is not None)
        return tuple(d for bound in (*sides, self.offset) for d in row_dims(bound))

    def allowed(self, queries: Array, keys: Array) -> Array:
        distance = keys - queries
        return self._holds(distance, distance)

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        least, most = columns.first - rows.last, columns.last - rows.first
        mask = jax.tree.map(as_column, self)
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


@mask_class
class Prefix(Mask):
    """See `prefix`."""

    length: Bound
    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        return Prefix(
            per_row(self.length, "prefix: length", shape),
            per_row(self.offset, "prefix: offset", shape),
        )

    def dims(self) -> tuple[str, ...]:
        return row_dims(self.length) + row_dims(self.offset)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return (keys <= queries + self.offset) | (keys < self.length)

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        mask = jax.tree.map(as_column, self)
        return mask.allowed(rows.last, columns.first), mask.allowed(rows.first, columns.last)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        return 0, maximum(row + rows + self.offset, self.length)

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        return where(column < self.length, 0, column - self.offset), queries


@mask_class
class Lengths(Mask):
    """See `lengths`."""

    query: Bound | None
    key: Bound | None

    def resolve(self, shape: Shape) -> Mask:
        return Lengths(
            *(
                None if length is None else per_row(length, f"lengths: {name}", shape)
                for name, length in (("query", self.query), ("key", self.key))
            )
        )

    def dims(self) -> tuple[str, ...]:
        given = (length for length in (self.query, self.key) if length is not None)
        return tuple(d for length in given for d in row_dims(length))

    def allowed(self, queries: Array, keys: Array) -> Array:
        conditions = [queries == queries]  # True, of the shape that is asked for
        if self.query is not None:
            conditions.append(queries < self.query)
        if self.key is not None:
            conditions.append(keys < self.key)
        return functools.reduce(operator.and_, conditions)

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        mask = jax.tree.map(as_column, self)
        return mask.allowed(rows.first, columns.first), mask.allowed(rows.last, columns.last)

    def key_range(self, row: Bound, rows: int, keys: int) -> tuple[Bound, Bound]:
        stop = keys if self.key is None else self.key
        if self.query is not None:
            stop = where(row < self.query, stop, 0)
        return 0, stop

    def query_range(self, column: Bound, columns: int, queries: int) -> tuple[Bound, Bound]:
        return Lengths(self.key, self.query).key_range(column, columns, queries)


@mask_class
class Dilated(Mask):
    """See `dilated`."""

    step: int
    offset: Bound

    def resolve(self, shape: Shape) -> Mask:
        return Dilated(self.step, per_row(self.offset, "dilated: offset", shape))

    def dims(self) -> tuple[str, ...]:
        return row_dims(self.offset)

    def allowed(self, queries: Array, keys: Array) -> Array:
        return (queries + self.offset - keys) % self.step == 0

    def occupancy(self, rows: Tiles, columns: Tiles) -> tuple[Array, Array]:
        offset = as_column(self.offset)
        first, last = rows.first + offset - columns.last, rows.last + offset - columns.first
        return last // self.step >= -(-first // self.step), (first == first) & (self.step == 1)
