"""The kernel that prepares chunks of linear attention on Hopper GPUs: see `gpu_prepared`.

What it computes of a chunk is in `gpu_prepare_chunk`.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_call import Call, numbers
from pallas_kernels.linear.gpu_chunks import Fetch, Plan, own, run, steps_of
from pallas_kernels.linear.gpu_features import NOTHING
from pallas_kernels.linear.gpu_prepare_chunk import Preparation
from pallas_kernels.linear.gpu_walk import CHUNK, NUMBERS
from pallas_kernels.tpu import padded, result


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


def prepare(call: Call, *, keep: bool = False) -> tuple[Prepared, Array | None]:
    """Prepares a call: see `gpu_prepared.prepared`, which is what the gradients are of.

    Args:
      call: to be prepared.
      keep: whether the inverse of the delta rule is to be returned, too: of each chunk, that of
        1 + L in two parts beside each other, [B, T, M, 2 C].
    """
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
        if keep:
            results["inverse"] = like((batch, tokens, memories, 2 * CHUNK), call.dtype)
    names = ("query", "key", "logs") if channels else ("query", "key")
    count, count_of_values = features // gpu.FEATURES, gpu.whole(width) // gpu.FEATURES
    fetches = [Fetch(count, {name: name for name in names})]
    if delta:
        fetches.append(Fetch(count, {name: name for name in names[1:]}))
        fetches.append(Fetch(count_of_values, {"query": "value"}))
    plan = Plan(
        chunks=chunks,
        steps=steps_of(chunks, memories * batch),
        fetches=tuple(fetches),
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
    count = max(4, plan.fine + 2) if delta else plan.fine + plan.parts
    scratch = {"tiles": [own(jnp.bfloat16)] * count, "out": own(plan.dtype)}
    scratch |= {"ones": own(jnp.bfloat16)} if channels else {}
    results = run(Preparation, plan, arrays, results, scratch, name="linear_prepare", batch=batch)

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
    found = Prepared(
        *(results[name][..., :size] for name in ("reader", "writer")),
        scores=results["scores"],
        value=results["value"][..., :width] if delta else of_memories(call.value),
        decays=results["decays"][..., :size],
        erase=results["erase"][..., :size] if delta else None,
    )
    return found, results.get("inverse")
