"""What exact attention makes of the arguments that its forms share."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.cache.kv_cache import KVCache
from attention.cache.window_cache import WindowCache, checked_window
from attention.state import check_state
from pallas_kernels import masks, partition
from pallas_kernels.tiled import tiled_attention
from pallas_kernels.tiled.inputs import zero_outside


def batched(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Returns the arrays with a batch of 1 where they have none.

    Raises:
      ValueError: key or value have another dtype than query.
    """
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    for name, x in zip(("key", "value"), arrays[1:], strict=True):
        if x.dtype != arrays[0].dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be query's, {arrays[0].dtype}")
    return tuple(x[None] if x.ndim == 3 else x for x in arrays)


def joined_mask(
    batch: int,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 S|1"] | masks.Mask | None,
    *,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "B"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | tuple[ArrayLike, ArrayLike] | None = None,
    query_offset: masks.Bound = 0,
) -> masks.Mask | None:
    """Returns all masks that the arguments of `softmax_attention` stand for, joined.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
    """
    lengths = [
        None if length is None else _checked_lengths(length, name, batch)
        for name, length in (
            ("query_seq_lengths", query_seq_lengths),
            ("key_value_seq_lengths", key_value_seq_lengths),
        )
    ]
    parts = [] if mask is None else [mask if isinstance(mask, masks.Mask) else masks.dense(mask)]
    if is_causal:
        parts.append(masks.causal(query_offset))
    if local_window_size is not None:
        parts.append(masks.window(*checked_window(local_window_size), query_offset))
    if any(length is not None for length in lengths):
        parts.append(masks.lengths(*lengths))
    if segment_ids is not None:
        ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
        parts.append(masks.segments(*ids))
    return masks.all_of(parts)


def log_counts(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    mask: masks.Mask | None,
    implementation: str | None,
    function: str,
) -> Float[Array, "B|1 T|1 N|1"]:
    """Returns the logarithm of the number of keys that each query sees; 0 for none.

    It is the log-sum-exp of scores of 0, in one head if the mask is the same for all.
    """
    (batch, tokens, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if mask is None:
        return jnp.full((1, 1, 1), math.log(keys), dtype)
    resolved = mask.resolve(masks.Shape(tokens, keys, batch, heads, kv_heads))
    leaves = zip(jax.tree.leaves(resolved), resolved.dims(), strict=True)
    if not any("n" in dims and x.shape[dims.index("n")] > 1 for x, dims in leaves):
        heads = kv_heads = 1
    zeros = (
        jnp.zeros((batch, tokens, heads, 1), dtype),
        jnp.zeros((batch, keys, kv_heads, 1), dtype),
    )
    # Laid out as the arrays that they stand for.
    _, _, query, key = partition.aligned(
        (query, key, *zeros),
        ("btnh", "bsnh") * 2,
        partition.current_axes(),
        ("query", "key") * 2,
    )
    _, lse = tiled_attention(
        query,
        key,
        key,
        mask=mask,
        return_lse=True,
        implementation=implementation,
        function=function,
    )
    return jnp.where(jnp.isneginf(lse), 0, lse)


def without_hidden(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], mask: masks.Mask | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
    """Returns queries and keys with zeros in place of those that the mask's ranges rule out.

    A function that computes something of them, before the kernel does this, would differentiate
    whatever stands there, NaN even.
    """
    if mask is None:
        return query, key
    (batch, queries, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    mask = mask.resolve(masks.Shape(queries, keys, batch, heads, kv_heads))
    query = zero_outside(query, 0, *mask.query_range(0, keys, queries))
    return query, zero_outside(key, 0, *mask.key_range(0, queries, keys))


def appended(
    state: KVCache | WindowCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> tuple[Array, Array, Array, Int[Array, ""], KVCache | WindowCache]:
    """Puts new tokens into the cache of a step.

    Returns:
      The query, the cached and new keys and values in query's dtype, the place of the first new
      token among them, and the cache.

    Raises:
      TypeError: segment ids are not a pair, or the state is no cache.
      ValueError: there are not as many keys as queries, they do not fit into the cache, or it
        forgets what the window sees.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if query.ndim == 4 and key.ndim == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(f"key: {key.shape[1]} tokens must be as many as query's {query.shape[1]}")
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        raise TypeError("segment_ids: must be a pair (ids of queries, ids of the cache) in a step")
    if isinstance(state, WindowCache):
        if local_window_size is None or checked_window(local_window_size)[0] > state.window:
            raise ValueError(
                f"local_window_size: {local_window_size} needs more than the {state.window} tokens "
                "that the state keeps; make it with the same local_window_size"
            )
        seen, after = state.extended(key, value)
        offset = seen.length - key.shape[1]
    else:
        seen = after = check_state(state, KVCache).append(key, value)
        offset = state.length
    return query, seen.key.astype(query.dtype), seen.value.astype(query.dtype), offset, after


def _checked_lengths(value: ArrayLike, name: str, batch: int) -> masks.Bound:
    value = masks.as_bound(value, name)
    if isinstance(value, int) or value.shape != (batch,):
        raise ValueError(f"{name}: must be int32[B] with B = {batch}; got {jnp.shape(value)}")
    return value
