"""RAT: a gated recurrence within chunks, softmax attention to the chunks before."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attention.catalogue import Mechanism
from attention.packing import places
from attention.positions import rope
from attention.spans import earlier, make_spans
from attention.state import check_state
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.scan import ScanState, gated_scan
from pallas_kernels.tiled import tiled_attention
from pallas_kernels.tiled.merge import merge_partials

CHUNK_SIZE = 16
"""Of the paper."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RATState:
    """What `rat_attention` carries from token to token.

    Attributes:
      chunk_keys: turned keys of the chunks that are finished, in order; what follows is not read.
      chunk_values: their values.
      key: the recurrent key of the last token, before it is turned.
      value: its recurrent value.
      length: number of tokens so far.
    """

    chunk_keys: Float[Array, "B chunks M H"]
    chunk_values: Float[Array, "B chunks M V"]
    key: Float[Array, "B M H"]
    value: Float[Array, "B M V"]
    length: Int[Array, ""]


def rat_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    log_decay: Float[ArrayLike, "B T N H"] | None = None,
    chunk_size: int = CHUNK_SIZE,
    rope_base: float | None = 10_000.0,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Causal attention to chunks, each summed up by a gated recurrence.

    Within each chunk of C tokens, from its first on, with gates g_t = exp(log_decay_t) for every
    channel,

        k'_t = g_t k'_{t-1} + (1 - g_t) k_t,    v'_t = g_t v'_{t-1} + (1 - g_t) v_t

    and token t of chunk c attends by softmax to (k', v') of the last tokens of chunks 0 to c - 1
    and to its own (k'_t, v'_t). Queries and keys k' are turned by RoPE, by the number of their
    chunk. Chunks are counted from the beginning of a document.

    With C = 1 and g = 0 this is ordinary causal attention; one chunk for all tokens is the
    recurrence alone. O(T^2 / C) time, O(T) memory. Everything but the products is in float32, or
    float64 for float64 queries. First derivatives exist in reverse mode; the implementation
    "reference" has all.

    Source: Wei et al., RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling
    (2025). There head n has key head n mod K: to use weights from there, reorder heads.

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      log_decay: logarithm of the gates, at most 0; V is H then. None for gates of 0: a chunk is
        what its last token is.
      chunk_size: C, 16 by default as published.
      rope_base: of RoPE; None for no positions.
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
      >>> log_decay = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(1), query.shape))
      >>> out = rat_attention(query, key, value, log_decay=log_decay)
      >>> out.shape
      (2, 100, 4, 8)
    """
    query, key, value, log_decay = _checked(query, key, value, log_decay, chunk_size)
    batch, tokens = query.shape[:2]
    place = jnp.broadcast_to(places(segment_ids, batch, tokens), (batch, tokens))
    within = place % chunk_size
    (keys, values), _ = _recurrent(key, value, log_decay, within == 0, None, implementation)
    chunk = place // chunk_size
    query, keys = _turned(query, chunk, rope_base), _turned(keys, chunk, rope_base)

    # A document's last chunk is read by nobody else unless it is whole.
    chunks = make_spans(chunk_size, batch, tokens, segment_ids, whole=True)
    ends = jnp.broadcast_to(chunks.start + chunks.size - 1, (batch, chunks.start.shape[1]))
    ends = jnp.minimum(ends, tokens - 1)
    mask = chunks.earlier()
    ends = ends[:, :, None, None]
    others = jnp.take_along_axis(keys, ends, 1), jnp.take_along_axis(values, ends, 1), mask
    return _attend(query, keys, values, others, scale, implementation)


def _checked(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, log_decay: ArrayLike | None, chunk_size: int
) -> tuple[Array, Array, Array, Array | None]:
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    check_positive(chunk_size=chunk_size)
    if log_decay is None:
        return query, key, value, None
    log_decay = jnp.asarray(log_decay)
    if log_decay.shape != query.shape:
        raise ValueError(f"log_decay: must have query's shape {query.shape}; got {log_decay.shape}")
    if not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise TypeError(f"log_decay: must be floating point; got {log_decay.dtype}")
    if value.shape[3] != query.shape[3]:
        raise ValueError(
            f"value: must have {query.shape[3]} channels, as query and log_decay; got "
            f"{value.shape[3]}"
        )
    return query, key, value, log_decay


def _recurrent(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    log_decay: Float[Array, "B T N H"] | None,
    begins: Bool[Array, "B|1 T"],
    before: tuple[Array, Array] | None,
    implementation: str | None,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns k' and v' of all tokens, in the dtype of key, and of the last, in float32 or better.

    They have N heads where there are gates, else K.

    Args:
      key: k.
      value: v.
      log_decay: of the gates.
      begins: which tokens begin a chunk.
      before: k' and v' before the first token.
      implementation: of the scan.
    """
    wide = jnp.promote_types(key.dtype, jnp.float32)
    if log_decay is None:
        return (key, value), (key[:, -1].astype(wide), value[:, -1].astype(wide))
    batch, tokens, heads, width = log_decay.shape
    log_decay = log_decay.astype(wide)
    taken = -jnp.expm1(log_decay)
    chunks = jnp.cumsum(jnp.broadcast_to(begins, (batch, tokens)), axis=1)

    def flat(x: Array) -> Array:
        return x.reshape(batch, *x.shape[1:-2], heads * width)

    results, last = [], []
    for i, x in enumerate((key, value)):
        x = jnp.repeat(x, heads // x.shape[2], axis=2).astype(wide)
        state = None
        if before is not None:
            # A scan's first token continues what it is given, whatever its segment.
            state = jnp.where(begins[:, :1, None], 0, before[i].astype(wide))
            state = ScanState(state.reshape(batch, heads * width))
        out, state = gated_scan(
            flat(taken * x),
            flat(log_decay),
            segment_ids=chunks,
            initial_state=state,
            return_state=True,
            implementation=implementation,
        )
        results.append(out.reshape(batch, tokens, heads, width).astype(key.dtype))
        last.append(state.hidden.reshape(batch, heads, width))
    return tuple(results), tuple(last)


def _turned(
    x: Float[Array, "B T N H"], chunk: Int[Array, "#B T"], base: float | None
) -> Float[Array, "B T N H"]:
    if base is None:
        return x
    return rope(x, jnp.broadcast_to(chunk, x.shape[:2]), base=base)


def _attend(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B T M H"],
    values: Float[Array, "B T M V"],
    others: tuple[Array, Array, masks.Mask],
    scale: float | None,
    implementation: str | None,
) -> Float[Array, "B T N V"]:
    """Returns attention to keys and values of chunks, and of a token itself."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    keys, values = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (keys, values))
    chunk_keys, chunk_values, mask = others
    out, lse = tiled_attention(
        query,
        chunk_keys,
        chunk_values,
        mask=mask,
        scale=scale,
        return_lse=True,
        implementation=implementation,
        function="rat_attention",
    )
    wide = jnp.promote_types(query.dtype, jnp.float32)
    own = scale * jnp.sum(query.astype(wide) * keys.astype(wide), axis=-1)
    return merge_partials([out, values.astype(out.dtype)], [lse, own])[0]


def rat_attention_step(
    state: RATState,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    log_decay: Float[ArrayLike, "B T N H"] | None = None,
    chunk_size: int = CHUNK_SIZE,
    rope_base: float | None = 10_000.0,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], RATState]:
    """Continues `rat_attention` by T >= 1 tokens: a prompt at once, or token by token.

    A step attends to one key for each chunk so far. Tokens beyond the chunks of the state and the
    one after them have outputs of NaN.

    Args:
      state: the chunks so far, and the recurrence.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      log_decay: as for `rat_attention`.
      chunk_size: likewise, and the same in all steps.
      rope_base: likewise.
      scale: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `rat_attention`.

    Example:
      >>> state = init_rat_attention_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 40, 4, 8))
      >>> out, state = rat_attention_step(state, query, key, value)
      >>> out.shape, state.chunk_keys.shape, int(state.length)
      ((1, 40, 4, 8), (1, 64, 4, 8), 40)
    """
    check_state(state, RATState)
    query, key, value, log_decay = _checked(query, key, value, log_decay, chunk_size)
    heads = query.shape[2] if log_decay is not None else key.shape[2]
    room = state.chunk_keys.shape
    if (room[0], room[2], room[3]) != (query.shape[0], heads, query.shape[3]):
        raise ValueError(
            f"state: was made for [batch, heads, H] = {[room[0], *room[2:]]}; these are "
            f"{[query.shape[0], heads, query.shape[3]]}"
        )
    place = state.length + jnp.arange(query.shape[1])[None]
    before = state.key, state.value
    (keys, values), last = _recurrent(
        key, value, log_decay, place % chunk_size == 0, before, implementation
    )
    chunk = place // chunk_size
    query, keys = _turned(query, chunk, rope_base), _turned(keys, chunk, rope_base)
    length = state.length + query.shape[1]

    # A chunk's slot takes its last token; others go nowhere.
    slot = jnp.where(place[0] % chunk_size == chunk_size - 1, chunk[0], room[1])
    fits = length <= (room[1] + 1) * chunk_size
    chunks = [
        jnp.where(fits, old.at[:, slot].set(new.astype(old.dtype), mode="drop"), jnp.nan)
        for old, new in ((state.chunk_keys, keys), (state.chunk_values, values))
    ]
    finished = jnp.broadcast_to(chunk, query.shape[:2])
    others = (*(x.astype(query.dtype) for x in chunks), earlier(finished, room[1]))
    out = _attend(query, keys, values, others, scale, implementation)
    return out, RATState(*chunks, *last, length)


def init_rat_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    chunk_size: int = CHUNK_SIZE,
    gated: bool = False,
) -> RATState:
    """Returns a state without tokens for `rat_attention_step`.

    Args:
      batch: number of sequences.
      max_length: the most tokens that will be seen.
      num_heads: number of query heads.
      num_kv_heads: number of key heads.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of the inputs to come, and of what is stored of chunks; the recurrence is in float32 or
        better.
      chunk_size: C.
      gated: whether the steps have a `log_decay`, by which each query head has keys of its own.

    Raises:
      ValueError: chunk_size is not positive.
    """
    check_positive(chunk_size=chunk_size)
    heads = num_heads if gated else num_kv_heads
    chunks = max(max_length // chunk_size, 1)
    wide = jnp.promote_types(dtype, jnp.float32)
    return RATState(
        chunk_keys=jnp.zeros((batch, chunks, heads, head_dim), dtype),
        chunk_values=jnp.zeros((batch, chunks, heads, value_dim), dtype),
        key=jnp.zeros((batch, heads, head_dim), wide),
        value=jnp.zeros((batch, heads, value_dim), wide),
        length=jnp.zeros((), jnp.int32),
    )


RECORD = Mechanism(
    slug="rat_attention",
    title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
    year=2025,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=rat_attention,
    step=rat_attention_step,
    init_state=init_rat_attention_state,
    extras=(RATState,),
    small={"chunk_size": 3},
)
