"""Chunks of tokens: loops over them, all but the last of one size, and how they are joined."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array


class Part(NamedTuple):
    """Consecutive chunks of one size."""

    first: int  # number of the first chunk
    count: int
    size: int
    stride: int  # tokens from one chunk to the next; the same in all parts


def chunk_parts(tokens: int, size: int) -> list[Part]:
    """Cuts tokens into whole chunks, and a shorter one of what is left."""
    whole, rest = divmod(tokens, size)
    found = (Part(0, whole, size, size), Part(whole, 1, rest, size))
    return [part for part in found if part.count and part.size]


def chunk_loop(
    part: Part, step: Callable[[Any, Any], Any], carry: Any, *, backwards: bool = False
) -> Any:
    """Calls `step(number of the chunk, carry)` for all chunks of a part."""
    last = part.first + part.count - 1

    def body(n: Any, carry: Any) -> Any:
        return step(last - n if backwards else part.first + n, carry)

    return body(0, carry) if part.count == 1 else jax.lax.fori_loop(0, part.count, body, carry)


def joined(
    decay: Array,
    added: Array,
    first: Array,
    *,
    reverse: bool = False,
    times: Callable[[Array, Array], Array] = operator.mul,
) -> Array:
    """Returns what a memory is after each of some chunks, given what it is before the first.

    Args:
      decay: what is left of it after a chunk, [B, chunks, ...].
      added: what is added to it in a chunk, likewise.
      first: what it is before the first chunk, [B, ...], or after the last if `reverse`.
      reverse: whether to go from the last chunk to the first.
      times: what is left of something: of a memory, or of what is left of it.
    """
    at = -1 if reverse else 0
    added = added.at[:, at].add(times(decay[:, at], first))

    def combine(one: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return times(then[0], one[0]), times(then[0], one[1]) + then[1]

    return jax.lax.associative_scan(combine, (decay, added), axis=1, reverse=reverse)[1]
