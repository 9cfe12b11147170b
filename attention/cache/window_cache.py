"""A cache of the keys and values that a sliding window still sees."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attention.cache.kv_cache import KVCache, init_kv_cache
from attention.state import check_room


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache:
    """Keys and values of the last tokens, in arrays whose size does not depend on their number.

    Tokens lie in order of time, from the first place on; while there are fewer than places, what
    lies behind them is not read.
    """

    key: Float[Array, "B W K H"]
    value: Float[Array, "B W K V"]
    length: Int[Array, ""]
    """Number of tokens so far, with those that are forgotten; the same for all batch rows."""

    @property
    def window(self) -> int:
        """Returns how many tokens before a token are kept."""
        return self.key.shape[1]

    def extended(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K V"]
    ) -> tuple[KVCache, "WindowCache"]:
        """Returns what T more tokens see, and what the tokens after them will see.

        Args:
          key: keys of the new tokens.
          value: values of the new tokens.

        Returns:
          A cache of W + T places, in which the kept and then the new tokens lie, cast to the
          cache's dtype; and this cache with the last W of them.

        Raises:
          ValueError: shapes do not fit the cache.
        """
        check_room("cache", key=(key, self.key), value=(value, self.value))
        held = jnp.minimum(self.length, self.window)
        room = [(0, 0), (0, key.shape[1]), (0, 0), (0, 0)]
        seen = KVCache(jnp.pad(self.key, room), jnp.pad(self.value, room), held).append(key, value)
        kept = (
            jax.lax.dynamic_slice_in_dim(
                x, jnp.maximum(seen.length - self.window, 0), self.window, axis=1
            )
            for x in (seen.key, seen.value)
        )
        return seen, WindowCache(*kept, self.length + key.shape[1])


def init_window_cache(
    batch: int,
    window: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> WindowCache:
    """Returns an empty cache.

    Args:
      batch: number of sequences.
      window: W, tokens that it keeps: one fewer than a token sees with itself.
      num_kv_heads: number of key heads.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of keys and values.
    """
    empty = init_kv_cache(batch, window, num_kv_heads, head_dim, value_dim, dtype)
    return WindowCache(empty.key, empty.value, empty.length)


def init_of_windowed(slug: str) -> Callable[..., KVCache | WindowCache]:
    """Returns the `init_<slug>_state` of a mechanism whose `local_window_size` bounds its cache."""

    def init_state(
        batch: int,
        max_length: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: DTypeLike = jnp.float32,
        *,
        local_window_size: int | tuple[int, int] | None = None,
    ) -> KVCache | WindowCache:
        """Returns an empty cache for `{slug}_step`.

        Args:
          batch: number of sequences.
          max_length: number of tokens that it can hold; of no matter where a window is smaller.
          num_heads: number of query heads; the cache does not depend on it.
          num_kv_heads: number of key heads.
          head_dim: width of a key.
          value_dim: width of a value.
          dtype: of keys and values.
          local_window_size: of the steps to come, (left, right) or one number for both. With one,
            the cache keeps that many tokens to the left and no others.

        Returns:
          A `KVCache`, or a `WindowCache` where that is smaller.
        """
        del num_heads
        sizes = num_kv_heads, head_dim, value_dim, dtype
        if local_window_size is not None:
            window = checked_window(local_window_size)[0]
            if window < max_length:
                return init_window_cache(batch, window, *sizes)
        return init_kv_cache(batch, max_length, *sizes)

    init_state.__name__ = init_state.__qualname__ = f"init_{slug}_state"
    init_state.__doc__ = init_state.__doc__.replace("{slug}", slug)
    return init_state


def checked_window(value: int | tuple[int, int]) -> tuple[int, int]:
    """Returns a `local_window_size` as (left, right).

    Raises:
      ValueError: it is neither a number of keys nor a pair of them.
    """
    sides = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(side, int) and side >= 0 for side in sides)
    ):
        raise ValueError(
            f"local_window_size: must be a number of keys or a pair (left, right); got {value!r}"
        )
    return tuple(sides)
