"""BASED's linear attention: the second-order Taylor polynomial of softmax's exponential."""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.state import check_state
from pallas_kernels.linear import LinearState, init_linear_state, linear_attention


def based_linear_attention(
    query: Float[ArrayLike, "B T N F"],
    key: Float[ArrayLike, "B T K F"],
    value: Float[ArrayLike, "B T K V"],
    *,
    epsilon: float = 1e-12,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], LinearState]:
    """Causal linear attention with weights 1 + s + s^2 / 2 in place of softmax's exp(s).

    For every head, with queries and keys of few features F (16 in the paper),

        s_tj = q_t . k_j / sqrt(F),    w_tj = 1 + s_tj + s_tj^2 / 2,
        o_t  = sum_{j<=t} w_tj v_j / (sum_{j<=t} w_tj + epsilon)

    Weights are at least 1/2, so that the sum of the first t + 1 is at least (t + 1) / 2. The
    features whose products are the weights, phi(x) = [1, x / F^(1/4), x_i^2 / sqrt(2F),
    x_i x_j / sqrt(F) (i < j)], are 1 + F + F (F + 1) / 2 (153 for 16). They are made for a chunk at
    a time and never written to memory; within a chunk the polynomial is taken of the scores. O(T)
    time and memory, forward and backward; the memory and all sums are float32, or float64 for
    float64 queries. There are no positions: in the paper those come from the sliding windows and
    short convolutions of the layers between.

    Source: Arora et al., Simple linear attention language models balance the recall-throughput
    tradeoff (2024).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      epsilon: what is added to the sum of weights, 1e-12 as published.
      segment_ids: documents packed into a row: the memory begins anew wherever the id changes.
      initial_state: the memory left by the tokens before, which belong to the first segment.
      return_state: whether to return the memory after the last token too.
      chunk_size: tokens of a chunk, by default a number that was measured to be fast; no influence
        but on rounding.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype; with `return_state` also the state.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 2, 48, 4, 16))
      >>> value = jax.random.normal(jax.random.key(1), (2, 48, 4, 32))
      >>> out, state = based_linear_attention(query, key, value, return_state=True)
      >>> out.shape
      (2, 48, 4, 32)
      >>> state.memory.shape
      (2, 4, 153, 32)
    """
    return linear_attention(
        query,
        key,
        value,
        feature_map="taylor",
        normalize=True,
        epsilon=epsilon,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
        function="based_linear_attention",
    )


def based_linear_attention_step(
    state: LinearState,
    query: Float[ArrayLike, "B T N F"],
    key: Float[ArrayLike, "B T K F"],
    value: Float[ArrayLike, "B T K V"],
    *,
    epsilon: float = 1e-12,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], LinearState]:
    """Continues `based_linear_attention` by T >= 1 tokens: a prompt at once, or token by token.

    The time of a step and the size of the state do not depend on the tokens before.

    Args:
      state: the memory after the tokens before, from `init_based_linear_attention_state`, from the
        step before, or from `based_linear_attention(..., return_state=True)`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      epsilon: as for `based_linear_attention`.
      chunk_size: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `based_linear_attention`.

    Example:
      >>> state = init_based_linear_attention_state(1, 1024, 4, 4, 16, 32)
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 16))
      >>> value = jax.random.normal(jax.random.key(1), (1, 1, 4, 32))
      >>> out, state = based_linear_attention_step(state, query, key, value)
      >>> bool(jnp.allclose(out, value, atol=1e-5))
      True
    """
    return based_linear_attention(
        query,
        key,
        value,
        epsilon=epsilon,
        initial_state=check_state(state, LinearState),
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def init_based_linear_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> LinearState:
    """Returns an empty memory for `based_linear_attention_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the memory does not depend on it.
      num_heads: number of query heads.
      num_kv_heads: number of key heads; the memory does not depend on it.
      head_dim: F, features of a key.
      value_dim: width of a value.
      dtype: of the inputs to come; the memory is float32, or float64 for float64.
    """
    del max_length, num_kv_heads
    return init_linear_state(
        batch, num_heads, head_dim, value_dim, feature_map="taylor", normalize=True, dtype=dtype
    )


RECORD = Mechanism(
    slug="based_linear_attention",
    title="Simple linear attention language models balance the recall-throughput tradeoff",
    year=2024,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="linear",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=based_linear_attention,
    step=based_linear_attention_step,
    init_state=init_based_linear_attention_state,
    extras=(LinearState,),
)
