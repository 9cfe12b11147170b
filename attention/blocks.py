"""Block lists: the blocks of keys that each block of queries attends to, made at run time.

A list is what `masks.blocks` takes: padded int32 indices, unique and ascending in the first `count`
places of the last dimension, 0 behind them, and the count. Rows of lists are all dimensions before
that: [B|1, N|K|1, Q] for a mask. A list chooses and has no gradient.

Lengths of lists are static, so whoever knows that rows have few blocks says so by `longest`. A row
that has more keeps the first ones, and its count stays what it was: `masks.blocks` refuses that
where it checks, which is outside of jit and under `jax.experimental.checkify`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import partition

Lists = tuple[Int[Array, "*rows L"], Int[Array, "*rows"]]
"""Indices and counts."""


def lists_from_mask(mask: Bool[ArrayLike, "*rows C"], longest: int | None = None) -> Lists:
    """Lists the blocks that a mask marks.

    Args:
      mask: of all C blocks of keys, for every row.
      longest: L, the most blocks of a row; None for C.

    Returns:
      Indices and counts.

    Raises:
      TypeError: the mask is not boolean.
      ValueError: longest is no positive integer.

    Example:
      >>> indices, counts = lists_from_mask([[True, False, True], [False, False, False]])
      >>> indices.tolist(), counts.tolist()
      ([[0, 2, 0], [0, 0, 0]], [2, 0])
    """
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask: must be boolean; got {mask.dtype}")
    return _packed(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask, longest)


def lists_from_ranges(
    starts: Int[ArrayLike, "*rows"], stops: Int[ArrayLike, "*rows"], longest: int
) -> Lists:
    """Lists blocks start .. stop - 1; none where stop is not beyond start.

    Args:
      starts: first blocks, at least 0.
      stops: ends, of a shape that broadcasts with that of the starts.
      longest: L, the most blocks of a row.

    Returns:
      Indices and counts.

    Raises:
      ValueError: longest is no positive integer.

    Example:
      >>> indices, counts = lists_from_ranges([0, 1, 5], [1, 4, 5], longest=3)
      >>> indices.tolist(), counts.tolist()
      ([[0, 0, 0], [1, 2, 3], [0, 0, 0]], [1, 3, 0])
    """
    longest = _checked_longest(longest)
    starts, stops = (jnp.asarray(x, jnp.int32) for x in (starts, stops))
    counts = jnp.maximum(stops - starts, 0)
    place = jnp.arange(longest, dtype=jnp.int32)
    return jnp.where(place < counts[..., None], starts[..., None] + place, 0), counts


def lists_from_indices(
    indices: Int[ArrayLike, "*rows M"],
    listed: Bool[ArrayLike, "*rows M"],
    longest: int | None = None,
) -> Lists:
    """Lists blocks that are given in any order and any number of times.

    Args:
      indices: numbers of blocks, at least 0.
      listed: which of them count; others may be anything.
      longest: L, the most different blocks of a row; None for M.

    Returns:
      Indices and counts.

    Raises:
      ValueError: longest is no positive integer.

    Example:
      >>> indices, counts = lists_from_indices([[7, 2, 9, 2]], [[True, True, False, True]])
      >>> indices.tolist(), counts.tolist()
      ([[2, 7, 0, 0]], [2])
    """
    ordered = _ordered(jnp.asarray(indices, jnp.int32), jnp.asarray(listed))
    again = jnp.zeros_like(ordered[..., :1], bool)
    again = jnp.concatenate([again, ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    return _packed(ordered, (ordered != _NONE) & ~again, longest)


def top_blocks(
    scores: Float[ArrayLike, "*rows C"],
    count: int,
    *,
    forced: Bool[ArrayLike, "*#rows C"] | None = None,
    allowed: Bool[ArrayLike, "*#rows C"] | None = None,
) -> Lists:
    """Lists the `count` blocks of the highest scores, fewer where fewer are allowed.

    Of equal scores, those of lower numbers come first.

    Args:
      scores: of all C blocks of keys, for every row; -inf for what is not allowed.
      count: how many blocks a row may list, the forced ones included.
      forced: blocks that come before all others; those of lower numbers first, if `count` is too
        small for all.
      allowed: blocks that may be listed at all, forced or not; None for all.

    Returns:
      Indices, [*rows, min(count, C)], and counts.

    Raises:
      ValueError: count is no positive integer.

    Example:
      >>> forced = [True, False, False, False]
      >>> indices, counts = top_blocks([[0.3, 0.1, 0.9, 0.5]], 2, forced=forced)
      >>> indices.tolist(), counts.tolist()
      ([[0, 2]], [2])
    """
    if not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"count: must be a positive integer; got {count!r}")
    scores, order = _ranked(scores, forced, allowed)
    order = order[..., : int(count)]
    allowed = jnp.take_along_axis(scores, order, axis=-1) > -jnp.inf
    return _packed(order, allowed, None)


def top_mask(
    scores: Float[ArrayLike, "*rows C"],
    count: int | Int[ArrayLike, "*#rows"],
    *,
    forced: Bool[ArrayLike, "*#rows C"] | None = None,
    allowed: Bool[ArrayLike, "*#rows C"] | None = None,
) -> Bool[Array, "*rows C"]:
    """Marks the blocks that `top_blocks` lists, where every row has a count of its own.

    Args:
      scores: as for `top_blocks`.
      count: how many blocks each row marks, the forced ones included.
      forced: as for `top_blocks`.
      allowed: likewise.

    Example:
      >>> top_mask([[0.3, 0.1, 0.9], [0.3, 0.1, 0.9]], jnp.array([1, 2])).astype(int).tolist()
      [[0, 0, 1], [1, 0, 1]]
    """
    scores, order = _ranked(scores, forced, allowed)
    rank = jnp.argsort(order, axis=-1)
    return (rank < jnp.asarray(count)[..., None]) & (scores > -jnp.inf)


def choose_lists(
    choice: Callable[[Array, Array], Lists],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
) -> Lists:
    """Calls a function that makes lists of queries and keys, without a gradient.

    It is called on every device with the batch and heads that lie there, as `tiled_attention` is.

    Args:
      choice: makes lists [B, N, Q, L] and [B, N, Q] of any part of batch and heads.
      query: its first argument.
      key: its second.
    """
    query, key = jax.lax.stop_gradient((query, key))
    dims = ("btnh", "bsnh"), ("bnql", "bnq")
    return partition.sharded(choice, *dims, partition.current_axes())(query, key)


_NONE = np.iinfo(np.int32).max


def _ranked(
    scores: ArrayLike, forced: ArrayLike | None, allowed: ArrayLike | None
) -> tuple[Array, Array]:
    """Returns scores, -inf for what is not allowed, and the blocks in order, best first."""
    scores = jax.lax.stop_gradient(jnp.asarray(scores))
    if forced is not None:
        scores = jnp.minimum(scores, jnp.finfo(scores.dtype).max)
        scores = jnp.where(jnp.asarray(forced), jnp.inf, scores)
    if allowed is not None:
        scores = jnp.where(jnp.asarray(allowed), scores, -jnp.inf)
    # A sort, unlike `top_k` and scatters, is partitioned over batch and heads.
    return scores, jnp.argsort(scores, axis=-1, descending=True)


def _ordered(indices: Array, listed: Array) -> Array:
    """Returns indices in ascending order, _NONE for those that are not listed."""
    return jnp.sort(jnp.where(listed, indices, _NONE), axis=-1)


def _packed(indices: Array, listed: Array, longest: int | None) -> Lists:
    """Returns the lists of indices that do not repeat."""
    longest = listed.shape[-1] if longest is None else _checked_longest(longest)
    ordered = _ordered(indices, listed)[..., :longest]
    counts = jnp.sum(listed, axis=-1, dtype=jnp.int32)
    return jnp.where(ordered == _NONE, 0, ordered), counts


def _checked_longest(longest: int) -> int:
    if not isinstance(longest, int | np.integer) or longest < 1:
        raise ValueError(f"longest: must be a positive integer; got {longest!r}")
    return int(longest)
