"""What a warpgroup of the kernel in `gpu_prepare` computes.

As in `blocks`, scores are sums over levels s = 1, 2, ..., 32: of each, pairs of neighbouring blocks
of s tokens have a product of their own, with decays from the middle on, and to it. Their logarithms
are sums over tokens, which the matrix units form as products with matrices of zeros and ones, so
that no exponent is positive and none is a difference of large numbers; for that logarithms are cut
into parts of bfloat16. The inverse that the delta rule needs grows by the same levels: with X that
of the blocks of s tokens and C what joins pairs of them, X - X C X is that of the blocks of 2 s.
"""

import functools
from collections.abc import Callable
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
from pallas_kernels.linear.gpu_walk import CHUNK, NUMBERS
from pallas_kernels.linear.inputs import LOWEST

SQUARE = (CHUNK, CHUNK)
"""Tokens and features, or tokens and tokens: the tiles of all products."""

LEVELS = 6
"""Sizes of blocks: 1, 2, ..., 32."""


class Plan(NamedTuple):
    """The static part of a kernel."""

    chunks: int
    steps: int
    """Chunks of a warpgroup, but for the last ones."""
    features: int
    """Tiles of 64."""
    values: int
    stages: int
    memories: int
    heads: dict[str, int]
    channels: bool
    """Whether each feature has decays of its own."""
    same: bool
    """Whether the numbers of all chunks are the same."""
    alone: bool
    """Whether those of all batch rows are."""
    delta: bool
    dtype: DTypeLike
    feature_map: str | None
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
    def tiles(self) -> int:
        """Returns how many tiles a warpgroup needs for matrices of its own."""
        return max(4, self.fine + 2) if self.delta else self.fine + self.parts

    @property
    def copies(self) -> int:
        """Returns how many tiles a slot has."""
        return 3 if self.channels else 2

    @property
    def jobs(self) -> int:
        """Returns how often the copies of a chunk fill a slot."""
        return self.features + (self.features + self.values if self.delta else 0)


class Chunks:
    """The chunks of a warpgroup."""

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
        if self.plan.channels:
            self.own("ones")[...] = gpu.matrix(1.0, SQUARE).astype(jnp.bfloat16)

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

    def __call__(self, step: Array, carry: None) -> None:
        """Prepares a chunk."""
        plan, first = self.plan, step * self.plan.jobs
        scores = [gpu.matrix(0.0, SQUARE) for _ in range(1 + plan.delta)]
        of_tile = self.scores_by_channel if plan.channels else self.scores
        scores = self.each(plan.features, functools.partial(of_tile, step), first, scores)
        if not plan.channels:
            scores = self.decayed(step, scores)
        self.write("scores", scores[0], step)
        if not plan.delta:
            return
        beta = self.arguments["beta"].at[self.batch, self.memory, self.tokens(step)]
        of_row = plgpu.load(beta, layout=gpu.OF_ROWS, optimized=False)
        inverse = self.inverse(scores[1] * gpu.across(of_row, SQUARE))
        of_column = plgpu.load(beta, layout=gpu.OF_COLUMNS, optimized=False)
        weights = _cut(inverse * gpu.down(of_column, SQUARE), 2)

        def erase(slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
            self.map(slot, "key")
            keys = self.loaded("key", slot)
            keys = self.put(keys * self.since(step, slot), plan.fine, 2)
            self.write("erase", gpu.product(weights, keys), step, tile)
            return carry

        def value(slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
            values = self.operand("query", slot)
            self.write("value", gpu.product(weights, values), step, tile)
            return carry

        self.each(plan.features, erase, first + plan.features, [])
        self.each(plan.values, value, first + 2 * plan.features, [])

    def each(
        self,
        count: int,
        function: Callable[[Array, Array, list[Array]], list[Array]],
        job: Array,
        carry: list[Array],
    ) -> list[Array]:
        """Calls a function for each of some tiles, when they are there.

        Args:
          count: of the tiles.
          function: gets where in SMEM, which tile, and what it returned for the one before.
          job: number of the first copies.
          carry: for the first tile.
        """

        def step(tile: Array, carry: list[Array]) -> list[Array]:
            slot = self.slot(job + tile)
            plgpu.barrier_wait(self.scratch["ready"].at[slot])
            carry = function(slot, tile, carry)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.scratch["free"].at[slot])
            return carry

        return lax.fori_loop(0, count, step, carry)

    def scores(self, step: Array, slot: Array, tile: Array, scores: list[Array]) -> list[Array]:
        """Adds what a tile of features adds to scores, without decays."""
        self.map(slot, "query", "key")
        keys = self.operand("key", slot)
        exact, query = self.plan.exact, self.scratch["query"].at[slot]
        queries = _cut(self.loaded("query", slot), 2) if exact else [query]
        left = [queries, keys][: len(scores)]
        scores = [
            gpu.accumulated(total, x, gpu.transposed(keys))
            for x, total in zip(left, scores, strict=True)
        ]
        if "numbers" in self.arguments:
            for name, source, decay in (("reader", "query", "since"), ("writer", "key", "until")):
                decay = gpu.across(self.number(step, decay), SQUARE)
                self.write(name, self.loaded(source, slot) * decay, step, tile)
        return scores

    def scores_by_channel(
        self, step: Array, slot: Array, tile: Array, scores: list[Array]
    ) -> list[Array]:
        """Adds what a tile of features adds to scores, with a decay for each of them."""
        plan = self.plan
        self.map(slot, "query", "key")
        self.cut_logs(slot)
        self.write_decays(step, tile)

        # Where keys are alike, what is erased comes down to how they differ.
        parts = 2 if plan.delta else plan.parts

        def level(i: Array, scores: list[Array]) -> list[Array]:
            size = jnp.left_shift(jnp.int32(1), i)
            decay = jnp.exp(self.sums(block(size)))
            keys = self.put(self.loaded("key", slot) * decay, plan.fine, parts)
            queries = _cut(self.loaded("query", slot) * decay, plan.parts)
            pairs = [(queries, keys[: plan.parts]), (keys, keys)]
            return [
                total + jnp.where(joined(size), gpu.product(left, gpu.transposed(right)), 0)
                for (left, right), total in zip(pairs, scores, strict=False)
            ]

        scores = lax.fori_loop(0, LEVELS, level, scores)
        since = jnp.exp(self.sums(prefix()))
        self.write("reader", self.loaded("query", slot) * since, step, tile)
        until = jnp.exp(self.sums(suffix()))
        self.write("writer", self.loaded("key", slot) * until, step, tile)
        # Last, as else what is loaded would stay in registers.
        same = jnp.sum(self.loaded("query", slot) * self.loaded("key", slot), axis=1)
        same = jnp.where(diagonal(), gpu.across(same, SQUARE), 0)
        scores[0] = scores[0] + same
        return scores

    def cut_logs(self, slot: Array) -> None:
        """Puts the parts of logarithms where the matrix units can read them."""
        logs = jnp.maximum(self.loaded("logs", slot), LOWEST)
        self.put(logs, 0, self.plan.fine)

    def sums(self, which: Array) -> Array:
        """Returns sums of logarithms, for each row of those of some tokens."""
        return gpu.product([chosen(which)], self.own("tiles")[: self.plan.fine])

    def write_decays(self, step: Array, tile: Array) -> None:
        """Writes the decays of the chunk: features are rows, as no sums of rows are safe."""
        # Those of the layout go through SMEM that both warpgroups would use at the same time.
        logs = self.own("tiles")[: self.plan.fine]
        sums = gpu.product(gpu.transposed(logs), [self.own("ones")])
        decays = jnp.exp(jnp.max(sums, axis=1))
        columns = pl.ds(tile * gpu.FEATURES, gpu.FEATURES)
        at = self.batch, self.first + step, self.memory, columns
        gpu.store(self.results["decays"].at[at], decays)

    def since(self, step: Array, slot: Array) -> Array | float:
        """Returns the decays from the beginning of the chunk to each token."""
        if self.plan.channels:
            self.cut_logs(slot)
            return jnp.exp(self.sums(prefix()))
        if "numbers" not in self.arguments:
            return 1.0
        return gpu.across(self.number(step, "since"), SQUARE)

    def number(self, step: Array, name: str, layout: Any = gpu.OF_ROWS) -> Array:
        """Returns a number of every token."""
        tokens = pl.ds(0, CHUNK) if self.plan.same else self.tokens(step)
        at = 0 if self.plan.alone else self.batch, self.memory, NUMBERS.index(name), tokens
        numbers = plgpu.load(self.arguments["numbers"].at[at], layout=layout, optimized=False)
        return lax.optimization_barrier(numbers)  # else layouts of rows and columns are mixed up

    def decayed(self, step: Array, scores: list[Array]) -> list[Array]:
        """Returns scores times the decays between tokens; 0 for those that are not seen."""
        if "numbers" in self.arguments:
            total = 0.0
            for name in ("coarse", "fine"):
                of_row = gpu.across(self.number(step, name), SQUARE)
                total += of_row - gpu.down(self.number(step, name, gpu.OF_COLUMNS), SQUARE)
            # Above the diagonal it may be infinite.
            decay = jnp.exp(total)
            scores = [decay * x for x in scores]
        # No token sees itself among keys.
        seen = [prefix(), within(0, rows())]
        return [jnp.where(mask, x, 0) for mask, x in zip(seen, scores, strict=False)]

    def inverse(self, lower: Array) -> Array:
        """Returns the inverse of 1 + L."""
        self.put(lower, 0, 2)
        first = jnp.where(diagonal(), 1.0, 0.0) - jnp.where(joined(1), lower, 0)

        def level(i: Array, inverse: Array) -> Array:
            size = jnp.left_shift(jnp.int32(1), i)
            parts = self.put(inverse, 2, 2)
            # Blocks of the inverse are on the diagonal: they keep what joins pairs where it is.
            cross = jnp.where(joined(size), gpu.product(_cut(inverse, 2), self.own("tiles")[:2]), 0)
            return inverse - gpu.product(_cut(cross, 2), parts)

        return lax.fori_loop(1, LEVELS, level, first)

    def operand(self, name: str, slot: Array) -> list[Any]:
        """Returns a matrix that has been copied as a right side of products."""
        ref = self.scratch[name].at[slot]
        return self.put(self.loaded(name, slot), 0, 2) if self.plan.exact else [ref]

    def put(self, matrix: Array, first: int, count: int) -> list[Any]:
        """Puts the parts of a matrix where the matrix units can read them, from a tile on."""
        tiles = self.own("tiles")[first : first + count]
        plgpu.commit_smem()  # for all warps to be done with what was there
        for tile, part in zip(tiles, _cut(matrix, count), strict=True):
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


def _cut(x: Array, count: int) -> list[Array]:
    """Returns an array in parts of bfloat16, each of which has what those before it left over."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def rows() -> Array:
    """Returns the numbers of rows."""
    return gpu.iota(CHUNK, gpu.OF_ROWS)


def within(first: Array | int, end: Array | int) -> Array:
    """Returns where a square has columns between two of each row."""
    column = gpu.down(gpu.iota(CHUNK, gpu.OF_COLUMNS), SQUARE)
    first, end = (x if isinstance(x, int) else gpu.across(x, SQUARE) for x in (first, end))
    if isinstance(first, int):
        return column < end
    return column >= first if isinstance(end, int) else (column >= first) & (column < end)


def chosen(mask: Array) -> Array:
    """Returns the matrix of sums of what is there in each row."""
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def prefix() -> Array:
    """Returns where tokens are up to that of the row."""
    return within(0, rows() + 1)


def suffix() -> Array:
    """Returns where tokens are after that of the row."""
    return within(rows() + 1, CHUNK)


def block(size: Array) -> Array:
    """Returns where tokens are between that of the row and the middle of a pair of blocks."""
    row = rows()
    second, begin = (row & size) > 0, row & -size
    first, end = jnp.where(second, begin, row + 1), jnp.where(second, row + 1, begin + size)
    return within(first, end)


def of_block(size: Array) -> Array:
    """Returns the transpose of `block`."""
    row = rows()
    begin = row & -size
    second = (row & size) > 0
    first, end = jnp.where(second, row, begin), jnp.where(second, begin + size, row)
    return within(first, end)


def joined(size: Array | int) -> Array:
    """Returns where rows are of the second of a pair of blocks, and columns of the first."""
    row = rows()
    first = jnp.where((row & size) > 0, (row & -size) - size, CHUNK)
    return within(first, first + size)


def diagonal() -> Array:
    """Returns where tokens are that of the row."""
    row = rows()
    return within(row, row + 1)
