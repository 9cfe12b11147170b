"""The backward of tiled attention as Pallas kernels for Hopper GPUs: see docs/kernels.md.

Two kernels compute all scores anew. One has tiles of queries, visits keys, and sums the gradients
of queries and of what belongs to them. The other one has tiles of keys, visits queries, and sums
the gradients of keys and values; its scores are [keys, queries], so that they are multiplied as
they lie in registers. It sums those of queries, too, if that is all there is to do: `gpu_one_pass`.
Nothing else is added in GMEM. Results are the same every time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.masks import same_heads
from pallas_kernels.tiled import gpu_distances, gpu_one_pass, gpu_tuned
from pallas_kernels.tiled.gpu_operands import At, Operands, Tiling
from pallas_kernels.tiled.gpu_stream import (
    FUNCTIONS,
    Plan,
    Stream,
    of_blocks,
    scored,
    stream_barriers,
    tile_of,
)
from pallas_kernels.tiled.inputs import (
    Inputs,
    Options,
    of_rows,
    sink_gradient,
    unbroadcast,
    without_hidden,
)
from pallas_kernels.tiled.schedule import Grid, schedule, split, transposed_schedules, visited
from pallas_kernels.tiled.scores import Scores, row_operands
from pallas_kernels.tiled.sums import gradient_of_bias
from pallas_kernels.tiled.tiles import branches as branches_of
from pallas_kernels.tiled.tiles import common_blocks, has_scores
from pallas_kernels.tpu import result

BOTH = {True: 128, False: 256}
"""Features of a key and a value together up to which one kernel sums the gradients of both, by
whether they are float32."""

STREAMING = {False: ("key", "value"), True: ("query", "d_out")}
"""The matrices of columns, by whether rows are keys; the others are those of rows."""


def backward(options: Options, names: Sequence[str], *args: Array) -> tuple[Array, ...]:
    """Returns gradients, as `xla.backward` does."""
    *inputs, out, lse, d_out, d_lse = args
    x = without_hidden(Inputs(*inputs))
    d_out, lse, delta = of_rows(out, lse, d_out, d_lse)
    call = functools.partial(_Call, options, x, d_out.astype(x.query.dtype), lse, delta)
    by_keys = {"key", "value"} | ({"bias"} if _is_of_keys(x.bias) else set())
    of_queries = [name for name in names if name not in by_keys | {"sink"}]
    of_keys = [name for name in names if name in by_keys]
    gradients, shares = {}, one_pass(options, x, names)
    if of_queries and shares is None:
        prepared = call(transposed=False, by_distance="table" in names)
        gradients |= prepared.of_queries(of_queries)
    call = call(transposed=True, shares=shares)
    groups = [of_keys]
    if call.features + call.width > BOTH[x.query.dtype == jnp.float32]:
        groups = [[name for name in of_keys if name != "value"], ["value"]]
    for group in groups:
        gradients |= call.of_keys(group) if group else {}
    if "sink" in names:
        gradients["sink"] = sink_gradient(x, lse, delta)
    return tuple(gradients[name] for name in names)


def has_space_by_distance(options: Options, x: Inputs) -> bool:
    """Returns whether shared memory has space for a tile beside sums by distance."""
    features = sum(gpu.whole(array.shape[3]) for array in (x.query, x.value))
    return _plan(options, x, features, transposed=False, by_distance=True).stages > 0


def one_pass(options: Options, x: Inputs, names: Sequence[str]) -> gpu_one_pass.Shares | None:
    """Returns what blocks do where one pass makes gradients, or None where two do.

    Args:
      options: of the call.
      x: its inputs.
      names: of those by which it is differentiated.
    """
    several = has_scores(x) or options.reweight is not None
    several |= x.slopes is not None or x.table is not None
    if several or sorted({*names} - {"sink"}) != ["key", "query", "value"]:
        return None
    if not gpu_tuned.one_pass(x):
        return None
    features, width = (gpu.whole(array.shape[3]) for array in (x.query, x.value))
    plan = _plan(options, x, features + width, transposed=True, one_pass=True)
    serves = gpu_one_pass.serves(x.query.dtype, features, plan.tiling.tile)
    if not serves or features + width > BOTH[False] or plan.streams > 1 or not plan.stages:
        return None
    batch, _, heads, _ = x.query.shape
    return gpu_one_pass.shares(batch, heads, plan.blocks)


def _is_of_keys(bias: Array | None) -> bool:
    return bias is not None and bias.shape[2] == 1 < bias.shape[3]


class _Call:
    """A call of the backward, prepared for kernels with tiles of queries, or of keys."""

    def __init__(
        self,
        options: Options,
        x: Inputs,
        d_out: Array,
        lse: Array,
        delta: Array,
        *,
        transposed: bool,
        by_distance: bool = False,
        shares: gpu_one_pass.Shares | None = None,
    ):
        """Prepares a call, with rows of keys if `transposed`, or for sums by distance.

        With `shares`, one pass makes the gradients of queries, too.
        """
        self.x = x
        self.batch, self.queries, self.heads, _ = x.query.shape
        self.keys, self.kv_heads = x.key.shape[1:3]
        self.features, self.width = (gpu.whole(a.shape[3]) for a in (x.query, x.value))
        both = self.features + self.width
        self.shares = shares
        self.plan = _plan(options, x, both, transposed, by_distance, shares is not None)
        self.rows = self.plan.tiling.rows
        queries, keys = self.rows, self.plan.tiling.columns
        queries, keys = (keys, queries) if transposed else (queries, keys)
        self.scores = Scores.of(options, x, FUNCTIONS)
        more = row_operands(self.scores, x, lse, delta, queries)
        more |= {"ahead": True, "numbered": shares is not None}
        self.operands = Operands(self.scores, x, self.plan.tiling, **more)
        self.matrices = {
            "query": gpu.filled(x.query, queries, self.features),
            "key": gpu.filled(x.key, keys, self.features),
            "value": gpu.filled(x.value, keys, self.width),
            "d_out": gpu.filled(d_out, queries, self.width),
        }

    def of_queries(self, names: Sequence[str]) -> dict[str, Array]:
        """Returns gradients of queries, and of what scores of queries are summed for."""
        x, tiling = self.x, self.plan.tiling
        tiles = schedule(x.mask, self.plan.grid)
        results = {"query": self._matrix("query", self.features, x.query.dtype)}
        results |= {name: self._of_rows() for name in names if name not in ("query", "table")}
        if "table" in names:
            shape = self.rows // gpu.ROWS, gpu_distances.count(tiling.columns)
            results["table"] = result((self.batch, self.heads, *shape), jnp.float32, x.query)
        each = "bias" in names and min(x.bias.shape[2:]) > 1
        if each:
            shape = (self.batch, self.heads, self.rows, tiling.columns)
            results["bias"] = result(shape, jnp.float32, x.query)
        totals = self._run("tiled_backward_queries", tiles, ("query", "d_out"), results)
        totals = {name: totals[name] for name in names}
        gradients = {}
        for name, total in totals.items():
            array = getattr(x, name)
            if name == "query":
                gradients[name] = total[:, : self.queries, :, : array.shape[3]]
                continue
            if name == "table":
                gradients[name] = gpu_distances.gradient(total, x, tiling)
                continue
            total = total[:, :, : self.queries]
            if name == "slopes":
                gradients[name] = unbroadcast(-jnp.sum(total, axis=2), array.shape)
            elif name == "statistic":
                gradients[name] = unbroadcast(-total, array.shape)
            elif each:
                here = visited(tiles, self.plan.grid)
                total, here = same_heads(total[..., : self.keys], here)
                gradients[name] = unbroadcast(jnp.where(here, total, 0), array.shape)
            else:
                total = total if array.shape[2] > 1 else jnp.sum(total, axis=2)
                gradients[name] = gradient_of_bias(total, x)
        return gradients

    def of_keys(self, names: Sequence[str]) -> dict[str, Array]:
        """Returns gradients of keys, of values and of a bias of keys."""
        x, tiling, group = self.x, self.plan.tiling, self.heads // self.kv_heads
        count = tiling.columns // tiling.tile
        tiles = transposed_schedules(x.mask, self.plan.grid, count)[0]
        results = {"bias": self._of_rows()} if "bias" in names else {}
        if self.shares is not None:
            first = gpu_one_pass.first_visits(tiles, count, self.shares.count)
            tiles = gpu_one_pass.with_first(tiles, first)
            shape = self.shares.count * self.batch, tiling.columns, self.heads, self.features
            results["query"] = result(shape, jnp.float32, x.query)
        for name, width in (("key", self.features), ("value", self.width)):
            if name in names:  # sums over the heads of a group are taken in float32
                dtype = jnp.float32 if group > 1 else getattr(x, name).dtype
                results[name] = self._matrix(name, width, dtype)
        resident = ("key",) if names == ["value"] else ("key", "value")
        totals = self._run("tiled_backward_keys", tiles, resident, results)
        gradients = {}
        for name, total in totals.items():
            if name == "bias":
                gradients[name] = gradient_of_bias(total[:, :, : self.keys], x)
                continue
            array = getattr(x, name)
            if name == "query":
                total = gpu_one_pass.total(total, first, tiling.tile) * self.scores.options.scale
                total = total[:, : self.queries, :, : array.shape[3]]
                gradients[name] = total.astype(array.dtype)
                continue
            total = total[:, : self.keys, :, : array.shape[3]]
            if group > 1:
                total = jnp.sum(total.reshape(*array.shape[:3], group, array.shape[3]), axis=3)
            gradients[name] = total.astype(array.dtype)
        return gradients

    def _matrix(self, name: str, width: int, dtype: Any) -> Any:
        """Returns the type of a matrix of gradients."""
        return result((self.batch, self.rows, self.heads, width), dtype, self.x.query)

    def _of_rows(self) -> Any:
        """Returns the type of sums of rows."""
        return result((self.batch, self.heads, self.rows), jnp.float32, self.x.query)

    def _run(
        self, name: str, rows: Any, resident: Sequence[str], results: dict[str, Any]
    ) -> dict[str, Array]:
        """Runs a kernel.

        Args:
          name: of the kernel.
          rows: the schedule.
          resident: names of the matrices of its rows.
          results: types of what it sums.
        """
        plan, parts = self.plan, len(self.matrices["query"])
        streaming = STREAMING[plan.tiling.transposed]
        ready, free = stream_barriers(plan, parts)
        scratch = {
            "ready": plgpu.Barrier(num_arrivals=parts * len(resident), num_barriers=gpu.COMPUTING),
            "sums": {
                name: plgpu.SMEM((gpu.COMPUTING, gpu.ROWS), jnp.float32)
                for name, total in results.items()
                if len(total.shape) == 3
            },
        }
        tile = plan.streams * plan.stages, plan.tiling.tile
        for names, shape in ((resident, (gpu.COMPUTING, gpu.ROWS)), (streaming, tile)):
            for key in names:
                matrix = self.matrices[key][0]
                scratch[key] = [gpu.smem((*shape, matrix.shape[3]), matrix.dtype, tile[1])] * parts
        scratch["operands"] = self.operands.space(tile[0])
        for key in streaming:
            scratch[f"{key}_ready"], scratch[f"{key}_free"] = ready, free
        copies = parts + len(self.operands.streamed)
        scratch[f"{streaming[0]}_ready"], _ = stream_barriers(plan, copies)
        if "table" in results:
            scratch |= gpu_distances.space(plan.tiling.columns)
        if self.shares is not None:
            dtype = self.x.query.dtype
            scratch |= gpu_one_pass.space(plan.tiling.tile, plan.stages, dtype)
        arguments = {
            "schedule": of_blocks(rows, plan),
            "operands": self.operands.arrays,
            **{key: self.matrices[key] for key in (*resident, *streaming)},
        }
        branches = branches_of(rows, self.operands.mask is not None)
        exact, work = self.x.query.dtype == jnp.float32, self.shares or plan.work(self.batch, rows)
        kernel = _Kernel(self.scores, plan, work, self.operands, branches, resident, exact)
        return gpu.run(
            kernel.body,
            arguments,
            results,
            scratch,
            name=name,
            grid=work.grid,
            exact=exact,
        )


class _Kernel(NamedTuple):
    """The static part of a kernel."""

    call: Scores
    plan: Plan
    work: gpu.Work | gpu_one_pass.Shares
    operands: Operands
    branches: tuple[bool, bool]
    resident: Sequence[str]
    exact: bool

    def body(
        self,
        arguments: dict[str, Any],
        results: dict[str, Any],
        scratch: dict[str, Any],
        place: dict[str, Array],
    ) -> None:
        """Computes the sums of a block's tiles of rows."""
        warpgroup, streaming = place["warpgroup"], STREAMING[self.plan.tiling.transposed]

        def copy_all(place: dict[str, Array], before: list[Array]) -> list[Array]:
            stream, tile = self.stream(arguments, place), self.plan.tiling.tile

            def copy(name: str, number: Array, slot: Array) -> None:
                number = number >> 1 if "share" in place else number
                ready = scratch[f"{name}_ready"].at[slot]
                self.copy(name, pl.ds(number * tile, tile), slot, ready, stream, arguments, scratch)
                if name == streaming[0]:
                    at = At(stream.batch, stream.head, 0, number * tile, slot)
                    self.operands.copy(arguments["operands"], at, scratch["operands"], ready)

            return stream.copy(streaming, copy, scratch, before)

        def compute(place: dict[str, Array], before: Array) -> Array:
            stream = self.stream(arguments, place)
            b, n, row = stream.batch, stream.head, stream.row(warpgroup)
            rows, ready = pl.ds(row, gpu.ROWS), scratch["ready"].at[warpgroup]
            for name in self.resident:
                self.copy(name, rows, warpgroup, ready, stream, arguments, scratch)
            plgpu.barrier_wait(ready)
            if "table" in results:
                gpu_distances.begin(scratch, warpgroup)
            if "share" in place:
                where = place["share"], warpgroup
                queries = gpu_one_pass.Queries(stream, *where, arguments, results, scratch)
                static = self.call, self.operands
                sums = gpu_one_pass.Sums(*static, stream, queries, row, arguments, scratch)
                totals, done = sums.visit(self.branches, before)
                queries.end()
            else:
                totals, done = self.sums(
                    stream, warpgroup, row, arguments, results, scratch, before
                )
            # Places of results, made ahead, would take registers all the while.
            b, n, row = lax.optimization_barrier((b, n, row))
            rows = pl.ds(row, gpu.ROWS)
            if "table" in results:
                target = results["table"].at[b, n, lax.div(row, gpu.ROWS)]
                gpu_distances.end(scratch, warpgroup, target)
            for name in ("query", "key"):
                if name in totals:
                    totals[name] *= self.call.options.scale
            for name, space in scratch["sums"].items():
                space.at[warpgroup][...] = totals.pop(name)
            for name, total in totals.items():
                target = results[name].at[b, rows, n]
                gpu.store(target, total.astype(target.dtype))
            if scratch["sums"]:
                plgpu.commit_smem()
                for name, space in scratch["sums"].items():
                    plgpu.copy_smem_to_gmem(space.at[warpgroup], results[name].at[b, n, rows])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return done

        @pl.when(warpgroup == gpu.COMPUTING)
        def _() -> None:
            plgpu.set_max_registers(gpu.REGISTERS_COPYING, action="decrease")
            self.work.each(place, copy_all, [jnp.int32(0)] * self.plan.streams)

        @pl.when(warpgroup < gpu.COMPUTING)
        def _() -> None:
            plgpu.set_max_registers(gpu.REGISTERS, action="increase")
            self.work.each(place, compute, jnp.int32(0))

    def stream(self, arguments: dict[str, Any], place: dict[str, Array]) -> Stream:
        """Returns the columns that the rows of a place visit."""
        block = place["block"]
        # The rows of a causal mask that have the most to do start first.
        block = block if self.plan.tiling.transposed else self.plan.blocks - 1 - block
        return Stream(self.plan, arguments["schedule"], place["batch"], place["head"], block)

    def copy(
        self,
        name: str,
        tokens: Any,
        index: Array,
        ready: Any,
        stream: Stream,
        arguments: dict[str, Any],
        scratch: dict[str, Any],
    ) -> None:
        """Has the copy engine fetch some tokens of a matrix."""
        head = stream.head
        if name in ("key", "value"):
            head = head // (self.plan.tiling.heads // arguments["key"][0].shape[2])
        for source, target in zip(arguments[name], scratch[name], strict=True):
            source = source.at[stream.batch, tokens, head]
            plgpu.copy_gmem_to_smem(source, target.at[index], ready)

    def sums(
        self,
        stream: Stream,
        warpgroup: Array,
        row: Array,
        arguments: dict[str, Any],
        results: dict[str, Any],
        scratch: dict[str, Any],
        before: Array,
    ) -> tuple[dict[str, Array], Array]:
        """Visits the columns of a tile of rows.

        Returns:
          Sums by name, of matrices not scaled; and the number of all tiles visited so far.
        """
        refs, transposed = arguments["operands"] | scratch["operands"], self.plan.tiling.transposed
        streaming = STREAMING[transposed]
        narrow = scratch["query"][0].dtype
        each = None if transposed or "bias" in scratch["sums"] else results.get("bias")

        def add(
            name: str,
            a: Array,
            b: gpu.Parts,
            totals: dict[str, Array],
            meanwhile: Callable[[Array], Any] | None = None,
        ) -> Any:
            parts = gpu.in_parts(a) if self.exact else [a.astype(narrow)]
            meanwhile = functools.partial(meanwhile, parts[0]) if meanwhile else lambda: None
            totals[name], found = gpu.accumulated_and(totals[name], parts, b, meanwhile)
            return found

        def visit(
            slot: Array, number: Array, masked: bool, totals: dict[str, Array]
        ) -> dict[str, Array]:
            totals = dict(totals)
            at = At(stream.batch, stream.head, row, number * self.plan.tiling.tile, slot)
            for name in streaming:
                plgpu.barrier_wait(scratch[f"{name}_ready"].at[slot])
            # Descriptors of matrices, made ahead of the loop, would take registers.
            own = lax.optimization_barrier(warpgroup)
            here = {name: gpu.at(scratch[name], own) for name in self.resident}
            here |= {name: gpu.at(scratch[name], slot) for name in streaming}
            pairs = zip(STREAMING[not transposed], streaming, strict=True)
            pairs = [(here[a], gpu.transposed(here[b])) for a, b in pairs if a in here]
            # One after the other, so that registers hold little at a time.
            load = functools.partial(self.operands.values, refs, at)
            products, values = gpu.product_and(*pairs[0], load)
            scores, values = scored(self.call, self.operands, products, refs, at, masked, values)
            weights, derivative, by_statistic = self.call.differentiated(scores, values, self.exact)

            def load_delta(*_: Array) -> Array | None:
                needed = len(pairs) > 1 and self.call.options.normalise
                return self.operands.value("delta", refs, at) if needed else None

            if "value" in totals:
                delta = add("value", weights, here["d_out"], totals, load_delta)
            else:
                delta = load_delta()
            if len(pairs) > 1:
                if delta is not None:
                    # It takes no registers of its own when products are added to it.
                    d_weights = gpu.accumulated(-delta, *pairs[1])
                else:
                    d_weights = gpu.product(*pairs[1])
                d_scores = derivative * d_weights
                for name, b in (("query", "key"), ("key", "query")):
                    if name in totals:
                        add(name, d_scores * values["slope"], here[b], totals)
            for name in streaming:
                plgpu.barrier_arrive(scratch[f"{name}_free"].at[slot])
            if each is not None:
                rows, columns = pl.ds(row, gpu.ROWS), pl.ds(at.column, self.plan.tiling.tile)
                gpu.store(each.at[at.batch, at.head, rows, columns], d_scores)
            if "table" in results:
                gpu_distances.add(scratch, warpgroup, at.column, d_scores)
            for name in scratch["sums"]:
                term = by_statistic * d_weights if name == "statistic" else d_scores
                if name == "slopes":
                    term *= self.operands.distances(refs, at)
                totals[name] += jnp.sum(term, axis=1)
            return totals

        totals = {name: gpu.of_rows(0.0) for name in scratch["sums"]}
        for name in ("query", "key", "value"):
            if name in results:
                totals[name] = gpu.matrix(0.0, (gpu.ROWS, results[name].shape[3]))
        return stream.visit(warpgroup, visit, totals, self.branches, before)


def _plan(
    options: Options,
    x: Inputs,
    features: int,
    transposed: bool,
    by_distance: bool = False,
    one_pass: bool = False,
) -> Plan:
    """Chooses the tiles of a kernel; `features` are those of a key and a value."""
    queries, heads = x.query.shape[1:3]
    keys = x.key.shape[1]
    lists, _ = split(x.mask)
    block_q, block_k = common_blocks(lists) if lists else (0, 0)
    rows, columns = (keys, queries) if transposed else (queries, keys)
    block_row, block_column = (block_k, block_q) if transposed else (block_q, block_k)
    both = gpu.COMPUTING * gpu.ROWS
    streams = gpu.COMPUTING if block_row % both else 1
    parts = len(gpu.in_parts(jnp.zeros((), x.query.dtype)))
    most = (options.tile_q if transposed else options.tile_k) or 128
    config = gpu_tuned.config("backward_keys" if transposed else "backward_queries", x)
    most = min(most, _most(options, x, features, transposed), config.tile if config else most)
    size = 2 * parts * features
    fixed = both * size
    if by_distance:
        most = min(most, gpu_distances.MOST_COLUMNS)
        fixed += gpu_distances.size(gpu.whole(columns))
    column = streams * (size + 16)  # 16 for what is streamed beside
    if one_pass:
        fixed += gpu_one_pass.FIXED_BYTES
        column += gpu_one_pass.COLUMN_BYTES
    tile, stages = tile_of(fixed, column, most, block_column, columns)
    tiling = Tiling(gpu.whole(rows, both), gpu.whole(columns, tile), tile, heads, transposed)
    cut = (tile, both // streams) if transposed else (both // streams, tile)
    persistent = config and config.persistent
    return Plan(tiling, Grid(queries, keys, *cut), streams, stages, persistent)


def _most(options: Options, x: Inputs, features: int, transposed: bool) -> int:
    """Returns the most columns of a tile for which the registers suffice: see `tests`."""
    exact = x.query.dtype == jnp.float32
    several = options.weights != "softmax" or options.logits_soft_cap is not None
    if options.reweight is not None or (exact and features > BOTH[exact] and transposed):
        return 32
    if exact:
        return 32 if several or features > 128 else 64
    most = 128 if transposed else BOTH[exact]
    if options.logits_soft_cap is not None and features > most:
        return 32
    several |= (x.table if transposed else x.slopes) is not None
    return 64 if several or features > most else 128
