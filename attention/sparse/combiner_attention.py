"""Combiner: every token sees some tokens directly, and the others through summaries of spans."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attention.catalogue import Mechanism
from attention.packing import places
from attention.spans import Spans, earlier, make_spans
from attention.state import check_room, check_state
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays
from pallas_kernels.choose import resolve_implementation
from pallas_kernels.tiled import tiled_attention
from pallas_kernels.tiled.merge import merge_partials


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CombinerAttentionState:
    """What "fixed" `combiner_attention` carries: the tokens of one span, and summaries of others.

    Attributes:
      key: keys of the tokens of the span so far, from its first on; what follows is not read.
      value: their values.
      query: the maximum of their queries.
      span_keys: keys of the spans that are finished, in order; what follows is not read.
      span_values: their values.
      length: number of tokens so far.
    """

    key: Float[Array, "B n K H"]
    value: Float[Array, "B n K V"]
    query: Float[Array, "B N H"]
    span_keys: Float[Array, "B R K H"]
    span_values: Float[Array, "B R N V"]
    length: Int[Array, ""]


def combiner_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    form: Literal["fixed", "logsparse"] = "fixed",
    is_causal: bool = False,
    span_size: int | None = None,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Full attention by parts: to tokens directly, and to spans of tokens by one summary of each.

    Token i sees the tokens D_i directly and the spans R_i, which share no token with D_i nor with
    each other and together hold all others that it may see. For every head, all maxima being of
    each channel over the tokens of a span r,

        k_r = max_j k_j,   q_r = max_j q_j,   v_r = sum_j p_rj v_j,   p_r = softmax_j(scale q_r.k_j)
        o_i = sum_{j in D_i} w_ij v_j + sum_{r in R_i} w_ir v_r
        w_i = softmax over both of scale q_i.k_j, j in D_i, and scale q_i.k_r, r in R_i

    so token i gives the tokens of a span weights w_ir p_rj, and the weights of a row sum to 1.

        "fixed"      spans of n tokens. D_i is the token's own span, up to i where causal; R_i are
                     the others, those before its own where causal. O(T (n + T / n)) time, so
                     O(T^1.5) for n = sqrt(T), and O(T) memory
        "logsparse"  causal. D_i = {i}; for every bit l set in i, R_i has the span of 2^l tokens
                     that ends where the rest of i, without that and all lower bits, says: [0, i) is
                     cut up. O(T log T) time and memory. Plain JAX

    Spans are counted from the beginning of a document. For n = 1 or n = T, "fixed" is full
    attention. Scores and sums are float32, or float64 for float64 queries. First derivatives, also
    through the summaries, exist in reverse mode; the implementation "reference" has all.

    The released code lets a token that sees both ways see its own span's summary too, and so count
    the span's tokens twice; here it does not. Its axial forms make keys of the output of attention
    by linear layers and a normalisation: they are layers, and left out.

    Source: Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost (2021).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      form: "fixed" or "logsparse".
      is_causal: whether a token sees itself and those before it only; must be set for "logsparse".
      span_size: n of "fixed"; None for sqrt(T), rounded up.
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
      >>> out = combiner_attention(query, key, value, is_causal=True)
      >>> out.shape
      (2, 100, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    batch, tokens = query.shape[:2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if form == "logsparse":
        if not is_causal:
            raise ValueError("is_causal: must be True for form 'logsparse'; got False")
        if span_size is not None:
            raise ValueError(f"span_size: is of form 'fixed'; got {span_size!r}")
        resolve_implementation(
            implementation,
            {name: lambda: None for name in ("xla", "reference")},
            function="combiner_attention",
        )
        return _log_sparse(query, key, value, scale, segment_ids)
    if form != "fixed":
        raise ValueError(f"form: must be 'fixed' or 'logsparse'; got {form!r}")
    size = _size(span_size, tokens)
    place = places(segment_ids, batch, tokens)
    own = jnp.cumsum(place % size == 0, axis=1, dtype=jnp.int32)
    # The window says nothing that the spans do not: it bounds what is visited of a row.
    within = masks.segments(own) & masks.window(size - 1, 0 if is_causal else size - 1)
    spans = make_spans(size, batch, tokens, segment_ids, whole=is_causal)
    summaries = _summaries(query, key, value, spans, scale)
    others = spans.earlier() if is_causal else spans.others()
    parts = (key, value, within), (*summaries, others)
    return _attend(query, parts, scale, implementation)


def _size(span_size: int | None, tokens: int) -> int:
    if span_size is None:
        return math.isqrt(max(tokens, 1) - 1) + 1
    if not isinstance(span_size, int) or span_size < 1:
        raise ValueError(f"span_size: must be a positive integer or None; got {span_size!r}")
    return span_size


def _summaries(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    spans: Spans,
    scale: float,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S N V"]]:
    """Returns the keys and values of spans."""
    values = _span_values(
        spans.pooled(query, "max"), spans.split(key), spans.split(value), spans.inside, scale
    )
    return spans.pooled(key, "max"), values


def _span_values(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S n K H"],
    value: Float[Array, "B S n K V"],
    inside: Bool[Array, "B|1 S n"],
    scale: float,
) -> Float[Array, "B S N V"]:
    """Returns the values of spans, from their queries and from what their tokens carry."""
    batch, count, heads, _ = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, count, key.shape[3], -1, query.shape[3])
    scores = jnp.einsum("bskgh,bsjkh->bskgj", query, key, preferred_element_type=wide)
    inside = inside[:, :, None, None]
    scores = jnp.where(inside, scale * scores, jnp.finfo(wide).min)
    weights = jnp.where(inside, jax.nn.softmax(scores, axis=-1), 0).astype(value.dtype)
    inside = jnp.moveaxis(inside, 4, 2)
    value = jnp.where(inside, value, 0)
    out = jnp.einsum("bskgj,bsjkv->bskgv", weights, value, preferred_element_type=wide)
    return out.reshape(batch, count, heads, -1).astype(value.dtype)


def _attend(
    query: Float[Array, "B T N H"],
    parts: tuple[tuple[Array, Array, masks.Mask], ...],
    scale: float,
    implementation: str | None,
) -> Float[Array, "B T N V"]:
    """Returns attention to keys and values of several arrays together."""
    results = [
        tiled_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            return_lse=True,
            implementation=implementation,
            function="combiner_attention",
        )
        for key, value, mask in parts
    ]
    return merge_partials(*zip(*results, strict=True))[0]


def _log_sparse(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    scale: float,
    segment_ids: Int[ArrayLike, "B T"] | None,
) -> Float[Array, "B T N V"]:
    batch, tokens, heads, _ = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    place = places(segment_ids, batch, tokens)

    def read(rows: Array, slot: Array) -> Array:
        rows = jnp.repeat(rows, heads // rows.shape[2], axis=2).astype(wide)
        return jnp.take_along_axis(rows, slot[:, :, None, None], axis=1)

    def scored(keys: Array) -> Array:
        return scale * jnp.sum(query.astype(wide) * keys, axis=-1)

    itself = jnp.arange(tokens, dtype=jnp.int32)[None]
    outs, scores = [read(value, itself)], [scored(read(key, itself))]
    for level in range((tokens - 1).bit_length()):
        # The span that ends where the token's own span of this level begins.
        spans = make_spans(2**level, batch, tokens, segment_ids, whole=True)
        slot = jnp.maximum(spans.number - 1, 0)
        keys, values = _summaries(query, key, value, spans, scale)
        seen = (place >> level & 1 == 1)[..., None]
        outs.append(read(values, slot))
        scores.append(jnp.where(seen, scored(read(keys, slot)), -jnp.inf))
    return merge_partials(outs, scores)[0].astype(query.dtype)


def combiner_attention_step(
    state: CombinerAttentionState,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    span_size: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], CombinerAttentionState]:
    """Continues causal "fixed" `combiner_attention` by T >= 1 tokens: a prompt, or token by token.

    A step attends to the tokens of one span and to one key for each span before. Outputs of tokens
    that come after more spans than the state has room for are NaN.

    Args:
      state: the span so far, and the summaries of those before.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      span_size: that of the state, if given.
      scale: as for `combiner_attention`.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `combiner_attention`.

    Example:
      >>> state = init_combiner_attention_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 40, 4, 8))
      >>> out, state = combiner_attention_step(state, query, key, value)
      >>> out.shape, state.key.shape, state.span_keys.shape, int(state.length)
      ((1, 40, 4, 8), (1, 32, 4, 8), (1, 32, 4, 8), 40)
    """
    check_state(state, CombinerAttentionState)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    check_room("state", key=(key, state.key), value=(value, state.value))
    if query.shape[2] != state.query.shape[1]:
        raise ValueError(
            f"query: {query.shape[2]} heads do not fit the state's {state.query.shape[1]}"
        )
    (batch, size), tokens, room = state.key.shape[:2], query.shape[1], state.span_keys.shape[1]
    if _size(size if span_size is None else span_size, tokens) != size:
        raise ValueError(f"span_size: {span_size}, but the state's is {size}")
    scale = query.shape[3] ** -0.5 if scale is None else scale

    # The span so far lies before the new tokens. Of its queries the maximum stands for all, in the
    # place of the first.
    length, slots = state.length, jnp.arange(size)
    after, begin = length + tokens, length // size * size
    queries = jnp.pad(state.query[:, None], ((0, 0), (0, size - 1), (0, 0), (0, 0)), mode="edge")
    queries, keys, values = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in ((queries, query), (state.key, key), (state.value, value))
    )

    def placed(x: Array, positions: Array) -> Array:
        """Returns what stands at positions [spans, size] from the beginning of the span on."""
        index = jnp.where(positions < length, positions - begin, size + positions - length)
        index = jnp.clip(index, 0, size + tokens - 1).ravel()
        return jnp.take(x, index, axis=1).reshape(batch, *positions.shape, *x.shape[2:])

    finished = begin + jnp.arange((size - 1 + tokens) // size)[:, None] * size + slots
    whole = finished[:, -1] < after
    of_spans = [jnp.max(placed(x, finished), axis=2) for x in (queries, keys)]
    inside = jnp.broadcast_to(whole[None, :, None], (1, *finished.shape))
    new_values = _span_values(
        of_spans[0], placed(keys, finished), placed(values, finished), inside, scale
    )
    number = jnp.where(whole, finished[:, 0] // size, room)
    fits = after <= (room + 1) * size
    span_keys, span_values = (
        jnp.where(fits, old.at[:, number].set(new.astype(old.dtype), mode="drop"), jnp.nan)
        for old, new in ((state.span_keys, of_spans[1]), (state.span_values, new_values))
    )

    positions = length + jnp.arange(tokens)
    before = jnp.where(begin + slots < length, begin // size, -2)
    own = jnp.concatenate([before, positions // size])[None].astype(jnp.int32)
    within = masks.segments(own[:, size:], own) & masks.causal(size)
    others = earlier(own[:, size:], room)
    parts = (keys, values, within), (span_keys, span_values, others)
    parts = tuple((k.astype(query.dtype), v.astype(query.dtype), mask) for k, v, mask in parts)
    out = _attend(query, parts, scale, implementation)

    wanted = (after // size * size + slots)[None]
    query = jnp.where((wanted < after)[..., None, None], placed(queries, wanted), -jnp.inf)
    query = jnp.where(after % size > 0, jnp.max(query[:, 0], axis=1), 0)
    return out, CombinerAttentionState(
        key=placed(keys, wanted)[:, 0].astype(state.key.dtype),
        value=placed(values, wanted)[:, 0].astype(state.value.dtype),
        query=query.astype(state.query.dtype),
        span_keys=span_keys,
        span_values=span_values,
        length=after,
    )


def init_combiner_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    span_size: int | None = None,
) -> CombinerAttentionState:
    """Returns a state without tokens for `combiner_attention_step`.

    Args:
      batch: number of sequences.
      max_length: the most tokens that will be seen.
      num_heads: number of query heads.
      num_kv_heads: number of key heads.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of the inputs to come, and of what is stored.
      span_size: n; None for the square root of max_length, rounded up.
    """
    size = _size(span_size, max_length)
    spans = max(max_length // size, 1)
    return CombinerAttentionState(
        key=jnp.zeros((batch, size, num_kv_heads, head_dim), dtype),
        value=jnp.zeros((batch, size, num_kv_heads, value_dim), dtype),
        query=jnp.zeros((batch, num_heads, head_dim), dtype),
        span_keys=jnp.zeros((batch, spans, num_kv_heads, head_dim), dtype),
        span_values=jnp.zeros((batch, spans, num_heads, value_dim), dtype),
        length=jnp.zeros((), jnp.int32),
    )


RECORD = Mechanism(
    slug="combiner_attention",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    year=2021,
    family="sparse",
    patterns=frozenset({"self causal", "self non-causal"}),
    time="O(T^1.5)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=combiner_attention,
    step=combiner_attention_step,
    init_state=init_combiner_attention_state,
    extras=(CombinerAttentionState,),
    small={"span_size": 3},
)
