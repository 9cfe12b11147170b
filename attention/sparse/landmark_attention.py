"""Landmark attention: blocks of tokens compete by their landmarks, tokens within their block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.blocks import top_blocks
from attention.cache.kv_cache import KVCache, init_of_mechanism
from attention.catalogue import Mechanism
from attention.dense.arguments import appended
from attention.packing import places
from attention.state import check_state
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.choose import resolve_implementation
from pallas_kernels.tiled import merge_partials, tiled_attention

BLOCK_SIZE = 64
"""Of the released LLaMA: 63 tokens and their landmark."""


def landmark_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    block_size: int = BLOCK_SIZE,
    is_landmark: Bool[ArrayLike, "B T"] | None = None,
    num_landmarks: int | None = None,
    top_k: int | None = None,
    share_heads: bool = False,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Causal attention in which a block of tokens gets what its last one, its landmark, wins.

    With s_ij = scale q_i . k_j, c the block of token i and l(b) the landmark of block b, all sums
    being over tokens that are no landmarks,

        p_i  = softmax over {j <= i in c} and {l(b), b < c} of s_i
        g_ib = softmax over {j in b} of s_i
        o_i  = sum_{j <= i in c} p_ij v_j + sum_{b < c} p_i,l(b) sum_{j in b} g_ibj v_j

    so weights of a row sum to 1; values of landmarks count for nothing, and so does the landmark of
    the token's own block. By default every `block_size`-th token of a document is a landmark.
    Without landmarks, T < `block_size`, this is softmax attention.

    With `top_k`, b runs over those `top_k` of the blocks before c that have the highest s_i,l(b),
    for each token and head: what is done for long contexts, after training with all. A token then
    takes the time of `top_k` blocks and all landmarks, and the choice O(T^2 / `block_size`) memory.

    O(T^2) time, O(T) memory. Scores and sums are float32, or float64 for float64 queries. First
    derivatives exist in reverse mode, and none of a choice; the implementation "reference" has all.
    Its groups of keys have no TPU kernel: there attention to blocks before is plain JAX.

    The released code reads a long text in chunks: a token sees all blocks of its own chunk, and a
    choice for a whole chunk may depend on later tokens. Here every token chooses for itself, so
    results do not depend on chunks. There, chosen blocks also get new rotary positions, next to the
    token, other ones for each pair of a token and a block, so that queries no longer share turned
    keys: left out; positions are those that queries and keys are given with.

    Source: Mohtashami and Jaggi, Landmark Attention: Random-Access Infinite Context Length for
    Transformers (2023).

    Args:
      query: float array, turned by rotary positions, if any.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      block_size: tokens in a block, with its landmark; 64 by default as released. With
        `is_landmark` the most that a block may have.
      is_landmark: which tokens are landmarks, each the last of its block, such as where windows
        begin anywhere; None for every `block_size`-th of a document. A landmark alone is no block.
      num_landmarks: the most landmarks that a row has in `is_landmark`; None for
        T // `block_size` + 1. Rows with more, or with a longer block, have outputs of NaN.
      top_k: how many blocks before its own a token sees; None for all.
      share_heads: whether all heads choose the same blocks, by the largest of their softmax over
        landmarks of blocks before.
      scale: factor of the scores; None for 1 / sqrt(H).
      segment_ids: documents packed into a row: tokens attend within their own.
      implementation: None for the best, "reference", "xla", or "pallas_tpu" for a `block_size` of
        8, 16, 32, 64 or 128 without `top_k`.

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 8))
      >>> out = landmark_attention(query, key, value, block_size=16)
      >>> out.shape
      (2, 100, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    _check(block_size, top_k, implementation)
    batch, tokens = query.shape[:2]
    place = places(segment_ids, batch, tokens)
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    count = tokens // block_size
    given = is_landmark is not None
    if given:
        is_landmark = _checked_landmarks(is_landmark, (batch, tokens))
        count = count + 1 if num_landmarks is None else num_landmarks
        check_positive(num_landmarks=count)
    elif num_landmarks is not None:
        raise ValueError(f"num_landmarks: is of is_landmark, which is None; got {num_landmarks!r}")
    else:
        is_landmark = place % block_size == block_size - 1
    begins = (place == 0) | jnp.pad(is_landmark[:, :-1], ((0, 0), (1, 0)))
    document, begin = (jax.lax.cummax(jnp.where(x, index, 0), axis=1) for x in (place == 0, begins))

    ids = jnp.broadcast_to(begin, (batch, tokens))
    own = masks.segments(ids, jnp.where(is_landmark, -2, ids)) & masks.window(block_size - 1, 0)
    older = None
    if count and not given and segment_ids is None:
        older = _aligned(key, value, block_size)
    elif count:
        older = _gathered(key, value, is_landmark, begin, count, block_size)
    tokens_of = query, begin, document
    out = _attend(tokens_of, (key, value, own), older, 0, top_k, share_heads, scale, implementation)
    if given:
        wrong = jnp.any(index - begin >= block_size, axis=1)
        wrong |= jnp.sum(is_landmark, axis=1) > count
        out = jnp.where(wrong[:, None, None, None], jnp.nan, out)
    return out


def _check(block_size: int, top_k: int | None, implementation: str | None) -> None:
    if not isinstance(block_size, int) or block_size < 2:
        raise ValueError(f"block_size: must be an integer of at least 2; got {block_size!r}")
    check_positive(top_k=1 if top_k is None else top_k)
    available = {name: lambda: None for name in ("xla", "reference", "pallas_tpu")}
    resolve_implementation(implementation, available, function="landmark_attention")


def _checked_landmarks(is_landmark: ArrayLike, shape: tuple[int, int]) -> Bool[Array, "B T"]:
    is_landmark = jnp.asarray(is_landmark)
    if is_landmark.dtype != bool:
        raise TypeError(f"is_landmark: must be boolean; got {is_landmark.dtype}")
    if is_landmark.shape != shape:
        raise ValueError(f"is_landmark: must have shape {shape}; got {is_landmark.shape}")
    return is_landmark


class _Blocks(NamedTuple):
    """Blocks that end with a landmark, which stands in the last of their places.

    Attributes:
      size: number of places.
      key: what stands in them; anything in those without a token.
      value: likewise.
      end: token number of the landmark; where a place has no token, that of no token.
      offset: by how many places keys stand behind where they were, at most.
    """

    size: int
    key: Float[Array, "B S*size K H"]
    value: Float[Array, "B S*size K V"]
    end: Int[Array, "B|1 S*size"]
    offset: masks.Bound


def _aligned(key: Array, value: Array, size: int) -> _Blocks:
    """Returns the blocks of rows in which they all are of one size."""
    tokens = key.shape[1] // size * size
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    return _Blocks(size, key[:, :tokens], value[:, :tokens], index // size * size + size - 1, 0)


def _gathered(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    is_landmark: Bool[Array, "B T"],
    begin: Int[Array, "B T"],
    count: int,
    size: int,
) -> _Blocks:
    """Returns the blocks of rows in which they may be shorter."""
    batch, tokens = key.shape[:2]
    end = jax.vmap(lambda x: jnp.nonzero(x, size=count, fill_value=tokens)[0])(is_landmark)
    end = end.astype(jnp.int32)
    there = end < tokens
    first = jnp.take_along_axis(begin, jnp.minimum(end, tokens - 1), axis=1)
    place = end[..., None] - jnp.arange(size - 1, -1, -1, dtype=jnp.int32)
    inside = there[..., None] & (place >= first[..., None])
    index = jnp.clip(place, 0, tokens - 1).reshape(batch, -1)
    shift = jnp.arange(1, count + 1, dtype=jnp.int32) * size - 1 - end
    return _Blocks(
        size,
        *(jnp.take_along_axis(x, index[:, :, None, None], axis=1) for x in (key, value)),
        jnp.where(inside, end[..., None], tokens).reshape(batch, -1),
        jnp.max(jnp.where(there, shift, 0), axis=1, initial=0),
    )


def _attend(
    of_tokens: tuple[Array, Array, Array],
    own: tuple[Array, Array, masks.Mask],
    older: _Blocks | None,
    offset: masks.Bound,
    top_k: int | None,
    share_heads: bool,
    scale: float | None,
    implementation: str | None,
) -> Float[Array, "B T N V"]:
    """Returns attention to the own block of each token, and to those before.

    Args:
      of_tokens: queries, the first tokens of their blocks, and those of their documents.
      own: keys, values, and who of them is in the own block, and seen.
      older: blocks that may come before; None if there are none.
      offset: of the first query among the keys.
      top_k: as for `landmark_attention`; likewise the others.
      share_heads: likewise.
      scale: likewise.
      implementation: likewise.
    """
    query, begin, document = of_tokens
    scale = query.shape[3] ** -0.5 if scale is None else scale

    def attend(key: Array, value: Array, mask: masks.Mask, **groups: int) -> tuple[Array, Array]:
        return tiled_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            return_lse=True,
            implementation=implementation,
            function="landmark_attention",
            **groups,
        )

    if older is None:
        return attend(*own)[0]
    mask = masks.rule(_before, (document, begin), older.end) & masks.causal(offset + older.offset)
    if top_k is not None:
        chosen = _chosen(query, older, document, begin, top_k, share_heads, scale)
        mask &= masks.blocks(*chosen, 1, older.size)
    parts = attend(older.key, older.value, mask, group_size=older.size), attend(*own)
    return merge_partials(*zip(*parts, strict=True))[0]


def _before(query: tuple[Any, Any], end: Any) -> Array:
    """Says whether blocks end in the query's document before its own block begins."""
    document, begin = query
    return (document <= end) & (end < begin)


def _chosen(
    query: Float[Array, "B T N H"],
    older: _Blocks,
    document: Int[Array, "B|1 T"],
    begin: Int[Array, "B|1 T"],
    count: int,
    share_heads: bool,
    scale: float,
) -> tuple[Int[Array, "B N|1 T L"], Int[Array, "B N|1 T"]]:
    """Returns lists of the blocks with the best landmarks."""
    (batch, tokens, heads, features), size = query.shape, older.size
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query, key = jax.lax.stop_gradient((query, older.key[:, size - 1 :: size]))
    query = query.reshape(batch, tokens, key.shape[2], -1, features)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=wide)
    scores = scores.reshape(batch, heads, tokens, -1)
    # The place before the landmark's has a token, unless the landmark is alone.
    end = older.end[:, size - 2 :: size]
    allowed = _before((document[..., None], begin[..., None]), end[:, None])[:, None]
    if share_heads:
        shares = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(wide).min), axis=-1)
        scores = jnp.max(shares, axis=1, keepdims=True)
    return top_blocks(scores, count, allowed=allowed)


def landmark_attention_step(
    state: KVCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    block_size: int = BLOCK_SIZE,
    top_k: int | None = None,
    share_heads: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], KVCache]:
    """Continues `landmark_attention` by T >= 1 tokens: a prompt at once, or token by token.

    Every `block_size`-th token is a landmark. `KVCache.append` says what happens where tokens do
    not fit.

    Args:
      state: keys and values so far.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      block_size: as for `landmark_attention`, and the same in all steps.
      top_k: likewise.
      share_heads: likewise.
      scale: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `landmark_attention`.

    Example:
      >>> state = init_landmark_attention_state(1, 128, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 100, 4, 8))
      >>> out, state = landmark_attention_step(state, query, key, value, block_size=16, top_k=2)
      >>> out.shape, int(state.length)
      ((1, 100, 4, 8), 100)
    """
    check_state(state, KVCache)
    _check(block_size, top_k, implementation)
    query, key, value, length, state = appended(state, query, key, value)
    check_arrays(query, key, value)
    place, index = (jnp.arange(n, dtype=jnp.int32)[None] for n in (query.shape[1], key.shape[1]))
    begin = (length + place) // block_size * block_size
    ids = jnp.where(index % block_size == block_size - 1, -2, index // block_size * block_size)
    ids, own_ids = (jnp.broadcast_to(x, (query.shape[0], x.shape[1])) for x in (ids, begin))
    own = masks.segments(own_ids, ids) & masks.window(block_size - 1, 0, length)
    older = _aligned(key, value, block_size) if key.shape[1] >= block_size else None
    out = _attend(
        (query, begin, jnp.zeros_like(begin)),
        (key, value, own),
        older,
        length,
        top_k,
        share_heads,
        scale,
        implementation,
    )
    return out, state


init_landmark_attention_state = init_of_mechanism("landmark_attention")


RECORD = Mechanism(
    slug="landmark_attention",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    year=2023,
    family="sparse",
    patterns=frozenset({"self causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu"),
    has_weights=False,
    function=landmark_attention,
    step=landmark_attention_step,
    init_state=init_landmark_attention_state,
    small={"block_size": 5},
)
