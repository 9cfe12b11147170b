"""A block of threads on a Hopper GPU: barriers, the copy engine, the matrix units.

What goes on by itself, copies and products, happens at a random time between its beginning and the
wait for it; till then what it writes is NaN. Warpgroups take turns at random, too.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tests.ptx.host import Launch, TensorMap
from tests.ptx.memory import (
    GMEM,
    LANES,
    NOTHING,
    PARAMETERS,
    SMEM_WINDOW,
    Fault,
    Gmem,
    Smem,
    swizzled,
)

BARRIERS = 64
_LANE = np.arange(LANES)
_IN_WARP = _LANE % 32
_MOST_BYTES = (1 << 20) - 1
"""That a barrier can wait for."""

Active = Any
"""Which threads take part: an array, or True for all."""
Program = Callable[["Block", "Warpgroup"], Generator[Any, None, None]]
"""What a warpgroup does; it yields when others may go on, with a function that says whether it can
itself, or None if it can."""


class _Barrier:
    def __init__(self, number: int, count: int, clock: np.ndarray):
        self.number, self.count, self.pending = number, count, count
        self.bytes, self.phase = 0, 0
        self.told, self.known = clock.copy(), clock.copy()

    def arrive(self, count: int) -> None:
        self.pending -= count
        if self.pending < 0:
            raise Fault("a barrier has more arrivals than it counts")
        self.turn()

    def turn(self) -> None:
        if not self.pending and not self.bytes:
            self.pending, self.phase = self.count, self.phase + 1
            self.told[self.number] = self.phase
            self.known = self.told.copy()


class _Sum:
    """What the matrix units add to, in registers that are NaN until it is waited for."""

    def __init__(self, registers: Sequence[np.ndarray]):
        rows = np.stack(registers)
        self.value = rows.view(np.float32).copy()
        rows.view(np.uint8).fill(NOTHING)
        self.registers = list(rows)
        self.products = 0

    def end(self) -> None:
        for register, value in zip(self.registers, self.value.view(np.uint32), strict=True):
            register[:] = value


class _Groups:
    """What goes on by itself, in groups that are waited for in their order."""

    def __init__(self):
        self.begun: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def commit(self) -> None:
        self.groups.append(self.begun)
        self.begun = []

    def wait(self, left: int) -> None:
        while len(self.groups) > left:
            for action in self.groups.pop(0):
                action()


class Warpgroup:
    """What its threads have begun."""

    def __init__(self, index: int):
        """Nothing yet."""
        self.index = index
        self.tid = (_LANE + index * LANES).astype(np.uint32)
        self.warp = index * LANES // 32 + _LANE // 32
        """Of every thread."""
        self.warps = np.unique(self.warp)
        self.products, self.stores = _Groups(), _Groups()
        self.landing: list[Callable[[], None]] = []
        """What has been read to be stored, and need not be there yet."""
        self.sums: dict[int, _Sum] = {}

    def land(self) -> None:
        """Has all be in GMEM that has been read."""
        while self.landing:
            self.landing.pop()()

    @property
    def idle(self) -> bool:
        """Returns whether all is done that it has begun."""
        groups = self.products, self.stores
        return not any(group.begun or group.groups for group in groups)


class Block:
    """A block of threads and what it shares."""

    def __init__(self, launch: Launch, gmem: Gmem, place: Sequence[int], rng: np.random.Generator):
        """Starts where a kernel does.

        Args:
          launch: what the kernel is launched with.
          gmem: where its arrays are.
          place: the block's in the grid.
          rng: decides what happens first.
        """
        self.launch = launch
        self.ctaid = [np.full(LANES, x, np.uint32) for x in place]
        self.nctaid = [np.full(LANES, x, np.uint32) for x in launch.grid]
        self._gmem, self._rng = gmem, rng
        self._number = 1 + int(np.ravel_multi_index(tuple(place), launch.grid))
        self._smem = Smem(launch.smem_bytes, launch.threads // 32, BARRIERS)
        self._barriers: dict[int, _Barrier] = {}
        self._meeting: dict[int, list[Warpgroup]] = {}
        self._met: dict[int, int] = {}
        self._copies: list[Callable[[], None]] = []

    def run(self, program: Program) -> None:
        """Runs a program in all warpgroups to its end."""
        groups = [Warpgroup(i) for i in range(self.launch.threads // LANES)]
        running = {group: program(self, group) for group in groups}
        waits: dict[Warpgroup, Callable[[], bool] | None] = dict.fromkeys(groups)
        while running:
            ready = [group for group in running if waits[group] is None or waits[group]()]
            if self._copies and (not ready or self._rng.random() < 0.1):
                self._copies.pop(self._rng.integers(len(self._copies)))()
                continue
            if not ready:
                raise Fault(f"warpgroups {[group.index for group in running]} wait for ever")
            group = ready[self._rng.integers(len(ready))]
            try:
                waits[group] = next(running[group])
            except StopIteration:
                del running[group]
                if not group.idle:
                    raise Fault("a warpgroup ends before what it has begun") from None
                group.land()
        if self._copies:
            raise Fault("a block ends before its copies")

    # Threads

    elected = _IN_WARP == 0

    def uniform(self, predicate: np.ndarray) -> bool:
        """Returns whether a branch is taken, upon which all threads of a warpgroup must agree."""
        if (predicate != predicate[0]).any():
            raise NotImplementedError("threads of a warpgroup go different ways")
        return bool(predicate[0])

    @staticmethod
    def shuffle(kind: str, values: np.ndarray, by: np.ndarray) -> np.ndarray:
        """shfl.sync with all threads of a warp: "idx", "bfly", "up" or "down"."""
        by = by.astype(np.int64)
        lane = {
            "idx": lambda: by % 32,
            "bfly": lambda: _IN_WARP ^ by,
            "up": lambda: np.where(_IN_WARP >= by, _IN_WARP - by, _IN_WARP),
            "down": lambda: np.where(_IN_WARP + by < 32, _IN_WARP + by, _IN_WARP),
        }[kind]()
        return values[_LANE - _IN_WARP + lane]

    def load(
        self, group: Warpgroup, at: np.ndarray, size: int, count: int, space: str, active: Active
    ) -> list[np.ndarray]:
        """ld: returns `count` neighbours of `size` bytes for each thread, as unsigned numbers."""
        memory, places, lanes = self._elements(at, size, count, space, active)
        found = np.zeros((count, LANES), f"u{size}")
        if memory is self._smem.bytes:
            for start in range(0, size * count, 4):
                self._smem.reads(group.warp[lanes], places + start)
        for i, row in enumerate(found):
            row[lanes] = memory.view(row.dtype)[places // size + i]
        return list(found)

    def store(
        self,
        group: Warpgroup,
        at: np.ndarray,
        values: Sequence[np.ndarray],
        size: int,
        space: str,
        active: Active,
    ) -> None:
        """st: writes neighbours of `size` bytes for each thread."""
        memory, places, lanes = self._elements(at, size, len(values), space, active)
        if memory is self._smem.bytes:
            self._wrote(group, lanes, places, size * len(values))
        for i, value in enumerate(values):
            value = np.broadcast_to(value, LANES)[lanes]
            memory.view(f"u{size}")[places // size + i] = value.astype(f"u{size}")

    def _elements(
        self, at: np.ndarray, size: int, count: int, space: str, active: Active
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns a memory, where elements are in it, and the threads that they are for."""
        lanes = _LANE if active is True else _LANE[active]
        at = at[lanes].astype(np.int64)
        if (at % (size * count)).any():
            raise Fault(f"an address is no multiple of {size * count}")
        generic = not space and (at >= SMEM_WINDOW).all()
        if space == "shared" or generic:
            places = at - SMEM_WINDOW if generic else at
            self._smem.check(places, size * count)
            return self._smem.bytes, places, lanes
        self._gmem.places(at + size * count - 1)
        return self._gmem.bytes, self._gmem.places(at), lanes

    def _wrote(self, group: Warpgroup, lanes: np.ndarray, places: np.ndarray, size: int) -> None:
        warps = group.warp[lanes]
        for start in range(0, size, 4):
            now = self._smem.clocks[warps, warps]
            self._smem.writes(warps, places + start, warps, now)
        self._smem.wrote(group.index, (places[:, None] + np.arange(size)).reshape(-1))

    def store_matrices(
        self, group: Warpgroup, at: np.ndarray, values: Sequence[np.ndarray], transposed: bool
    ) -> None:
        """stmatrix: each warp writes up to four matrices of 8 x 8 numbers of 16 bits."""
        for places, value in zip(self._rows(at, len(values)), values, strict=True):
            self._wrote(group, _LANE, places, 4)
            value = _transposed(value) if transposed else value
            self._smem.bytes.view(np.uint32)[places // 4] = value

    def load_matrices(
        self, group: Warpgroup, at: np.ndarray, count: int, transposed: bool
    ) -> list[np.ndarray]:
        """ldmatrix: each warp reads up to four matrices of 8 x 8 numbers of 16 bits."""
        found = []
        for places in self._rows(at, count):
            self._smem.reads(group.warp, places)
            value = self._smem.bytes.view(np.uint32)[places // 4]
            found.append(_transposed(value) if transposed else value)
        return found

    def _rows(self, at: np.ndarray, count: int) -> np.ndarray:
        """Returns where in SMEM threads have two neighbours of each matrix: [count, 128]."""
        # Eight threads of a warp have the addresses of a matrix's rows.
        rows = at.astype(np.int64).reshape(LANES // 32, 4, 8)[:, :count]
        self._smem.check(rows, 16)
        lane = np.arange(32)
        places = rows[:, :, lane // 4] + 4 * (lane % 4)
        return places.transpose(1, 0, 2).reshape(count, LANES)

    def fence(self, group: Warpgroup) -> None:
        """fence.proxy.async."""
        self._smem.fence(group.index)

    # Barriers

    def init_barrier(self, at: np.ndarray, count: np.ndarray, active: Active) -> None:
        """mbarrier.init."""
        for address, number in _each(active, at, count):
            index = self._smem.clocks.shape[1] - BARRIERS + len(self._barriers)
            self._barriers[address] = _Barrier(index, number, 0 * self._smem.clocks[0])

    def arrive(
        self, group: Warpgroup, at: np.ndarray, count: Any, expected: Any, active: Active
    ) -> None:
        """mbarrier.arrive, after some bytes are told to come."""
        arrivals = np.array([*_each(active, at, group.warp, count, expected)]).reshape(-1, 4)
        for address in np.unique(arrivals[:, 0]):
            barrier = self._barrier(address)
            _, warps, counts, sizes = arrivals[arrivals[:, 0] == address].T
            barrier.told = np.maximum(barrier.told, self._smem.clocks[np.unique(warps)].max(axis=0))
            barrier.bytes += sizes.sum()
            if barrier.bytes > _MOST_BYTES:
                raise Fault(f"a barrier waits for {barrier.bytes} bytes")
            barrier.arrive(counts.sum())
        self._smem.tick(group.warps)

    def wait(
        self, group: Warpgroup, at: np.ndarray, parity: np.ndarray
    ) -> Generator[Callable[[], bool], None, None]:
        """mbarrier.try_wait.parity, until it is true."""
        barrier, odd = self._barrier(_one(at)), _one(parity)
        while barrier.phase % 2 == odd:
            yield lambda: barrier.phase % 2 != odd
        self._smem.learn(group.warps, barrier.known)

    def sync(
        self, group: Warpgroup, number: np.ndarray, threads: int
    ) -> Generator[Callable[[], bool], None, None]:
        """bar.sync of whole warpgroups."""
        number = _one(number)
        here = self._meeting.setdefault(number, [])
        meetings = self._met.get(number, 0)
        here.append(group)
        if len(here) * LANES == threads:
            self._smem.meet(np.concatenate([group.warps for group in here]))
            here.clear()
            self._met[number] = meetings + 1
        while self._met.get(number, 0) == meetings:
            yield lambda: self._met.get(number, 0) > meetings

    def _barrier(self, address: int) -> _Barrier:
        if address not in self._barriers:
            raise Fault(f"there is no barrier at {address}")
        return self._barriers[address]

    # The copy engine

    def copy_tile_in(
        self,
        group: Warpgroup,
        to: np.ndarray,
        tensor: np.ndarray,
        corner: Sequence[np.ndarray],
        barrier: np.ndarray,
        active: Active,
    ) -> None:
        """cp.async.bulk.tensor from GMEM to SMEM."""
        for lane, smem, address, at, *start in _each(active, _LANE, to, tensor, barrier, *corner):
            self._begin(group.warp[lane], *self._tile(address, start, smem), at)

    def copy_in(
        self,
        group: Warpgroup,
        to: np.ndarray,
        of: np.ndarray,
        size: np.ndarray,
        barrier: np.ndarray,
        active: Active,
    ) -> None:
        """cp.async.bulk from GMEM to SMEM."""
        for lane, smem, gmem, count, at in _each(active, _LANE, to, of, size, barrier):
            self._begin(group.warp[lane], *self._line(smem, gmem, count), at)

    def _begin(
        self, warp: int, smem: np.ndarray, gmem: np.ndarray, exists: np.ndarray, address: int
    ) -> None:
        barrier = self._barrier(address)
        self._smem.writes(np.array(warp), smem, barrier.number, barrier.phase + 1)

        def copy() -> None:
            values = np.zeros(smem.size, np.uint8)
            values[exists] = self._gmem.bytes[gmem[exists]]
            self._smem.bytes[smem] = self._smem.seen[smem] = values
            barrier.bytes -= smem.size
            barrier.turn()

        self._copies.append(copy)

    def copy_tile_out(
        self,
        group: Warpgroup,
        tensor: np.ndarray,
        corner: Sequence[np.ndarray],
        of: np.ndarray,
        active: Active,
        *,
        adds: bool = False,
    ) -> None:
        """cp.async.bulk.tensor from SMEM to GMEM, or cp.reduce.async.bulk.tensor of float32."""
        for lane, smem, address, *start in _each(active, _LANE, of, tensor, *corner):
            self._begin_out(group, group.warp[lane], *self._tile(address, start, smem), adds)

    def copy_out(
        self,
        group: Warpgroup,
        to: np.ndarray,
        of: np.ndarray,
        size: np.ndarray,
        active: Active,
    ) -> None:
        """cp.async.bulk from SMEM to GMEM."""
        for lane, gmem, smem, count in _each(active, _LANE, to, of, size):
            self._begin_out(group, group.warp[lane], *self._line(smem, gmem, count))

    def _begin_out(
        self,
        group: Warpgroup,
        warp: int,
        smem: np.ndarray,
        gmem: np.ndarray,
        exists: np.ndarray,
        adds: bool = False,
    ) -> None:
        warp, places = np.array(warp), gmem[exists]
        self._smem.reads(warp, smem, ended=False)
        self._gmem.begin(places, self._number)

        def read() -> None:
            values = self._smem.seen[smem[exists]]
            self._smem.have_read(warp, smem)
            group.landing.append(functools.partial(self._gmem.end, places, values, adds))

        group.stores.begun.append(read)

    def _tile(
        self, address: int, corner: Sequence[int], smem: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns where bytes are in SMEM and GMEM, and which do exist there: others are 0."""
        index, place = divmod(address - PARAMETERS, 1 << 20)
        tensor: TensorMap = self.launch.parameters[index][place // 128]
        exists, gmem = np.ones(1, bool), np.zeros(1, np.int64)
        for dimension, start in enumerate(corner):
            start = start - (1 << 32) if start >> 31 else start
            at = (start + np.arange(tensor.box[dimension]))[:, None]
            exists = (exists & (at >= 0) & (at < tensor.sizes[dimension])).reshape(-1)
            gmem = (gmem + at * tensor.strides[dimension]).reshape(-1)
        gmem = (gmem[:, None] + np.arange(tensor.item_bytes)).reshape(-1) + tensor.base - GMEM
        exists = np.repeat(exists, tensor.item_bytes)
        self._gmem.places(gmem[exists] + GMEM)
        if smem % 128:
            raise Fault("SMEM: a copy is at no multiple of 128")
        places = swizzled(smem + np.arange(gmem.size), tensor.swizzle)
        self._smem.check(places, 1)
        return places, gmem, exists

    def _line(self, smem: int, gmem: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if smem % 16 or gmem % 16 or size % 16:
            raise Fault("a copy is of no multiple of 16 bytes, or at none")
        bytes_ = np.arange(size)
        self._smem.check(smem + bytes_, 1)
        return smem + bytes_, self._gmem.places(gmem + bytes_), np.ones(size, bool)

    @staticmethod
    def commit_stores(group: Warpgroup) -> None:
        """cp.async.bulk.commit_group."""
        group.stores.commit()

    @staticmethod
    def wait_stores(group: Warpgroup, left: int, *, read: bool = False) -> None:
        """cp.async.bulk.wait_group: till all has been read, or is there, too."""
        group.stores.wait(left)
        if not read:
            group.land()

    # The matrix units

    def multiply(
        self,
        group: Warpgroup,
        total: Sequence[np.ndarray],
        a: np.ndarray | list[np.ndarray],
        b: np.ndarray,
        *,
        kind: str,
        adds: bool,
        sign: int,
        transposed: tuple[bool, bool],
    ) -> list[np.ndarray]:
        """wgmma.mma_async of 64 rows: returns the registers of the sum.

        Args:
          group: what computes.
          total: registers of what is added to, [64, columns].
          a: registers of [64, 16], or a descriptor of it in SMEM.
          b: descriptor of [16, columns].
          kind: "bf16" or "f16".
          adds: whether there is something to add to.
          sign: of the product.
          transposed: whether the first index of a, and the last of b, are those of neighbours.
        """
        found = group.sums.get(id(total[0]))
        if found is None:
            found = _Sum(total)
            group.sums[id(found.registers[0])] = found
        found.products += 1
        columns, warps = 2 * len(total), group.warps[:, None]
        operands = {"b": _operand(_one(b), columns, transposed[1])}
        if not isinstance(a, list):
            operands["a"] = _operand(_one(a), 64, transposed[0])
        for places in operands.values():
            self._smem.check(places, 2)
            self._smem.reads(warps, places.reshape(-1), ended=False)

        def matrix(name: str) -> np.ndarray:
            places = operands[name]
            self._smem.have_read(warps, places.reshape(-1))
            return _floats(self._smem.seen.view(np.uint16)[places // 2], kind)

        def multiply() -> None:
            left = matrix("a") if "a" in operands else _left(np.stack(a), kind)
            value = sign * (left @ matrix("b").T)
            # Rows are of a warp, of one of its halves, of four threads; a thread has two
            # neighbours of every eight columns.
            value = value.reshape(4, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
            value = value.reshape(len(total), LANES)
            found.value = found.value + value if adds else value
            found.products -= 1

        group.products.begun.append(multiply)
        return found.registers

    @staticmethod
    def commit_products(group: Warpgroup) -> None:
        """wgmma.commit_group."""
        group.products.commit()

    @staticmethod
    def wait_products(group: Warpgroup, left: int) -> None:
        """wgmma.wait_group."""
        group.products.wait(left)
        for key, total in list(group.sums.items()):
            if not total.products:
                total.end()
                del group.sums[key]


def _each(active: Active, *values: Any) -> Iterator[tuple[int, ...]]:
    """Yields the values of each thread that takes part."""
    lanes = _LANE if active is True else _LANE[active]
    rows = [np.broadcast_to(value, LANES)[lanes].tolist() for value in values]
    return zip(*rows, strict=True)


def _one(values: np.ndarray) -> int:
    """Returns a number that must be the same for all threads."""
    if (values != values[0]).any():
        raise Fault("threads of a warpgroup differ where they must not")
    return int(values[0])


@functools.lru_cache(1024)
def _operand(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Returns where a matrix of 16 bits [rows, 16] is, which is summed along the last index."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    if width is None or descriptor >> 49 & 7:
        raise NotImplementedError(f"a matrix with the descriptor {descriptor:#x}")
    row, inner = np.arange(rows)[:, None], np.arange(16)
    if transposed:
        places = row % (width // 2) * 2 + row // (width // 2) * leading
        places = places + inner % 8 * width + inner // 8 * stride
    else:
        places = row % 8 * width + row // 8 * stride + inner * 2
    return swizzled(start + places, width)


def _floats(bits: np.ndarray, kind: str) -> np.ndarray:
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]
    return bits.view(dtype).astype(np.float32)


def _left(registers: np.ndarray, kind: str) -> np.ndarray:
    """Returns the left matrix [64, 16] of a product from its registers [4, 128]."""
    # Halves of columns, halves of a warp's rows; warps, four threads of a row, two neighbours.
    values = _floats(registers.view(np.uint16), kind).reshape(2, 2, 4, 8, 4, 2)
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(64, 16)


def _transposed(register: np.ndarray) -> np.ndarray:
    """Returns 8 x 8 matrices of 16 bits, one of each warp, transposed."""
    matrices = np.ascontiguousarray(register).view(np.uint16).reshape(LANES // 32, 8, 8)
    return np.ascontiguousarray(matrices.swapaxes(1, 2)).view(np.uint32).reshape(LANES)
