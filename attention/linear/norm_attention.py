"""NormAttention (TransNormer): linear attention with a norm in place of a denominator."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.norms import rms_over_heads
from attention.positions import reflected, rope
from attention.state import check_state
from pallas_kernels.linear import LinearState, features, init_linear_state, linear_attention

FEATURE_MAPS = ("elu_plus_one", "elu")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormAttentionState:
    """What `norm_attention` carries from token to token.

    Attributes:
      linear: the memory of keys and values.
      length: number of tokens so far, the position of the next.
    """

    linear: LinearState
    length: Int[Array, ""]


def norm_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    is_causal: bool = False,
    feature_map: Literal["elu_plus_one", "elu"] = "elu_plus_one",
    frequencies: Float[ArrayLike, "H/2"] | None = None,
    reflection: Float[ArrayLike, "H"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-8,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: NormAttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], NormAttentionState]:
    """Linear attention without a denominator, whose output is normalised over all heads.

    With f the feature map of queries and keys, and P_t the encoding of position t, for every head

        o_t = sum_j (P_t f(q_t)) . (P_j f(k_j)) v_j,    j <= t where causal

    and then over all channels of a token's heads together, N V of them,

        y_t = o_t / (sqrt(mean(o_t^2)) + epsilon)

    Dividing by the sum of the weights, as other linear attention does, makes gradients grow without
    bound where that sum is near 0; the norm bounds them. "elu" is the paper's T1 and may give
    negative weights, "elu_plus_one" its T2. Positions are LRPE: x is reflected, x - 2 w (w . x), by
    a fixed unit vector w shared by queries, keys and heads, and turned as by RoPE, with frequencies
    that all heads share and that may be learned. All released models have it, from RoPE's
    frequencies on; without `frequencies` there are no positions.

    O(T) time and memory, forward and backward; sums and norm are float32, or float64 for float64
    queries. The norm is over all heads, so that heads on several devices send one number a token.

    Source: Qin et al., The Devil in Linear Transformer (2022).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads. Causal, S is T.
      value: likewise.
      is_causal: whether a token attends to itself and those before it only.
      feature_map: f, "elu_plus_one" or "elu".
      frequencies: angles by which a token turns the pairs of channels; None for no rotation.
      reflection: w, of length 1; None for no reflection. Without frequencies it changes nothing.
      normalize: whether the output is normalised.
      epsilon: what is added to the root mean square.
      segment_ids: documents packed into a row: tokens attend within their own.
      initial_state: the memory left by the tokens before, if causal.
      return_state: whether to return the memory after the last token too, if causal.
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
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 48, 4, 8))
      >>> out = norm_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(jnp.mean(out**2, axis=(2, 3)), 1, atol=1e-4))
      True
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map: must be one of {', '.join(FEATURE_MAPS)}; got {feature_map!r}"
        )
    if initial_state is not None and not isinstance(initial_state, NormAttentionState):
        raise TypeError(
            f"initial_state: must be a NormAttentionState; got {type(initial_state).__name__}"
        )
    if not is_causal and (initial_state is not None or return_state):
        raise ValueError("is_causal: must be True for an initial_state or return_state")
    start = 0 if initial_state is None else initial_state.length
    inside: str | None = feature_map
    if frequencies is not None:
        # What turns them must see features.
        query, key = (
            _encoded(x, feature_map, name, frequencies, reflection, start)
            for x, name in ((query, "query"), (key, "key"))
        )
        inside = None
    results = linear_attention(
        query,
        key,
        value,
        causal=is_causal,
        feature_map=inside,
        segment_ids=segment_ids,
        initial_state=None if initial_state is None else initial_state.linear,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
        function="norm_attention",
    )
    out, linear = results if return_state else (results, None)
    if normalize:
        out = rms_over_heads(out, epsilon)
    if not return_state:
        return out
    return out, NormAttentionState(linear, jnp.asarray(start + query.shape[1], jnp.int32))


def norm_attention_step(
    state: NormAttentionState,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    feature_map: Literal["elu_plus_one", "elu"] = "elu_plus_one",
    frequencies: Float[ArrayLike, "H/2"] | None = None,
    reflection: Float[ArrayLike, "H"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-8,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], NormAttentionState]:
    """Continues causal `norm_attention` by T >= 1 tokens: a prompt at once, or token by token.

    The time of a step and the size of the state do not depend on the tokens before.

    Args:
      state: the memory after the tokens before.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      feature_map: as for `norm_attention`.
      frequencies: likewise.
      reflection: likewise.
      normalize: likewise.
      epsilon: likewise.
      chunk_size: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `norm_attention`.

    Example:
      >>> state = init_norm_attention_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 5, 4, 8))
      >>> out, state = norm_attention_step(state, query, key, value)
      >>> out.shape, int(state.length)
      ((1, 5, 4, 8), 5)
    """
    check_state(state, NormAttentionState)
    return norm_attention(
        query,
        key,
        value,
        is_causal=True,
        feature_map=feature_map,
        frequencies=frequencies,
        reflection=reflection,
        normalize=normalize,
        epsilon=epsilon,
        initial_state=state,
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def init_norm_attention_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> NormAttentionState:
    """Returns an empty memory for `norm_attention_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the memory does not depend on it.
      num_heads: number of query heads.
      num_kv_heads: number of key heads; the memory does not depend on it.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of the inputs to come; the memory is float32, or float64 for float64.
    """
    del max_length, num_kv_heads
    linear = init_linear_state(batch, num_heads, head_dim, value_dim, dtype=dtype)
    return NormAttentionState(linear, jnp.zeros((), jnp.int32))


def _encoded(
    x: Float[Array, "B T N H"],
    feature_map: str,
    name: str,
    frequencies: ArrayLike,
    reflection: ArrayLike | None,
    start: int | Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """Returns features with their positions."""
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: must be a float array [B, T, heads, H]; got {x.dtype}{x.shape}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mapped = features.mapped(feature_map, wide)
    if reflection is not None:
        mapped = reflected(mapped, reflection)
    positions = start + jnp.arange(x.shape[1])
    return rope(mapped, positions, frequencies=jnp.asarray(frequencies)).astype(x.dtype)


RECORD = Mechanism(
    slug="norm_attention",
    title="The Devil in Linear Transformer",
    year=2022,
    family="linear",
    patterns=frozenset({"self causal", "self non-causal", "cross non-causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="linear",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=norm_attention,
    step=norm_attention_step,
    init_state=init_norm_attention_state,
    extras=(NormAttentionState,),
)
