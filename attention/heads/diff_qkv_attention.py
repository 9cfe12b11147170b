"""DiffQKV attention (Sigma): few small keys, more values, wide queries."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from attention.cache.kv_cache import KVCache
from attention.catalogue import Mechanism
from attention.dense.arguments import appended, joined_mask
from attention.packing import places
from attention.positions import rope
from pallas_kernels import masks, partition
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.choose import resolve_implementation
from pallas_kernels.tiled import tiled_attention

ROWS = 128
"""Queries whose scores are held at once where values are selected."""


def diff_qkv_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K D"],
    value: Float[ArrayLike, "B S L V"],
    *,
    key_lift: Float[ArrayLike, "D H"] | Float[ArrayLike, "K D H"] | None = None,
    rope_base: float | None = None,
    top_values: int | None = None,
    renormalise: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "B T"] | tuple[ArrayLike, ArrayLike] | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention with numbers and widths of key heads and of value heads of their own.

    Query head n attends with key head floor(n K / N) and value head floor(n L / N); K and L both
    divide N:

        k'_j = k_j W,                   W = `key_lift`, from D to H channels; k' = k without it
        p_tj = softmax_j(scale q_t . k'_j)
        o_t  = sum_j p_tj v_j,          j over all keys, or the keys of the n largest p_tj only

    By default scale is 1 / sqrt(H), of the width of the product. A cache holds K D + L V numbers a
    token. With `top_values` = n, an approximation for inference, values are read for n keys of each
    query and head (of equal ones those that come first); weights stay as they are, so that they add
    up to less than 1, unless `renormalise` is set: published is neither.

    Without RoPE in between, the lift is not computed for any key: (q W^T) . k is the same. RoPE
    given as `rope_base` turns queries and lifted keys here, by their place in their document;
    without a lift the caller may as well turn them before. The wider query projection of the paper
    ("augmented Q") is the caller's too.

    It takes O(T S) time and O(T + S) memory. Scores and sums are float32, or float64 for float64
    queries. First derivatives exist in reverse mode; the implementation "reference" has all.

    Source: Lin et al., Sigma: Differential Rescaling of Query, Key and Value for Efficient Language
    Models (2025).

    Args:
      query: float array.
      key: of the dtype of query; D is H without `key_lift`.
      value: likewise; its heads need not be as many as those of key.
      key_lift: W, one for all key heads or one for each.
      rope_base: of RoPE, which needs an even H; None for none.
      top_values: n; None for all.
      renormalise: whether the n largest weights are divided by their sum.
      is_causal: whether query i sees keys up to i + query_offset only.
      scale: of the scores; None for 1 / sqrt(H).
      segment_ids: ids of the documents packed into a row, of equal length T = S; or a pair (ids of
        queries, ids of keys), where keys of id -1 are seen by all. Only equal ids attend.
      query_offset: position of query 0 among the keys, for `is_causal` and `rope_base`.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu"; a kernel
        does not serve `top_values`.

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query = jax.random.normal(jax.random.key(0), (2, 16, 8, 4))
      >>> key = jax.random.normal(jax.random.key(1), (2, 16, 1, 4))
      >>> value = jax.random.normal(jax.random.key(2), (2, 16, 4, 4))
      >>> diff_qkv_attention(query, key, value, is_causal=True).shape
      (2, 16, 8, 4)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if scale is None and query.ndim == 4:
        scale = 1 / math.sqrt(query.shape[3])
    offset = masks.as_bound(query_offset, "query_offset")
    query, key = _lifted(query, key, key_lift, rope_base, segment_ids, offset)
    check_arrays(query, key, value, separate_value_heads=True)
    mask = joined_mask(
        query.shape[0], None, is_causal=is_causal, segment_ids=segment_ids, query_offset=offset
    )
    if top_values is not None:
        return _selected(query, key, value, mask, scale, top_values, renormalise, implementation)
    if renormalise:
        raise ValueError("renormalise: is of the weights that top_values leaves; got none")
    return tiled_attention(
        query,
        key,
        value,
        scale=scale,
        mask=mask,
        implementation=implementation,
        function="diff_qkv_attention",
    )


def _lifted(
    query: Array,
    key: Array,
    lift: ArrayLike | None,
    base: float | None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None,
    offset: masks.Bound,
) -> tuple[Array, Array]:
    """Returns queries and keys of one width, with the products of queries and lifted keys."""
    if lift is not None:
        lift = jnp.asarray(lift)
        for name, array in (("query", query), ("key", key)):
            if array.ndim != 4:
                raise ValueError(f"{name}: must be 4-dimensional; got shape {array.shape}")
        wanted = (key.shape[3], query.shape[3])
        if lift.shape not in (wanted, (key.shape[2], *wanted)):
            raise ValueError(
                f"key_lift: must be {wanted}, or that for each of {key.shape[2]} key heads; got "
                f"shape {lift.shape}"
            )
        if not jnp.issubdtype(lift.dtype, jnp.floating):
            raise TypeError(f"key_lift: must be floating point; got {lift.dtype}")
        dims = "kdh" if lift.ndim == 3 else "dh"
        lift, wide = lift.astype(query.dtype), jnp.promote_types(query.dtype, jnp.float32)
        if lift.ndim == 3:
            # Sharded as the heads that it is of.
            query, key, lift = partition.aligned(
                (query, key, lift[None]),
                ("btnh", "bsnd", "1ndh"),
                partition.current_axes(),
                ("query", "key", "key_lift"),
            )
            lift = lift[0]
        if base is not None:
            lifted = jnp.einsum(f"bskd,{dims}->bskh", key, lift, preferred_element_type=wide)
            key = lifted.astype(key.dtype)
        else:
            if query.shape[2] % key.shape[2]:
                raise ValueError(
                    f"key: {key.shape[2]} heads do not divide the {query.shape[2]} heads of query"
                )
            grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
            lowered = jnp.einsum(f"btkgh,{dims}->btkgd", grouped, lift, preferred_element_type=wide)
            query = lowered.reshape(*query.shape[:3], -1).astype(query.dtype)
    if base is None:
        return query, key
    if segment_ids is None:
        place = jnp.arange(query.shape[1]) + jnp.reshape(jnp.asarray(offset), (-1, 1))
        query_place = jnp.broadcast_to(place, query.shape[:2])
        key_place = jnp.arange(key.shape[1])
    elif isinstance(segment_ids, tuple):
        raise ValueError("rope_base: needs one array of segment_ids, to know places in documents")
    else:
        query_place = key_place = places(segment_ids, *query.shape[:2])
    return rope(query, query_place, base=base), rope(key, key_place, base=base)


def _selected(
    query: Array,
    key: Array,
    value: Array,
    mask: masks.Mask | None,
    scale: float,
    count: int,
    renormalise: bool,
    implementation: str | None,
) -> Float[Array, "B T N V"]:
    """Returns attention with the `count` largest weights of each row."""
    check_positive(top_values=count)
    available = {name: lambda: None for name in ("xla", "reference")}
    available["pallas_tpu"] = lambda: "it reads all values; top_values must be None"
    resolve_implementation(implementation, available, function="diff_qkv_attention")
    shared = math.lcm(key.shape[2], value.shape[2])
    key, value = (jnp.repeat(x, shared // x.shape[2], axis=2) for x in (key, value))
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    mask = masks.causal(keys) if mask is None else mask
    mask = mask.resolve(masks.Shape(queries, keys, batch, heads, shared))
    arrays = query, key, value, mask
    dims, axes = ("btnh", "bsnh", "bsnv", mask.dims()), partition.current_axes()
    arrays = partition.aligned(arrays, dims, axes, ("query", "key", "value", "segment_ids"))
    form = _selected_by_definition if implementation == "reference" else _selected_by_rows
    form = functools.partial(form, scale, min(count, keys), renormalise)
    (out,) = partition.sharded(form, dims, ("btnv",), axes)(*arrays)
    return out


def _scores(
    scale: float,
    query: Float[Array, "B rows N H"],
    key: Float[Array, "B S K H"],
    mask: masks.Mask,
    row: Array | int,
) -> tuple[Float[Array, "B N rows S"], Float[Array, "B N rows 1"]]:
    """Returns the scores of the queries from `row` on, -inf where masked, and their log-sum-exp.

    The log-sum-exp of no scores is 0 here: weights of exp(-inf - 0) are none.
    """
    (batch, rows, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, rows, kv_heads, heads // kv_heads, -1)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=wide)
    allowed = mask.tile(masks.Tile(row, rows, 0, keys))
    scores = jnp.where(allowed, scores.reshape(batch, heads, rows, keys), -jnp.inf)
    seen = jnp.any(allowed, axis=-1, keepdims=True)
    lse = jax.nn.logsumexp(jnp.where(seen, scores, 0), axis=-1, keepdims=True)
    return scores, jnp.where(seen, lse, 0)


def _weights(scores: Array, lse: Array, renormalise: bool) -> Array:
    weights = jnp.exp(scores - lse)
    if not renormalise:
        return weights
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _selected_by_definition(
    scale: float,
    count: int,
    renormalise: bool,
    query: Array,
    key: Array,
    value: Array,
    mask: masks.Mask,
) -> tuple[Float[Array, "B T N V"]]:
    scores, lse = _scores(scale, query, key, mask.prepared(query.shape[1], key.shape[1]), 0)
    _, index = jax.lax.top_k(jax.lax.stop_gradient(scores), count)
    none = jnp.zeros(scores.shape, bool)
    taken = jnp.put_along_axis(none, index, True, axis=-1, inplace=False)
    weights = _weights(jnp.where(taken, scores, -jnp.inf), lse, renormalise)
    value = jnp.repeat(value.astype(weights.dtype), query.shape[2] // value.shape[2], axis=2)
    return (jnp.einsum("bnts,bsnv->btnv", weights, value).astype(query.dtype),)


def _selected_by_rows(
    scale: float,
    count: int,
    renormalise: bool,
    query: Array,
    key: Array,
    value: Array,
    mask: masks.Mask,
) -> tuple[Float[Array, "B T N V"]]:
    queries, rows = query.shape[1], min(ROWS, query.shape[1])
    mask = mask.prepared(queries, key.shape[1])
    by_head = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2).swapaxes(1, 2)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some_rows(row: Array) -> Float[Array, "rows B N V"]:
        some = jax.lax.dynamic_slice_in_dim(query, row, rows, axis=1)
        scores, lse = _scores(scale, some, key, mask, row)
        best, index = jax.lax.top_k(scores, count)
        values = jax.vmap(jax.vmap(lambda v, i: v[i]))(by_head, index)
        weights = _weights(best, lse, renormalise)
        return jnp.einsum("bntc,bntcv->tbnv", weights, values.astype(best.dtype))

    # The last rows may overlap those before: a tile of a mask lies inside of it.
    starts = [*range(0, queries - rows, rows), queries - rows]
    out = jax.lax.map(some_rows, jnp.asarray(starts)).astype(query.dtype)
    before = out[:-1].reshape(-1, *out.shape[2:])
    rest = queries - before.shape[0]
    return (jnp.concatenate([before, out[-1, rows - rest :]]).swapaxes(0, 1),)


def diff_qkv_attention_step(
    state: KVCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K D"],
    value: Float[ArrayLike, "B T L V"],
    *,
    key_lift: Float[ArrayLike, "D H"] | Float[ArrayLike, "K D H"] | None = None,
    rope_base: float | None = None,
    top_values: int | None = None,
    renormalise: bool = False,
    scale: float | None = None,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], KVCache]:
    """Continues causal `diff_qkv_attention` by T >= 1 tokens.

    The cache holds the keys as they are given, small and not turned, and the values in heads of
    their own: `KVCache.append` says what happens where they do not fit.

    Args:
      state: the cache, made by `init_diff_qkv_attention_state`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      key_lift: as for `diff_qkv_attention`.
      rope_base: likewise; not with `segment_ids`.
      top_values: likewise.
      renormalise: likewise.
      scale: likewise.
      segment_ids: (ids of the new tokens [B, T], ids of the tokens in the cache [B, max_length]).
      implementation: name or None.

    Returns:
      The output for the new tokens, and the cache with them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `diff_qkv_attention`, or if the tokens are
        known not to fit.

    Example:
      >>> state = init_diff_qkv_attention_state(1, 64, 8, 1, 4, 4, num_value_heads=2)
      >>> query = jax.random.normal(jax.random.key(0), (1, 5, 8, 4))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 5, 2, 4))
      >>> out, state = diff_qkv_attention_step(state, query, key[:, :, :1], value)
      >>> out.shape, state.key.shape, state.value.shape
      ((1, 5, 8, 4), (1, 64, 1, 4), (1, 64, 2, 4))
    """
    query, key, value, offset, state = appended(state, query, key, value, segment_ids)
    out = diff_qkv_attention(
        query,
        key,
        value,
        key_lift=key_lift,
        rope_base=rope_base,
        top_values=top_values,
        renormalise=renormalise,
        is_causal=True,
        scale=scale,
        segment_ids=segment_ids,
        query_offset=offset,
        implementation=implementation,
    )
    return out, state


def init_diff_qkv_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    num_value_heads: int | None = None,
) -> KVCache:
    """Returns an empty cache for `diff_qkv_attention_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens that it can hold.
      num_heads: number of query heads; the cache does not depend on it.
      num_kv_heads: number of key heads, K.
      head_dim: width of a key before it is lifted, D.
      value_dim: width of a value, V.
      dtype: of keys and values.
      num_value_heads: L; None for K.
    """
    del num_heads
    value_heads = num_kv_heads if num_value_heads is None else num_value_heads
    return KVCache(
        key=jnp.zeros((batch, max_length, num_kv_heads, head_dim), dtype),
        value=jnp.zeros((batch, max_length, value_heads, value_dim), dtype),
        length=jnp.zeros((), jnp.int32),
    )


RECORD = Mechanism(
    slug="diff_qkv_attention",
    title=("Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models"),
    year=2025,
    family="heads",
    patterns=frozenset({"self causal", "self non-causal", "cross causal", "cross non-causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=diff_qkv_attention,
    step=diff_qkv_attention_step,
    init_state=init_diff_qkv_attention_state,
    extras=(KVCache,),
)
