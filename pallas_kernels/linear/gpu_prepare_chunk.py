"""What a warpgroup of the kernel in `gpu_prepare` computes.

As in `blocks`, scores are sums over levels s = 1, 2, ..., 32: of each, pairs of neighbouring blocks
of s tokens have a product of their own, with decays from the middle on, and to it. Their logarithms
are sums over tokens, which the matrix units form as products with matrices of zeros and ones, so
that no exponent is positive and none is a difference of large numbers; for that logarithms are cut
into parts of bfloat16. The inverse that the delta rule needs grows by the same levels: with X that
of the blocks of s tokens and C what joins pairs of them, X - X C X is that of the blocks of 2 s.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_chunks import SQUARE, Chunks, cut
from pallas_kernels.linear.gpu_walk import CHUNK, NUMBERS
from pallas_kernels.linear.inputs import LOWEST

LEVELS = 6
"""Sizes of blocks: 1, 2, ..., 32."""


class Decayed(Chunks):
    """Chunks with decays, and with betas."""

    def cut_logs(self, slot: Array) -> None:
        """Puts the parts of logarithms where the matrix units can read them."""
        logs = jnp.maximum(self.loaded("logs", slot), LOWEST)
        self.put(logs, 0, self.plan.fine)

    def sums(self, which: Array) -> Array:
        """Returns sums of logarithms, for each row of those of some tokens."""
        return gpu.product([chosen(which)], self.own("tiles")[: self.plan.fine])

    def number(self, step: Array, name: str, layout: Any = gpu.OF_ROWS) -> Array:
        """Returns a number of every token."""
        tokens = pl.ds(0, CHUNK) if self.plan.same else self.tokens(step)
        at = 0 if self.plan.alone else self.batch, self.memory, NUMBERS.index(name), tokens
        numbers = plgpu.load(self.arguments["numbers"].at[at], layout=layout, optimized=False)
        return lax.optimization_barrier(numbers)  # else layouts of rows and columns are mixed up

    def between(self, step: Array) -> Array:
        """Returns the decays between tokens, that may be infinite above the diagonal."""
        total = 0.0
        for name in ("coarse", "fine"):
            of_row = gpu.across(self.number(step, name), SQUARE)
            total += of_row - gpu.down(self.number(step, name, gpu.OF_COLUMNS), SQUARE)
        return jnp.exp(total)

    def beta(self, step: Array, layout: Any = gpu.OF_ROWS) -> Array:
        """Returns the betas of a chunk."""
        beta = self.arguments["beta"].at[self.batch, self.memory, self.tokens(step)]
        return plgpu.load(beta, layout=layout, optimized=False)


class Preparation(Decayed):
    """Chunks that are prepared."""

    def begin(self) -> None:
        """Does what is done once."""
        if self.plan.channels:
            self.own("ones")[...] = gpu.matrix(1.0, SQUARE).astype(jnp.bfloat16)

    def __call__(self, step: Array, carry: None) -> None:
        """Prepares a chunk."""
        plan = self.plan
        scores = [gpu.matrix(0.0, SQUARE) for _ in range(1 + plan.delta)]
        of_tile = self.scores_by_channel if plan.channels else self.scores
        scores = self.each(0, step, of_tile, scores)
        if not plan.channels:
            scores = self.decayed(step, scores)
        self.write("scores", scores[0], step)
        if not plan.delta:
            return
        inverse = self.inverse(scores[1] * gpu.across(self.beta(step), SQUARE))
        weights = cut(inverse * gpu.down(self.beta(step, gpu.OF_COLUMNS), SQUARE), 2)
        if "inverse" in self.results:
            for i, part in enumerate(cut(inverse, 2)):
                self.write("inverse", part, step, i)

        def erase(step: Array, slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
            self.map(slot, "key")
            keys = self.loaded("key", slot)
            keys = self.put(keys * self.since(step, slot), plan.fine, 2)
            self.write("erase", gpu.product(weights, keys), step, tile)
            return carry

        def value(step: Array, slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
            values = self.operand("query", slot)
            self.write("value", gpu.product(weights, values), step, tile)
            return carry

        self.each(1, step, erase, [])
        self.each(2, step, value, [])

    def scores(self, step: Array, slot: Array, tile: Array, scores: list[Array]) -> list[Array]:
        """Adds what a tile of features adds to scores, without decays."""
        self.map(slot, "query", "key")
        keys = self.operand("key", slot)
        exact, query = self.plan.exact, self.scratch["query"].at[slot]
        queries = cut(self.loaded("query", slot), 2) if exact else [query]
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
            queries = cut(self.loaded("query", slot) * decay, plan.parts)
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

    def decayed(self, step: Array, scores: list[Array]) -> list[Array]:
        """Returns scores times the decays between tokens; 0 for those that are not seen."""
        if "numbers" in self.arguments:
            decay = self.between(step)
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
            cross = jnp.where(joined(size), gpu.product(cut(inverse, 2), self.own("tiles")[:2]), 0)
            return inverse - gpu.product(cut(cross, 2), parts)

        return lax.fori_loop(1, LEVELS, level, first)

    def operand(self, name: str, slot: Array) -> list[Any]:
        """Returns a matrix that has been copied as a right side of products."""
        ref = self.scratch[name].at[slot]
        return self.put(self.loaded(name, slot), 0, 2) if self.plan.exact else [ref]


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
