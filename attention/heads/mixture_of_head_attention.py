"""Mixture-of-head attention (MoH): every token weighs heads, and leaves some out."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from attention.cache.kv_cache import KVCache, init_of_mechanism
from attention.catalogue import Mechanism
from attention.dense.arguments import appended, joined_mask
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays
from pallas_kernels.tiled import tiled_attention


def mixture_of_head_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    num_shared: int | None = None,
    top_k: int | None = None,
    shared_logits: Float[ArrayLike, "B T num_shared"] | None = None,
    routed_logits: Float[ArrayLike, "B T N-num_shared"] | None = None,
    balance_logits: Float[ArrayLike, "B T 2"] | None = None,
    straight_through: bool = False,
    is_causal: bool = False,
    scale: float | Float[Array, ""] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | tuple[ArrayLike, ArrayLike] | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention whose heads are experts: some for all tokens, of the others k for each.

    The first heads are shared, the others routed. With the gates g of the *query's* token,
    `mixture_of_head_gates`,

        o_tn = g_tn sum_j softmax_j(scale q_tn . k_j) v_j

    and g_tn = 0 for all but k of the routed heads. All heads are computed, as keys and values of
    all are needed by some token: it takes the O(T S) time of softmax attention, and O(T + S)
    memory. Where heads are sharded, routing by norms gathers a number for each. Gates and sums are
    float32, or float64 for float64 queries. First derivatives exist in reverse mode; the
    implementation "reference" has all.

    `head_balance_loss` is the term that keeps routers from using a few heads only.

    Source: Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention (2024); the factors
    of the gates, by which they are 1 on average, from the released code.

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      num_shared: number of shared heads; None for N / 2, rounded down.
      top_k: k; None for half of the routed heads, rounded up.
      shared_logits: what the shared heads' router makes of the layer's input, which is a projection
        with no bias; None for equal ones.
      routed_logits: likewise of the routed heads; None for routing by the norms of queries.
      balance_logits: likewise of the two kinds of heads, shared and routed; None for equal ones.
      straight_through: see `mixture_of_head_gates`.
      is_causal: whether query i sees keys up to i + query_offset only.
      scale: of the scores; None for 1 / sqrt(H).
      segment_ids: ids of the documents packed into a row, of equal length T = S; or a pair (ids of
        queries, ids of keys), where keys of id -1 are seen by all. Only equal ids attend.
      query_offset: position of query 0 among the keys, for `is_causal`.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16, 8, 4))
      >>> routed_logits = jax.random.normal(jax.random.key(1), (2, 16, 6))
      >>> out = mixture_of_head_attention(
      ...     query, key, value, num_shared=2, top_k=3, routed_logits=routed_logits, is_causal=True
      ... )
      >>> (out[0, 5] != 0).any(axis=1).sum().item()
      5
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value)
    gates = mixture_of_head_gates(
        query,
        num_shared=num_shared,
        top_k=top_k,
        shared_logits=shared_logits,
        routed_logits=routed_logits,
        balance_logits=balance_logits,
        straight_through=straight_through,
    )
    offset = masks.as_bound(query_offset, "query_offset")
    out = tiled_attention(
        query,
        key,
        value,
        scale=scale,
        mask=joined_mask(
            query.shape[0],
            None,
            is_causal=is_causal,
            segment_ids=segment_ids,
            query_offset=offset,
        ),
        implementation=implementation,
        function="mixture_of_head_attention",
    )
    return (gates[..., None] * out).astype(query.dtype)


def mixture_of_head_gates(
    query: Float[ArrayLike, "B T N H"],
    *,
    num_shared: int | None = None,
    top_k: int | None = None,
    shared_logits: Float[ArrayLike, "B T num_shared"] | None = None,
    routed_logits: Float[ArrayLike, "B T N-num_shared"] | None = None,
    balance_logits: Float[ArrayLike, "B T 2"] | None = None,
    straight_through: bool = False,
) -> Float[Array, "B T N"]:
    """Returns the gates of every token's heads, of which those of all but `top_k` are 0.

    With M shared heads, R = N - M routed ones and the k largest of R logits chosen (of equal ones
    those of lower heads),

        shared:  a_1 M softmax(shared_logits)
        routed:  a_2 k softmax(routed_logits over the chosen), 0 for the others
        (a_1, a_2) = 2 softmax(balance_logits)

    where softmaxes of logits that are not given are uniform. Without `routed_logits`, as in the
    models that continue LLaMA3, the logits are the norms of the queries of the routed heads over
    their standard deviation (`head_norm_logits`), and the gates of the chosen are a_2.

    Those gates have no derivative with respect to queries; with `straight_through` they get that of
    the softmax over all R logits, as in training published models.

    Args:
      query: queries before or after RoPE, which keeps their norms; only its shape matters where
        there are `routed_logits`.
      num_shared: M; None for N / 2, rounded down.
      top_k: k; None for half of the routed heads, rounded up.
      shared_logits: of the shared heads, or None.
      routed_logits: of the routed heads, or None.
      balance_logits: of shared heads against routed ones, or None.
      straight_through: whether gates by norms get a derivative.

    Returns:
      The gates in float32, or float64 for float64 queries.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.

    Example:
      >>> query = jax.random.normal(jax.random.key(0), (1, 3, 8, 4))
      >>> gates = mixture_of_head_gates(query, num_shared=4, top_k=2)
      >>> gates.sum(axis=2).tolist()
      [[6.0, 6.0, 6.0]]
    """
    query = jnp.asarray(query)
    if query.ndim != 4:
        raise ValueError(f"query: must be [B, T, N, H]; got shape {query.shape}")
    rows, heads = query.shape[:2], query.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    shared = _checked_shared(num_shared, heads)
    routed = heads - shared
    chosen_heads = _checked_top_k(top_k, routed)
    given = [
        _checked_logits(name, logits, (*rows, count), wide)
        for name, logits, count in (
            ("shared_logits", shared_logits, shared),
            ("routed_logits", routed_logits, routed),
            ("balance_logits", balance_logits, 2),
        )
    ]
    shared_logits, routed_logits, balance_logits = given
    if balance_logits is not None and not (shared and routed):
        raise ValueError(
            f"balance_logits: are between shared and routed heads; there are {shared} and {routed}"
        )

    parts = []
    if shared:
        ones = jnp.ones((*rows, shared), wide)
        parts.append(ones if shared_logits is None else shared * jax.nn.softmax(shared_logits))
    if routed:
        logits = head_norm_logits(query, shared) if routed_logits is None else routed_logits
        chosen = _chosen(logits, chosen_heads)
        if routed_logits is not None:
            part = chosen_heads * jax.nn.softmax(routed_logits, where=chosen)
        else:
            part = chosen.astype(wide)
            if straight_through:
                weights = jnp.where(chosen, jax.nn.softmax(logits), 0)
                part += weights - jax.lax.stop_gradient(weights)
        parts.append(part)
    if balance_logits is not None:
        balance = 2 * jax.nn.softmax(balance_logits)
        parts = [balance[..., i, None] * part for i, part in enumerate(parts)]
    return jnp.concatenate(parts, axis=-1)


def head_norm_logits(
    query: Float[ArrayLike, "B T N H"], num_shared: int | None = None
) -> Float[Array, "B T N-num_shared"]:
    """Returns router logits that need no router: norms of the queries of the routed heads.

    They are divided by their standard deviation over the heads (of a sample; where it is 0, they
    are 0: all are equal).

    Args:
      query: the queries.
      num_shared: number of shared heads, which are left out; None for N / 2, rounded down.

    Raises:
      ValueError: there is no such number of shared heads.

    Example:
      >>> head_norm_logits(jax.random.normal(jax.random.key(0), (1, 3, 8, 4)), 2).shape
      (1, 3, 6)
    """
    query = jnp.asarray(query)
    shared = _checked_shared(num_shared, query.shape[2])
    query = query.astype(jnp.promote_types(query.dtype, jnp.float32))
    square = jnp.sum(query**2, axis=-1)
    norms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    sharding = jax.typeof(norms).sharding
    if sharding.spec[2] is not None:
        # Explicitly sharded heads are gathered: a token compares all of its heads.
        whole = NamedSharding(sharding.mesh, P(*sharding.spec[:2], None))
        norms = jax.sharding.reshard(norms, whole)
    norms = norms[..., shared:]
    centred = norms - jnp.mean(norms, axis=-1, keepdims=True)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / max(norms.shape[-1] - 1, 1)
    differ = variance > 0
    return jnp.where(differ, norms / jnp.sqrt(jnp.where(differ, variance, 1)), 0)


def head_balance_loss(
    routed_logits: Float[ArrayLike, "B T R"],
    top_k: int | None = None,
    *,
    where: Bool[ArrayLike, "B T"] | None = None,
) -> Float[Array, ""]:
    """Returns the load-balance loss of the routed heads of one layer.

        R sum_e mean_t(softmax(routed_logits_t)_e) mean_t(head e is among the k of token t)

    with means over all tokens of a batch. It is k where tokens use all heads equally, and at most
    R. The published vision models add 0.01 of its average over layers to their loss.

    Args:
      routed_logits: as for `mixture_of_head_gates`.
      top_k: k; None for half of the routed heads, rounded up.
      where: the tokens that count; None for all.

    Raises:
      ValueError: a shape or k does not fit.

    Example:
      >>> float(head_balance_loss(jax.numpy.zeros((2, 16, 4)), 2))
      2.0
    """
    logits = jnp.asarray(routed_logits)
    if logits.ndim != 3:
        raise ValueError(f"routed_logits: must be [B, T, R]; got shape {logits.shape}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    heads = logits.shape[2]
    chosen = _chosen(logits, _checked_top_k(top_k, heads)).astype(logits.dtype)
    if where is None:
        where = jnp.ones(logits.shape[:2], bool)
    where = jnp.asarray(where)
    if where.shape != logits.shape[:2]:
        raise ValueError(f"where: must have shape {logits.shape[:2]}; got {where.shape}")
    count = jnp.maximum(jnp.sum(where), 1)
    load, weight = (
        jnp.sum(x, axis=(0, 1), where=where[..., None]) / count
        for x in (chosen, jax.nn.softmax(logits))
    )
    return heads * jnp.sum(load * weight)


def _chosen(logits: Float[Array, "B T R"], count: int) -> Bool[Array, "B T R"]:
    # Pairs of a few heads: unlike a sort, XLA partitions them over tokens with no collective.
    head = jnp.arange(logits.shape[-1])
    mine, other = logits[..., :, None], logits[..., None, :]
    better = (other > mine) | ((other == mine) & (head < head[:, None]))
    return jnp.sum(better, axis=-1) < count


def _checked_shared(num_shared: int | None, heads: int) -> int:
    if num_shared is None:
        return heads // 2
    if not isinstance(num_shared, int) or not 0 <= num_shared <= heads:
        raise ValueError(f"num_shared: must be 0 to {heads}, the heads; got {num_shared!r}")
    return num_shared


def _checked_top_k(top_k: int | None, routed: int) -> int:
    if top_k is None:
        return (routed + 1) // 2
    least = min(1, routed)
    if not isinstance(top_k, int) or not least <= top_k <= routed:
        raise ValueError(f"top_k: must be {least} to {routed}, the routed heads; got {top_k!r}")
    return top_k


def _checked_logits(
    name: str, logits: ArrayLike | None, shape: tuple[int, ...], dtype: jnp.dtype
) -> Array | None:
    if logits is None:
        return None
    logits = jnp.asarray(logits)
    if logits.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}; got {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name}: must be floating point; got {logits.dtype}")
    return logits.astype(dtype)


def mixture_of_head_attention_step(
    state: KVCache,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    num_shared: int | None = None,
    top_k: int | None = None,
    shared_logits: Float[ArrayLike, "B T num_shared"] | None = None,
    routed_logits: Float[ArrayLike, "B T N-num_shared"] | None = None,
    balance_logits: Float[ArrayLike, "B T 2"] | None = None,
    straight_through: bool = False,
    scale: float | Float[Array, ""] | None = None,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], KVCache]:
    """Continues causal `mixture_of_head_attention` by T >= 1 tokens.

    The new keys and values are appended to the cache, for all heads: `KVCache.append` says what
    happens where they do not fit.

    Args:
      state: the cache, made by `init_mixture_of_head_attention_state`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      num_shared: as for `mixture_of_head_attention`.
      top_k: likewise.
      shared_logits: of the new tokens.
      routed_logits: likewise.
      balance_logits: likewise.
      straight_through: as for `mixture_of_head_attention`.
      scale: likewise.
      segment_ids: (ids of the new tokens [B, T], ids of the tokens in the cache [B, max_length]).
      implementation: name or None.

    Returns:
      The output for the new tokens, and the cache with them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `mixture_of_head_attention`, or if the
        tokens are known not to fit.

    Example:
      >>> state = init_mixture_of_head_attention_state(1, 64, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 5, 4, 8))
      >>> out, state = mixture_of_head_attention_step(state, query, key, value)
      >>> out.shape, int(state.length)
      ((1, 5, 4, 8), 5)
    """
    query, key, value, offset, state = appended(state, query, key, value, segment_ids)
    out = mixture_of_head_attention(
        query,
        key,
        value,
        num_shared=num_shared,
        top_k=top_k,
        shared_logits=shared_logits,
        routed_logits=routed_logits,
        balance_logits=balance_logits,
        straight_through=straight_through,
        is_causal=True,
        scale=scale,
        segment_ids=segment_ids,
        query_offset=offset,
        implementation=implementation,
    )
    return out, state


init_mixture_of_head_attention_state = init_of_mechanism("mixture_of_head_attention")


RECORD = Mechanism(
    slug="mixture_of_head_attention",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    family="heads",
    patterns=frozenset({"self causal", "self non-causal", "cross causal", "cross non-causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=mixture_of_head_attention,
    step=mixture_of_head_attention_step,
    init_state=init_mixture_of_head_attention_state,
    extras=(mixture_of_head_gates, head_norm_logits, head_balance_loss, KVCache),
    small={"num_shared": 1, "top_k": 2},
)
