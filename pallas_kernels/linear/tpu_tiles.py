"""How the TPU kernels of linear attention cut a call: into tiles of tokens of some memories.

A grid step has a tile of tokens, which is some chunks, of all memories of a step; time is the last
dimension of the grid, so that the memories stay in VMEM from step to step. Tokens lie as they come,
[B, T, heads x features], with features filled up to whole registers. Numbers of a token and memory
lie as rows, [B, steps, memories, T].
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import tpu
from pallas_kernels.linear.inputs import Inputs, Options
from pallas_kernels.tpu import LANES, generation

TILES = {
    4: {"scalar": (128, 8, 16), "others": (128, 8, 16)},
    6: {"scalar": (256, 8, 8), "others": (128, 8, 16)},
}
"""By generation from which on, for gates of one decay without the delta rule and for all others:
tokens of a chunk, memories of a grid step at most, and chunks of a step, of all its memories, where
there are as many. See docs/benchmarks.md."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut."""

    batch: int
    memories: int
    step: int
    """Memories of a grid step."""
    tiles: int
    rows: int
    """Tokens of a tile, a multiple of those that are kept together."""
    chunk: int
    """Tokens of a chunk."""
    kept: int
    """Tokens from one state that is kept to the next."""
    reverse: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Returns the numbers of batch rows, of groups of memories, and of tiles."""
        return self.batch, self.memories // self.step, self.tiles

    def time(self, i: Any) -> Any:
        """Returns the number of the tile of a grid step."""
        return self.tiles - 1 - i if self.reverse else i

    def heads(self, count: int) -> int:
        """Returns how many of `count` heads, of queries say, a grid step has."""
        return max(self.step * count // self.memories, 1)

    def head(self, count: int, memory: int) -> int:
        """Returns which of them is that of a memory of the step."""
        return memory * count // self.memories if self.step * count >= self.memories else 0

    def by_token(self, count: int, width: int) -> pl.BlockSpec:
        """Is the block of [B, T, count x width]."""
        heads, step, memories = self.heads(count), self.step, self.memories

        def block(b: Any, n: Any, i: Any) -> tuple[Any, ...]:
            return b, self.time(i), n * step * count // memories // heads

        return pl.BlockSpec((None, self.rows, heads * width), block)

    def numbers(self, heads: int | None = None) -> pl.BlockSpec:
        """Is the block of [B, steps, memories, T], or of [B, 1, 1, T]."""
        shape = (None, None, heads or self.step, self.rows)
        shared = heads is not None
        return pl.BlockSpec(shape, lambda b, n, i: (b, 0 if shared else n, 0, self.time(i)))

    def by_memory(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Is the block of [B, M, *shape], which stays while time goes on."""
        rest = (0,) * len(shape)
        return pl.BlockSpec((None, self.step, *shape), lambda b, n, i: (b, n, *rest))

    def kept_states(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Is the block of [B, kept, M, *shape]."""
        rest = (0,) * len(shape)
        return pl.BlockSpec(
            (None, self.rows // self.kept, self.step, *shape),
            lambda b, n, i: (b, self.time(i), n, *rest),
        )

    def laid_out(self, array: Array) -> Array:
        """Returns [B, T, heads, features] as [B, T, heads x features], with whole tiles."""
        array = tpu.padded(array, 3, filled(array.shape[3]))
        array = tpu.padded(array, 1, self.tiles * self.rows)
        return array.reshape(*array.shape[:2], -1)

    def rows_of(self, numbers: Array) -> Array:
        """Returns [B, T, M] as [B, steps, memories, T], with whole tiles, in float32."""
        numbers = tpu.padded(numbers.astype(jnp.float32), 1, self.tiles * self.rows)
        numbers = jnp.swapaxes(numbers, 1, 2)
        return numbers.reshape(numbers.shape[0], -1, self.step, numbers.shape[2])

    def row_of(self, numbers: Array) -> Array:
        """Returns [B, T] as [B, 1, 1, T], likewise."""
        numbers = tpu.padded(numbers.astype(jnp.float32), 1, self.tiles * self.rows)
        return numbers[:, None, None]


def filled(size: int) -> int:
    """Returns the number of columns of whole registers."""
    return -(-size // LANES) * LANES


def step_of(x: Inputs, most: int) -> int:
    """Returns how many memories a grid step has, whose heads are whole blocks of their arrays."""

    def fits(step: int) -> bool:
        shares = [step * array.shape[2] for array in x[:3]]
        return x.heads % step == 0 and all(s % x.heads == 0 or x.heads % s == 0 for s in shares)

    return next(step for step in range(min(most, x.heads), 0, -1) if fits(step))


def sizes(options: Options, x: Inputs, kind: str) -> tuple[int, int, int]:
    """Returns the tokens of a chunk, the memories of a grid step, and its tokens at most.

    Args:
      options: of the call.
      x: the inputs.
      kind: of `TILES`.
    """
    tiles = TILES[max(known for known in TILES if known <= max(generation(), min(TILES)))]
    chunk, most, together = tiles[kind]
    # Wider features than the 128 of the table take as much more memory.
    mapped, width = (filled(n) for n in next(iter(x.state_shapes(options).values()))[2:])
    wider = max((mapped + width) * x.precision.itemsize // (4 * LANES), 1)
    step = step_of(x, max(most // wider, 1))
    return chunk, step, together // wider * chunk // step
