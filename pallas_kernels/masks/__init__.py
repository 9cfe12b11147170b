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

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from pallas_kernels.masks.algebra import (
    And,
    Bound,
    ListedTile,
    Mask,
    Shape,
    Tile,
    Tiles,
    all_of,
    as_bound,
    as_integers,
    parts,
    same_heads,
    sliced_tile,
)
from pallas_kernels.masks.contents import Blocks, Dense, Rule, Segments
from pallas_kernels.masks.positions import Causal, Dilated, Lengths, Prefix, Window

__all__ = [
    "And",
    "Blocks",
    "Bound",
    "Causal",
    "Dense",
    "Dilated",
    "Lengths",
    "ListedTile",
    "Mask",
    "Prefix",
    "Rule",
    "Segments",
    "Shape",
    "Tile",
    "Tiles",
    "Window",
    "all_of",
    "as_bound",
    "blocks",
    "causal",
    "dense",
    "dilated",
    "lengths",
    "parts",
    "prefix",
    "rule",
    "same_heads",
    "segments",
    "sliced_tile",
    "window",
]


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
    query_ids = as_integers(query_ids, "segments: query_ids")
    if key_ids is None:
        return Segments(query_ids, None, shared=False)
    return Segments(query_ids, as_integers(key_ids, "segments: key_ids"), shared=True)


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
    indices, counts = as_integers(indices, "blocks: indices"), as_integers(counts, "blocks: counts")
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


def _length(value: Any, name: str) -> Bound:
    value = as_bound(value, name)
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} must not be negative; got {value}")
    return value
