"""Sigmoid attention: every pair weighs by itself, with no sum over the row."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.cache.kv_cache import KVCache, init_of_mechanism
from attention.catalogue import Mechanism
from attention.dense.arguments import appended, batched, joined_mask, log_counts
from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention


def sigmoid_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Float[ArrayLike, "B|1 N|1 T|1 S|1"] | None = None,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 S|1"] | masks.Mask | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    logit_bias: float | Float[Array, ""] | None = None,
    temperature: float | Float[Array, ""] = 0.0,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "B"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    segment_ids: Int[ArrayLike, "B T"] | tuple[ArrayLike, ArrayLike] | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
) -> Float[Array, "*B T N V"]:
    r"""Sigmoid attention: weights are sigmoids of the scores, and are not normalised.

    For every head, with key head k of query head n = k G + g, G = N / K, and the temperature t,

        s_ij = exp(t) (scale q_i . k_j - slope |i + offset - j|) + bias_ij + b
        o_i  = sum_j sigmoid(s_ij) v_j

    with j over the keys that all masks allow, and every term left out that is not given. The scalar
    b (`logit_bias`) keeps the sum of n weights near 1 where training starts: by default b = -log n,
    n the number of keys in the query's own sequence, and 0 with ALiBi. A causal mask or a window
    does not change n, as in the paper; padding and packing do not either: where
    `key_value_seq_lengths` or `segment_ids` are given, n is a row's length, or a document's. The
    recipe of the paper normalises queries and keys (LayerNorm over H) before the call.

    Outputs over disjoint sets of keys, with the same b, add up to the output over their union.
    Weights and sums are computed in float32, or float64 for float64 queries. Time is O(T S), or
    O(T w) in a window of w; memory is O(T + S), forward and backward. Derivatives are first-order
    reverse mode, except with implementation="reference". What stands beyond the sequence lengths
    may be anything, NaN too.

    Source: Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention
    (2024), eq. 3 and section 4 for the default of b; the temperature is from the authors' code.

    Args:
      query: [B, T, N, H] or, here and below without B, [T, N, H].
      key: [B, S, K, H], of the dtype of query; K divides N.
      value: [B, S, K, V], likewise.
      bias: added to the scaled logits.
      mask: True where a query may attend to a key, or a mask of `attention.masks`.
      scale: of the logits, by default 1 / sqrt(H).
      logit_bias: b, by default -log n, or 0 with `alibi_slopes`; a float or a scalar array. With
        `segment_ids` the default is one number a query; a number given is faster.
      temperature: t, logarithm of a factor of the products and ALiBi's terms; a float or a scalar
        array.
      is_causal: whether query i sees keys up to i + query_offset only.
      query_seq_lengths: number of valid queries in each row of the batch.
      key_value_seq_lengths: number of valid keys in each row of the batch.
      local_window_size: (left, right): how many keys a query sees before and after its own
        position, i + query_offset; one number stands for both.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".
      segment_ids: ids of the documents packed into a row, of equal length T = S; or a pair (ids of
        queries, ids of keys), where keys of id -1 are seen by all. Only equal ids attend.
      query_offset: position of query 0 among the keys, for `is_causal`, `local_window_size` and
        `alibi_slopes`.
      alibi_slopes: slope of each head's penalty on distance (`attention.positions.alibi_slopes`).

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> import jax
      >>> from attention import sigmoid_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 16, 2, 8))
      >>> out = sigmoid_attention(query, key, value, is_causal=True)
      >>> out.shape
      (2, 16, 4, 8)
    """
    unbatched = jnp.ndim(query) == 3
    query, key, value = batched(query, key, value)
    offset = masks.as_bound(query_offset, "query_offset")
    joined = joined_mask(
        query.shape[0],
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_offset=offset,
    )
    if logit_bias is None and (segment_ids is not None or key_value_seq_lengths is not None):
        logit_bias = 0.0
        if alibi_slopes is None:
            own = joined_mask(
                query.shape[0],
                None,
                key_value_seq_lengths=key_value_seq_lengths,
                segment_ids=segment_ids,
            )
            # A length is the same for all queries of a row.
            counting = query[:, :1] if segment_ids is None else query
            logs = log_counts(counting, key, own, implementation, "sigmoid_attention")
            logs = jnp.swapaxes(logs, 1, 2)[..., None]
            bias = -logs if bias is None else jnp.asarray(bias) - logs
    elif logit_bias is None:
        logit_bias = 0.0 if alibi_slopes is not None else -math.log(key.shape[1])
    factor = math.exp(temperature) if isinstance(temperature, int | float) else _exp(temperature)
    out = tiled_attention(
        query,
        key,
        value,
        scale=factor * (1 / math.sqrt(query.shape[-1]) if scale is None else scale),
        weights="sigmoid",
        logit_bias=logit_bias,
        bias=bias,
        alibi_slopes=None if alibi_slopes is None else factor * jnp.asarray(alibi_slopes),
        mask=joined,
        query_offset=offset,
        implementation=implementation,
        function="sigmoid_attention",
    )
    return out[0] if unbatched else out


def sigmoid_attention_step(
    state: KVCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    bias: Float[ArrayLike, "B|1 N|1 T|1 max_length|1"] | None = None,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 max_length|1"] | masks.Mask | None = None,
    scale: float | Float[Array, ""] | None = None,
    logit_bias: float | Float[Array, ""] | None = None,
    temperature: float | Float[Array, ""] = 0.0,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
) -> tuple[Float[Array, "B T N V"], KVCache]:
    """Attends causally from T >= 1 new tokens to all tokens so far: `sigmoid_attention` in steps.

    The new keys and values are appended to the cache; `KVCache.append` says what happens where they
    do not fit. Keys of `bias`, `mask` and `segment_ids` are numbered by their place in the cache.

    Args:
      state: the cache, made by `init_sigmoid_attention_state`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      bias: as for `sigmoid_attention`, with S = max_length; likewise the other arguments.
      mask: allows pairs that are also causal.
      scale: of the logits, by default 1 / sqrt(H).
      logit_bias: b. By default n is max_length (with `segment_ids`, the number of tokens in the
        cache that have the query's id), so steps are one pass over max_length tokens; for steps
        like a pass over another number, or to go on as a model was trained, it must be given.
      temperature: t.
      local_window_size: (left, right) or one number for both.
      implementation: name or None.
      segment_ids: (ids of the new tokens [B, T], ids of the tokens in the cache [B, max_length]).
      alibi_slopes: [N].

    Returns:
      The output for the new tokens, and the cache with them.

    Raises:
      ValueError: besides those of `sigmoid_attention`, if the tokens are known not to fit.

    Example:
      >>> import jax
      >>> from attention import init_sigmoid_attention_state, sigmoid_attention_step
      >>> query = jax.random.normal(jax.random.key(0), (1, 3, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 3, 2, 8))
      >>> state = init_sigmoid_attention_state(1, 16, 4, 2, 8, 8)
      >>> out, state = sigmoid_attention_step(state, query, key, value, logit_bias=-2.0)
      >>> out.shape, int(state.length)
      ((1, 3, 4, 8), 3)
    """
    query, key, value, offset, state = appended(state, query, key, value, segment_ids)
    out = sigmoid_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        logit_bias=logit_bias,
        temperature=temperature,
        is_causal=True,
        local_window_size=local_window_size,
        implementation=implementation,
        segment_ids=segment_ids,
        query_offset=offset,
        alibi_slopes=alibi_slopes,
    )
    return out, state


init_sigmoid_attention_state = init_of_mechanism("sigmoid_attention")


def _exp(temperature: Float[Array, ""]) -> Float[Array, ""]:
    temperature = jnp.asarray(temperature)
    if temperature.shape:
        raise ValueError(f"temperature: must be a number; got shape {temperature.shape}")
    return jnp.exp(temperature)


RECORD = Mechanism(
    slug="sigmoid_attention",
    title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    year=2024,
    family="dense",
    patterns=frozenset({"self causal", "self non-causal", "cross causal", "cross non-causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=sigmoid_attention,
    step=sigmoid_attention_step,
    init_state=init_sigmoid_attention_state,
    extras=(KVCache,),
)
