"""The delta rule's triangular systems on TPU, see `delta` and `blocks.inverse`.

The inverse of 1 + L is made of its blocks on the diagonal. Those of 8 rows are inverted all at
once, side by side in one row of registers, by elimination. Two of them, A and B, and the block M of
L to the left of B become one of twice the size, with -B M A in its corner.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tpu_matrix import (
    ROWS,
    Parts,
    dot,
    dot_parts,
    halves,
    in_parts,
    iota,
    joined,
    left_of,
    lower,
    rolled,
)


@jax.custom_vjp
def solved(
    inverted: Parts, below: Float[Array, "C C"], right: Float[Array, "C V"]
) -> Float[Array, "C V"]:
    """Returns x with (1 + L) x = right, for an L of which what is strictly below counts.

    Args:
      inverted: the inverse of 1 + L, which derivatives do not see. It takes differences of values
        that may be alike, so bfloat16 would not do.
      below: L.
      right: .
    """
    return _forward(inverted, below, right)[0]


def _forward(inverted: Parts, below: Array, right: Array) -> tuple[Array, tuple[Parts, Array]]:
    del below
    x = dot_parts(inverted, in_parts(right, len(inverted) == 1))
    return x, (inverted, x)


def _backward(residuals: tuple[Parts, Array], cotangent: Array) -> tuple[Parts, Array, Array]:
    inverted, x = residuals
    parts = in_parts(cotangent, len(inverted) == 1)
    d_right = dot_parts(inverted, parts, transposed=True)
    d_below = -dot(d_right, x, 1, 1, inverted[0].dtype)
    d_below = jnp.where(lower(x.shape[0], strictly=True), d_below, 0)
    return jax.tree.map(jnp.zeros_like, inverted), d_below, d_right


solved.defvjp(_forward, _backward)


def inverse(below: Float[Array, "M C C"], exact: bool) -> Parts:
    """Returns the inverse of 1 + L, of each of some systems.

    Args:
      below: L, of which what is strictly below the diagonal counts.
      exact: whether products are float32's.
    """
    size = below.shape[1]
    row, column = (iota((size, size), axis) for axis in (0, 1))
    packed = jnp.concatenate([_eliminated(below)] * (size // ROWS), axis=1)
    result = jnp.where(row ^ column < ROWS, packed, 0)
    block = ROWS
    while block < size:
        left = jnp.where(left_of(size // 2, block, size), halves(below, block)[1], 0)
        if block == ROWS:
            # Half a register of bfloat16 cannot be taken apart.
            parts, (first, second) = in_parts(result, exact), halves(result, block)
            product = dot_parts(in_parts(left, exact), parts)
            product = in_parts(joined(jnp.zeros_like(product), product, block), exact)
            result = joined(first, second - dot_parts(in_parts(second, exact), product), block)
            parts = in_parts(result, exact)
        else:
            product = in_parts(dot_parts(in_parts(left, exact), parts), exact)
            product = tuple(joined(jnp.zeros_like(part), part, block) for part in product)
            above, below_parts = zip(*(halves(part, block) for part in parts), strict=True)
            first, second = halves(result, block)
            second = second - dot_parts(below_parts, product)
            result = joined(first, second, block)
            pairs = zip(above, in_parts(second, exact), strict=True)
            parts = tuple(joined(*pair, block) for pair in pairs)
        block *= 2
    return parts


def _eliminated(below: Float[Array, "M C C"]) -> Float[Array, "M 8 C"]:
    """Returns the inverses of the blocks of 8 on the diagonal, side by side."""
    count, size, _ = below.shape
    row, column = (iota((count, ROWS, size), axis) for axis in (1, 2))
    packed = jnp.zeros(row.shape, below.dtype)
    for block in range(size // ROWS):
        rows = below[:, block * ROWS : (block + 1) * ROWS]
        packed = jnp.where(column >> 3 == block, rows, packed)
    packed = jnp.where(row > column & 7, packed, 0)
    result = (row == column & 7).astype(below.dtype)
    for j in range(ROWS - 1):
        # Column j of each block, in all columns of it.
        factor = jnp.where(column & 7 == j, packed, 0)
        factor = rolled(factor, -j, 2)
        for shift in (1, 2, 4):
            factor = factor + rolled(factor, shift, 2)
        result = result - factor * result[:, j : j + 1]
    return result
