"""How plain JAX lays out heads: arrays of a call, and of a chunk that is cut out of them.

Heads are K groups of G memories. The memories of a group share the keys; they are read by one query
each or all by one, and written with one value each or all with one.

    of a call     queries [B, T, K, G|1, H], keys [B, T, K, H], values [B, T, K, G|1, V]
    of a chunk    queries [B, K, G|1, C, H], keys [B, K, C, H], values [B, K, G|1, C, V]

and numbers for each memory and token, such as a gate, as queries, with H = 1 if not one for each
feature.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.linear.inputs import Inputs, Options


class Tokens(NamedTuple):
    """Arrays with tokens, of a call or of a chunk."""

    query: Array
    key: Array
    value: Array
    log_decay: Array | None  # None also where it is the same for all tokens
    beta: Array | None
    log_momentum: Array | None

    @classmethod
    def of(cls, x: Inputs) -> "Tokens":
        """Returns those of a call; keys may have fewer heads than there are groups."""
        groups = group_count(x)
        log_decay = None if x.log_decay is None or x.log_decay.ndim == 2 else x.log_decay

        def grouped(array: Array | None) -> Array | None:
            if array is None:
                return None
            batch, tokens, heads = array.shape[:3]
            return array.reshape(batch, tokens, groups, heads // groups, *array.shape[3:] or (1,))

        query, value, *numbers = map(grouped, (x.query, x.value, log_decay, x.beta, x.log_momentum))
        return cls(query, x.key, value, *numbers)

    def given(self) -> dict[str, Array]:
        """Returns the arrays that there are, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}

    def cut(self, start: Any, size: int, precision: DTypeLike) -> "Tokens":
        """Cuts out a chunk; numbers are of the accumulators' dtype."""
        dtypes = (precision,) * 3 + (jnp.promote_types(precision, jnp.float32),) * 3
        chunk = (
            None if array is None else cut(array, start, size, dtype)
            for array, dtype in zip(self, dtypes, strict=True)
        )
        return Tokens(*chunk)

    def put(self, chunk: "Tokens", start: Any) -> "Tokens":
        """Is the inverse of `cut`."""
        return jax.tree.map(lambda array, part: put(array, part, start), self, chunk)


def group_count(x: Inputs) -> int:
    """Returns K of the layout: keys are repeated where values have more heads than queries."""
    heads, kv_heads, value_heads = (a.shape[2] for a in x[:3])
    return kv_heads if value_heads == kv_heads else heads


def cut(array: Array, start: Any, size: int, dtype: DTypeLike) -> Array:
    """Cuts tokens out of [B, T, heads, features] as [B, heads, tokens, features].

    XLA takes the turn along with the cut, while products of the arrays as they are would be slow.
    """
    chunk = jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
    return jnp.moveaxis(chunk, 1, -2).astype(dtype)


def put(array: Array, chunk: Array, start: Any) -> Array:
    """Is the inverse of `cut`."""
    chunk = jnp.moveaxis(chunk, -2, 1).astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, start, axis=1)


def grouped(array: Array, axis: int, groups: int) -> Array:
    """Splits a dimension of heads into groups."""
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def packed(options: Options, x: Inputs, state: dict[str, Array]) -> tuple[Array, ...]:
    """Returns the memories of a state, [B, K, G, H, V].

    A sum of keys is one more column of the memory, as values of 1 would make it.
    """
    memory = state["memory"]
    if options.epsilon is not None:
        memory = jnp.concatenate([memory, state["key_sum"][..., None]], axis=-1)
    memories = (memory, state["momentum"]) if "momentum" in state else (memory,)
    return tuple(grouped(memory, 1, group_count(x)) for memory in memories)


def unpacked(options: Options, memories: tuple[Array, ...]) -> tuple[Array, ...]:
    """Is the inverse of `packed`, without the names."""
    memory, *momentum = (m.reshape(m.shape[0], -1, *m.shape[3:]) for m in memories)
    if options.epsilon is not None:
        return memory[..., :-1], memory[..., -1]
    return memory, *momentum
