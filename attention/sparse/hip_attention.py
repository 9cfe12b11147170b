"""HiP attention: each block of queries finds its keys by a search that halves its steps."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.blocks import Lists, choose_lists, lists_from_indices, top_blocks
from attention.catalogue import Mechanism
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.tiled import tiled_attention

Representative = Literal["first", "middle", "all"]

GATHERED = 2**24
"""Numbers of keys that are gathered at a time, over batch and heads."""


def hip_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    mask_k: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    group: int = 8,
    window: int = 128,
    sinks: int = 32,
    representative: Representative = "first",
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Causal attention to the keys that a tree search finds, and those at hand; no training needed.

    Keys lie in groups of `group` tokens, of which the search sees the least and the largest number
    of every channel, and in blocks of W = block_k group tokens. Each head and each block of block_q
    queries keeps M = mask_k / W of the nb blocks of keys before its window, all of them if they are
    no more. Else it begins with M nodes of consecutive blocks, from nb i / M to nb (i + 1) / M
    rounded down, and, ceil(log2(nb / M)) times,

        1. halves each node, the first half being the smaller one;
        2. scores every half by max over q and over the groups of its representative block of
           max(q . least, q . largest), q being every second query, from the second one on;
        3. keeps the M halves that score best.

    The queries of the block then attend, by softmax with scores scale q . k, to the blocks so
    found, the first `sinks` tokens, and the last `window` tokens before the end of the block; to
    those of them, exactly, that do not come after the query. As published, later queries of a
    block so decide for earlier ones. What is found has no gradient.

    Up to mask_k + window tokens this is causal attention. O(T / block_q M log(T / mask_k)) time for
    the search and O(T (mask_k + window + sinks)) for the attention, O(T) memory; only
    `representative="all"` searches in O(T^2 / block_q). A block of queries ends where it would if
    there were more tokens, and sinks, window and mask_k round up to whole blocks. A row is one
    document: blocks would lie across the ends of packed ones, so `segment_ids` are not taken.
    Scores and sums are float32, or float64 for float64 queries. First derivatives exist in reverse
    mode; the implementation "reference" has all.

    The released code has one group in a block of keys; the TPU kernel takes blocks of multiples of
    16 tokens, hence two by default. There the search leaves out `window` groups instead of tokens,
    and no query attends to what lies between; here nothing lies between. There a short window has
    queries search keys that come after them; here it is refused. There the best of all keys is at
    least 0; here it may be less.

    Source: Lee et al., HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention
    Pruning (2024).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      mask_k: number of tokens that the search keeps.
      block_q: number of queries that search together.
      block_k: number of groups in a block of keys.
      group: number of tokens in a group; with 1 the search sees keys themselves.
      window: number of tokens, from the end of a block of queries back, that are attended to
        without a search; at least block_q.
      sinks: number of tokens at the beginning that are always attended to.
      representative: block of a half that is scored: the "first", as released, the "middle" one,
        as published, or "all", which bounds what any choice may find.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 300, 4, 8))
      >>> out = hip_attention(query, key, value, mask_k=64, window=64)
      >>> out.shape
      (1, 300, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    check_positive(mask_k=mask_k, block_q=block_q, block_k=block_k, group=group, window=window)
    if window < block_q:
        raise ValueError(f"window: must be at least block_q, {block_q}; got {window}")
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks: must be an integer and not negative; got {sinks!r}")
    if representative not in ("first", "middle", "all"):
        raise ValueError(
            f"representative: must be 'first', 'middle' or 'all'; got {representative!r}"
        )
    tokens, width = query.shape[1], block_k * group
    ends = np.arange(block_q, tokens + block_q, block_q)
    near = np.maximum(ends - window, 0) // width
    mask, leaves = masks.causal(), -(-mask_k // width)
    if near[-1] > leaves:
        choice = functools.partial(
            _lists,
            near=near,
            at_hand=_blocks_at_hand(near, ends, tokens, -(-sinks // width), width),
            leaves=leaves,
            block_q=block_q,
            block_k=block_k,
            group=group,
            representative=representative,
        )
        mask &= masks.blocks(*choose_lists(choice, query, key), block_q, width)
    return tiled_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        implementation=implementation,
        function="hip_attention",
    )


def _blocks_at_hand(
    near: np.ndarray, ends: np.ndarray, tokens: int, sinks: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns blocks that are not searched, [Q, L], and which of them count.

    Args:
      near: first block of every window.
      ends: tokens at which windows end.
      tokens: number of all tokens.
      sinks: number of blocks at the beginning, of which those before a window count here.
      width: tokens in a block.
    """
    stop = -(-np.minimum(ends, tokens) // width)[:, None]
    near, first = near[:, None], np.arange(sinks)[None]
    last = near + np.arange(max(stop - near)[0])
    indices = np.concatenate([np.broadcast_to(first, (len(near), sinks)), last], axis=1)
    return indices, np.concatenate([first < near, last < stop], axis=1)


def _lists(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    *,
    near: np.ndarray,
    at_hand: tuple[np.ndarray, np.ndarray],
    leaves: int,
    block_q: int,
    block_k: int,
    group: int,
    representative: Representative,
) -> Lists:
    """Returns lists of the blocks that are found and those at hand."""
    samples = _samples(query, block_q, key.shape[2])
    keys = _grouped(key, int(near[-1]), block_k, group)
    found = _search(samples, keys, near, leaves, representative)
    indices, listed = (
        jnp.concatenate([mine, jnp.broadcast_to(x, (*mine.shape[:3], x.shape[1]))], axis=3)
        for mine, x in zip(found, at_hand, strict=True)
    )
    return lists_from_indices(indices, listed)


def _samples(
    query: Float[Array, "B T N H"], block_q: int, kv_heads: int
) -> Float[Array, "Q B K G R H"]:
    """Returns every second query of each block, from the second on; the only one of a short one."""
    batch, tokens, _, features = query.shape
    begins = np.arange(0, tokens, block_q)[:, None]
    rows = begins + np.arange(min(1, block_q - 1), block_q, 2)
    # What is missing in the last block is another copy of its first sample.
    rows = np.where(rows < tokens, rows, np.minimum(begins + 1, tokens - 1))
    samples = query[:, rows].reshape(batch, *rows.shape, kv_heads, -1, features)
    return jnp.transpose(samples, (1, 0, 3, 4, 2, 5))


def _grouped(
    key: Float[Array, "B T K H"], count: int, block_k: int, group: int
) -> Float[Array, "B K blocks X H"]:
    """Returns the bounds of the groups of the first blocks of keys: keys, if groups are of 1."""
    batch, _, heads, features = key.shape
    key = key[:, : count * block_k * group]
    key = key.reshape(batch, count, block_k, group, heads, features)
    bounds = [key.min(axis=3), key.max(axis=3)] if group > 1 else [key[:, :, :, 0]]
    return jnp.moveaxis(jnp.concatenate(bounds, axis=2), 3, 1)


def _search(
    samples: Float[Array, "Q B K G R H"],
    keys: Float[Array, "B K blocks X H"],
    near: np.ndarray,
    leaves: int,
    representative: Representative,
) -> tuple[Int[Array, "B N Q M"], Bool[Array, "B N Q M"]]:
    """Returns the blocks that are found for each block of queries, and which of them count.

    Args:
      samples: the queries that search.
      keys: what they are compared with.
      near: number of blocks that each block of queries searches.
      leaves: M, the most that it finds.
      representative: what scores a node.
    """
    batch, heads, _, parts, features = keys.shape
    rows, _, _, group, _, _ = samples.shape
    nodes = (batch, heads, group, leaves)
    # A node has at most this many blocks; halved so often, it has one.
    largest = -(-int(near[-1]) // leaves)
    levels = (largest - 1).bit_length()

    def row(block: tuple[Array, Array]) -> tuple[Array, Array]:
        query, count = block
        ends = count * jnp.arange(leaves + 1, dtype=jnp.int32) // leaves
        score = _scorer(query, keys, representative, levels)

        def level(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            start, size = carry
            half = size // 2
            start = _interleaved(start, start + half)
            size = _interleaved(half, size - half)
            # Whatever is left of rows with fewer levels is one block each, and stays.
            kept, counts = top_blocks(score(start, size), leaves, allowed=size > 0)
            listed = jnp.arange(leaves) < counts[..., None]
            start, size = (jnp.take_along_axis(x, kept, axis=-1) for x in (start, size))
            return start, jnp.where(listed, size, 0)

        start, size = (jnp.broadcast_to(x, nodes) for x in (ends[:-1], jnp.diff(ends)))
        start, size = jax.lax.fori_loop(0, levels, level, (start, size))
        return start, size > 0

    each = batch * heads * group * 2 * leaves * parts * features
    at_once = min(max(GATHERED // each, 1), rows)
    found = jax.lax.map(row, (samples, jnp.asarray(near, jnp.int32)), batch_size=at_once)
    return tuple(jnp.moveaxis(x.reshape(rows, batch, heads * group, leaves), 0, 2) for x in found)


def _interleaved(a: Array, b: Array) -> Array:
    return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)


def _scorer(
    query: Float[Array, "B K G R H"],
    keys: Float[Array, "B K blocks X H"],
    representative: Representative,
    levels: int,
) -> Callable[[Array, Array], Array]:
    """Returns a function of nodes, their first blocks and sizes [B, K, G, nodes], to scores."""
    batch, heads, count, parts, features = keys.shape
    group = query.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def by_block(start: Array, size: Array) -> Array:
        block = start + size // 2 if representative == "middle" else start
        taken = jnp.take_along_axis(
            keys, block.reshape(batch, heads, -1, 1, 1), axis=2, mode="clip"
        )
        taken = taken.reshape(batch, heads, group, -1, parts, features)
        scores = jnp.einsum("bkgrh,bkgmxh->bkgmxr", query, taken, preferred_element_type=dtype)
        return scores.max(axis=(4, 5))

    if representative != "all":
        return by_block

    scores = jnp.einsum("bkgrh,bkmxh->bkgmxr", query, keys, preferred_element_type=dtype)
    # The best of 1, 2, 4, ... blocks from each on: any node is two of these, that may overlap.
    best = [scores.max(axis=(4, 5))]
    for reach in range(levels - 1):
        ahead = best[-1][..., 2**reach :]
        ahead = jnp.pad(ahead, [(0, 0)] * 3 + [(0, count - ahead.shape[3])])
        best.append(jnp.maximum(best[-1], ahead))
    best = jnp.concatenate(best, axis=-1)

    def by_all(start: Array, size: Array) -> Array:
        power = 31 - jax.lax.clz(jnp.maximum(size, 1))
        first, last = (
            jnp.take_along_axis(best, power * count + at, axis=-1, mode="clip")
            for at in (start, start + size - (1 << power))
        )
        return jnp.maximum(first, last)

    return by_all


RECORD = Mechanism(
    slug="hip_attention",
    title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
    year=2024,
    family="sparse",
    patterns=frozenset({"self causal"}),
    time="O(T log T)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=hip_attention,
    selects_ahead=True,
    small={"mask_k": 4, "block_q": 2, "block_k": 1, "group": 2, "window": 2, "sinks": 1},
)
