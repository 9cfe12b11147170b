"""What kernel families ask of their arguments."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Int


def check_positive(**sizes: int) -> None:
    """Raises ValueError unless every named size is a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: must be a positive integer; got {size!r}")


def check_arrays(
    query: Array,
    key: Array,
    value: Array,
    *,
    same_tokens: bool = False,
    separate_value_heads: bool = False,
    more_value_heads: bool = False,
) -> None:
    """Checks that query [B, T, N, H], key [B, S, K, H] and value [B, S, K, V] fit together.

    Args:
      query: the queries.
      key: the keys.
      value: the values.
      same_tokens: whether S must be T.
      separate_value_heads: whether value may have another number of heads than key.
      more_value_heads: whether value may have a multiple of the heads of query instead of key's.

    Raises:
      TypeError: an array is not of floating point.
      ValueError: a shape does not fit; the message names the argument.
    """
    for name, array, dims in (
        ("query", query, "[B, T, N, H]"),
        ("key", key, "[B, S, K, H]"),
        ("value", value, "[B, S, K, V]"),
    ):
        if array.ndim != 4:
            raise ValueError(f"{name}: must be {dims}; got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}: must be floating point; got {array.dtype}")
        if 0 in array.shape:
            raise ValueError(f"{name}: shape {array.shape} has no elements")
    batch, _, heads, features = query.shape
    if key.shape[0] != batch or key.shape[3] != features:
        raise ValueError(
            f"key: shape {key.shape} must have the batch, {batch}, and the head dimension, "
            f"{features}, of query {query.shape}"
        )
    if same_tokens and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key: shape {key.shape} must have the {query.shape[1]} tokens of query: attention "
            "over a memory is self-attention"
        )
    more_value_heads = more_value_heads and value.shape[2] % heads == 0
    shared = 2 if separate_value_heads or more_value_heads else 3
    if value.shape[:shared] != key.shape[:shared]:
        raise ValueError(
            f"value: shape {value.shape} must start with {key.shape[:shared]}, as key {key.shape}"
        )
    for name, array in (("key", key), ("value", value)):
        if heads % array.shape[2] and not (name == "value" and more_value_heads):
            raise ValueError(
                f"{name}: {array.shape[2]} heads do not divide the {heads} heads of query; "
                "num_heads must be a multiple of num_kv_heads"
            )


def segment_begins(
    segment_ids: Int[ArrayLike, "B T"], shape: tuple[int, ...]
) -> Bool[Array, "B T"]:
    """Returns which tokens begin a segment; the first one of a call continues a state.

    Raises:
      TypeError, ValueError: the ids are no integers, or not of this shape.
    """
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != shape:
        raise ValueError(f"segment_ids: must have shape {shape}; got {segment_ids.shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids: must be integers; got {segment_ids.dtype}")
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))
