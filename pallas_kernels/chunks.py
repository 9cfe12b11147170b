"""Loops over chunks of tokens, which all but the last have one size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


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
