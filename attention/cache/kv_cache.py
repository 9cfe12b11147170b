"""A contiguous cache of all keys and values."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attention.state import check_room


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in arrays of a fixed size.

    Tokens lie in order of time; what lies at `length` and beyond is not read.
    """

    key: Float[Array, "B max_length K H"]
    value: Float[Array, "B max_length K V"]
    length: Int[Array, ""]
    """Number of tokens in the cache, the same for all batch rows."""

    @property
    def max_length(self) -> int:
        """Returns the number of tokens that the cache can hold."""
        return self.key.shape[1]

    def append(self, key: Float[Array, "B T K H"], value: Float[Array, "B T K V"]) -> "KVCache":
        """Returns the cache with T more tokens, cast to its dtype.

        Where the length is traced, an overflow cannot raise: the tokens that did not fit are then
        stored as NaN, over the last ones, so that it shows in every later output.

        Raises:
          ValueError: shapes do not fit the cache, or the tokens do not fit into it.
        """
        check_room("cache", key=(key, self.key), value=(value, self.value))
        if key.shape[1] != value.shape[1]:
            raise ValueError(
                f"value: {value.shape[1]} tokens must be as many as key's {key.shape[1]}"
            )
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + key.shape[1] > self.max_length:
            raise ValueError(
                f"key: {key.shape[1]} more tokens do not fit into a cache of {self.max_length} "
                f"that holds {used}; make it with a larger max_length"
            )
        length = self.length + key.shape[1]
        fits = length <= self.max_length
        key, value = (
            jax.lax.dynamic_update_slice_in_dim(
                old, jnp.where(fits, new.astype(old.dtype), jnp.nan), self.length, axis=1
            )
            for old, new in ((self.key, key), (self.value, value))
        )
        return KVCache(key, value, length)


def init_kv_cache(
    batch: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> KVCache:
    """Returns an empty cache.

    Args:
      batch: number of sequences.
      max_length: number of tokens that it can hold.
      num_kv_heads: number of key heads.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of keys and values.
    """
    return KVCache(
        key=jnp.zeros((batch, max_length, num_kv_heads, head_dim), dtype),
        value=jnp.zeros((batch, max_length, num_kv_heads, value_dim), dtype),
        length=jnp.zeros((), jnp.int32),
    )


def init_of_mechanism(slug: str) -> Callable[..., KVCache]:
    """Returns the `init_<slug>_state` of a mechanism whose state is a cache of keys and values."""

    def init_state(
        batch: int,
        max_length: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> KVCache:
        """Returns an empty cache for `{slug}_step`.

        Args:
          batch: number of sequences.
          max_length: number of tokens that it can hold.
          num_heads: number of query heads; the cache does not depend on it.
          num_kv_heads: number of key heads.
          head_dim: width of a key.
          value_dim: width of a value.
          dtype: of keys and values.
        """
        del num_heads
        return init_kv_cache(batch, max_length, num_kv_heads, head_dim, value_dim, dtype)

    init_state.__name__ = init_state.__qualname__ = f"init_{slug}_state"
    init_state.__doc__ = init_state.__doc__.replace("{slug}", slug)
    return init_state
