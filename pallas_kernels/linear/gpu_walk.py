"""The kernel that linear attention on Hopper GPUs is made of: a walk through time with a memory.

A step takes a chunk of 64 tokens. With the memory S, [F, V], and for the tokens readers R and
writers K, [64, F], values v, [64, V], and scores P, [64, 64],

    e  = v - W S                                     or v
    o  = P e + diag(since) R S
    S' = D S + K^T diag(until) e  -  W^T o           or without the last term

Scores are given, or are R K^T times the decays between tokens; W, since, until and D may be none.
R, K and v may be features of what is given.
The walk goes to the last token or, with what a token reads and writes changed round, to the first:
so the gradients of a walk are walks. A block of the grid has some columns of the memory, half of
them in the registers of each of two warpgroups that compute, in float32; for the matrix units there
is a copy in SMEM. A third warpgroup copies chunks ahead of them.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear import gpu_features
from pallas_kernels.linear.gpu_features import NOTHING, TAYLOR
from pallas_kernels.tpu import result

CHUNK = gpu.ROWS
"""Tokens of a step."""

NUMBERS = ("coarse", "fine", "since", "until")
"""What is known of a token where all rows of the memory decay alike. The sum of the first two is
that of the logarithms from the beginning of the chunk on; differences of the first are exact."""

REGISTERS, REGISTERS_COPYING = 232, 40
"""As `gpu.REGISTERS`, but there is more to copy."""

MIXING = 32
"""Numbers to which the three of a mixing are filled up: what the copy engine aligns to."""

MOST_NUMBERS = 8192
"""Numbers of a memory that a warpgroup has in its registers: half of what there are."""


class Walk(NamedTuple):
    """What a walk is given, and how it goes. Arrays are of T tokens, a multiple of `CHUNK`.

    Heads of readers, writers and values divide M, the number of memories; each serves as many
    memories that follow each other.
    """

    writer: Float[Array, "B T K F"]
    value: Float[Array, "B T L V"]
    memory: Float[Array, "B P M F V"]
    """What each of P spans of time begins with, float32."""
    reader: Float[Array, "B T N F"] | None = None
    """None for no output."""
    scores: Float[Array, "B T M 64"] | None = None
    erase: Float[Array, "B T M F"] | None = None
    numbers: Float[Array, "B|1 M 4 T|64"] | None = None
    """`NUMBERS`, of all tokens or the same in every chunk; None for no decays of this kind."""
    decays: Float[Array, "B chunks M F"] | None = None
    """D for each row of the memory; None for 1, or for what the numbers say."""
    mixing: Float[Array, "B chunks M 3"] | None = None
    """Numbers d, m and w where a memory is two, S above U, of F / 2 rows each, a multiple of 64:
    what is left of them is d S + m U and w U or, in reverse, d S and m S + w U."""
    reverse: bool = False
    keep: int = 0
    """Chunks from one state that is kept to the next; 0 to keep none."""
    span: int = 0
    """Chunks of a span but the last, a multiple of `keep`; 0 for all."""
    correct: bool = False
    """Whether W corrects values, and e is a result; else it takes the output away."""
    scale: float = 1.0
    """Of the output."""
    writes: bool = True
    """Whether outputs, and e, are results."""
    out_dtype: DTypeLike = jnp.float32
    dtype: DTypeLike = jnp.float32
    """Of states that are kept, and of e."""
    feature_map: str | None = None
    """Name of the map of what is `mapped`."""
    mapped: Collection[str] = ()
    """Which of "reader", "writer" and, unless the map is "taylor", "value" are given as what
    features are made of, see `gpu_features.unmapped`."""


class Walked(NamedTuple):
    """What a walk returns."""

    out: Float[Array, "B T M V"] | None
    kept: Float[Array, "B count M F V"] | None
    """States before every `keep` chunks, as the walk goes: after them if it is reversed."""
    corrected: Float[Array, "B T M V"] | None
    memory: Float[Array, "B P M F V"]
    """What each span ends with, float32."""


class _Plan(NamedTuple):
    """The static part of a walk."""

    chunks: int
    span: int
    keep: int
    columns: int
    """Of a warpgroup."""
    stages: int
    memories: int
    heads: dict[str, int]
    same: bool
    """Whether the numbers of all chunks are the same."""
    alone: bool
    """Whether those of all batch rows are."""
    parts: tuple[int, ...]
    """Rows of the one memory, or of the two."""
    reverse: bool
    correct: bool
    scale: float
    exact: bool
    feature_map: str | None
    mapped: Collection[str]

    @property
    def expands(self) -> bool:
        """Returns whether features have places of their own."""
        return self.feature_map == TAYLOR

    @property
    def rows(self) -> list[Any]:
        """Returns where in the rows the memories are."""
        if len(self.parts) == 1:
            return [slice(None)]
        return [pl.ds(i * size, size) for i, size in enumerate(self.parts)]


def walk(given: Walk, name: str) -> Walked:
    """Walks; `name` is that of the kernel, for reports."""
    batch, tokens, _, _ = given.writer.shape
    _, spans, memories, size, width = given.memory.shape
    features, columns = gpu.whole(size), gpu.whole(width)
    given = given._replace(mapped=_mapped(given))
    sizes = {"writer": features, "value": columns, "reader": features, "erase": features}
    if given.feature_map == TAYLOR:
        sizes |= dict.fromkeys(given.mapped, gpu_features.NUMBERS)
    arrays = {
        array: gpu.filled(
            getattr(given, array),
            tokens,
            count,
            NOTHING.get(given.feature_map, 0) if array in given.mapped else 0,
        )
        for array, count in sizes.items()
        if getattr(given, array) is not None
    }
    if given.scores is not None:
        arrays["scores"] = gpu.in_parts(given.scores)
    plan = _plan(given, arrays, features, columns)
    matrices = tuple(arrays)
    space = _scratch(plan, given, arrays, features)
    pad = ((0, 0),) * 3 + ((0, features - size), (0, columns - width))
    arrays["memory"] = jnp.pad(given.memory, pad)
    if given.numbers is not None:
        arrays["numbers"] = given.numbers
    if given.decays is not None:
        arrays["decays"] = jnp.pad(given.decays, ((0, 0),) * 3 + ((0, features - size),))
    if given.mixing is not None:
        arrays["decays"] = jnp.pad(given.mixing, ((0, 0),) * 3 + ((0, MIXING - 3),))
    if plan.expands:
        arrays |= gpu_features.taylor_arrays(size, features)
    like = functools.partial(result, like=given.writer)
    results = {"memory": like(arrays["memory"].shape, jnp.float32)}
    if _has_outputs(given):
        results["out"] = like((batch, tokens, memories, columns), given.out_dtype)
    if given.correct and given.writes:
        results["corrected"] = like((batch, tokens, memories, columns), given.dtype)
    if given.keep:
        count = -(-plan.chunks // given.keep)
        results["kept"] = like((batch, count, memories, features, columns), given.dtype)
    results = gpu.run(
        functools.partial(_kernel, plan, matrices),
        arrays,
        results,
        space,
        name=name,
        grid={
            "block": columns // (gpu.COMPUTING * plan.columns),
            "span": spans,
            "memory": memories,
            "batch": batch,
        },
        exact=plan.exact,
    )
    out, kept, corrected = (results.get(key) for key in ("out", "kept", "corrected"))
    return Walked(
        None if out is None else out[..., :width],
        None if kept is None else kept[..., :size, :width],
        None if corrected is None else corrected[..., :width],
        results["memory"][..., :size, :width],
    )


def _plan(given: Walk, arrays: dict[str, Any], features: int, width: int) -> _Plan:
    """Chooses how many columns a warpgroup has, and how far copies go ahead."""
    chunks = given.writer.shape[1] // CHUNK
    parts, item = len(arrays["writer"]), arrays["writer"][0].dtype.itemsize
    rows = sum(arrays[name][0].shape[3] for name in ("reader", "writer", "erase") if name in arrays)
    expanded = features * len(given.mapped) if given.feature_map == TAYLOR else 0
    rows += CHUNK if given.scores is not None else 0
    for columns in (64, 32) if parts == 1 else (32,):
        both = gpu.COMPUTING * columns
        stage = CHUNK * parts * item * (rows + both)
        stage += 4 * len(NUMBERS) * CHUNK if given.numbers is not None else 0
        stage += 4 * features if given.decays is not None else 0
        stage += 4 * MIXING if given.mixing is not None else 0
        staged = _staged(given)
        fixed = both * parts * item * (features + CHUNK * len(staged))
        if expanded:
            fixed += CHUNK * parts * item * expanded + 4 * gpu_features.NUMBERS * features
        if _has_outputs(given):
            fixed += both * CHUNK * jnp.dtype(given.out_dtype).itemsize
        stages = min((gpu.SMEM_BYTES - 4096 - fixed) // stage, 4, max(chunks, 1))
        if width % both == 0 and features * columns <= MOST_NUMBERS and stages > 0:
            break
    return _Plan(
        chunks=chunks,
        span=given.span or chunks,
        keep=given.keep,
        columns=columns,
        stages=stages,
        memories=given.memory.shape[2],
        heads={name: array[0].shape[2] for name, array in arrays.items()},
        same=given.numbers is not None and given.numbers.shape[3] == CHUNK,
        alone=given.numbers is not None and given.numbers.shape[0] == 1,
        parts=(features,) if given.mixing is None else (features // 2,) * 2,
        reverse=given.reverse,
        correct=given.correct,
        scale=given.scale,
        exact=parts > 1,
        feature_map=given.feature_map if given.mapped else None,
        mapped=given.mapped,
    )


def _has_outputs(given: Walk) -> bool:
    """Returns whether outputs are a result."""
    return given.reader is not None and given.writes


def _mapped(given: Walk) -> list[str]:
    """Names what a walk maps."""
    there = (name for name in given.mapped if getattr(given, name) is not None)
    return [] if given.feature_map is None else [*there]


def _staged(given: Walk) -> list[str]:
    """Names what is put into SMEM for the matrix units, beside the memory."""
    names = ["corrected"] if given.correct else []
    names += ["weighed"] if given.numbers is not None else []
    return names + (["taken"] if given.erase is not None and not given.correct else [])


def _scratch(plan: _Plan, given: Walk, arrays: dict[str, Any], features: int) -> dict[str, Any]:
    """Returns the SMEM of a block."""
    parts, dtype = len(arrays["writer"]), arrays["writer"][0].dtype
    columns, stages, both = plan.columns, plan.stages, gpu.COMPUTING

    def space(*shape: int) -> list[Any]:
        # The matrix units want both sides of a product to lie in the same way.
        return [gpu.smem(shape, dtype, columns)] * parts

    scratch: dict[str, Any] = {"state": space(both, features, columns)}
    for name in arrays:
        match name:
            case "value":
                scratch[name] = space(both * stages, CHUNK, columns)
            case "scores":
                scratch[name] = space(stages, CHUNK, CHUNK)
            case _ if plan.expands and name in plan.mapped:
                shape = stages, CHUNK, gpu_features.NUMBERS
                scratch[name] = [gpu.smem(shape, dtype, 32)] * parts
                scratch[f"{name} features"] = space(1, CHUNK, features)
            case _:
                scratch[name] = space(stages, CHUNK, features)
    if plan.expands:
        scratch |= gpu_features.taylor_space(features)
    for name in _staged(given):
        scratch[name] = space(both, CHUNK, columns)
    copies = parts * (len(arrays) + both - 1)
    if given.numbers is not None:
        scratch["numbers"] = plgpu.SMEM((stages, len(NUMBERS), CHUNK), jnp.float32)
        copies += 1
    if given.decays is not None or given.mixing is not None:
        size = MIXING if given.decays is None else features
        scratch["decays"] = plgpu.SMEM((stages, size), jnp.float32)
        copies += 1
    if _has_outputs(given):
        scratch["out"] = gpu.smem((both, CHUNK, columns), given.out_dtype, columns)
    scratch["ready"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    scratch["free"] = plgpu.Barrier(num_arrivals=both, num_barriers=stages)
    if plan.mapped:
        scratch["mapped"] = plgpu.Barrier(num_arrivals=both)
    return scratch


def _kernel(
    plan: _Plan,
    matrices: Sequence[str],
    arguments: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
    place: dict[str, Array],
) -> None:
    """Walks through a span with some columns of a memory."""
    step = _Step(plan, matrices, arguments, results, scratch, place)

    @pl.when(place["warpgroup"] == gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS_COPYING, action="decrease")
        if plan.expands:
            gpu_features.copy_taylor(arguments, scratch)
        lax.fori_loop(0, step.count, step.copy, None)

    @pl.when(place["warpgroup"] < gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        columns = step.columns(place["warpgroup"])
        first, last = (
            array.at[place["batch"], place["span"], place["memory"]]
            for array in (arguments["memory"], results["memory"])
        )
        memory = [
            plgpu.load(first.at[rows, columns], layout=gpu.MATRIX, optimized=False)
            for rows in plan.rows
        ]
        step.remember(memory)
        if plan.expands:
            plgpu.barrier_wait(scratch["chosen"])
        # Without the barrier what copies spills, in float32 with spans.
        memory = lax.fori_loop(0, lax.optimization_barrier(step.count), step, memory)
        for rows, part in zip(plan.rows, memory, strict=True):
            gpu.store(last.at[rows, columns], part)
        plgpu.wait_smem_to_gmem(0)


class _Step:
    """A step of a walk: where it is, and what it does."""

    def __init__(
        self,
        plan: _Plan,
        matrices: Sequence[str],
        arguments: dict[str, Any],
        results: dict[str, Any],
        scratch: dict[str, Any],
        place: dict[str, Array],
    ):
        """Finds the span of a block."""
        self.plan, self.matrices = plan, matrices
        self.arguments, self.results, self.scratch = arguments, results, scratch
        self.batch, self.memory, self.block = (place[k] for k in ("batch", "memory", "block"))
        self.warpgroup = place["warpgroup"]
        self.first = place["span"] * plan.span
        self.count = jnp.minimum(plan.span, plan.chunks - self.first)

    def columns(self, warpgroup: Array | int) -> Any:
        """Returns the columns of a warpgroup."""
        size = self.plan.columns
        return pl.ds((self.block * gpu.COMPUTING + warpgroup) * size, size)

    def chunk(self, step: Array) -> Array:
        """Returns the number of the chunk of a step."""
        return self.first + (self.count - 1 - step if self.plan.reverse else step)

    def copy(self, step: Array, carry: None) -> None:
        """Has the copy engine fetch a chunk as soon as there is space for it."""
        plan, chunk = self.plan, self.chunk(step)
        slot = lax.rem(step, plan.stages)
        free, ready = (self.scratch[name].at[slot] for name in ("free", "ready"))
        pl.when(step >= plan.stages)(functools.partial(plgpu.barrier_wait, free))
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        for name in self.matrices:
            head = self.memory // (plan.memories // plan.heads[name])
            for source, target in zip(self.arguments[name], self.scratch[name], strict=True):
                source = source.at[self.batch, tokens, head]
                if name != "value":
                    plgpu.copy_gmem_to_smem(source, target.at[slot], ready)
                    continue
                for warpgroup in range(gpu.COMPUTING):
                    half = target.at[gpu.COMPUTING * slot + warpgroup]
                    part = source.at[slice(None), self.columns(warpgroup)]
                    plgpu.copy_gmem_to_smem(part, half, ready)
        if "numbers" in self.arguments:
            tokens = pl.ds(0, CHUNK) if plan.same else tokens
            row = 0 if plan.alone else self.batch
            source = self.arguments["numbers"].at[row, self.memory, slice(None), tokens]
            plgpu.copy_gmem_to_smem(source, self.scratch["numbers"].at[slot], ready)
        if "decays" in self.arguments:
            source = self.arguments["decays"].at[self.batch, chunk, self.memory]
            plgpu.copy_gmem_to_smem(source, self.scratch["decays"].at[slot], ready)

    def keep(self, step: Array, memory: list[Array]) -> None:
        """Keeps the memory before a chunk, if it is the first of a group as the walk goes."""
        plan, chunk = self.plan, self.chunk(step)
        after = chunk + 1
        first = lax.rem(after if plan.reverse else chunk, plan.keep) == 0
        first = first | (after == plan.chunks) if plan.reverse else first

        @pl.when(first)
        def _() -> None:
            group = lax.div(chunk, plan.keep)
            target = self.results["kept"].at[self.batch, group, self.memory]
            target = target.at[slice(None), self.columns(self.warpgroup)]
            if not plan.exact:
                self.copied("state", target)
                return
            for rows, part in zip(plan.rows, memory, strict=True):
                gpu.store(target.at[rows], part)

    def __call__(self, step: Array, memory: list[Array]) -> list[Array]:
        """Returns the memory after a chunk."""
        plan, scratch = self.plan, self.scratch
        slot = lax.rem(step, plan.stages)
        if plan.keep:
            self.keep(step, memory)
        plgpu.barrier_wait(scratch["ready"].at[slot])
        self.map(slot)
        here = functools.partial(self.here, slot)
        value, at = here("value"), (self.batch, pl.ds(self.chunk(step) * CHUNK, CHUNK), self.memory)
        if plan.correct:
            read = gpu.product(here("erase"), here("state"))
            wrong = gpu.loaded(value) - read
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            value = self.put("corrected", wrong)
            if "corrected" in self.results:
                target = self.results["corrected"].at[(*at, self.columns(self.warpgroup))]
                if plan.exact:
                    gpu.store(target, wrong)
                else:
                    self.copied("corrected", target)
        takes = "erase" in self.matrices and not plan.correct
        if "reader" in self.matrices:
            out = self.read(step, slot, here, value)
            if "out" in scratch:
                self.write(out, at)
            if takes:
                # Else the compiler changes signs while the matrix units are still at work.
                self.put("taken", -lax.optimization_barrier(out))
        if "numbers" in scratch:
            until = self.number(slot, "until")
            weighed = gpu.loaded(value)
            value = self.put("weighed", weighed * gpu.across(until, weighed.shape))
        memory = self.decayed(slot, memory)
        pairs = [("writer", value), ("erase", here("taken"))] if takes else [("writer", value)]
        for name, right in pairs:
            for i, rows in enumerate(plan.rows):
                left = [part.at[slice(None), rows].T for part in here(name)]
                memory[i] = gpu.accumulated(memory[i], left, right)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["free"].at[slot])
        if plan.keep:
            # The outputs, if there are any, are what was copied last.
            plgpu.wait_smem_to_gmem(int("out" in scratch), wait_read_only=True)
        self.remember(memory)
        return memory

    def map(self, slot: Array) -> None:
        """Makes features; of what both warpgroups need, each makes those of a matrix."""
        mapped = self.plan.mapped
        if "value" in mapped:
            self.map_matrix(slot, "value")
        shared = [name for name in ("reader", "writer") if name in mapped]
        if self.plan.expands:
            self.meet()  # both are done with the features before
        for warpgroup, name in enumerate(shared):
            one = functools.partial(self.map_matrix, slot, name)
            pl.when(self.warpgroup == warpgroup)(one)
        if mapped:
            plgpu.commit_smem()
        if shared:
            self.meet()

    def map_matrix(self, slot: Array, name: str) -> None:
        """Makes the features of a matrix."""
        parts = gpu.at(self.scratch[name], self.index(slot, name))
        if self.plan.expands:
            target = self.here(slot, name)
            gpu_features.map_taylor(parts, target, self.fill, self.arguments, self.scratch)
        else:
            gpu_features.map_each(self.plan.feature_map, parts, self.fill)

    def meet(self) -> None:
        """Waits for the other warpgroup that computes."""
        plgpu.barrier_arrive(self.scratch["mapped"])
        plgpu.barrier_wait(self.scratch["mapped"])

    def here(self, slot: Array | None, name: str) -> list[Any]:
        """Returns references to a matrix of the chunk in a slot, or of the warpgroup.

        What is known of it is made where it is used: descriptors of all matrices, made ahead of a
        loop, would take more registers than there are.
        """
        if self.plan.expands and name in self.plan.mapped:
            return gpu.at(self.scratch[f"{name} features"], lax.optimization_barrier(jnp.int32(0)))
        return gpu.at(self.scratch[name], self.index(slot, name))

    def index(self, slot: Array | None, name: str) -> Array:
        """Returns which of the matrices of a name is that of a slot, or of the warpgroup."""
        index = self.warpgroup
        if name == "value":
            index = gpu.COMPUTING * slot + index
        elif name in self.matrices:
            index = slot
        return lax.optimization_barrier(index)

    def read(self, step: Array, slot: Array, here: Callable[[str], Any], value: Any) -> Array:
        """Returns the outputs of a chunk."""
        plan = self.plan
        if "scores" in self.matrices:
            weights = here("scores")
            weights = gpu.transposed(weights) if plan.reverse else weights
        else:
            right = gpu.transposed(here("writer"))
            load = functools.partial(self.between, step)
            scores, between = gpu.product_and(here("reader"), right, load)
            scores = self.weighed(slot, scores, between)
            narrow = here("reader")[0].dtype
            weights = gpu.in_parts(scores) if plan.exact else [scores.astype(narrow)]
        out = gpu.product(here("reader"), here("state"))
        if "numbers" in self.scratch:
            since = self.number(slot, "since")
            out = out * gpu.across(since, out.shape)
        return gpu.accumulated(out, weights, value)

    def between(self, step: Array) -> list[Array]:
        """Returns the numbers of the columns of scores that decays between tokens are made of.

        From SMEM no columns can be loaded.
        """
        if "numbers" not in self.scratch:
            return []
        source, plan = self.arguments["numbers"], self.plan
        tokens = pl.ds(0 if plan.same else self.chunk(step) * CHUNK, CHUNK)
        row = 0 if plan.alone else self.batch
        return [
            plgpu.load(
                source.at[row, self.memory, i, tokens], layout=gpu.OF_COLUMNS, optimized=False
            )
            for i in (NUMBERS.index("coarse"), NUMBERS.index("fine"))
        ]

    def weighed(self, slot: Array, scores: Array, between: Sequence[Array]) -> Array:
        """Returns scores times decays; 0 for tokens that are not seen."""
        row = gpu.across(gpu.iota(CHUNK, gpu.OF_ROWS), scores.shape)
        column = gpu.down(gpu.iota(CHUNK, gpu.OF_COLUMNS), scores.shape)
        seen = row <= column if self.plan.reverse else row >= column
        if between:
            decay = 0.0
            for name, of_column in zip(("coarse", "fine"), between, strict=True):
                of_row = gpu.across(self.number(slot, name), scores.shape)
                of_column = gpu.down(of_column, scores.shape)
                decay += of_column - of_row if self.plan.reverse else of_row - of_column
            scores = scores * jnp.exp(decay)
        return jnp.where(seen, scores, 0)

    def write(self, out: Array, at: Any) -> None:
        """Has the copy engine write the outputs of a chunk."""
        staged = self.scratch["out"].at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = (out * self.plan.scale).astype(staged.dtype)
        plgpu.commit_smem()
        target = self.results["out"].at[(*at, self.columns(self.warpgroup))]
        plgpu.copy_smem_to_gmem(staged, target)

    def decayed(self, slot: Array, memory: list[Array]) -> list[Array]:
        """Returns what is left of the memory."""
        if len(memory) == 2:
            own, moved, other = (self.scratch["decays"][slot, i] for i in range(3))
            first, second = memory
            if self.plan.reverse:
                return [first * own, second * other + first * moved]
            return [first * own + second * moved, second * other]
        (memory,) = memory
        if "numbers" in self.scratch:
            # The decay of the whole chunk; what reads and what writes have changed places.
            name = "until" if self.plan.reverse else "since"
            return [memory * self.scratch["numbers"][slot, NUMBERS.index(name), CHUNK - 1]]
        if "decays" in self.scratch:
            rows = plgpu.load(self.scratch["decays"].at[slot], layout=gpu.OF_ROWS, optimized=False)
            return [memory * gpu.across(rows, memory.shape)]
        return [memory]

    def number(self, slot: Array, name: str) -> Array:
        """Returns a number of every token, for rows."""
        ref = self.scratch["numbers"].at[slot, NUMBERS.index(name)]
        return plgpu.load(ref, layout=gpu.OF_ROWS, optimized=False)

    def copied(self, name: str, target: Any) -> None:
        """Has the copy engine write what was put in SMEM, which is in one part."""
        (part,) = gpu.at(self.scratch[name], self.warpgroup)
        plgpu.copy_smem_to_gmem(part, target)

    def remember(self, memory: list[Array]) -> None:
        """Puts the memory where the matrix units can read it."""
        for rows, part in zip(self.plan.rows, memory, strict=True):
            self.put("state", part, rows)

    def put(self, name: str, matrix: Array, rows: Any = slice(None)) -> list[Any]:
        """Puts a matrix where the matrix units can read it, and returns the references."""
        parts = self.here(None, name)
        self.fill([part.at[rows] for part in parts], matrix)
        plgpu.commit_smem()
        return parts

    def fill(self, parts: gpu.Parts, matrix: Array) -> None:
        """Puts float32 values into SMEM."""
        values = gpu.in_parts(matrix) if self.plan.exact else [matrix.astype(parts[0].dtype)]
        for part, value in zip(parts, values, strict=True):
            part[...] = value
