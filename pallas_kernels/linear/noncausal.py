"""Linear attention to all tokens in plain JAX: a sum over the keys, that every query reads.

With segments, a chunk's queries read the keys of the chunk itself, the memory of the tokens before
it and that of those after it, as far as they are of the same segment. JAX differentiates the loops
over chunks; they keep memories, and compute all else again.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear import features, products
from pallas_kernels.linear.inputs import Inputs, Options, zero_unless
from pallas_kernels.linear.layout import Tokens, packed, unpacked


class _Chunks(NamedTuple):
    """Arrays of all chunks, or of one: without the first dimension."""

    query: Float[Array, "chunks B K G|1 C H"]
    key: Float[Array, "chunks B K C H"]
    value: Float[Array, "chunks B K G C V"]
    runs: Int[Array, "chunks B C"] | None


def forward(options: Options, x: Inputs) -> tuple[Array, ...]:
    """Returns the output in the dtype of the query, and the state: that of the last segment."""
    tokens = Tokens.of(x)
    query, key, value = (a.astype(x.precision) for a in tokens[:3])
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    if options.epsilon is not None:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    value = jnp.broadcast_to(value, (*value.shape[:3], x.heads // value.shape[2], value.shape[4]))
    # Values of 0 in the last chunk, with the 1 that counts a key, make its rest count for nothing.
    size = min(options.chunk_size, max(query.shape[1], key.shape[1]))
    query, key, value = (jnp.moveaxis(_chunked(a, size), 2, -2) for a in (query, key, value))
    runs = None if x.runs is None else _chunked(x.runs, size, mode="edge")
    chunks = _Chunks(query, key, value, runs)
    memories = packed(options, x, x.initial_state(options))

    attend = _attend if runs is None else _attend_segments
    out, memory = attend(options, chunks, *memories)
    out = jnp.moveaxis(out, (0, -2), (1, 2))
    out = out.reshape(out.shape[0], -1, x.heads, out.shape[-1])[:, : x.query.shape[1]]
    if options.epsilon is not None:
        out = out[..., :-1] / (out[..., -1:] + options.epsilon)
    return (options.scale * out).astype(x.query.dtype), *unpacked(options, (memory,))


def forward_keeping(options: Options, x: Inputs) -> tuple[Array, ...]:
    """Returns, too, the state to keep."""
    out, *state = forward(options, x)
    return out, *state, *(part[:, None] for part in state)


def backward(
    options: Options, names: Sequence[str], x: Inputs, *rest: Array | None
) -> tuple[Array, ...]:
    """Returns the gradients of the inputs with these names, see `xla.backward`."""
    # A sum over all keys is quick to make again, and what is kept does not have those of segments.
    cotangents = rest[len(x.state_shapes(options)) :]

    def results(*given: Array) -> tuple[Array, ...]:
        return forward(options, x._replace(**dict(zip(names, given, strict=True))))

    return jax.vjp(results, *(getattr(x, name) for name in names))[1](cotangents)


def _attend(options: Options, chunks: _Chunks, memory: Array) -> tuple[Array, Array]:
    """Returns the outputs of all chunks, and the memory of all tokens."""

    @jax.checkpoint
    def add(memory: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        key, value = chunk
        return memory + products.written(features.mapped(options.feature_map, key), value), None

    @jax.checkpoint
    def read(query: Array) -> Array:
        return products.read(features.mapped(options.feature_map, query), memory)

    memory, _ = jax.lax.scan(add, memory, (chunks.key, chunks.value))
    return jax.lax.map(read, chunks.query), memory


def _attend_segments(options: Options, chunks: _Chunks, memory: Array) -> tuple[Array, Array]:
    """Returns the outputs of all chunks, and the memory of the last segment."""
    mapped = functools.partial(features.mapped, options.feature_map)
    first, last = chunks.runs[..., 0], chunks.runs[..., -1]
    before = jnp.concatenate([first[:1], last[:-1]])  # run of the token before each chunk
    after = jnp.concatenate([first[1:], last[-1:]])

    @jax.checkpoint
    def add(memory: Array, chunk: tuple[_Chunks, Array, Array]) -> tuple[Array, Array]:
        """Returns the memory of the run that goes on beyond the chunk, and the one it came with."""
        chunk, beside, leaving = chunk
        kept = zero_unless(beside == leaving, memory)
        leaves = chunk.runs == leaving[:, None]
        key = zero_unless(leaves[:, None], mapped(chunk.key))
        return kept + products.written(key, chunk.value), memory

    memory, befores = jax.lax.scan(add, memory, (chunks, before, last))
    afters = jax.lax.scan(add, jnp.zeros_like(memory), (chunks, after, first), reverse=True)[1]

    @jax.checkpoint
    def read(args: tuple[_Chunks, Array, Array, Array, Array]) -> Array:
        chunk, before, after, memory_before, memory_after = args
        query, runs = mapped(chunk.query), chunk.runs
        same = runs[:, None, None, :, None] == runs[:, None, None, None]
        scores = features.scores(options.feature_map, query, mapped(chunk.key))
        scores = jnp.broadcast_to(scores, (*chunk.value.shape[:3], *scores.shape[3:]))
        out = products.weighed(jnp.where(same, scores, 0), chunk.value)
        for beside, memory in ((before, memory_before), (after, memory_after)):
            readers = (runs == beside[:, None])[:, None, None]
            out += products.read(zero_unless(readers, query), memory)
        return out

    return jax.lax.map(read, (chunks, before, after, befores, afters)), memory


def _chunked(array: Array, size: int, mode: str = "constant") -> Array:
    """Cuts tokens [B, T, ...] into [chunks, B, C, ...]."""
    batch, tokens = array.shape[:2]
    pad = [(0, 0)] * array.ndim
    pad[1] = (0, -tokens % size)
    array = jnp.pad(array, pad, mode=mode)
    return jnp.moveaxis(array.reshape(batch, -1, size, *array.shape[2:]), 1, 0)
