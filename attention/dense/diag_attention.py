"""DiagAttention (TransNormer): exact attention within blocks of a sequence."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.norms import rms_over_heads
from attention.packing import places
from attention.state import check_room, check_state
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.tiled import tiled_attention

BLOCK_SIZE = 64
"""Of the released models."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagAttentionState:
    """What `diag_attention` carries from token to token: keys and values of one block.

    Attributes:
      key: keys of the tokens of the block so far, from its first on; what follows is not read.
      value: their values.
      length: number of tokens so far, of all blocks.
    """

    key: Float[Array, "B W K H"]
    value: Float[Array, "B W K V"]
    length: Int[Array, ""]


def diag_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    is_causal: bool = False,
    block_size: int = BLOCK_SIZE,
    weights: Literal["softmax", "relu"] = "softmax",
    scale: float | None = None,
    epsilon: float = 1e-8,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Attention within blocks: token t sees the tokens of block floor(t / W) only.

    With W the block size and s_tj = scale q_t . k_j over the tokens j of the block of t, up to t
    where causal,

        "softmax":  o_t = sum_j exp(s_tj) v_j / sum_j exp(s_tj)                        T2
        "relu":     o_t = sum_j max(s_tj, 0) v_j,   y_t = o_t / (rms(o_t) + epsilon)   T1

    the root mean square being over all channels of a token's heads together. Blocks do not overlap;
    each document of a packed row begins a new one. O(T W) time, O(T) memory.
    Scores and sums are float32, or float64 for float64 queries. First derivatives exist in reverse
    mode; the implementation "reference" has all. A token with no weight has an output of 0.

    The released code gives keys that fill up the last block a score of 0 and lets them count; here
    there are none.

    Source: Qin et al., The Devil in Linear Transformer (2022).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      is_causal: whether a token sees itself and those before it only.
      block_size: W, 64 by default as in the released models.
      weights: "softmax" or "relu".
      scale: factor of the scores; None for 1 / sqrt(H).
      epsilon: what is added to the root mean square of "relu".
      segment_ids: documents packed into a row: tokens attend within their own.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 8))
      >>> out = diag_attention(query, key, value, block_size=32, is_causal=True)
      >>> out.shape
      (2, 100, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    _check(block_size, weights)
    place = places(segment_ids, *query.shape[:2])
    blocks = jnp.cumsum(place % block_size == 0, axis=1, dtype=jnp.int32)
    blocks = jnp.broadcast_to(blocks, query.shape[:2])
    within = masks.segments(blocks) & masks.window(
        block_size - 1, 0 if is_causal else block_size - 1
    )
    return _attend(query, key, value, within, weights, scale, epsilon, implementation)


def _check(block_size: int, weights: str) -> None:
    check_positive(block_size=block_size)
    if weights not in ("softmax", "relu"):
        raise ValueError(f"weights: must be 'softmax' or 'relu'; got {weights!r}")


def _attend(
    query: Array,
    key: Array,
    value: Array,
    mask: masks.Mask,
    weights: str,
    scale: float | None,
    epsilon: float,
    implementation: str | None,
) -> Array:
    out = tiled_attention(
        query,
        key,
        value,
        mask=mask,
        weights=weights,
        normalise=weights == "softmax",
        scale=scale,
        implementation=implementation,
        function="diag_attention",
    )
    return rms_over_heads(out, epsilon) if weights == "relu" else out


def diag_attention_step(
    state: DiagAttentionState,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    block_size: int = BLOCK_SIZE,
    weights: Literal["softmax", "relu"] = "softmax",
    scale: float | None = None,
    epsilon: float = 1e-8,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], DiagAttentionState]:
    """Continues causal `diag_attention` by T >= 1 tokens: a prompt at once, or token by token.

    The state holds the keys and values of one block, whatever the number of tokens before.

    Args:
      state: the block so far.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      block_size: as for `diag_attention`; at most that of the state.
      weights: likewise.
      scale: likewise.
      epsilon: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `diag_attention`.

    Example:
      >>> state = init_diag_attention_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 70, 4, 8))
      >>> out, state = diag_attention_step(state, query, key, value)
      >>> out.shape, state.key.shape, int(state.length)
      ((1, 70, 4, 8), (1, 64, 4, 8), 70)
    """
    check_state(state, DiagAttentionState)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    _check(block_size, weights)
    size, tokens = state.key.shape[1], query.shape[1]
    if block_size > size:
        raise ValueError(f"block_size: {block_size}, but the state has room for {size} tokens")
    check_room("state", key=(key, state.key), value=(value, state.value))

    # The block so far lies before the new tokens, each with its position; -1 is none.
    length, slots = state.length, jnp.arange(size)
    begin = length // block_size * block_size
    before = jnp.where(begin + slots < length, begin + slots, -1)
    positions = jnp.concatenate([before, length + jnp.arange(tokens)])
    keys = jnp.concatenate([state.key.astype(key.dtype), key], axis=1)
    values = jnp.concatenate([state.value.astype(value.dtype), value], axis=1)
    blocks = jnp.where(positions < 0, -2, positions // block_size).astype(jnp.int32)
    blocks = jnp.broadcast_to(blocks, (query.shape[0], size + tokens))
    mask = masks.segments(blocks[:, size:], blocks) & masks.causal(size)
    out = _attend(query, keys, values, mask, weights, scale, epsilon, implementation)

    after = length + tokens
    wanted = after // block_size * block_size + slots
    # Positions of one block lie side by side, either in the state or among the new tokens.
    index = jnp.where(wanted < length, wanted - begin, size + wanted - length)
    index = jnp.clip(index, 0, size + tokens - 1)
    key, value = (
        jnp.take(array, index, axis=1).astype(old.dtype)
        for array, old in ((keys, state.key), (values, state.value))
    )
    return out, DiagAttentionState(key, value, after)


def init_diag_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    block_size: int = BLOCK_SIZE,
) -> DiagAttentionState:
    """Returns a state without tokens for `diag_attention_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the state does not depend on it.
      num_heads: number of query heads; the state does not depend on it.
      num_kv_heads: number of key heads.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of keys and values.
      block_size: W, the most that the steps may have.
    """
    del max_length, num_heads
    return DiagAttentionState(
        key=jnp.zeros((batch, block_size, num_kv_heads, head_dim), dtype),
        value=jnp.zeros((batch, block_size, num_kv_heads, value_dim), dtype),
        length=jnp.zeros((), jnp.int32),
    )


RECORD = Mechanism(
    slug="diag_attention",
    title="The Devil in Linear Transformer",
    year=2022,
    family="dense",
    patterns=frozenset({"self causal", "self non-causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=diag_attention,
    step=diag_attention_step,
    init_state=init_diag_attention_state,
    extras=(DiagAttentionState,),
    small={"block_size": 5},
)
