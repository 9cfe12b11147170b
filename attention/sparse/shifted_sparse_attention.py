"""Shifted sparse attention (LongLoRA, SinkLoRA): within groups, for half of the heads shifted."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.packing import places
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays
from pallas_kernels.tiled import tiled_attention
from pallas_kernels.tiled.merge import merge_partials


def shifted_sparse_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    group_size: int | None = None,
    num_sinks: int = 0,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Causal attention within groups of tokens, which half of the heads shift by half a group.

    Groups of G tokens begin at 0, G, 2 G, ... for the query heads 0 to N // 2 - 1, and at 0, h,
    h + G, h + 2 G, ..., with h = G // 2, for all others. For every head, with g(t) the first token
    of the group of token t,

        o_t = sum_j p_tj v_j,   p_t = softmax of scale q_t . k_j
              over the tokens g(t) <= j <= t, and j < num_sinks

    It stands in for full attention while a model is fine-tuned on long rows, and full attention
    takes over when the model is used, so there is no step. Groups and sinks are counted from the
    beginning of a document. The query heads of one key head may be of both kinds. O(T G) time and,
    with a merge of both parts where there are sinks, O(T) memory. Scores and sums are float32, or
    float64 for float64 queries. First derivatives exist in reverse mode; the implementation
    "reference" has all.

    These are the groups of the released FlashAttention form. The released other form rolls the
    tokens of the shifted heads by h, so that the first h tokens of a row see its last ones, which
    come later: it is left out. Sinks are one reading of SinkLoRA, whose released code has none.

    Source: Chen et al., LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models
    (2023); sinks: Zhang, SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context
    Large Language Models (2024).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      group_size: G; None for a quarter of T as published, rounded up.
      num_sinks: how many tokens at the beginning are seen by all later ones.
      scale: factor of the scores; None for 1 / sqrt(H).
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
      >>> out = shifted_sparse_attention(query, key, value, group_size=32)
      >>> out.shape
      (2, 100, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    batch, tokens, heads, _ = query.shape
    if group_size is None:
        group_size = -(-tokens // 4)
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: must be a positive integer or None; got {group_size!r}")
    if not isinstance(num_sinks, int) or num_sinks < 0:
        raise ValueError(f"num_sinks: must be an integer of at least 0; got {num_sinks!r}")

    place = jnp.broadcast_to(places(segment_ids, batch, tokens), (batch, tokens))
    half = group_size // 2
    shift = jnp.where(jnp.arange(heads) < heads // 2, 0, half)
    begins = (place[:, None] - shift[:, None]) % group_size == 0
    groups = jnp.cumsum(begins | (place == 0)[:, None], axis=2, dtype=jnp.int32)

    def attend(key: Array, value: Array, mask: masks.Mask) -> tuple[Array, Array]:
        return tiled_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            return_lse=True,
            implementation=implementation,
            function="shifted_sparse_attention",
        )

    # The window says nothing that the groups do not: it bounds what is visited of a row.
    parts = [attend(key, value, masks.segments(groups) & masks.window(group_size - 1, 0))]
    if num_sinks:
        # Only a document of more than half a group has sinks beyond the own group of its tokens.
        count = 1 if segment_ids is None else max(tokens // (half + 1), 1)
        sinks, of_sinks, document = _sinks(place, half, count, num_sinks)
        own = jnp.take_along_axis(groups, sinks[:, None], axis=2)
        mask = masks.segments(document, of_sinks) & masks.rule(_before, groups, own)
        sinks = sinks[:, :, None, None]
        parts.append(attend(*(jnp.take_along_axis(x, sinks, axis=1) for x in (key, value)), mask))
    if len(parts) == 1:
        return parts[0][0]
    return merge_partials(*zip(*parts, strict=True))[0]


def _sinks(
    place: Int[Array, "B T"], half: int, count: int, num_sinks: int
) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B T"]]:
    """Returns where sinks stand, their documents (-2 for none), and those of all tokens.

    Args:
      place: of every token in its document.
      half: sinks are those of documents with more tokens than this.
      count: the most such documents.
      num_sinks: of a document.
    """
    batch, tokens = place.shape
    document = jnp.cumsum(place == 0, axis=1, dtype=jnp.int32)
    found = jax.vmap(lambda x: jnp.nonzero(x, size=count, fill_value=tokens + half)[0])
    first = found(place == half) - half
    sinks = first[:, :, None] + jnp.arange(num_sinks)
    inside = sinks < tokens
    first, sinks = (jnp.minimum(x, tokens - 1) for x in (first, sinks))
    sinks = sinks.reshape(batch, -1)
    of_sinks = jnp.take_along_axis(document, sinks, axis=1)
    of_first = jnp.take_along_axis(document, first, axis=1)
    same = of_sinks == jnp.repeat(of_first, num_sinks, axis=1)
    return sinks, jnp.where(inside.reshape(batch, -1) & same, of_sinks, -2), document


def _before(own: Array, of_sink: Array) -> Array:
    return of_sink < own


RECORD = Mechanism(
    slug="shifted_sparse_attention",
    title="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
    year=2023,
    family="sparse",
    patterns=frozenset({"self causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=shifted_sparse_attention,
    small={"group_size": 4, "num_sinks": 2},
)
