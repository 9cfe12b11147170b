"""Kernels that go through all chunks of linear attention on Hopper GPUs, at the same time.

A block of the grid has some chunks of a memory, half of them for each of two warpgroups that
compute. They take tiles of 64 rows and 64 columns, one after the other. A third warpgroup copies
ahead of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_features import MAPS
from pallas_kernels.linear.gpu_walk import CHUNK

SQUARE = (CHUNK, CHUNK)
"""Tokens and features, or tokens and tokens: the tiles of all products."""

MOST_STEPS = 8
"""Chunks that a warpgroup takes at most."""


class Fetch(NamedTuple):
    """What the copy engine fetches of a chunk."""

    tiles: int
    """Of 64 features, or values: one after the other."""
    names: dict[str, str]
    """Where in SMEM they come, and what they are of."""


class Plan(NamedTuple):
    """The static part of a kernel."""

    chunks: int
    steps: int
    """Chunks of a warpgroup, but for the last ones."""
    fetches: tuple[Fetch, ...]
    stages: int
    memories: int
    dtype: DTypeLike
    heads: dict[str, int]
    """Numbers of heads of what not each memory has of its own."""
    channels: bool = False
    """Whether each feature has decays of its own."""
    same: bool = False
    """Whether the numbers of all chunks are the same."""
    alone: bool = False
    """Whether those of all batch rows are."""
    delta: bool = False
    feature_map: str | None = None
    """What queries and keys are mapped by, one of `gpu_features.MAPS`."""

    @property
    def exact(self) -> bool:
        """Returns whether matrices of features are cut in two parts."""
        return self.dtype == jnp.float32

    @property
    def parts(self) -> int:
        """Returns how many parts they are cut in."""
        return 2 if self.exact else 1

    @property
    def fine(self) -> int:
        """Returns how many parts logarithms are cut in: 24 bits, or 16 before 8 are left."""
        return (3 if self.exact else 2) if self.channels else 0

    @property
    def slots(self) -> dict[str, DTypeLike]:
        """Returns where in SMEM tiles come, and of which dtype."""
        names = (name for fetch in self.fetches for name in fetch.names)
        return {name: jnp.float32 if name == "logs" else self.dtype for name in names}

    @property
    def jobs(self) -> int:
        """Returns how often the copies of a chunk fill a slot."""
        return self.first(len(self.fetches))

    def first(self, fetch: int) -> int:
        """Returns how many copies of a chunk are before those of a fetch."""
        return sum(fetch.tiles for fetch in self.fetches[:fetch])


class Chunks:
    """The chunks of a warpgroup: what it does with them is a subclass."""

    def __init__(
        self,
        plan: Plan,
        arguments: dict[str, Any],
        results: dict[str, Any],
        scratch: dict[str, Any],
        place: dict[str, Array],
        warpgroup: Array | int,
    ):
        """Finds them."""
        self.plan, self.arguments, self.results = plan, arguments, results
        self.scratch, self.warpgroup = scratch, warpgroup
        self.batch, self.memory = place["batch"], place["memory"]
        self.first = (place["block"] * gpu.COMPUTING + warpgroup) * plan.steps
        self.count = jnp.clip(plan.chunks - self.first, 0, plan.steps)

    def begin(self) -> None:
        """Does what is done once."""

    def __call__(self, step: Array, carry: None) -> None:
        """Does what is done for a chunk."""
        raise NotImplementedError

    def source(self, name: str, step: Array, tile: Array) -> Any:
        """Returns a tile of an argument, where it is fetched from."""
        head = self.memory
        if name in self.plan.heads:
            head = lax.div(head, self.plan.memories // self.plan.heads[name])
        columns = pl.ds(tile * gpu.FEATURES, gpu.FEATURES)
        return self.arguments[name].at[self.batch, self.tokens(step), head, columns]

    def own(self, name: str) -> Any:
        """Returns SMEM of the warpgroup."""
        # Addresses of all operands take too many registers, unless they are made where they are
        # used.
        warpgroup = lax.optimization_barrier(self.warpgroup)
        return jax.tree.map(lambda ref: ref.at[warpgroup], self.scratch[name])

    def loaded(self, name: str, slot: Array) -> Array:
        """Returns a tile that has been copied, float32, in registers."""
        tile = self.scratch[name].at[lax.optimization_barrier(slot)]
        return plgpu.load(tile, layout=gpu.MATRIX).astype(jnp.float32)

    def given(self, name: str, step: Array, tile: Array | int = 0) -> Array:
        """Returns a tile of an argument that is not fetched, float32, in registers."""
        # Addresses that are made ahead of loops take too many registers.
        step, tile = lax.optimization_barrier((step, jnp.int32(tile)))
        columns = pl.ds(tile * gpu.FEATURES, gpu.FEATURES)
        source = self.arguments[name].at[self.batch, self.tokens(step), self.memory, columns]
        return plgpu.load(source, layout=gpu.MATRIX, optimized=False).astype(jnp.float32)

    def map(self, slot: Array, *names: str) -> None:
        """Puts features in the place of what they are made of."""
        if self.plan.feature_map is None:
            return
        for name in names:
            features = MAPS[self.plan.feature_map](self.loaded(name, slot))
            tile = self.scratch[name].at[lax.optimization_barrier(slot)]
            tile[...] = features.astype(tile.dtype)
        plgpu.commit_smem()

    def tokens(self, step: Array) -> Any:
        """Returns the tokens of a chunk."""
        return pl.ds((self.first + step) * CHUNK, CHUNK)

    def slot(self, job: Array) -> Array:
        """Returns where tiles are that have been copied."""
        return self.warpgroup * self.plan.stages + lax.rem(job, self.plan.stages)

    def each(
        self,
        fetch: int,
        step: Array,
        function: Callable[[Array, Array, Array, list[Array]], list[Array]],
        carry: list[Array],
    ) -> list[Array]:
        """Calls a function for each of the tiles that are fetched, when they are there.

        Args:
          fetch: which of the fetches of a chunk.
          step: which chunk.
          function: gets it, where in SMEM, which tile, and what it returned for the one before.
          carry: for the first tile.
        """

        def one(tile: Array, carry: list[Array]) -> list[Array]:
            return self.one(fetch, step, tile, functools.partial(function, step), carry)

        return lax.fori_loop(0, self.plan.fetches[fetch].tiles, one, carry)

    def one(
        self,
        fetch: int,
        step: Array,
        tile: Array,
        function: Callable[[Array, Array, list[Array]], list[Array]],
        carry: list[Array],
    ) -> list[Array]:
        """Calls a function for one tile, see `each`."""
        slot = self.slot(step * self.plan.jobs + self.plan.first(fetch) + tile)
        plgpu.barrier_wait(self.scratch["ready"].at[slot])
        carry = function(slot, tile, carry)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch["free"].at[slot])
        return carry

    def put(self, matrix: Array, first: int, count: int) -> list[Any]:
        """Puts the parts of a matrix where the matrix units can read them, from a tile on."""
        tiles = self.own("tiles")[first : first + count]
        plgpu.commit_smem()  # for all warps to be done with what was there
        for tile, part in zip(tiles, cut(matrix, count), strict=True):
            tile[...] = part
        plgpu.commit_smem()
        return tiles

    def write(self, name: str, matrix: Array, step: Array, tile: Array | int = 0) -> None:
        """Has the copy engine write a tile of a result."""
        staged = self.own("out")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = matrix.astype(staged.dtype)
        plgpu.commit_smem()
        columns = pl.ds(tile * CHUNK, CHUNK)
        at = self.batch, self.tokens(step), self.memory, columns
        plgpu.copy_smem_to_gmem(staged, self.results[name].at[at])


def cut(x: Array, count: int) -> list[Array]:
    """Returns an array in parts of bfloat16, each of which has what those before it left over."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def steps_of(chunks: int, memories: int) -> int:
    """Returns how many chunks a warpgroup takes, for all to be done soon."""

    def waves(steps: int) -> int:
        blocks = -(-chunks // (gpu.COMPUTING * steps)) * memories
        return -(-blocks // gpu.processors())

    # Copies go ahead in a block alone: of equals, the most.
    return min(range(1, MOST_STEPS + 1), key=lambda steps: (waves(steps) * steps, waves(steps)))


def own(dtype: DTypeLike) -> Any:
    """Returns SMEM of a tile for each warpgroup that computes."""
    return gpu.smem((gpu.COMPUTING, *SQUARE), dtype)


def run(
    of: type[Chunks],
    plan: Plan,
    arguments: dict[str, Array],
    results: dict[str, Any],
    scratch: dict[str, Any],
    *,
    name: str,
    batch: int,
) -> dict[str, Array]:
    """Runs a kernel that goes through all chunks.

    Args:
      of: what a warpgroup does with its chunks.
      plan: of the kernel.
      arguments: what the copy engine fetches, and more.
      results: their types.
      scratch: SMEM for what is not fetched.
      name: of the kernel.
      batch: its size.
    """
    slots = gpu.COMPUTING * plan.stages
    scratch |= {name: gpu.smem((slots, *SQUARE), dtype) for name, dtype in plan.slots.items()}
    scratch["ready"] = plgpu.Barrier(num_arrivals=len(plan.slots), num_barriers=slots)
    scratch["free"] = plgpu.Barrier(num_arrivals=1, num_barriers=slots)
    return gpu.run(
        functools.partial(_kernel, of, plan),
        arguments,
        results,
        scratch,
        name=name,
        grid={
            "block": -(-plan.chunks // (gpu.COMPUTING * plan.steps)),
            "memory": plan.memories,
            "batch": batch,
        },
        exact=False,  # of exponents below 0: the last bits of products are coarser
    )


def _kernel(
    of: type[Chunks],
    plan: Plan,
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    """Goes through some chunks of a memory."""
    place_of = functools.partial(of, plan, arguments, results, scratch, place)

    # First what computes: what it needs would stay in the few registers of what copies.
    @pl.when(place["warpgroup"] < gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS, action="increase")
        chunks = place_of(place["warpgroup"])
        chunks.begin()
        # Loops of few steps, if the compiler knows their number, are unrolled: others then spill.
        lax.fori_loop(0, lax.optimization_barrier(chunks.count), chunks, None)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(place["warpgroup"] == gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS_COPYING, action="decrease")
        both = [place_of(warpgroup) for warpgroup in range(gpu.COMPUTING)]

        def copy(step: Array, carry: None) -> None:
            for i, fetch in enumerate(plan.fetches):
                _fetch(both, step, plan.first(i), fetch)

        steps = lax.optimization_barrier(jnp.int32(plan.steps))
        lax.fori_loop(0, steps, copy, None)


def _fetch(both: Sequence[Chunks], step: Array, first: int, fetch: Fetch) -> None:
    """Has the copy engine fetch tiles of chunks as soon as there is space for them.

    Args:
      both: chunks of the warpgroups.
      step: which of them.
      first: number of the first job of the step.
      fetch: what is fetched.
    """
    plan = both[0].plan

    def copy(tile: Array, carry: None) -> None:
        for chunks in both:
            # Nor is there to be one loop for blocks of so many chunks and another for the rest.
            count = lax.optimization_barrier(chunks.count)
            pl.when(step < count)(functools.partial(of_warpgroup, chunks, tile))

    def of_warpgroup(chunks: Chunks, tile: Array) -> None:
        # Places that are found ahead of the loop take more registers than what copies has.
        at_step, at_tile = lax.optimization_barrier((step, tile))
        job = at_step * plan.jobs + first + at_tile
        slot = chunks.slot(job)
        free, ready = (chunks.scratch[name].at[slot] for name in ("free", "ready"))
        pl.when(job >= plan.stages)(functools.partial(plgpu.barrier_wait, free))
        for where, name in fetch.names.items():
            source, target = chunks.source(name, step, tile), chunks.scratch[where].at[slot]
            plgpu.copy_gmem_to_smem(source, target, ready)
        for _ in range(len(plan.slots) - len(fetch.names)):
            plgpu.barrier_arrive(ready)

    lax.fori_loop(0, fetch.tiles, copy, None)
