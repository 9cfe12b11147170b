"""Softmax attention, exact, in linear memory."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.cache.kv_cache import KVCache
from attention.cache.window_cache import WindowCache, init_of_windowed
from attention.catalogue import Mechanism
from attention.dense.arguments import appended, batched, joined_mask
from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention


def softmax_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Float[ArrayLike, "B|1 N|1 T|1 S|1"] | None = None,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 S|1"] | masks.Mask | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "B"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    segment_ids: Int[ArrayLike, "B T"] | tuple[ArrayLike, ArrayLike] | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
    logits_soft_cap: float | None = None,
    sink: Float[ArrayLike, "N"] | None = None,
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Exact softmax attention, a drop-in for `jax.nn.dot_product_attention`.

    For every head, with key head k of query head n = k G + g, G = N / K,

        s_ij = c tanh(scale q_i . k_j / c) + bias_ij - slope |i + offset - j|
        o_i  = sum_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))

    with j over the keys that all masks allow, and every term left out that is not given. Softmax
    and sums are computed in float32, or float64 for float64 queries. Time is O(T S), or O(T w) in a
    window of w; memory is O(T + S), forward and backward.

    The arguments up to `return_residual` are those of `jax.nn.dot_product_attention`, in meaning,
    order and default, with these differences: a query that may attend to no key gets zeros, and
    zero gradients, where JAX gives it the average of all values; the log-sum-exp is float32 and
    differentiable; V may differ from H; implementations are named otherwise; and derivatives are
    first-order reverse mode, except with implementation="reference". What stands beyond the
    sequence lengths may be anything, NaN too.

    Sources: Vaswani et al., Attention Is All You Need (2017), eq. 1; memory by Rabe and Staats,
    Self-attention Does Not Need O(n^2) Memory (2021) and Dao et al., FlashAttention (2022); slopes
    by Press et al., Train Short, Test Long (2021); soft cap as in Gemma 2 (2024); sink as in
    gpt-oss (2025), first, with sink = 0, by Miller, Attention Is Off By One (2023).

    Args:
      query: [B, T, N, H] or, here and below without B, [T, N, H].
      key: [B, S, K, H], of the dtype of query; K divides N.
      value: [B, S, K, V], likewise.
      bias: added to the scaled and capped logits.
      mask: True where a query may attend to a key, or a mask of `attention.masks`.
      scale: of the logits, by default 1 / sqrt(H).
      is_causal: whether query i sees keys up to i + query_offset only.
      query_seq_lengths: number of valid queries in each row of the batch.
      key_value_seq_lengths: number of valid keys in each row of the batch.
      local_window_size: (left, right): how many keys a query sees before and after its own
        position, i + query_offset; one number stands for both.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".
      return_residual: whether to return the log-sum-exp of the scores (with the sink) too.
      segment_ids: ids of the documents packed into a row, of equal length T = S; or a pair (ids of
        queries, ids of keys), where keys of id -1 are seen by all. Only equal ids attend.
      query_offset: position of query 0 among the keys, for `is_causal`, `local_window_size` and
        `alibi_slopes`.
      alibi_slopes: slope of each head's penalty on distance (`attention.positions.alibi_slopes`).
      logits_soft_cap: c, which bounds the scaled logits.
      sink: logit of each head in the denominator that belongs to no key.

    Returns:
      The output in query's dtype; with `return_residual` also the log-sum-exp, [B, T, N], which is
      -inf where a query sees nothing.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> import jax
      >>> from attention import softmax_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 16, 2, 8))
      >>> out = softmax_attention(query, key, value, is_causal=True, local_window_size=(4, 0))
      >>> out.shape
      (2, 16, 4, 8)
    """
    unbatched = jnp.ndim(query) == 3
    query, key, value = batched(query, key, value)
    offset = masks.as_bound(query_offset, "query_offset")
    mask = joined_mask(
        query.shape[0],
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_offset=offset,
    )
    out, lse = tiled_attention(
        query,
        key,
        value,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sink=sink,
        mask=mask,
        query_offset=offset,
        return_lse=True,
        implementation=implementation,
        function="softmax_attention",
    )
    if unbatched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def softmax_attention_step(
    state: KVCache | WindowCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    bias: Float[ArrayLike, "B|1 N|1 T|1 max_length|1"] | None = None,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 max_length|1"] | masks.Mask | None = None,
    scale: float | Float[Array, ""] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
    logits_soft_cap: float | None = None,
    sink: Float[ArrayLike, "N"] | None = None,
) -> tuple[Array | tuple[Array, Array], KVCache | WindowCache]:
    """Attends causally from T >= 1 new tokens to all tokens so far: `softmax_attention` in steps.

    The new keys and values are appended to the cache; `KVCache.append` says what happens where they
    do not fit. Keys of `bias`, `mask` and `segment_ids` are numbered by their place in the cache.
    A state that was made with a `local_window_size` keeps no more than that, so that no step takes
    longer or needs more memory than another; there, they are the kept and then the new tokens.

    Args:
      state: the cache, made by `init_softmax_attention_state`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      bias: as for `softmax_attention`, with S = max_length; likewise the other arguments.
      mask: allows pairs that are also causal.
      scale: of the logits, by default 1 / sqrt(H).
      local_window_size: (left, right) or one number for both; at most that of the state's making.
      implementation: name or None.
      return_residual: whether the output is (output, log-sum-exp).
      segment_ids: (ids of the new tokens [B, T], ids of the tokens in the cache [B, max_length]).
      alibi_slopes: [N].
      logits_soft_cap: bound of the logits.
      sink: [N].

    Returns:
      The output for the new tokens, and the cache with them.

    Raises:
      ValueError: besides those of `softmax_attention`, if the tokens are known not to fit.

    Example:
      >>> import jax
      >>> from attention import init_softmax_attention_state, softmax_attention_step
      >>> query = jax.random.normal(jax.random.key(0), (1, 3, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 3, 2, 8))
      >>> state = init_softmax_attention_state(1, 16, 4, 2, 8, 8)
      >>> out, state = softmax_attention_step(state, query, key, value)
      >>> out.shape, int(state.length)
      ((1, 3, 4, 8), 3)
    """
    query, key, value, offset, state = appended(
        state, query, key, value, segment_ids, local_window_size
    )
    out = softmax_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=True,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        segment_ids=segment_ids,
        query_offset=offset,
        alibi_slopes=alibi_slopes,
        logits_soft_cap=logits_soft_cap,
        sink=sink,
    )
    return out, state


init_softmax_attention_state = init_of_windowed("softmax_attention")


RECORD = Mechanism(
    slug="softmax_attention",
    title="Attention Is All You Need",
    year=2017,
    family="dense",
    patterns=frozenset({"self causal", "self non-causal", "cross causal", "cross non-causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=softmax_attention,
    step=softmax_attention_step,
    init_state=init_softmax_attention_state,
    extras=(KVCache, WindowCache),
)
