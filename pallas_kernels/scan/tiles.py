"""What the TPU kernels of scans share: how arrays are cut into tiles, and what is in a tile.

A grid step has the tokens of one chunk along sublanes and a block of channels along lanes; time is
the last dimension of the grid, so that a state stays in VMEM from step to step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import tpu
from pallas_kernels.tpu import LANES

ROWS = 8
"""Tokens in a register."""
STEP = 16
"""Tokens that a loop takes at a time: a register of 16-bit values."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut; channels are a multiple of `lanes`."""

    batch: int
    tokens: int
    channels: int
    rows: int
    lanes: int
    reverse: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Returns the numbers of batch rows, blocks of channels, and tiles of time."""
        return self.batch, self.channels // self.lanes, pl.cdiv(self.tokens, self.rows)

    @property
    def ragged(self) -> bool:
        """Returns whether the last tile reaches beyond the last token."""
        return self.tokens % self.rows != 0

    def time(self, i: Any) -> Any:
        """Returns the number of the tile of time of a grid step."""
        return self.grid[2] - 1 - i if self.reverse else i

    def by_token(self) -> pl.BlockSpec:
        """Is the block of [B, T, D]."""
        return pl.BlockSpec((None, self.rows, self.lanes), lambda b, c, i: (b, self.time(i), c))

    def column(self) -> pl.BlockSpec:
        """Is the block of [B, T, 1]."""
        return pl.BlockSpec((None, self.rows, 1), lambda b, c, i: (b, self.time(i), 0))

    def by_chunk(self, rows: int) -> pl.BlockSpec:
        """Is the block of [B, chunks, rows, D]."""
        shape = (None, None, rows, self.lanes)
        return pl.BlockSpec(shape, lambda b, c, i: (b, self.time(i), 0, c))

    def by_row(self, rows: int) -> pl.BlockSpec:
        """Is the block of [B, rows, D], which stays while time goes on."""
        return pl.BlockSpec((None, rows, self.lanes), lambda b, c, i: (b, 0, c))

    def shared(self, rows: int, batch: int) -> pl.BlockSpec:
        """Is the block of [B|1, rows, D], of a parameter."""
        shape = (None, rows, self.lanes)
        return pl.BlockSpec(shape, lambda b, c, i: (b if batch > 1 else 0, 0, c))

    @property
    def first(self) -> Any:
        """Returns whether a grid step is the first in time of its channels, as time is walked."""
        return pl.program_id(2) == 0

    @property
    def last(self) -> Any:
        """Returns whether it is the last."""
        return pl.program_id(2) == self.grid[2] - 1

    def valid(self, start: Any, rows: int) -> Array:
        """Returns which of the rows from `start` on are tokens, [rows, 1]."""
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        return row < self.tokens - self.time(pl.program_id(2)) * self.rows - start


def tiling(
    shape: Sequence[int], rows: int, *, widest: int, group: int | None = None, reverse: bool = False
) -> Tiling:
    """Returns how a call is cut.

    Args:
      shape: batch, tokens and channels.
      rows: tokens in a tile.
      widest: the most lanes of a tile.
      group: of how many channels those of a tile must be a part; None for all.
      reverse: whether the grid goes from the last tile of time to the first.
    """
    channels = -(-shape[2] // LANES) * LANES
    whole = channels if group is None else group
    lanes = next(n for n in (1024, 512, 256, LANES) if n <= widest and whole % n == 0)
    return Tiling(shape[0], shape[1], channels, rows, lanes, reverse)


def padded(array: Array, tiling: Tiling) -> Array:
    """Fills channels, the last dimension, up with zeros."""
    return tpu.padded(array, array.ndim - 1, tiling.channels)


def loop(rows: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Calls `body(first row, carry)` for all groups of `STEP` rows of a tile."""

    def step(i: Any, carry: Any) -> Any:
        return body(pl.multiple_of(i * STEP, STEP), carry)

    return jax.lax.fori_loop(0, rows // STEP, step, carry)
