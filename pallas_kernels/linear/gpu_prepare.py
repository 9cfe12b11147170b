"""The kernel that prepares chunks of linear attention on Hopper GPUs: see `gpu_prepared`.

A block of the grid has some chunks of a memory, half of them for each of two warpgroups that
compute, see `gpu_prepare_chunk`. They take 64 features, or values, after the other. A third
warpgroup copies ahead of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_call import Call, numbers
from pallas_kernels.linear.gpu_features import NOTHING
from pallas_kernels.linear.gpu_prepare_chunk import SQUARE, Chunks, Plan
from pallas_kernels.linear.gpu_walk import CHUNK, NUMBERS
from pallas_kernels.tpu import padded, result

MOST_STEPS = 8
"""Chunks that a warpgroup takes at most."""


class Prepared(NamedTuple):
    """What is prepared of chunks, for each memory; decays are float32."""

    reader: Float[Array, "B T M F"]
    writer: Float[Array, "B T M F"]
    scores: Float[Array, "B T M C"]
    value: Float[Array, "B T M V"]
    decays: Float[Array, "B chunks M F"] | None
    erase: Float[Array, "B T M F"] | None
    mixing: Float[Array, "B chunks M 3"] | None = None
    """Instead of decays, for momentum."""


def prepare(call: Call) -> Prepared:
    """Prepares a call: see `gpu_prepared.prepared`, which is what the gradients are of."""
    batch, tokens, _, size = call.query.shape
    width, memories, logs = call.value.shape[3], call.memories, call.logs
    channels, delta = logs is not None and logs.ndim == 4, call.beta is not None
    features, chunks = gpu.whole(size), tokens // CHUNK
    like = functools.partial(result, like=call.key)
    fill = NOTHING.get(call.feature_map, 0)
    arrays = {name: padded(getattr(call, name), 3, features, fill) for name in ("query", "key")}
    results = {"scores": like((batch, tokens, memories, CHUNK), call.dtype)}
    of_tokens = None
    if channels:
        arrays["logs"] = padded(logs.astype(jnp.float32), 3, features)
        results["decays"] = like((batch, chunks, memories, features), jnp.float32)
    elif logs is not None:
        of_tokens = arrays["numbers"] = numbers(logs, reverse=False)
    if logs is not None:
        for name in ("reader", "writer"):
            results[name] = like((batch, tokens, memories, features), call.dtype)
    if delta:
        arrays["value"] = padded(call.value, 3, gpu.whole(width))
        arrays["beta"] = jnp.swapaxes(call.beta.astype(jnp.float32), 1, 2)
        results["erase"] = like((batch, tokens, memories, features), call.dtype)
        results["value"] = like((batch, tokens, memories, gpu.whole(width)), call.dtype)
    steps = steps_of(chunks, memories * batch)
    plan = Plan(
        chunks=chunks,
        steps=steps,
        features=features // gpu.FEATURES,
        values=gpu.whole(width) // gpu.FEATURES,
        stages=1 if call.dtype == jnp.float32 else 2,
        memories=memories,
        heads={name: getattr(call, name).shape[2] for name in ("query", "key", "value")},
        channels=channels,
        same=of_tokens is not None and of_tokens.shape[3] == CHUNK,
        alone=of_tokens is not None and of_tokens.shape[0] == 1,
        delta=delta,
        dtype=call.dtype,
        feature_map=call.feature_map,
    )
    scratch = {"tiles": [own(jnp.bfloat16)] * plan.tiles, "out": own(plan.dtype)}
    scratch |= {"ones": own(jnp.bfloat16)} if channels else {}
    results = run(Chunks, plan, arrays, results, scratch, name="linear_prepare", batch=batch)

    def of_memories(array: Array) -> Array:
        return jnp.repeat(array, memories // array.shape[2], axis=2)

    if not channels:
        shape = batch, chunks, memories, size
        decays = jnp.ones_like(call.memory, shape=(1, 1, memories), dtype=jnp.float32)
        if of_tokens is not None:
            decays = jnp.swapaxes(of_tokens[:, :, NUMBERS.index("since"), CHUNK - 1 :: CHUNK], 1, 2)
        results["decays"] = jnp.broadcast_to(decays[..., None], shape)
    if logs is None:
        results["reader"] = of_memories(call.features("query"))
        results["writer"] = of_memories(call.features("key"))
    return Prepared(
        *(results[name][..., :size] for name in ("reader", "writer")),
        scores=results["scores"],
        value=results["value"][..., :width] if delta else of_memories(call.value),
        decays=results["decays"][..., :size],
        erase=results["erase"][..., :size] if delta else None,
    )


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
    scratch |= {x: gpu.smem((slots, *SQUARE), plan.dtype) for x in ("query", "key")}
    if plan.channels:
        scratch["logs"] = gpu.smem((slots, *SQUARE), jnp.float32)
    scratch["ready"] = plgpu.Barrier(num_arrivals=plan.copies, num_barriers=slots)
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
        lax.fori_loop(0, chunks.count, chunks, None)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(place["warpgroup"] == gpu.COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(gpu.REGISTERS_COPYING, action="decrease")
        both = [place_of(warpgroup) for warpgroup in range(gpu.COMPUTING)]
        logs = ("logs",) if plan.channels else ()

        def copy(step: Array, carry: None) -> None:
            _fetch(both, step, 0, plan.features, ("query", "key", *logs))
            if plan.delta:
                _fetch(both, step, plan.features, plan.features, ("key", *logs))
                _fetch(both, step, 2 * plan.features, plan.values, ("value",))

        lax.fori_loop(0, plan.steps, copy, None)


def _fetch(
    both: Sequence[Chunks], step: Array, first: int, count: int, names: Sequence[str]
) -> None:
    """Has the copy engine fetch tiles of chunks as soon as there is space for them.

    Args:
      both: chunks of the warpgroups.
      step: which of them.
      first: number of the first job of the step.
      count: of the tiles, and of the jobs.
      names: of the arguments.
    """
    plan, arguments = both[0].plan, both[0].arguments

    def copy(tile: Array, carry: None) -> None:
        for chunks in both:
            pl.when(step < chunks.count)(functools.partial(of_warpgroup, chunks, tile))

    def of_warpgroup(chunks: Chunks, tile: Array) -> None:
        job = step * plan.jobs + first + tile
        slot = chunks.slot(job)
        free, ready = (chunks.scratch[name].at[slot] for name in ("free", "ready"))
        pl.when(job >= plan.stages)(functools.partial(plgpu.barrier_wait, free))
        columns = pl.ds(tile * gpu.FEATURES, gpu.FEATURES)
        for name in names:
            head = chunks.memory
            if name in plan.heads:
                head = lax.div(head, plan.memories // plan.heads[name])
            source = arguments[name].at[chunks.batch, chunks.tokens(step), head, columns]
            target = chunks.scratch["query" if name == "value" else name].at[slot]
            plgpu.copy_gmem_to_smem(source, target, ready)
        for _ in range(plan.copies - len(names)):
            plgpu.barrier_arrive(ready)

    lax.fori_loop(0, count, copy, None)
