"""Operations on matrices in registers, which the TPU kernels differentiate."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tpu import LANES

ROWS = 8
"""Rows of a register."""


def dot(a: Array, b: Array, a_axis: int, b_axis: int, dtype: DTypeLike | None = None) -> Array:
    """Multiplies matrices over these axes into float32.

    Operands are taken in `dtype`, by default the narrower of theirs, and so is what the derivative
    multiplies; results of that are not rounded to it.
    """
    dtype = min(a.dtype, b.dtype, key=lambda x: x.itemsize) if dtype is None else dtype
    return _dot(a, b, (a_axis, a.dtype), (b_axis, b.dtype), jnp.dtype(dtype))


_Operand = tuple[int, DTypeLike]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dot(a: Array, b: Array, a_is: _Operand, b_is: _Operand, dtype: DTypeLike) -> Array:
    return _dot_forward(a, b, a_is, b_is, dtype)[0]


def _dot_forward(
    a: Array, b: Array, a_is: _Operand, b_is: _Operand, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    a, b = a.astype(dtype), b.astype(dtype)
    result = jax.lax.dot_general(
        a,
        b,
        (((a_is[0],), (b_is[0],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return result, (a, b)


def _dot_backward(
    a_is: _Operand,
    b_is: _Operand,
    dtype: DTypeLike,
    operands: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    (a, b), (a_axis, a_dtype), (b_axis, b_dtype) = operands, a_is, b_is
    cotangent = cotangent.astype(dtype)
    d_a = dot(cotangent, b, 1, 1 - b_axis) if a_axis else dot(b, cotangent, 1 - b_axis, 1)
    d_b = dot(cotangent, a, 0, 1 - a_axis) if b_axis else dot(a, cotangent, 1 - a_axis, 0)
    return d_a.astype(a_dtype), d_b.astype(b_dtype)


_dot.defvjp(_dot_forward, _dot_backward)


Parts = tuple[Float[Array, "*lead _ _"], ...]


def in_parts(x: Float[Array, "*lead _ _"], exact: bool) -> Parts:
    """Returns matrices as `dot_parts` takes them: in two parts of bfloat16, or as they are."""
    if exact:
        return (x,)
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def dot_parts(a: Parts, b: Parts, *, transposed: bool = False) -> Float[Array, "*lead _ _"]:
    """Multiplies matrices, to about 16 bits if they are in parts. It is not differentiable.

    Args:
      a: of each of some products, or of one.
      b: likewise.
      transposed: whether the first is transposed.
    """
    rows, columns = (a[0].ndim - 1, a[0].ndim - 2)
    inner = columns if transposed else rows
    if len(a) == 2:
        a = (jnp.concatenate([a[0], a[0], a[1]], axis=inner),)
        b = (jnp.concatenate([b[0], b[1], b[0]], axis=columns),)
    lead = tuple(range(columns))
    return jax.lax.dot_general(
        *a,
        *b,
        (((inner,), (columns,)), (lead, lead)),
        precision=jax.lax.Precision.HIGHEST if a[0].dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def across(column: Float[Array, "C _"], size: int) -> Array:
    """Returns numbers of rows, in one column or the same in a register's all, in `size` or 1."""
    if column.shape[1] != LANES or size == LANES:
        return column
    return jnp.tile(column, (1, size // LANES)) if size > LANES else column[:, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rolled(x: Array, shift: int, axis: int) -> Array:
    """Moves what is along an axis by `shift`, around its end."""
    return pltpu.roll(x, shift % x.shape[axis], axis)


rolled.defvjp(
    lambda x, shift, axis: (rolled(x, shift, axis), None),
    lambda shift, axis, _, cotangent: (rolled(cotangent, -shift, axis),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def halves(x: Float[Array, "*lead C H"], size: int) -> tuple[Array, Array]:
    """Returns the rows of the first, and of the second, of each pair of blocks of `size` rows."""
    *lead, rows, columns = x.shape
    pairs = x.reshape(*lead, rows // (2 * size), 2, size, columns)
    return tuple(pairs[..., i, :, :].reshape(*lead, rows // 2, columns) for i in (0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def joined(first: Float[Array, "*lead R H"], second: Float[Array, "*lead R H"], size: int) -> Array:
    """Is the inverse of `halves`."""
    *lead, rows, columns = first.shape
    shape = *lead, rows // size, 1, size, columns
    pairs = jnp.concatenate([first.reshape(shape), second.reshape(shape)], axis=-3)
    return pairs.reshape(*lead, 2 * rows, columns)


halves.defvjp(
    lambda x, size: (halves(x, size), None), lambda size, _, parts: (joined(*parts, size),)
)
joined.defvjp(
    lambda first, second, size: (joined(first, second, size), None),
    lambda size, _, whole: halves(whole, size),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def exchanged(x: Float[Array, "C H"], size: int) -> Array:
    """Exchanges the two of each pair of blocks of `size` rows."""
    if size >= ROWS:
        return joined(*reversed(halves(x, size)), size)
    blocks = x.reshape(-1, ROWS, x.shape[1])
    second = iota(blocks.shape, 1) & size > 0
    # Half a register is moved by the same number of rows in both directions.
    other = rolled(blocks, size, 1)
    if size < ROWS // 2:
        other = jnp.where(second, other, rolled(blocks, -size, 1))
    return other.reshape(x.shape)


exchanged.defvjp(
    lambda x, size: (exchanged(x, size), None),
    lambda size, _, cotangent: (exchanged(cotangent, size),),
)


def iota(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    """Returns the number along an axis of each element."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def lower(size: int, strictly: bool = False) -> Bool[Array, "C C"]:
    """Returns the mask of what is below the diagonal, or on it."""
    row, column = (iota((size, size), axis) for axis in (0, 1))
    return row > column if strictly else row >= column


def left_of(rows: int, size: int, columns: int) -> Bool[Array, "R C"]:
    """Returns for rows that are second halves, see `halves`, which columns are of their first."""
    shift = size.bit_length() - 1
    row, column = (iota((rows, columns), axis) >> shift for axis in (0, 1))
    return row * 2 == column


def turned(x: Float[Array, "R C"]) -> Float[Array, "C R"]:
    """Returns the transpose."""
    return jnp.swapaxes(x, 0, 1)
