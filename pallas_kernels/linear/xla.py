"""Linear attention in plain JAX: a loop over chunks of tokens, on any platform.

What a chunk does is in `gates`, and for the delta rule in `delta`. The forward keeps the memory
before each span of some chunks for the backward, which walks over spans and chunks from the last to
the first: it computes the memories before the chunks of a span again, and takes the derivative of
one chunk at a time. Tokens after the last whole chunk are a shorter chunk of their own. Attention
that is not causal is in `noncausal`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.chunks import Part, chunk_loop, chunk_parts
from pallas_kernels.linear import delta, features, gates, noncausal, products
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
    x = Inputs(*inputs)
    return _forward(options, x, ()) if options.causal else noncausal.forward(options, x)


def forward_keeping(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns, too, what the backward needs: the states before each span."""
    x = Inputs(*inputs)
    if not options.causal:
        return noncausal.forward_keeping(options, x)
    kept = (_zeros(x, shape, x.precision) for shape in x.kept_shapes(options))
    return _forward(options, x, tuple(kept))


def _forward(options: Options, x: Inputs, kept: tuple[Array, ...]) -> tuple[Array, ...]:
    tokens = Tokens.of(x)
    batch, count, groups = tokens.query.shape[:3]
    memories = packed(options, x, x.initial_state(options))
    out = _zeros(x, (batch, count, groups, x.heads // groups, x.value.shape[3]), x.query.dtype)
    slope = _zeros(x, memories[0].shape[:3], x.accumulator)
    chunk = _chunk_maker(options, x)

    def step(begin: Any, part: Part, i: Any, carry: tuple) -> tuple:
        memories, out = carry
        start = begin + i * part.stride
        chunk_tokens = tokens.cut(start, part.size, x.precision)
        chunk_out, memories = chunk(start, part.size)(slope, memories, chunk_tokens)
        return memories, put(out, chunk_out, start)

    def span(part: Part, i: Any, carry: tuple) -> tuple:
        memories, out, kept = carry
        states = unpacked(options, memories) if kept else ()
        kept = tuple(
            jax.lax.dynamic_update_slice_in_dim(all_, state[:, None].astype(all_.dtype), i, axis=1)
            for all_, state in zip(kept, states, strict=True)
        )
        carry = memories, out
        for chunks in chunk_parts(part.size, options.chunk_size):
            carry = chunk_loop(chunks, functools.partial(step, i * part.stride, chunks), carry)
        return *carry, kept

    carry = memories, out, kept
    for part in chunk_parts(count, options.kept):
        carry = chunk_loop(part, functools.partial(span, part), carry)
    memories, out, kept = carry
    return out.reshape(batch, count, x.heads, -1), *unpacked(options, memories), *kept


def backward(options: Options, names: Sequence[str], *arguments: Array | None) -> tuple[Array, ...]:
    """Returns the gradients of the inputs with these names.

    Args:
      options: as for the forward.
      names: of fields of `Inputs`.
      *arguments: the inputs, the states that `forward_keeping` adds, and the cotangents of the
        output and of the last state.
    """
    count = len(Inputs._fields)
    x, rest = Inputs(*arguments[:count]), arguments[count:]
    if not options.causal:
        return noncausal.backward(options, names, x, *rest)
    tokens, groups = Tokens.of(x), group_count(x)
    state = tuple(x.state_shapes(options))
    kept, d_out, d_state = rest[: len(state)], rest[len(state)], rest[len(state) + 1 :]
    d_out = grouped(d_out, 2, groups)
    d_memories = packed(options, x, dict(zip(state, d_state, strict=True)))
    slope = _zeros(x, d_memories[0].shape[:3], x.accumulator)
    size = options.chunk_size
    chunk = _chunk_maker(options, x)

    def again(begin: Any, i: Any, befores: tuple[Array, ...]) -> tuple[Array, ...]:
        memories = tuple(jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in befores)
        start = begin + i * size
        chunk_tokens = tokens.cut(start, size, x.precision)
        _, memories = chunk(start, size)(slope, memories, chunk_tokens)
        return tuple(
            jax.lax.dynamic_update_index_in_dim(all_, m, i + 1, axis=0)
            for all_, m in zip(befores, memories, strict=True)
        )

    def step(begin: Any, befores: tuple[Array, ...], part: Part, i: Any, carry: tuple) -> tuple:
        d_tokens, d_memories, d_slope = carry
        start = begin + i * part.stride
        memories = tuple(jax.lax.dynamic_index_in_dim(m, i, keepdims=False) for m in befores)
        chunk_tokens = tokens.cut(start, part.size, x.precision)
        _, transpose = jax.vjp(chunk(start, part.size), slope, memories, chunk_tokens)
        d_chunk_out = cut(d_out, start, part.size, x.accumulator)
        d_chunk_slope, d_memories, d_chunk = transpose((d_chunk_out, d_memories))
        return d_tokens.put(d_chunk, start), d_memories, d_slope + d_chunk_slope

    def span(part: Part, i: Any, carry: tuple) -> tuple:
        begin = i * part.stride
        states = (jax.lax.dynamic_index_in_dim(m, i, 1, keepdims=False) for m in kept)
        states = (m.astype(x.accumulator) for m in states)
        memories = packed(options, x, dict(zip(state, states, strict=True)))
        count = -(-part.size // size)
        befores = tuple(jnp.pad(m[None], ((0, count - 1),) + ((0, 0),) * m.ndim) for m in memories)
        if count > 1:
            whole = Part(0, count - 1, size, size)
            befores = chunk_loop(whole, functools.partial(again, begin), befores)
        for chunks in reversed(chunk_parts(part.size, size)):
            one = functools.partial(step, begin, befores, chunks)
            carry = chunk_loop(chunks, one, carry, backwards=True)
        return carry

    carry = jax.tree.map(jnp.zeros_like, tokens), d_memories, slope
    for part in reversed(chunk_parts(x.query.shape[1], options.kept)):
        carry = chunk_loop(part, functools.partial(span, part), carry, backwards=True)
    d_tokens, d_memories, d_slope = carry

    d_state = dict(zip(state, unpacked(options, d_memories), strict=True))
    d_slope = d_slope.reshape(d_slope.shape[0], -1)
    gradients = dict(log_decay=d_slope) | d_state | d_tokens.given()
    return tuple(
        _unbroadcast(gradients[name].reshape(-1, *given.shape[1:]), given)
        for name, given in ((name, getattr(x, name)) for name in names)
    )


def _chunk_maker(options: Options, x: Inputs) -> Callable[[Any, int], Callable[..., Any]]:
    """Returns a function of a chunk's first token and size to its function, see `_chunk`."""
    parts = chunk_parts(x.query.shape[1], options.chunk_size)
    # Made once, outside of all loops.
    constants = {part.size: gates.constant_weights(x, part.size) for part in parts}

    def make(start: Any, size: int) -> Callable[..., Any]:
        return functools.partial(_chunk, options, constants[size], _segments(x, start, size))

    return make


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
