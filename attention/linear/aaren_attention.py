"""Aaren: attention as a recurrence, by a query that is the same for all tokens."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.state import check_state
from pallas_kernels.scan import SoftmaxState, softmax_scan


def aaren_attention(
    query: Float[ArrayLike, "B|1 1 N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: SoftmaxState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], SoftmaxState]:
    """Causal softmax attention of one learned query to all tokens so far.

    For every head, with the query q that a layer learns in place of one for each token,

        s_j = scale q . k_j,    o_t = sum_{j<=t} exp(s_j) v_j / sum_{j<=t} exp(s_j)

    A token's output is that of ordinary attention by this query over the tokens up to it. It needs
    no more of the past than (m, u, w): the largest score, and the sums of exp(s_j - m) and of
    exp(s_j - m) v_j; two such states join to that of both parts, in any order. O(T) time and
    memory, forward and backward; scores and states are float32, or float64 for float64 keys.

    Source: Feng et al., Attention as an RNN (2024).

    Args:
      query: one for all tokens, of each row of the batch or of all rows.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive heads of
        the query.
      value: likewise.
      scale: factor of the scores; None for 1 / sqrt(H).
      segment_ids: documents packed into a row: the state begins anew wherever the id changes.
      initial_state: that of the tokens before, which belong to the first segment.
      return_state: whether to return the state after the last token too.
      chunk_size: tokens between two states that are kept for the backward, by default a number that
        was measured to be fast; no influence but on rounding.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in value's dtype; with `return_state` also the state.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query = jax.random.normal(jax.random.key(0), (1, 1, 4, 8))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 48, 4, 8))
      >>> out = aaren_attention(query, key, value)
      >>> out.shape
      (2, 48, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name}: must be a float array of 4 dimensions; got {x.dtype}{x.shape}"
            )
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be query's, {query.dtype}")
    batch, tokens, kv_heads, features = key.shape
    rows, ones, heads, _ = query.shape
    if rows not in (1, batch) or ones != 1 or query.shape[3] != features or heads % kv_heads:
        raise ValueError(
            f"query: shape {query.shape} must be [{batch} or 1, 1, N, {features}], one query for "
            f"all tokens, with N a multiple of the {kv_heads} heads of key {key.shape}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: shape {value.shape} must be [{batch}, {tokens}, {kv_heads}, V], as key"
        )
    wide = jnp.promote_types(key.dtype, jnp.float32)
    grouped = jnp.broadcast_to(query[:, 0], (batch, heads, features))
    grouped = grouped.reshape(batch, kv_heads, heads // kv_heads, features)
    score = jnp.einsum(
        "bkgh,btkh->btkg",
        grouped,
        key,
        preferred_element_type=wide,
        precision=jax.lax.Precision.HIGHEST if key.dtype == wide else None,
    )
    score *= features**-0.5 if scale is None else scale
    return softmax_scan(
        score.reshape(batch, tokens, heads),
        value,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
        function="aaren_attention",
    )


def aaren_attention_step(
    state: SoftmaxState,
    query: Float[ArrayLike, "B|1 1 N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], SoftmaxState]:
    """Continues `aaren_attention` by T >= 1 tokens: a prompt at once, or token by token.

    The time of a step and the size of the state do not depend on the tokens before.

    Args:
      state: that of the tokens before, from `init_aaren_attention_state`, from the step before, or
        from `aaren_attention(..., return_state=True)`.
      query: the same for all tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      scale: as for `aaren_attention`.
      chunk_size: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `aaren_attention`.

    Example:
      >>> state = init_aaren_attention_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 1, 4, 8))
      >>> out, state = aaren_attention_step(state, query, key, value)
      >>> bool(jnp.allclose(out, value, atol=1e-6))
      True
    """
    check_state(state, SoftmaxState)
    return aaren_attention(
        query,
        key,
        value,
        scale=scale,
        initial_state=state,
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def init_aaren_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> SoftmaxState:
    """Returns the state of no tokens for `aaren_attention_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the state does not depend on it.
      num_heads: number of heads of the query.
      num_kv_heads: number of key heads; the state does not depend on it.
      head_dim: width of a key; nor on this.
      value_dim: width of a value.
      dtype: of the inputs to come; the state is float32, or float64 for float64.
    """
    del max_length, num_kv_heads, head_dim
    dtype = jnp.promote_types(dtype, jnp.float32)
    rows = (batch, num_heads)
    return SoftmaxState(
        maximum=jnp.full(rows, -jnp.inf, dtype),
        total=jnp.zeros(rows, dtype),
        weighted=jnp.zeros((*rows, value_dim), dtype),
    )


RECORD = Mechanism(
    slug="aaren_attention",
    title="Attention as an RNN",
    year=2024,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="scan",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    one_query=True,
    function=aaren_attention,
    step=aaren_attention_step,
    init_state=init_aaren_attention_state,
    extras=(SoftmaxState,),
)
