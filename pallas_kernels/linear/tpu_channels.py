"""The gates of a decay for each feature of a key, as the TPU kernels compute them.

As in `blocks`, of each size pairs of neighbouring blocks of tokens have a product of their own,
with decays from the second half's beginning on, and to the first half's end. Blocks begin as single
tokens; or, where the logarithms have a bound, as large as decays from and to a token in the middle
are finite. Sums for pairs of blocks are made of those for blocks, so that none is a difference.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.tpu_gates import Features, Gate, Memories
from pallas_kernels.tpu_matrix import (
    ROWS,
    dot,
    exchanged,
    halves,
    iota,
    joined,
    left_of,
    rolled,
    turned,
)

LARGEST = 80.0
"""Logarithm of what decays relative to one in the middle may be together: float32 has exp(88)."""


class _ChannelGate(NamedTuple):
    """A decay for each row of the memory, that is for each feature of a key."""

    inside: tuple[Float[Array, "C H"], Float[Array, "C H"]] | None
    """In the first blocks, of queries and keys: decays from and to the middle; None for 1 token."""
    crosses: tuple[Float[Array, "C H"], ...]
    """By size of blocks: of the second of a pair from its beginning on, of the first to its end."""
    since: Float[Array, "C H"]
    until: Float[Array, "C H"]
    whole: Float[Array, "1 H"]

    def scores(self, queries: Sequence[Features], key: Features) -> list[Float[Array, "C C"]]:
        size, first = key.mapped.shape[0], key.mapped.shape[0] >> len(self.crosses)
        wide = key.mapped.astype(jnp.float32)
        rows = [query.mapped.astype(jnp.float32) for query in queries]
        row, column = (iota((size, size), axis) for axis in (0, 1))

        def products(left: Sequence[Array], right: Array) -> list[Array]:
            found = dot(jnp.concatenate(left), right, 1, 1, key.mapped.dtype)
            count = found.shape[0] // len(left)
            return [found[i * count : (i + 1) * count] for i in range(len(left))]

        if self.inside is None:
            results = [jnp.sum(x * wide, axis=1, keepdims=True) for x in rows]
            mask = row == column
        else:
            results = products([self.inside[0] * x for x in rows], self.inside[1] * wide)
            mask = (row >= column) & (row ^ column < first)
        results = [jnp.where(mask, x, 0) for x in results]
        for block, decay in zip(_doubled(first, size), self.crosses, strict=True):
            decayed = decay * wide
            left = [decayed if x is key else decay * y for x, y in zip(queries, rows, strict=True)]
            if block < ROWS:
                mask = (row & block > column & block) & (row ^ column < 2 * block)
                found = zip(products(left, decayed), results, strict=True)
                results = [jnp.where(mask, x, result) for x, result in found]
                continue
            mask = left_of(size // 2, block, size)
            found = products([halves(x, block)[1] for x in left], decayed)
            for i, x in enumerate(found):
                above, below = halves(results[i], block)
                results[i] = joined(above, jnp.where(mask, x, below), block)
        return results

    def read(self, query: Features, memories: Memories) -> Float[Array, "C V"]:
        decayed = self.since * query.mapped.astype(jnp.float32)
        return dot(decayed, memories[0], 1, 0, query.mapped.dtype)

    def after(self, memories: Memories, key: Features, value: Array) -> Memories:
        decayed = self.until * key.mapped.astype(jnp.float32)
        added = dot(decayed, value, 0, 0, key.mapped.dtype)
        return (turned(self.whole) * memories[0] + added,)

    def read_sum(self, query: Features, total: Float[Array, "1 F"]) -> Float[Array, "C 1"]:
        return jnp.sum(self.since * query.mapped * total, axis=1, keepdims=True)

    def after_sum(self, total: Float[Array, "1 F"], key: Features) -> Float[Array, "1 F"]:
        return self.whole * total + jnp.sum(self.until * key.mapped, axis=0, keepdims=True)

    def before(self) -> "_ChannelGate":
        return self


def channel_gate(log_decay: Float[Array, "C H"], bound: float | None) -> Gate:
    """Returns the gate of logarithms above `LOWEST`, and above the bound if there is one."""
    size = log_decay.shape[0]
    first, inside, crosses = _first_block(size, bound), None, []
    start, prefix, suffix, total = 1, log_decay, jnp.zeros_like(log_decay), log_decay
    if first > 1:
        start, (prefix, suffix, total) = ROWS, _summed(log_decay)
    for block in [*_doubled(start, size), size]:
        if block == first > 1:
            middle = _row_of_blocks(prefix, block, block // 2 - 1)
            inside = jnp.exp(prefix - middle), jnp.exp(middle - prefix)
        if block == size:
            break
        crossing, prefix, suffix, total = _paired(prefix, suffix, total, block)
        if block >= first:
            crosses.append(jnp.exp(crossing))
    since = jnp.exp(prefix)
    return _ChannelGate(inside, tuple(crosses), since, jnp.exp(suffix), since[-1:])


def _summed(log_decay: Float[Array, "C H"]) -> tuple[Array, Array, Array]:
    """Returns the sums of `_paired` for blocks of 8, of logarithms small enough to subtract."""
    blocks = log_decay.reshape(-1, ROWS, log_decay.shape[1])
    row = iota(blocks.shape, 1)
    for shift in (1, 2, 4):
        blocks = blocks + jnp.where(row >= shift, rolled(blocks, shift, 1), 0)
    total = jnp.broadcast_to(_last_row(blocks), blocks.shape)
    sums = blocks, total - blocks, total
    return tuple(x.reshape(log_decay.shape) for x in sums)


@jax.custom_vjp
def _last_row(blocks: Float[Array, "n 8 H"]) -> Float[Array, "n 1 H"]:
    return blocks[:, ROWS - 1 :]


def _last_row_backward(_: None, cotangent: Array) -> tuple[Array]:
    shape = cotangent.shape[0], ROWS, cotangent.shape[2]
    return (jnp.where(iota(shape, 1) == ROWS - 1, cotangent, 0),)


_last_row.defvjp(lambda blocks: (_last_row(blocks), None), _last_row_backward)


def _paired(prefix: Array, suffix: Array, total: Array, block: int) -> tuple[Array, ...]:
    """Returns sums for pairs of blocks, from those for blocks.

    Args:
      prefix: sums from the beginning of a block to each token.
      suffix: those after each token.
      total: those of a block.
      block: its size.

    Returns:
      The sums from the middle of a pair, or to it, and the three above.
    """
    if block < ROWS:
        second = iota(prefix.shape, 0) & block > 0
        crossing, beside = jnp.where(second, prefix, suffix), exchanged(total, block)
        prefix = jnp.where(second, prefix + beside, prefix)
        suffix = jnp.where(second, suffix, suffix + beside)
        return crossing, prefix, suffix, total + beside
    (front, second), (first, back) = halves(prefix, block), halves(suffix, block)
    before, after = halves(total, block)
    both = before + after
    return (
        joined(first, second, block),
        joined(front, second + before, block),
        joined(first + after, back, block),
        joined(both, both, block),
    )


def _first_block(size: int, bound: float | None) -> int:
    """Returns how many tokens the first blocks have."""
    if bound is None:
        return 1
    fitting = (n for n in _doubled(ROWS, 2 * size) if (n - 1) * bound >= -LARGEST)
    return max(fitting, default=1)


def _doubled(first: int, end: int) -> list[int]:
    """Returns first, twice that, ..., below the end."""
    return [first << i for i in range((end - 1).bit_length()) if first << i < end]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _row_of_blocks(x: Float[Array, "C H"], block: int, row: int) -> Float[Array, "C H"]:
    """Returns one row of each block in all rows of it; a constant for derivatives."""
    blocks = x.reshape(-1, block, x.shape[1])
    return jnp.broadcast_to(blocks[:, row : row + 1], blocks.shape).reshape(x.shape)


# Whatever decays are relative to, their products are the same.
_row_of_blocks.defvjp(
    lambda x, block, row: (_row_of_blocks(x, block, row), None),
    lambda block, row, _, cotangent: (jnp.zeros_like(cotangent),),
)
