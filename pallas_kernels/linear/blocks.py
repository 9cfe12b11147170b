"""Lower triangular matrices over the tokens of a chunk, built from blocks of 1, 2, 4, ... tokens.

At each size s, pairs of neighbouring blocks [s, s] on the diagonal become one block [2s, 2s]:

    first    0
    cross    second

Everything that is written here is a rule for `cross`. The rows of it are the tokens of the second
half of a block and the columns those of the first, so with c_i the sum of the log decays from the
beginning of the second half to token i, and r_j that of those after token j in the first half,

    decay from j to i = exp(c_i) exp(r_j)

No exponent is positive, and none is a difference of large numbers, so that decays of any strength
are exact.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALL = 4
"""Products of blocks up to this size are written as sums: matrix units gain nothing from them."""


class Level(NamedTuple):
    """Decays within blocks of 2 s tokens, across the middle."""

    second: Float[Array, "*lead blocks s H"]  # from the middle to each token of the second half
    first: Float[Array, "*lead blocks s H"]  # from each token of the first half to the middle


class Decays(NamedTuple):
    """Decays between the tokens of a chunk."""

    levels: tuple[Level, ...]
    size: int
    since: Float[Array, "*lead C H"]  # from the beginning of the chunk to each token
    until: Float[Array, "*lead C H"]  # from each token to the end of the chunk
    whole: Float[Array, "*lead 1 H"]


def decays(log_decay: Float[Array, "*lead C H"]) -> Decays:
    """Returns the decays of a chunk, from the finite logarithm of each token's."""
    size = log_decay.shape[-2]
    prefix = _split(_padded(log_decay), 1)  # sums from the beginning of the block to each token
    suffix = jnp.zeros_like(prefix)  # sums after each token to the end of the block
    levels = []
    while prefix.shape[-3] > 1:
        (before, prefix), (suffix, after) = _halves(prefix), _halves(suffix)
        levels.append(Level(jnp.exp(prefix), jnp.exp(suffix)))
        suffix = jnp.concatenate([suffix + prefix[..., -1:, :], after], axis=-2)
        prefix = jnp.concatenate([before, before[..., -1:, :] + prefix], axis=-2)
    prefix, suffix = prefix[..., 0, :size, :], suffix[..., 0, :size, :]
    since, until = jnp.exp(prefix), jnp.exp(suffix)
    return Decays(tuple(levels), size, since, until, since[..., -1:, :])


def decay_matrix(decays: Decays) -> Float[Array, "*lead C C"]:
    """Returns the decay from token j to token i >= j of one number for each token; else 0."""
    diagonal = jnp.ones((*decays.since.shape[:-2], _power(decays.size), 1, 1), decays.since.dtype)
    crosses = (level.second * jnp.swapaxes(level.first, -1, -2) for level in decays.levels)
    return _built(diagonal, crosses, decays.size)


def decayed_products(
    decays: Decays,
    left: Float[Array, "*lead C H"],
    right: Float[Array, "*lead C H"],
    product: Callable[[str, Array, Array], Array],
) -> Float[Array, "*lead C C"]:
    """Returns sum_h left_ih right_jh decay_h(from j to i) for j <= i; else 0."""
    left, right = _padded(left), _padded(right)
    dtype, lead = decays.since.dtype, decays.since.shape[:-2]
    diagonal = jnp.sum(left.astype(dtype) * right.astype(dtype), axis=-1)[..., None, None]
    diagonal = jnp.broadcast_to(diagonal, (*lead, *diagonal.shape[-3:]))

    def crosses() -> Iterator[Array]:
        for level in decays.levels:
            size = level.first.shape[-2]
            second = _halves(_split(left, size))[1] * level.second
            first = _halves(_split(right, size))[0] * level.first
            if size <= SMALL:
                yield jnp.sum(second[..., :, None, :] * first[..., None, :, :], axis=-1)
            else:
                second, first = (a.astype(left.dtype) for a in (second, first))
                yield product("...ih,...jh->...ij", second, first)

    return _built(diagonal, crosses(), decays.size)


@jax.custom_vjp
def inverse(lower: Float[Array, "*lead C C"]) -> Float[Array, "*lead C C"]:
    """Returns the inverse of 1 + L, for a strictly lower triangular L.

    Not by powers of L, which may be huge where the inverse is small (of equal keys, say).
    """
    size = lower.shape[-1]
    power = _power(size)
    pad = [(0, 0)] * (lower.ndim - 2) + [(0, power - size)] * 2
    lower = jnp.pad(lower, pad)
    block = jnp.ones((*lower.shape[:-2], power, 1, 1), lower.dtype)
    while block.shape[-3] > 1:
        first, second = block[..., ::2, :, :], block[..., 1::2, :, :]
        count, half = first.shape[-3], first.shape[-1]
        blocks = lower.reshape(*lower.shape[:-2], count, 2 * half, count, 2 * half)
        blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        cross = -_matmul(_matmul(second, blocks[..., half:, :half]), first)
        block = _assembled(first, cross, second)
    return block[..., 0, :size, :size]


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    result = inverse(lower)
    return result, result


def _inverse_backward(result: Array, cotangent: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(result, -1, -2)
    d_lower = -jnp.matmul(
        jnp.matmul(transposed, cotangent, precision="highest"), transposed, precision="highest"
    )
    return (jnp.tril(d_lower, -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)


def _matmul(left: Float[Array, "... s s"], right: Float[Array, "... s s"]) -> Array:
    if left.shape[-1] <= SMALL:
        return jnp.sum(left[..., :, :, None] * right[..., None, :, :], axis=-2)
    return jnp.matmul(left, right, precision="highest")


def _power(size: int) -> int:
    """Returns the smallest power of 2 that is not smaller."""
    return 1 << (size - 1).bit_length()


def _padded(array: Float[Array, "*lead C H"]) -> Float[Array, "*lead P H"]:
    """Appends zeros, which neither decay nor count, up to a power of 2."""
    pad = [(0, 0)] * array.ndim
    pad[-2] = (0, _power(array.shape[-2]) - array.shape[-2])
    return jnp.pad(array, pad)


def _split(array: Float[Array, "*lead P H"], size: int) -> Float[Array, "*lead blocks s H"]:
    return array.reshape(*array.shape[:-2], -1, size, array.shape[-1])


def _halves(blocks: Array) -> tuple[Array, Array]:
    """Returns the first and the second of each pair of blocks."""
    return blocks[..., ::2, :, :], blocks[..., 1::2, :, :]


def _assembled(first: Array, cross: Array, second: Array) -> Array:
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower = jnp.concatenate([cross, second], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _built(diagonal: Array, crosses: Iterator[Array], size: int) -> Float[Array, "*lead C C"]:
    block = diagonal
    for cross in crosses:
        first, second = _halves(block)
        block = _assembled(first, cross.astype(block.dtype), second)
    return block[..., 0, :size, :size]
