"""Linear attention in plain JAX: a loop over chunks of tokens, on any platform.

What a chunk does is in `gates`, and for the delta rule in `delta`. The forward keeps the memory
before each chunk for the backward, which walks over the chunks from the last to the first and takes
the derivative of one at a time. Tokens after the last whole chunk are a shorter chunk of their own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.chunks import Part, chunk_loop, chunk_parts
from pallas_kernels.linear import delta, features, gates, products
from pallas_kernels.linear.inputs import Inputs, Options
from pallas_kernels.linear.layout import (
    Tokens,
    cut,
    group_count,
    grouped,
    packed,
    put,
    unpacked,
)


def supports(**call: object) -> str | None:
    """Returns None: plain JAX serves every call."""
    del call


def forward(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns the output in the dtype of the query, and the state after the last token."""
    out, memories, _ = _forward(options, Inputs(*inputs), keep=False)
    return out, *unpacked(options, memories)


def forward_keeping(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns, too, what the backward needs: the memories before each chunk."""
    out, memories, kept = _forward(options, Inputs(*inputs), keep=True)
    return out, *unpacked(options, memories), *kept


def kept_count(x: Inputs) -> int:
    """Returns how many arrays `forward_keeping` adds, each [B, chunks, M, _, _]."""
    return 1 if x.log_momentum is None else 2


def _forward(
    options: Options, x: Inputs, *, keep: bool
) -> tuple[Array, gates.Memories, tuple[Array, ...]]:
    tokens = Tokens.of(x)
    batch, count, groups = tokens.query.shape[:3]
    memories = packed(options, x, x.initial_state(options))
    parts = chunk_parts(count, options.chunk_size)
    chunks = sum(part.count for part in parts) if keep else 0
    kept = tuple(_zeros(x, (batch, chunks, *m.shape[1:]), tokens.precision) for m in memories)
    out = _zeros(x, (batch, count, groups, x.heads // groups, x.value.shape[3]), x.query.dtype)
    slope = _zeros(x, memories[0].shape[:3], x.accumulator)

    def step(part: Part, constants: gates.Weights | None, i: Any, carry: tuple) -> tuple:
        memories, out, kept = carry
        start = i * part.stride
        if keep:
            kept = tuple(
                jax.lax.dynamic_update_slice_in_dim(all_, m[:, None].astype(all_.dtype), i, axis=1)
                for all_, m in zip(kept, memories, strict=True)
            )
        attend = functools.partial(_chunk, options, constants, _segments(x, start, part.size))
        chunk_out, memories = attend(slope, memories, tokens.cut(start, part.size))
        return memories, put(out, chunk_out, start), kept

    carry = memories, out, kept
    for part in parts:
        constants = gates.constant_weights(x, part.size)
        carry = chunk_loop(part, functools.partial(step, part, constants), carry)
    memories, out, kept = carry
    kept = tuple(m.reshape(batch, chunks, x.heads, *m.shape[4:]) for m in kept)
    return out.reshape(batch, count, x.heads, -1), memories, kept


def backward(options: Options, *arguments: Array | None) -> tuple[Array, ...]:
    """Returns the gradients of the inputs that are given, but for runs.

    Args:
      options: as for the forward.
      *arguments: the inputs, the memories that `forward_keeping` adds, and the cotangents of the
        output and of the last state.
    """
    count = len(Inputs._fields)
    x, rest = Inputs(*arguments[:count]), arguments[count:]
    tokens, groups = Tokens.of(x), group_count(x)
    kept = tuple(grouped(memories, 2, groups) for memories in rest[: kept_count(x)])
    d_out, *d_state = rest[kept_count(x) :]
    d_out = grouped(d_out, 2, groups)
    names = x.state_shapes(options)
    d_memories = packed(options, x, dict(zip(names, d_state, strict=True)))
    slope = _zeros(x, d_memories[0].shape[:3], x.accumulator)

    def step(part: Part, constants: gates.Weights | None, i: Any, carry: tuple) -> tuple:
        d_tokens, d_memories, d_slope = carry
        start = i * part.stride
        memories = tuple(
            jax.lax.dynamic_index_in_dim(all_, i, 1, keepdims=False).astype(x.accumulator)
            for all_ in kept
        )
        attend = functools.partial(_chunk, options, constants, _segments(x, start, part.size))
        _, transpose = jax.vjp(attend, slope, memories, tokens.cut(start, part.size))
        d_chunk_out = cut(d_out, start, part.size, x.accumulator)
        d_chunk_slope, d_memories, d_chunk = transpose((d_chunk_out, d_memories))
        return d_tokens.put(d_chunk, start), d_memories, d_slope + d_chunk_slope

    carry = jax.tree.map(jnp.zeros_like, tokens), d_memories, slope
    for part in reversed(chunk_parts(x.query.shape[1], options.chunk_size)):
        constants = gates.constant_weights(x, part.size)
        carry = chunk_loop(part, functools.partial(step, part, constants), carry, backwards=True)
    d_tokens, d_memories, d_slope = carry

    d_state = dict(zip(names, unpacked(options, d_memories), strict=True))
    d_slope = d_slope.reshape(d_slope.shape[0], -1)
    gradients = dict(log_decay=d_slope) | d_state | d_tokens.given()
    return tuple(
        _unbroadcast(gradients[name].reshape(-1, *given.shape[1:]), given)
        for name, given in zip(Inputs._fields, x, strict=True)
        if given is not None and name != "runs"
    )


def _chunk(
    options: Options,
    constants: gates.Weights | None,
    segments: gates.Segments | None,
    slope: Float[Array, "B K G"],
    memories: gates.Memories,
    chunk: Tokens,
) -> tuple[Float[Array, "B K G C V"], gates.Memories]:
    """Returns the output of a chunk and the memories after it, in the accumulators' dtype."""
    query, key, value = chunk[:3]
    key = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
    query, key = (features.mapped(options.feature_map, a) for a in (query, key))
    if options.epsilon is not None:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    gate = gates.of_chunk(options.feature_map, constants, segments, slope, chunk)
    if chunk.beta is not None:
        value = delta.corrections(gate, key, value, chunk.beta, memories)
    out = products.weighed(gate.scores(query, key), value) + gate.read(query, memories)
    memories = gate.after(memories, key, value)
    if options.epsilon is not None:
        out = out[..., :-1] / (out[..., -1:] + options.epsilon)
    return options.scale * out, memories


def _segments(x: Inputs, start: Any, size: int) -> gates.Segments | None:
    if x.runs is None:
        return None
    before = jax.lax.dynamic_slice_in_dim(x.runs, jnp.maximum(start - 1, 0), 1, axis=1)
    return gates.Segments.of(jax.lax.dynamic_slice_in_dim(x.runs, start, size, axis=1), before)


def _unbroadcast(gradient: Array, given: Array) -> Array:
    """Sums over the batch where what was given has none."""
    alone = given.shape[0] == 1 < gradient.shape[0]
    return gradient.sum(0, keepdims=True) if alone else gradient


def _zeros(x: Inputs, shape: tuple[int, ...], dtype: Any) -> Array:
    # Made from an input so that inside of a shard_map it varies as the inputs do.
    return jnp.zeros_like(x.query, shape=shape, dtype=dtype)
