"""Products of the arrays of a chunk, in the layout that the chunk loop cuts them to.

Heads are split into K and a group G that shares keys: G memories [B, K, G, H, V], queries
[B, K, G, C, H] or, where all memories of a group are read by one query, [B, K, 1, C, H], keys
[B, K, C, H], values [B, K, G|1, C, V] and scores [B, K, G|1, C, C]. Groups become more rows or
columns of one matrix wherever they share the other, so that XLA sees plain products.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, left: Array, right: Array) -> Array:
    """An einsum in the narrower of its operands' precisions, accumulated in float32 at least.

    The derivative treats its cotangent in the same way. That of `jnp.einsum` would multiply float32
    cotangents by bfloat16 operands, which no matrix unit does.
    """
    dtype = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    accumulator = jnp.promote_types(dtype, jnp.float32)
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(equation, left, right, preferred_element_type=accumulator)


def _forward(equation: str, left: Array, right: Array) -> tuple[Array, tuple]:
    return product(equation, left, right), (left, right)


def _backward(equation: str, operands: tuple, cotangent: Array) -> tuple[Array, Array]:
    left, right = operands
    terms, result = equation.split("->")
    first, second = terms.split(",")
    d_left = product(f"{result},{second}->{first}", cotangent, right)
    d_right = product(f"{first},{result}->{second}", left, cotangent)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


product.defvjp(_forward, _backward)


def scores(
    query: Float[Array, "B K G C H"], key: Float[Array, "B K C H"]
) -> Float[Array, "B K G C C"]:
    """Returns the products of queries and keys."""
    rows = query.reshape(*query.shape[:2], -1, query.shape[-1])
    result = product("bkrh,bkjh->bkrj", rows, key)
    return result.reshape(*query.shape[:4], key.shape[2])


def weighed(
    scores: Float[Array, "B K G C C"], value: Float[Array, "B K G|1 C V"]
) -> Float[Array, "B K G C V"]:
    """Returns the sums of values."""
    if value.shape[2] == scores.shape[2] > 1:
        return product("bkgij,bkgjv->bkgiv", scores, value)
    rows = scores.reshape(*scores.shape[:2], -1, scores.shape[-1])
    result = product("bkrj,bkjv->bkrv", rows, value[:, :, 0])
    return result.reshape(*scores.shape[:4], value.shape[-1])


def read(
    query: Float[Array, "B K G|1 C H"], memory: Float[Array, "B K G H V"]
) -> Float[Array, "B K G C V"]:
    """Returns what queries find in the memory."""
    query = jnp.broadcast_to(query, (*memory.shape[:3], *query.shape[3:]))
    return product("bkgih,bkghv->bkgiv", query, memory)


def written(
    key: Float[Array, "B K C H"], value: Float[Array, "B K G C V"]
) -> Float[Array, "B K G H V"]:
    """Returns the sums of the products of keys and values."""
    group, size, width = value.shape[2:]
    columns = jnp.moveaxis(value, 2, 3).reshape(*key.shape[:2], size, group * width)
    result = product("bkjh,bkjc->bkhc", key, columns)
    return jnp.moveaxis(result.reshape(*result.shape[:3], group, width), 3, 2)
