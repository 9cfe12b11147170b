"""The memories of a GPU that is emulated."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

LANES = 128
"""Threads of a warpgroup, which go together."""

GMEM, PARAMETERS, SMEM_WINDOW = 1 << 40, 2 << 40, 3 << 40
"""Where global memory, what a kernel is given and shared memory begin among generic addresses."""

SMEM = 1024
"""Where a block's part of shared memory begins, as an address of it; the first bytes are CUDA's."""

NOTHING = 0xFF
"""In bytes that nothing was written to: floating-point numbers of it are NaN."""


class Fault(Exception):
    """What a program does wrong."""


class Gmem:
    """Global memory that holds some arrays, apart from each other."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        """Copies the arrays."""
        sizes = [-(-array.nbytes // 256) * 256 + 256 for array in arrays]
        self._places = [sum(sizes[:i]) for i in range(len(sizes))]
        self.bytes = np.full(sum(sizes), NOTHING, np.uint8)
        self._exists = np.zeros(sum(sizes), bool)
        # Of words: the block that wrote to them, and whether that may still be under way.
        self._writer = np.zeros(sum(sizes) // 4, np.int32)
        self._under_way = np.zeros(sum(sizes) // 4, bool)
        for place, array in zip(self._places, arrays, strict=True):
            here = slice(place, place + array.nbytes)
            self.bytes[here] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._exists[here] = True

    @property
    def addresses(self) -> list[int]:
        """Returns those of the arrays."""
        return [GMEM + place for place in self._places]

    def array(self, index: int, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """Returns an array as it is now."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        place = self._places[index]
        return self.bytes[place : place + size].view(dtype).reshape(shape)

    def begin(self, places: np.ndarray, block: int) -> None:
        """The copy engine begins to write, or to add; a Fault if something else might do so, too.

        Args:
          places: of bytes.
          block: the one that has it do so, from 1: nothing orders what another one writes.
        """
        words = places // 4
        if ((self._writer[words] > 0) & (self._writer[words] != block)).any():
            raise Fault("GMEM: a race: another block has written there")
        if self._under_way[words].any():
            raise Fault("GMEM: a race: what was written before need not be there")
        self._writer[words], self._under_way[words] = block, True

    def end(self, places: np.ndarray, values: np.ndarray, adds: bool) -> None:
        """What was begun is there: bytes, which are added as float32 if `adds`."""
        if adds:
            before = self.bytes[places].view(np.float32)
            values = (before + values.view(np.float32)).view(np.uint8)
        self.bytes[places] = values
        self._under_way[places // 4] = False

    def places(self, addresses: np.ndarray) -> np.ndarray:
        """Returns where bytes are; all must be of arrays."""
        places = addresses.astype(np.int64) - GMEM
        inside = (places >= 0) & (places < self.bytes.size)
        if not inside.all() or not self._exists[places].all():
            raise Fault("GMEM: an address is in no array")
        return places


class Smem:
    """Shared memory, and what is known of who has read and written it.

    It is one memory for threads and for the engines, which copy and multiply; but what threads
    write the engines see from a fence on. A race is a use of what another has written, or a write
    to what another has read, that barriers do not order.
    """

    def __init__(self, size: int, warps: int, barriers: int):
        """Nothing is written yet.

        Args:
          size: bytes.
          warps: of the block.
          barriers: the most that there can be. What the copy engine writes it does in the name of
            the barrier that it tells.
        """
        self.end = SMEM + size
        whole = -(-self.end // 1024) * 1024
        self.bytes = np.full(whole, NOTHING, np.uint8)
        self.seen = np.full(whole, NOTHING, np.uint8)
        """What the engines see."""
        self._unfenced: list[list[np.ndarray]] = [[] for _ in range(warps * 32 // LANES)]
        # What each warp knows to be over, of warps and of phases of barriers.
        self.clocks = np.zeros((warps, warps + barriers), np.int32)
        self.clocks[:, :warps] = np.eye(warps)
        self._writer = np.zeros(whole // 4, np.int16)
        self._written = np.zeros(whole // 4, np.int32)
        self._read = np.zeros((warps, whole // 4), np.int32)

    def check(self, places: np.ndarray, size: int) -> None:
        """Raises a Fault if elements are outside, or not at a multiple of their size."""
        if places.size and (places.min() < SMEM or places.max() + size > self.end):
            raise Fault("SMEM: an address is outside")
        if (places % size).any():
            raise Fault(f"SMEM: an address is no multiple of {size}")

    def reads(self, warps: np.ndarray, places: np.ndarray, *, ended: bool = True) -> None:
        """Warps read words; a Fault if they cannot know what is in them.

        Args:
          warps: of each word, or one or several for all: [n, 1].
          places: bytes, of which each stands for its word.
          ended: whether reading is over by now; see `have_read`.
        """
        words = places // 4
        if (self.clocks[warps, self._writer[words]] < self._written[words]).any():
            raise Fault("SMEM: a race: what is read need not have been written")
        if ended:
            self.have_read(warps, places)

    def have_read(self, warps: np.ndarray, places: np.ndarray) -> None:
        """Warps have now read words."""
        self._read[warps, places // 4] = self.clocks[warps, warps]

    def writes(self, warps: np.ndarray, places: np.ndarray, writer: np.ndarray, at: int) -> None:
        """Warps write words, or have them written; a Fault if others may still use them.

        Args:
          warps: of each word, or one for all.
          places: bytes, of which each stands for its word.
          writer: in whose name: of each word, or one for all.
          at: the writer's time when it is done.
        """
        words = places // 4
        count = self.clocks.shape[0]
        warps = np.atleast_1d(warps)
        if (self.clocks[warps, self._writer[words]] < self._written[words]).any():
            raise Fault("SMEM: a race: what is overwritten need not have been written")
        if (self.clocks[warps, :count].T < self._read[:, words]).any():
            raise Fault("SMEM: a race: what is overwritten may still be read")
        self._writer[words], self._written[words] = writer, at

    def wrote(self, group: int, places: np.ndarray) -> None:
        """Threads of a warpgroup have written bytes, which the engines do not see yet."""
        self._unfenced[group].append(places)

    def fence(self, group: int) -> None:
        """Has the engines see what a warpgroup wrote."""
        for places in self._unfenced[group]:
            self.seen[places] = self.bytes[places]
        self._unfenced[group].clear()

    def meet(self, warps: np.ndarray) -> None:
        """Warps wait for each other."""
        self.learn(warps, self.clocks[warps].max(axis=0))
        self.tick(warps)

    def learn(self, warps: np.ndarray, clock: np.ndarray) -> None:
        """Warps get to know what is over."""
        self.clocks[warps] = np.maximum(self.clocks[warps], clock)

    def tick(self, warps: np.ndarray) -> None:
        """What warps do from now on comes after what they have told others."""
        self.clocks[warps, warps] += 1


def swizzled(places: np.ndarray, width: int) -> np.ndarray:
    """Returns where bytes are put: units of 16 bytes change places, so that columns use all banks.

    Args:
      places: of bytes.
      width: of a row, 128, 64 or 32 bytes; 16 for no change.
    """
    return places ^ (places >> 7 & width // 16 - 1) << 4
