"""Lightning attention: causal linear attention with a constant decay per head."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.positions import alibi_slopes
from attention.state import check_state
from pallas_kernels.linear import LinearState, init_linear_state, linear_attention


def lightning_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    slopes: Float[ArrayLike, "N"] | Sequence[float] | None = None,
    scale: float | Float[Array, ""] = 1.0,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], LinearState]:
    """Causal linear attention in which each head forgets at a constant rate.

    For every head, with slope s >= 0 and lam = exp(-s), and with neither softmax nor denominator,

        o_t = scale sum_{j<=t} lam^(t-j) (q_t . k_j) v_j

    It is computed in chunks of C tokens, within a chunk as the masked product of queries and keys
    and from chunk to chunk through the memory S = sum_j lam^(t-j) k_j^T v_j, [H, V]: O(T) time and
    memory, forward and backward. The memory and all sums are float32, or float64 for float64
    queries. Without slopes it is plain causal linear attention, and the output grows with T; models
    normalise it (TransNormerLLM by a norm over all heads).

    Sources: Qin et al., Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths
    in Large Language Models (2024), algorithms 1 and 2, and Various Lengths, Constant Speed:
    Efficient Language Modeling with Lightning Attention (2024).

    Args:
      query: float array. Its feature map, silu for TransNormerLLM, is the caller's.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise; V may differ from H.
      slopes: decay rate of each query head per token, at least 0; `inf` leaves each token only
        itself, None is 0. An array may be learned; a negative slope is refused where it is known
        before the program runs (tuples, NumPy arrays), and makes the memory grow where it is not.
      scale: of the output, by default 1, as published.
      segment_ids: documents packed into a row: the memory begins anew wherever the id changes.
      initial_state: the memory left by the tokens before, which belong to the first segment.
      return_state: whether to return the memory after the last token too.
      chunk_size: C, by default one that was measured to be fast; no influence but on rounding.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype; with `return_state` also the state.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 48, 4, 8))
      >>> slopes = transnormer_slopes(layer=0, num_layers=2, num_heads=4)
      >>> out = lightning_attention(query, key, value, slopes=slopes)
      >>> out.shape
      (2, 48, 4, 8)
      >>> prompt = (x[:, :40] for x in (query, key, value))
      >>> _, state = lightning_attention(*prompt, slopes=slopes, return_state=True)
      >>> rest = (x[:, 40:] for x in (query, key, value))
      >>> last, state = lightning_attention_step(state, *rest, slopes=slopes)
      >>> bool(jnp.allclose(last, out[:, 40:], rtol=1e-4, atol=1e-4))
      True
    """
    return linear_attention(
        query,
        key,
        value,
        log_decay=None if slopes is None else _log_decay(slopes, jnp.shape(query)),
        scale=scale,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
        function="lightning_attention",
    )


def lightning_attention_step(
    state: LinearState,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    slopes: Float[ArrayLike, "N"] | Sequence[float] | None = None,
    scale: float | Float[Array, ""] = 1.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], LinearState]:
    """Continues `lightning_attention` by T >= 1 tokens: a prompt at once, or token by token.

        S_t = lam S_{t-1} + k_t^T v_t,    o_t = scale q_t S_t

    The time of a step and the size of the state do not depend on the tokens before.

    Args:
      state: the memory after the tokens before, from `init_lightning_attention_state`, from the
        step before, or from `lightning_attention(..., return_state=True)`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      slopes: as for `lightning_attention`.
      scale: likewise.
      chunk_size: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `lightning_attention`.

    Example:
      >>> state = init_lightning_attention_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 1, 4, 8))
      >>> out, state = lightning_attention_step(state, query, key, value, slopes=(0.5,) * 4)
      >>> out.shape, state.memory.shape
      ((1, 1, 4, 8), (1, 4, 8, 8))
    """
    return lightning_attention(
        query,
        key,
        value,
        slopes=slopes,
        scale=scale,
        initial_state=check_state(state, LinearState),
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def init_lightning_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> LinearState:
    """Returns an empty memory for `lightning_attention_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the memory does not depend on it.
      num_heads: number of query heads: each has a memory, as each has a decay.
      num_kv_heads: number of key heads; the memory does not depend on it.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of the inputs to come; the memory is float32, or float64 for float64.
    """
    del max_length, num_kv_heads
    return init_linear_state(batch, num_heads, head_dim, value_dim, dtype=dtype)


def transnormer_slopes(
    layer: int, num_layers: int, num_heads: int, decay: Literal["alibi", "paper"] = "alibi"
) -> tuple[float, ...]:
    """Slopes of the heads of one layer of TransNormerLLM, for `lightning_attention`.

    With layers l = 0..L-1 and heads h = 0..N-1 there are two published rules, which give different
    models:

        "alibi":  s = a_h (1 - l / (L - 1) + 1e-5),   a the slopes of ALiBi
        "paper":  s = (8 h / N) (1 - l / L)

    "alibi" is what the released models and code use; the last layer hardly forgets at all, and a
    model of one layer has s = a_h (1 + 1e-5). In "paper" head 0 never forgets and the last head of
    the first layer forgets all but exp(-8 (N - 1) / N) in one token.

    Sources: Qin et al., Scaling TransNormer to 175 Billion Parameters (2023), on its position
    encoding, for "paper"; the code published with it for "alibi".

    Args:
      layer: l, from 0.
      num_layers: L.
      num_heads: N.
      decay: which rule.

    Returns:
      N slopes, at least 0.

    Raises:
      ValueError: the layer is not one of the layers, there is no head, or no such rule.

    Example:
      >>> transnormer_slopes(layer=1, num_layers=2, num_heads=4, decay="paper")
      (0.0, 1.0, 2.0, 3.0)
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: {layer} must be from 0 to num_layers - 1 = {num_layers - 1}")
    if num_heads < 1:
        raise ValueError(f"num_heads: {num_heads} must be at least 1")
    if decay == "alibi":
        factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
        return tuple(float(slope) * factor for slope in alibi_slopes(num_heads))
    if decay == "paper":
        return tuple(8 * head / num_heads * (1 - layer / num_layers) for head in range(num_heads))
    raise ValueError(f"decay: {decay!r} must be 'alibi' or 'paper'")


def _log_decay(slopes: ArrayLike | Sequence[float], query_shape: tuple[int, ...]) -> ArrayLike:
    """Returns the negated slopes; those that are known must be numbers of at least 0."""
    if not isinstance(slopes, jax.Array):
        slopes = np.asarray(slopes)
        if slopes.dtype.kind not in "fiu":
            raise TypeError(f"slopes: must be numbers; got {slopes.dtype}")
        if not np.all(slopes >= 0):
            raise ValueError(f"slopes: must be at least 0; got {slopes}")
        slopes = slopes.astype(np.float64)
    if len(query_shape) == 4 and slopes.shape != query_shape[2:3]:
        raise ValueError(
            f"slopes: must have shape {query_shape[2:3]}, one for each head of query; got "
            f"{slopes.shape}"
        )
    if not jnp.issubdtype(slopes.dtype, jnp.floating):
        raise TypeError(f"slopes: must be floating point; got {slopes.dtype}")
    return -slopes


RECORD = Mechanism(
    slug="lightning_attention",
    title=(
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large "
        "Language Models"
    ),
    year=2024,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="linear",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=lightning_attention,
    step=lightning_attention_step,
    init_state=init_lightning_attention_state,
    extras=(LinearState, transnormer_slopes),
)
