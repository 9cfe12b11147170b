"""Softplus attention (LSSA), and its weights reweighted by their mean (LSSAR)."""

import functools
import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.cache.kv_cache import KVCache
from attention.cache.window_cache import WindowCache, init_of_windowed
from attention.catalogue import Mechanism
from attention.dense.arguments import appended, batched, joined_mask, log_counts, without_hidden
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays
from pallas_kernels.tiled import tiled_attention


def softplus_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    *,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 S|1"] | masks.Mask | None = None,
    reweight_power: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "B"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    segment_ids: Int[ArrayLike, "B T"] | tuple[ArrayLike, ArrayLike] | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
) -> Float[Array, "*B T N V"]:
    """Softplus attention: softplus weights of cosines, normalised, and reweighted if asked for.

    For every head, with key head k of query head n = k G + g, G = N / K, and N_i the number of keys
    that query i sees,

        s_ij = log(H) log(N_i) q_i . k_j / (|q_i| |k_j|)
        a_ij = softplus(s_ij) / sum_j softplus(s_ij)                            LSSA
        w_ij = max(N_i a_ij - 1, 0)^p,   a'_ij = w_ij / sum_j w_ij              LSSAR
        o_i  = sum_j a_ij v_j,  with a' for a where reweighted

    with j over the keys that all masks allow. The factor log(N_i) keeps rows of any length equally
    sharp. LSSAR drops the keys whose weight is not above the mean of the row, and the power p
    (`reweight_power`) sharpens the rest: 3 is the paper's best at the length of training, 15 beyond
    it. A row of equal weights, as that of a query that sees one key, has nothing above the mean
    (less than 1e-5 above it): its output is 0. So is that of a query with no key.

    Positions enter by rotation (RoPE) of query and key before the call. The length of a query or a
    key does not matter; one of length 0 counts as orthogonal to all. Everything is computed in
    float32, products too, or float64 for float64 queries. Time is O(T S), or O(T w) in a window of
    w, with a second pass for LSSAR and one of a single head that counts the keys of a mask; memory
    is O(T + S), forward and backward. Derivatives are first-order reverse mode, except with
    implementation="reference". What stands beyond the sequence lengths may be anything, NaN too.

    Source: Gao et al., Softplus Attention with Re-weighting Boosts Length Extrapolation in LLMs
    (2025). Some implementations add 1e-8 to both sums, or subtract nothing in the first three rows.

    Args:
      query: [B, T, N, H] or, here and below without B, [T, N, H].
      key: [B, S, K, H], of the dtype of query; K divides N.
      value: [B, S, K, V], likewise.
      mask: True where a query may attend to a key, or a mask of `attention.masks`.
      reweight_power: p of LSSAR; None for LSSA.
      is_causal: whether query i sees keys up to i + query_offset only.
      query_seq_lengths: number of valid queries in each row of the batch.
      key_value_seq_lengths: number of valid keys in each row of the batch.
      local_window_size: (left, right): how many keys a query sees before and after its own
        position, i + query_offset; one number stands for both.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".
      segment_ids: ids of the documents packed into a row, of equal length T = S; or a pair (ids of
        queries, ids of keys), where keys of id -1 are seen by all. Only equal ids attend.
      query_offset: position of query 0 among the keys, for `is_causal` and `local_window_size`.

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> import jax
      >>> from attention import softplus_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 16, 2, 8))
      >>> out = softplus_attention(query, key, value, is_causal=True, reweight_power=3)
      >>> out.shape
      (2, 16, 4, 8)
    """
    if reweight_power is not None and not (
        isinstance(reweight_power, int | float) and reweight_power > 0
    ):
        raise ValueError(
            f"reweight_power: must be a positive number or None; got {reweight_power!r}"
        )
    unbatched = jnp.ndim(query) == 3
    query, key, value = batched(query, key, value)
    dtype = query.dtype
    joined = joined_mask(
        query.shape[0],
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_offset=masks.as_bound(query_offset, "query_offset"),
    )
    check_arrays(query, key, value)
    logs = log_counts(query, key, joined, implementation, "softplus_attention")
    query, key = map(_unit, without_hidden(query, key, joined))
    call = functools.partial(
        tiled_attention,
        query * (math.log(query.shape[-1]) * logs)[..., None],
        key,
        scale=1.0,
        weights="softplus",
        mask=joined,
        implementation=implementation,
        function="softplus_attention",
    )
    if reweight_power is None:
        out = call(value)
    else:
        # The sum over the row is all that is needed of the first pass.
        _, lse = call(value[..., :1], return_lse=True)
        out = call(value, row_statistic=lse - logs, reweight=(reweight_power, 1.0))
    out = out.astype(dtype)
    return out[0] if unbatched else out


def softplus_attention_step(
    state: KVCache | WindowCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    mask: Bool[ArrayLike, "B|1 N|1 T|1 max_length|1"] | masks.Mask | None = None,
    reweight_power: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[Float[Array, "B T N V"], KVCache | WindowCache]:
    """Attends causally from T >= 1 new tokens to all tokens so far: `softplus_attention` in steps.

    The new keys and values are appended to the cache; `KVCache.append` says what happens where they
    do not fit. Keys of `mask` and `segment_ids` are numbered by their place in the cache. A state
    that was made with a `local_window_size` keeps no more than that, so that no step takes longer
    or needs more memory than another; there, they are the kept and then the new tokens.

    Args:
      state: the cache, made by `init_softplus_attention_state`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      mask: allows pairs that are also causal.
      reweight_power: p of LSSAR; None for LSSA.
      local_window_size: (left, right) or one number for both; at most that of the state's making.
      implementation: name or None.
      segment_ids: (ids of the new tokens [B, T], ids of the tokens in the cache [B, max_length]).

    Returns:
      The output for the new tokens, and the cache with them.

    Raises:
      ValueError: besides those of `softplus_attention`, if the tokens are known not to fit.

    Example:
      >>> import jax
      >>> from attention import init_softplus_attention_state, softplus_attention_step
      >>> query = jax.random.normal(jax.random.key(0), (1, 3, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 3, 2, 8))
      >>> state = init_softplus_attention_state(1, 16, 4, 2, 8, 8)
      >>> out, state = softplus_attention_step(state, query, key, value)
      >>> out.shape, int(state.length)
      ((1, 3, 4, 8), 3)
    """
    query, key, value, offset, state = appended(
        state, query, key, value, segment_ids, local_window_size
    )
    out = softplus_attention(
        query,
        key,
        value,
        mask=mask,
        reweight_power=reweight_power,
        is_causal=True,
        local_window_size=local_window_size,
        implementation=implementation,
        segment_ids=segment_ids,
        query_offset=offset,
    )
    return out, state


init_softplus_attention_state = init_of_windowed("softplus_attention")


def _unit(array: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Returns vectors of length 1, in float32 or better; of 0, with gradients of 0, for 0."""
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    square = jnp.sum(array**2, axis=-1, keepdims=True)
    zero = square < jnp.finfo(array.dtype).tiny
    return jnp.where(zero, 0, array) / jnp.sqrt(jnp.where(zero, 1, square))


RECORD = Mechanism(
    slug="softplus_attention",
    title="Softplus Attention with Re-weighting Boosts Length Extrapolation in LLMs",
    year=2025,
    family="dense",
    patterns=frozenset({"self causal", "self non-causal", "cross causal", "cross non-causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    has_weights=False,
    function=softplus_attention,
    step=softplus_attention_step,
    init_state=init_softplus_attention_state,
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    extras=(KVCache, WindowCache),
)
