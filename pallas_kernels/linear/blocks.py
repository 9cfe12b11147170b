"""Lower triangular matrices over the tokens of a chunk, built from blocks of 4, 8, 16, ... tokens.

At each size s, pairs of neighbouring blocks [s, s] on the diagonal become one block [2s, 2s]:

    first    0
    cross    second

The rows of `cross` are the tokens of the second half of a block and its columns those of the first,
so with c_i the sum of the log decays from the beginning of the second half to token i, and r_j that
of those after token j in the first half,

    decay from j to i = exp(c_i) exp(r_j)

No exponent is positive, and none is a difference of large numbers, so that decays of any strength
are exact.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BASE = 4
"""Size of the first blocks. Products of theirs are sums: matrix units gain nothing from them."""


class Decays(NamedTuple):
    """Decays between the tokens of a chunk."""

    base: Float[Array, "*lead blocks i j H"]  # from token j to i >= j of a block; else 0
    second: tuple[Float[Array, "*lead pairs s H"], ...]  # for each s, from the middle to a token
    first: tuple[Float[Array, "*lead pairs s H"], ...]  # from a token to the middle
    since: Float[Array, "*lead C H"]  # from the beginning of the chunk to each token
    until: Float[Array, "*lead C H"]  # from each token to the end of the chunk
    whole: Float[Array, "*lead 1 H"]

    @property
    def size(self) -> int:
        """Returns the number of tokens."""
        return self.since.shape[-2]


def decays(log_decay: Float[Array, "*lead C H"]) -> Decays:
    """Returns the decays of a chunk, from the finite logarithm of each token's."""
    size = log_decay.shape[-2]
    blocks = _split(_padded(log_decay), BASE)
    # Sums over the tokens l of a block, j < l <= i; a token before the block is the first j.
    i, j, token = np.ogrid[:BASE, -1:BASE, :BASE]
    between = ((j < token) & (token <= i))[..., None]
    sums = jnp.sum(jnp.where(between, blocks[..., None, None, :, :], 0), axis=-2)
    prefix, suffix = sums[..., 0, :], sums[..., -1, 1:, :]
    base = jnp.where(np.tri(BASE, dtype=bool)[..., None], jnp.exp(sums[..., 1:, :]), 0)
    seconds, firsts = [], []
    while prefix.shape[-3] > 1:
        (before, prefix), (suffix, after) = _halves(prefix), _halves(suffix)
        seconds.append(jnp.exp(prefix))
        firsts.append(jnp.exp(suffix))
        suffix = jnp.concatenate([suffix + prefix[..., -1:, :], after], axis=-2)
        prefix = jnp.concatenate([before, before[..., -1:, :] + prefix], axis=-2)
    since, until = (jnp.exp(sums[..., 0, :size, :]) for sums in (prefix, suffix))
    return Decays(base, tuple(seconds), tuple(firsts), since, until, since[..., -1:, :])


def decay_matrix(decays: Decays) -> Float[Array, "*lead C C"]:
    """Returns the decay from token j to token i >= j of one number for each token; else 0."""
    crosses = (
        second * jnp.swapaxes(first, -1, -2)
        for second, first in zip(decays.second, decays.first, strict=True)
    )
    return _built(decays.base[..., 0], crosses, decays.size)


def decayed_products(
    decays: Decays,
    left: Float[Array, "*lead C H"],
    right: Float[Array, "*lead C H"],
    product: Callable[[str, Array, Array], Array],
) -> Float[Array, "*lead C C"]:
    """Returns sum_h left_ih right_jh decay_h(from j to i) for j <= i; else 0."""
    left, right = _padded(left), _padded(right)

    def cross(second: Array, first: Array) -> Array:
        size = first.shape[-2]
        second = _halves(_split(left, size))[1] * second
        first = _halves(_split(right, size))[0] * first
        if size <= BASE:
            return jnp.sum(second[..., :, None, :] * first[..., None, :, :], axis=-1)
        return product("...ih,...jh->...ij", second.astype(left.dtype), first.astype(left.dtype))

    pairs = _split(left, BASE)[..., :, None, :] * decays.base
    base = jnp.sum(pairs * _split(right, BASE)[..., None, :, :], axis=-1)
    return _built(base, map(cross, decays.second, decays.first), decays.size)


@jax.custom_vjp
def inverse(lower: Float[Array, "*lead C C"]) -> Float[Array, "*lead C C"]:
    """Returns the inverse of 1 + L, for a strictly lower triangular L.

    Not by powers of L, which may be huge where the inverse is small (of equal keys, say).
    """
    size = lower.shape[-1]
    power = _power(size)
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, power - size)] * 2)

    def diagonal(size: int) -> Float[Array, "*lead blocks s s"]:
        """Returns the blocks of L on the diagonal."""
        count = power // size
        blocks = lower.reshape(*lower.shape[:-2], count, size, count, size)
        return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)

    one, base = np.eye(BASE), diagonal(BASE)
    block = _matmul(one - base, one + _matmul(base, base))  # as base^4 = 0
    while (half := block.shape[-1]) < power:
        first, second = _halves(block)
        cross = diagonal(2 * half)[..., half:, :half]
        block = _assembled(first, -_matmul(_matmul(second, cross), first), second)
    return block[..., 0, :size, :size]


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    result = inverse(lower)
    return result, result


def _inverse_backward(result: Array, cotangent: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(result, -1, -2)
    return (jnp.tril(-_matmul(_matmul(transposed, cotangent), transposed), -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)


def _matmul(left: Float[Array, "... s s"], right: Float[Array, "... s s"]) -> Array:
    if left.shape[-1] <= BASE:
        return jnp.sum(left[..., :, :, None] * right[..., None, :, :], axis=-2)
    return jnp.matmul(left, right, precision="highest")


def _power(size: int) -> int:
    """Returns the smallest size of a block that is not smaller."""
    return max(BASE, 1 << (size - 1).bit_length())


def _padded(array: Float[Array, "*lead C H"]) -> Float[Array, "*lead P H"]:
    """Appends zeros, which neither decay nor count, up to the size of a block."""
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


def _built(block: Array, crosses: Iterable[Array], size: int) -> Float[Array, "*lead C C"]:
    """Returns the matrix, from the first blocks and the crosses that join them."""
    for cross in crosses:
        first, second = _halves(block)
        block = _assembled(first, cross.astype(block.dtype), second)
    return block[..., 0, :size, :size]
