"""Tokens of images and videos: sequences with a static shape, laid out tile by tile."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


def checked_shape(shape: tuple[int, ...] | None, tokens: int) -> tuple[int, ...]:
    """Returns the lengths of the axes whose product, in row-major order, the tokens are.

    Args:
      shape: lengths of one to three axes; None for one axis of all tokens.
      tokens: number of tokens.

    Raises:
      ValueError: the shape is none, or not one of these tokens.
    """
    if shape is None:
        return (tokens,)
    shape = tuple(shape) if isinstance(shape, tuple | list) else shape
    if not isinstance(shape, tuple) or not 1 <= len(shape) <= 3 or not all(map(_positive, shape)):
        raise ValueError(f"shape: must be one to three positive integers; got {shape!r}")
    if math.prod(shape) != tokens:
        raise ValueError(f"shape: {shape} has {math.prod(shape)} tokens; query has {tokens}")
    return shape


def sizes_by_axis(
    name: str, value: int | tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns positive integers, one for each axis; a single one stands for all.

    Raises:
      ValueError: they are none, or too many or too few; the message names them.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * len(shape)
    if len(values) != len(shape) or not all(map(_positive, values)):
        raise ValueError(
            f"{name}: must be a positive integer, or one for each axis of {shape}; got {value!r}"
        )
    return values


def pooled(
    x: Shaped[Array, "B T *rest"], shape: tuple[int, ...], sizes: tuple[int, ...]
) -> Shaped[Array, "B S *rest"]:
    """Returns means over so many parts of each axis, in the dtype of x, of sums in float32 or more.

    Part i of n of an axis of L tokens has those from floor(i L / n) to before ceil((i + 1) L / n):
    neighbours share tokens where n does not divide L, and there may be more parts than tokens.
    """
    rest = x.ndim - 2
    result = split(x, 1, shape).astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis, (length, size) in enumerate(zip(shape, sizes, strict=True), 1):
        if length % size == 0:
            result = jnp.mean(split(result, axis, (size, length // size)), axis + 1)
            continue
        part = np.arange(size)
        start, stop = part * length // size, -(-(part + 1) * length // size)
        index = start[:, None] + np.arange(np.max(stop - start))
        weights = (index < stop[:, None]) / (stop - start)[:, None]
        index = np.minimum(index, length - 1).astype(np.int32)
        parts = split(jnp.take(result, index.ravel(), axis), axis, index.shape)
        weights = weights.reshape(*index.shape, *(1,) * (len(sizes) - axis + rest))
        result = jnp.sum(parts * jnp.asarray(weights, result.dtype), axis + 1)
    return merged(result, 1, len(sizes)).astype(x.dtype)


def split(x: Array, axis: int, sizes: tuple[int, ...]) -> Array:
    """Returns an array with several dimensions in the place of one.

    JAX knows how the result is sharded where a reshape splits, or merges, in one place.
    """
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def merged(x: Array, axis: int, count: int) -> Array:
    """Returns an array with one dimension in the place of several."""
    size = math.prod(x.shape[axis : axis + count])
    return x.reshape(*x.shape[:axis], size, *x.shape[axis + count :])


class Grid(NamedTuple):
    """How the tokens of a shape are laid out: in groups, these in tiles.

    On every axis the tokens of a group are those with the same remainder by its dilation, and a
    tile is a number of neighbours in a group; groups, tiles and the tokens of a tile are numbered
    in row-major order. Each axis is filled up to whole tiles of all groups. It takes reshapes and a
    transposition, no gathers.

    Attributes:
      shape: number of tokens on each axis.
      tile: tokens of a tile on each axis.
      dilation: distance of neighbours in a group on each axis.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Returns the number of tiles of a group on each axis."""
        sizes = zip(self.shape, self.tile, self.dilation, strict=True)
        return tuple(-(-length // (tile * step)) for length, tile, step in sizes)

    @property
    def groups(self) -> int:
        """Returns the number of groups."""
        return math.prod(self.dilation)

    def laid_out(
        self, x: Shaped[Array, "B T *rest"], fill: Any = 0
    ) -> Shaped[Array, "B*groups tiles*tile *rest"]:
        """Returns the groups' tokens tile by tile, in the place of the batch; NumPy's of NumPy's.

        Args:
          x: what each token has.
          fill: what those have that fill up the axes.
        """
        rest = x.ndim - 2
        x = split(x, 1, self.shape)
        if self._whole != self.shape:
            pads = ((0, n - length) for n, length in zip(self._whole, self.shape, strict=True))
            widths = ((0, 0), *pads, *((0, 0),) * rest)
            numpy = np if isinstance(x, np.ndarray) else jnp
            x = numpy.pad(x, widths, constant_values=fill)
        for axis, sizes in reversed(list(enumerate(self._sizes, 1))):
            x = split(x, axis, sizes)
        axes = len(self.shape)
        x = x.transpose(self._order(x.ndim))
        return merged(merged(x, axes + 1, 2 * axes), 0, axes + 1)

    def restored(self, x: Shaped[Array, "B*groups tiles*tile *rest"]) -> Shaped[Array, "B T *rest"]:
        """Returns tokens in their own order again, without those that fill up the axes."""
        axes = len(self.shape)
        x = split(x, 1, (*self.tiles, *self.tile))
        x = split(x, 0, (x.shape[0] // self.groups, *self.dilation))
        x = x.transpose(np.argsort(self._order(x.ndim)))
        for axis in range(1, axes + 1):
            x = merged(x, axis, 3)
        if self._whole != self.shape:
            x = x[(slice(None), *map(slice, self.shape))]
        return merged(x, 1, axes)

    @property
    def _sizes(self) -> tuple[tuple[int, int, int], ...]:
        """Returns tiles, tile and dilation of each axis: how its tokens, filled up, split."""
        return tuple(zip(self.tiles, self.tile, self.dilation, strict=True))

    @property
    def _whole(self) -> tuple[int, ...]:
        """Returns the length of each axis, filled up."""
        return tuple(math.prod(sizes) for sizes in self._sizes)

    def _order(self, dims: int) -> tuple[int, ...]:
        """Returns dilations, tiles and tile of all axes out of what the axes split into."""
        last = 3 * len(self.shape)
        return (0, *(i for k in (3, 1, 2) for i in range(k, last + 1, 3)), *range(last + 1, dims))


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
