"""The gradient of queries beside those of keys and values, in the GPU kernels' backward.

Of the five products of a tile's backward, two kernels make two twice. Here the kernel with tiles of
keys makes the gradient of the queries, too: for each tile of queries that it visits, both
warpgroups put the scores' gradients of their keys into SMEM, multiply all by the keys, each for
half of the queries or of the features, and the copy engine adds the product to GMEM. They do so
when the matrix units have the scores of the next tile, whose weights are made meanwhile.

Sums are the same every time, as additions to a number follow one another: a block has a share of a
head's keys, with sums of its own, and waits for one addition before it begins with the next. XLA
adds the shares up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.tiled.gpu_operands import At, Operands
from pallas_kernels.tiled.gpu_stream import Stream, scored
from pallas_kernels.tiled.scores import Scores

HALF = gpu.ROWS
"""Queries, and features, of what a warpgroup adds."""

FIXED_BYTES, COLUMN_BYTES = gpu.COMPUTING * HALF * HALF * 4, gpu.COMPUTING * gpu.ROWS * 2
"""Of SMEM: whatever the tile is, and for a query of a stage."""

PRODUCTS = 5 / 7
"""Products of one pass, by those of two."""

MOST_SHARES = 8
"""Of a head's keys: every one has a sum in float32 as large as the queries."""


def serves(dtype: DTypeLike, features: int, tile: int) -> bool:
    """Returns whether there is an equal half of a tile's sums for each warpgroup.

    Args:
      dtype: of the queries.
      features: of a query, filled up.
      tile: queries of a tile.
    """
    return jnp.dtype(dtype).itemsize == 2 and (features, tile) in ((64, 128), (128, 64))


class Shares(NamedTuple):
    """What the blocks of the kernel do: each several tiles of keys, one after the other."""

    heads: int
    batch: int
    blocks: int
    """Tiles of keys of a head."""
    count: int
    """Shares of them."""

    @property
    def rounds(self) -> int:
        """Returns after how many tiles of keys, one after the other, all is done."""
        waves = -(-self.heads * self.batch * self.count // gpu.processors())
        return waves * -(-self.blocks // self.count)

    @property
    def grid(self) -> dict[str, int]:
        """Returns that of the kernel."""
        return {"head": self.heads, "share": self.count, "batch": self.batch}

    def each(
        self,
        place: dict[str, Array],
        visit: Callable[[dict[str, Array], Any], Any],
        carry: Any,
    ) -> Any:
        """Does a block's tiles of keys: see `gpu.Work.each`."""
        share = place["share"]

        def turn(i: Array, carry: Any) -> Any:
            # The others lie between them: under a causal mask all have as much to do.
            return visit(place | {"block": share + i * self.count}, carry)

        count = lax.div(self.blocks - 1 - share, self.count) + 1
        # A loop of few, if the compiler knew how many, would be unrolled, and spill.
        return lax.fori_loop(0, lax.optimization_barrier(count), turn, carry)


def shares(batch: int, heads: int, blocks: int) -> Shares | None:
    """Returns the shares that leave no processor idle, or None if two passes leave fewer."""
    all_ = [Shares(heads, batch, blocks, n + 1) for n in range(min(blocks, MOST_SHARES))]
    best = min(all_, key=lambda x: x.rounds)
    apart = -(-batch * heads * blocks // gpu.processors())
    return best if PRODUCTS * best.rounds <= apart else None


def first_visits(
    schedule: Int[Array, "B|1 N|K|1 blocks 1+entries"], tiles: int, count: int
) -> Int[Array, "B|1 N|K|1 count tiles"]:
    """Returns of each share the first tile of keys to visit a tile of queries; -1 if none does.

    Args:
      schedule: with rows of keys.
      tiles: of queries.
      count: of shares.
    """
    numpy = np if isinstance(schedule, np.ndarray) else jnp
    *lead, blocks, entries = schedule.shape
    listed = numpy.arange(entries - 1) < schedule[..., :1]
    number = numpy.where(listed, schedule[..., 1:] >> 1, tiles)
    visits = numpy.zeros((*lead, blocks, tiles + 1), bool)
    if numpy is np:
        np.put_along_axis(visits, number, True, axis=-1)
    else:
        visits = jnp.put_along_axis(visits, number, True, axis=-1, inplace=False)
    rounds = -(-blocks // count)
    missing = (0, rounds * count - blocks), (0, 0)
    visits = numpy.pad(visits[..., :tiles], ((0, 0),) * len(lead) + missing)
    visits = visits.reshape(*lead, rounds, count, tiles)
    first = numpy.argmax(visits, axis=-3) * count + np.arange(count)[:, None]
    return numpy.where(visits.any(-3), first, -1).astype(np.int32)


def with_first(
    schedule: Int[Array, "B|1 N|K|1 blocks 1+entries"], first: Int[Array, "B|1 N|K|1 count tiles"]
) -> Int[Array, "B|1 N|K|1 blocks 1+entries"]:
    """Returns a schedule whose numbers of tiles are twice what they were, plus 1 for first visits.

    Args:
      schedule: with rows of keys.
      first: what `first_visits` returned for it.
    """
    numpy = np if isinstance(schedule, np.ndarray) else jnp
    block = np.arange(schedule.shape[2])
    count, entries = schedule[..., :1], schedule[..., 1:]
    number, kind = entries >> 1, entries & 1
    here = numpy.take_along_axis(first[:, :, block % first.shape[2]], number, axis=-1)
    number = 2 * number + (here == block[:, None])
    return numpy.concatenate([count, 2 * number + kind], axis=-1).astype(np.int32)


def total(
    sums: Float[Array, "shares*B T N H"], first: Int[Array, "B|1 N|K|1 shares tiles"], tile: int
) -> Float[Array, "B T N H"]:
    """Returns the sums of all shares, from those of each; what nobody visited is 0.

    Args:
      sums: what the kernel added up.
      first: what `first_visits` returned.
      tile: queries of a tile.
    """
    sums = sums.reshape(first.shape[2], -1, *sums.shape[1:])
    visited = first >= 0
    if not (isinstance(visited, np.ndarray) and visited.all()):
        # As [shares, B|1, T, N|1, 1].
        visited = jnp.repeat(jnp.transpose(visited, (2, 0, 3, 1)), tile, axis=2)
        if visited.shape[3] > 1:
            visited = jnp.repeat(visited, sums.shape[3] // visited.shape[3], axis=3)
        sums = jnp.where(visited[..., None], sums, 0)
    return jnp.sum(sums, axis=0)


def space(tile: int, stages: int, dtype: DTypeLike) -> dict[str, Any]:
    """Returns SMEM, and a barrier."""
    return {
        "d_scores": gpu.smem((stages, gpu.COMPUTING, gpu.ROWS, tile), dtype),
        "d_query": gpu.smem((gpu.COMPUTING, HALF, HALF), jnp.float32),
        "met": plgpu.Barrier(num_arrivals=gpu.COMPUTING),
    }


class Queries:
    """The sums of queries that a tile of keys visits."""

    def __init__(
        self,
        stream: Stream,
        share: Array,
        warpgroup: Array,
        arguments: dict[str, Any],
        results: dict[str, Any],
        scratch: dict[str, Any],
    ):
        """Finds those of a share, a batch row and a head."""
        self.warpgroup, self.scratch = warpgroup, scratch
        batch = share * arguments["key"][0].shape[0] + stream.batch
        # Made of numbers that are there at all times, places in it would take more registers.
        batch, head = (lax.optimization_barrier(x) for x in (batch, stream.head))
        self._sums = results["query"].at[batch, :, head]

    def meet(self) -> None:
        """Waits for the other warpgroup."""
        plgpu.barrier_arrive(self.scratch["met"])
        plgpu.barrier_wait(self.scratch["met"])

    def share(self, slot: Array, d_scores: Array) -> None:
        """Has both warpgroups see the gradients of the scores [keys, queries] of a tile."""
        self.scratch["d_scores"].at[slot, self._own][...] = d_scores
        plgpu.commit_smem()
        self.meet()

    def matrices(self, slot: Array) -> list[tuple[gpu.Parts, gpu.Parts]]:
        """Returns what makes a warpgroup's half of a tile's sums: gradients of scores and keys."""
        d_scores, key = self.scratch["d_scores"], self.scratch["key"][0]
        rows, columns = self._half
        groups = [lax.optimization_barrier(jnp.int32(k)) for k in range(gpu.COMPUTING)]
        return [([d_scores.at[slot, k, :, rows].T], [key.at[k, :, columns]]) for k in groups]

    def add(self, entry: Array, sums: Array) -> None:
        """Adds a warpgroup's half to the sums of a tile, or writes it if it is the first.

        Args:
          entry: twice the number of the tile, plus 1 for a first visit.
          sums: the half.
        """
        rows, columns = self._half
        staged = self.scratch["d_query"].at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = sums
        plgpu.commit_smem()
        tile = self.scratch["d_scores"].shape[-1]
        target = self._sums.at[pl.ds((entry >> 1) * tile + rows.start, HALF), columns]
        first = entry & 1 == 1
        pl.when(first)(lambda: plgpu.copy_smem_to_gmem(staged, target))
        pl.when(~first)(lambda: plgpu.copy_smem_to_gmem(staged, target, reduction_op="add"))

    def end(self) -> None:
        """Ends with a tile of keys: another one may take its place.

        What was added has then not only been read, but is there: additions keep their order.
        """
        plgpu.wait_smem_to_gmem(0)
        self.meet()

    @property
    def _own(self) -> Array:
        # Addresses and descriptors, made ahead of the loop, would take registers.
        return lax.optimization_barrier(self.warpgroup)

    @property
    def _half(self) -> tuple[Any, Any]:
        """Returns which queries of a tile, and which features, are the warpgroup's."""
        start = self._own * HALF
        by_rows = self.scratch["d_scores"].shape[-1] > HALF
        row, column = (start, 0) if by_rows else (0, start)
        return pl.ds(row, HALF), pl.ds(column, HALF)


class Sums:
    """What a warpgroup sums over the queries that its tile of keys visits."""

    def __init__(
        self,
        call: Scores,
        operands: Operands,
        stream: Stream,
        queries: Queries,
        row: Array,
        arguments: dict[str, Any],
        scratch: dict[str, Any],
    ):
        """Prepares a visit, with the static part of the kernel first."""
        self.call, self.operands, self.stream, self.queries = call, operands, stream, queries
        self.row, self.scratch = row, scratch
        self.refs = arguments["operands"] | scratch["operands"]
        self.dtype = scratch["query"][0].dtype

    def visit(self, branches: tuple[bool, bool], before: Array) -> tuple[dict[str, Array], Array]:
        """Visits the queries.

        Args:
          branches: see `Stream.visit`.
          before: see `Stream.visit`.

        Returns:
          Sums by name, of matrices not scaled; and the number of all tiles visited so far.
        """
        totals = {
            name: gpu.matrix(0.0, (gpu.ROWS, self.scratch[name][0].shape[-1]))
            for name in ("key", "value")
        }
        functions = self._begin, self._visit, self._end
        warpgroup = self.queries.warpgroup
        return self.stream.visit_ahead(warpgroup, *functions, totals, branches, before)

    def _begin(self, slot: Array, entry: Array, masked: bool, totals: dict[str, Array]) -> Any:
        at = self._at(slot, entry)
        load = functools.partial(self.operands.values, self.refs, at)
        products, values = gpu.product_and(*self._matrices("key", "query", slot), load)
        found = self._weighted(at, masked, products, values)
        return self._differentiated(at, masked, totals, found), entry

    def _visit(self, last: Array, slot: Array, entry: Array, masked: bool, carry: Any) -> Any:
        (totals, last_entry), at = carry, self._at(slot, entry)
        found, sums = gpu.product_beside(
            self._matrices("key", "query", slot),
            self.queries.matrices(last),
            functools.partial(self.operands.values, self.refs, at),
            functools.partial(self._weighted, at, masked),
        )
        self.queries.add(last_entry, sums)
        return self._differentiated(at, masked, totals, found), entry

    def _end(self, slot: Array, carry: Any) -> dict[str, Array]:
        totals, entry = carry
        # A zero that compilers do not know, or one register has that of all sums, all the while.
        zero = gpu.matrix(0.0 * entry.astype(jnp.float32), (HALF, HALF))
        self.queries.add(entry, gpu.sum_of_products(self.queries.matrices(slot), zero))
        return totals

    def _at(self, slot: Array, entry: Array) -> At:
        column = (entry >> 1) * self.stream.plan.tiling.tile
        return At(self.stream.batch, self.stream.head, self.row, column, slot)

    def _matrices(self, rows: str, columns: str, slot: Array) -> tuple[gpu.Parts, gpu.Parts]:
        """Returns matrices of the keys and of the queries of a slot, when they are there."""
        plgpu.barrier_wait(self.scratch[f"{columns}_ready"].at[slot])
        # Descriptors of matrices, made ahead of the loop, would take registers.
        own = lax.optimization_barrier(self.queries.warpgroup)
        columns = gpu.at(self.scratch[columns], slot)
        return gpu.at(self.scratch[rows], own), gpu.transposed(columns)

    def _weighted(
        self, at: At, masked: bool, products: Array, values: dict[str, Any]
    ) -> tuple[Array, Array, Any]:
        """Returns weights, and their derivatives by scores and of scores by products."""
        refs = self.refs
        scores, values = scored(self.call, self.operands, products, refs, at, masked, values)
        weights, derivative, _ = self.call.differentiated(scores, values, exact=False)
        return weights, derivative, values["slope"]

    def _differentiated(
        self, at: At, masked: bool, totals: dict[str, Array], found: tuple[Array, Array, Any]
    ) -> dict[str, Array]:
        """Adds to the sums of keys, and shares the gradients of scores out."""
        totals, (weights, derivative, slope) = dict(totals), found
        value_and_d_out = self._matrices("value", "d_out", at.slot)
        d_out, query = (gpu.at(self.scratch[name], at.slot) for name in ("d_out", "query"))
        weights = [lax.optimization_barrier(weights.astype(self.dtype))]
        if self.stream.plan.tiling.tile == gpu.ROWS and not masked:
            d_scores, totals["value"] = gpu.product_beside(
                value_and_d_out,
                [(weights, d_out)],
                lambda: None,
                lambda d_weights, _: derivative * d_weights,
                start=self._minus_delta(at),
                total=totals["value"],
            )
        else:
            # One after the other, so that registers hold little at a time.
            load = functools.partial(self._minus_delta, at)
            totals["value"], start = gpu.accumulated_and(totals["value"], weights, d_out, load)
            d_scores = derivative * gpu.accumulated(start, *value_and_d_out)
        plgpu.barrier_arrive(self.scratch["d_out_free"].at[at.slot])
        parts = [(d_scores * slope).astype(self.dtype)]
        share = functools.partial(self.queries.share, at.slot, parts[0])
        totals["key"] = gpu.accumulated(totals["key"], parts, query, share)
        plgpu.barrier_arrive(self.scratch["query_free"].at[at.slot])
        return totals

    def _minus_delta(self, at: At) -> Array | None:
        """Returns what weights' derivatives by products are added to, if weights are normalised."""
        if not self.call.options.normalise:
            return None
        return -self.operands.value("delta", self.refs, at)
