"""Linear attention in plain JAX: a loop over chunks of tokens, on any platform.

In a chunk of C tokens that begins with the memory S, with lam the decay and i, j = 0..C-1

    o_i = sum_{j<=i} lam^(i-j) (q_i . k_j) v_j  +  lam^(i+1) q_i S          within, carried
    S'  = sum_j lam^(C-1-j) k_j^T v_j           +  lam^C S                  added, kept

Four sets of weights hold everything that a decay does, and no exponent in them is positive. Another
gate is another way to make the weights; the end of a segment sets some of them to zero.

The forward keeps the memory before each chunk for the backward, which walks over the chunks from
the last to the first and takes the derivative of one at a time. Tokens after the last whole chunk
are a shorter chunk of their own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear.inputs import Inputs, Options, finite


def supports(**call: object) -> str | None:
    """Returns None: plain JAX serves every call."""
    del call


def forward(
    options: Options, *inputs: Array | None
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """Returns the output in the dtype of the query, and the state after the last token."""
    return _forward(options, Inputs(*inputs), keep=False)[:2]


def forward_keeping(
    options: Options, *inputs: Array | None
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"], Float[Array, "B chunks N H V"]]:
    """Returns, too, what the backward needs: the memory before each chunk."""
    return _forward(options, Inputs(*inputs), keep=True)


class _Part(NamedTuple):
    """Consecutive chunks of one size."""

    first: int  # number of the first chunk
    count: int
    size: int
    stride: int  # tokens from one chunk to the next; the same in all parts


class _Weight(NamedTuple):
    """`exp(steps * log_decay)`, or 0, or a multiple: what something counts for after some steps."""

    value: Float[Array, "B|1 K G _ _"]
    steps: Int[Array, "_ _"]


class _Weights(NamedTuple):
    """How much the tokens of a chunk and the memory before it count (see the module)."""

    within: _Weight  # [B|1, K, G, C, C]
    carried: _Weight  # [B|1, K, G, C, 1]
    added: _Weight  # [B|1, K, G, C, 1]
    kept: _Weight  # [B|1, K, G, 1, 1]


def _forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Array, ...]:
    batch, tokens, heads, features = x.query.shape
    group, width = heads // x.key.shape[2], x.value.shape[3]
    arrays = (_grouped(x.query, 2, group), x.key, x.value)
    memory = x.memory
    if memory is None:
        memory = _zeros(x, (batch, heads, features, width), x.accumulator)
    parts = _parts(tokens, options.chunk_size)
    chunks = sum(part.count for part in parts) if keep else 0
    memory = _grouped(memory, 1, group)
    memories = _zeros(x, (batch, chunks, *memory.shape[1:]), _precision(x))
    out = _zeros(x, (batch, tokens, heads // group, group, width), x.query.dtype)
    slope = _zeros(x, memory.shape[:3], x.accumulator)

    def step(part: _Part, weights: _Weights, i: Any, carry: tuple) -> tuple:
        memory, out, memories = carry
        if keep:
            kept = memory[:, None].astype(memories.dtype)
            memories = jax.lax.dynamic_update_slice_in_dim(memories, kept, i, axis=1)
        chunk = [_cut(a, i * part.stride, part.size, _precision(x)) for a in arrays]
        weights = _segmented(weights, x.runs, part, i)
        out_chunk, memory = _chunk(weights, slope, memory, *chunk)
        return memory, _put(out, out_chunk, i * part.stride), memories

    carry = (memory, out, memories)
    for part in parts:
        weights = _weights(options, x, part.size)
        carry = _loop(part, functools.partial(step, part, weights), carry)
    memory, out, memories = carry
    state = (heads, features, width)
    return (
        out.reshape(batch, tokens, heads, width),
        memory.reshape(batch, *state),
        memories.reshape(batch, chunks, *state),
    )


def backward(options: Options, *arguments: Array | None) -> tuple[Array, ...]:
    """Returns the gradients of query, key, value and, where given, log_decay and memory.

    Args:
      options: as for the forward.
      *arguments: the inputs, the memories that `forward_keeping` returned, and the cotangents of
        the output and of the last state.
    """
    *inputs, memories, d_out, d_memory = arguments
    x = Inputs(*inputs)
    group = x.query.shape[2] // x.key.shape[2]
    arrays = (_grouped(x.query, 2, group), x.key, x.value)
    memories, d_out = _grouped(memories, 2, group), _grouped(d_out, 2, group)

    def step(part: _Part, weights: _Weights, i: Any, carry: tuple) -> tuple:
        d_arrays, d_memory, d_slope = carry
        start = i * part.stride
        weights = _segmented(weights, x.runs, part, i)
        memory = jax.lax.dynamic_index_in_dim(memories, i, 1, keepdims=False)
        chunks = [_cut(a, start, part.size, _precision(x)) for a in arrays]
        operands = slope, memory.astype(x.accumulator), *chunks
        _, transpose = jax.vjp(functools.partial(_chunk, weights), *operands)
        d_chunk_out = _cut(d_out, start, part.size, x.accumulator)
        d_chunk_slope, d_memory, *d_chunks = transpose((d_chunk_out, d_memory))
        d_arrays = [_put(a, d, start) for a, d in zip(d_arrays, d_chunks, strict=True)]
        return d_arrays, d_memory, d_slope + d_chunk_slope

    slope = _zeros(x, d_memory.shape[:2], x.accumulator)
    slope = _grouped(slope, 1, group)
    carry = [jnp.zeros_like(a) for a in arrays], _grouped(d_memory, 1, group), slope
    for part in reversed(_parts(x.query.shape[1], options.chunk_size)):
        weights = _weights(options, x, part.size)
        carry = _loop(part, functools.partial(step, part, weights), carry, backwards=True)
    d_arrays, d_memory, d_slope = carry

    gradients = [d.reshape(a.shape) for d, a in zip(d_arrays, x, strict=False)]
    if x.log_decay is not None:
        d_log_decay = d_slope.reshape(d_slope.shape[0], -1)
        one = x.log_decay.shape[0] == 1
        gradients.append(d_log_decay.sum(0, keepdims=True) if one else d_log_decay)
    if x.memory is not None:
        gradients.append(d_memory.reshape(x.memory.shape))
    return tuple(gradients)


def _weights(options: Options, x: Inputs, size: int) -> _Weights:
    """Returns the weights of a constant decay, for all chunks of `size` tokens."""
    heads = x.query.shape[2]
    log_decay = x.log_decay
    log_decay = jnp.zeros((1, heads), x.accumulator) if log_decay is None else finite(log_decay)
    log_decay = _grouped(log_decay, 1, heads // x.key.shape[2])[..., None, None]

    def weight(steps: Int[Array, "_ _"], scale: float = 1.0) -> _Weight:
        value = jnp.exp(jnp.maximum(steps, 0) * log_decay)
        return _Weight(jnp.where(steps >= 0, scale * value, 0), steps)

    token = jnp.arange(size)[:, None]
    return _Weights(
        within=weight(token - token.T, options.scale),
        carried=weight(token + 1, options.scale),
        added=weight(size - 1 - token),
        kept=weight(jnp.full((1, 1), size)),
    )


def _segmented(weights: _Weights, runs: Int[Array, "B T"] | None, part: _Part, i: Any) -> _Weights:
    """Returns the weights of chunk i, zero between different runs."""
    if runs is None:
        return weights
    start = i * part.stride
    before = jax.lax.dynamic_slice_in_dim(runs, jnp.maximum(start - 1, 0), 1, axis=1)
    runs = jax.lax.dynamic_slice_in_dim(runs, start, part.size, axis=1)
    last = runs[:, -1:]
    same = runs[:, :, None] == runs[:, None]

    def where(same: Bool[Array, "B _ _"], weight: _Weight) -> _Weight:
        return weight._replace(value=jnp.where(same[:, None, None], weight.value, 0))

    return _Weights(
        within=where(same, weights.within),
        carried=where((runs == before)[..., None], weights.carried),
        added=where((runs == last)[..., None], weights.added),
        kept=where((last == before)[..., None], weights.kept),
    )


def _chunk(
    weights: _Weights,
    slope: Float[Array, "B K G"],
    memory: Float[Array, "B K G H V"],
    query: Float[Array, "B K G C H"],
    key: Float[Array, "B K C H"],
    value: Float[Array, "B K C V"],
) -> tuple[Float[Array, "B K G C V"], Float[Array, "B K G H V"]]:
    """Returns the output of a chunk and the memory after it, both in the accumulators' dtype.

    The derivative in `slope` is that in the logarithm of the decay, for each row of the batch.
    """
    batch, kv_heads, group, size, features = query.shape
    width = value.shape[-1]
    # Heads of a group are more rows or columns for their key head, so that XLA sees plain products.
    by_head = batch, kv_heads, group
    rows = batch, kv_heads, group * size
    scores = _product("bkrh,bkjh->bkrj", query.reshape(*rows, features), key)
    scores = _weighted(weights.within, slope, scores.reshape(*by_head, size, size))
    out = _product("bkrj,bkjv->bkrv", scores.reshape(*rows, size), value)
    carried = _product("bkgih,bkghv->bkgiv", query, memory)
    out = out.reshape(*by_head, size, width) + _weighted(weights.carried, slope, carried)
    values = value[:, :, None].astype(memory.dtype)
    values = jnp.broadcast_to(values, (*by_head, size, width))
    added = jnp.moveaxis(_weighted(weights.added, slope, values), 2, 3)
    added = _product("bkjh,bkjc->bkhc", key, added.reshape(batch, kv_heads, size, group * width))
    added = added.reshape(batch, kv_heads, features, group, width)
    return out, _weighted(weights.kept, slope, memory) + jnp.moveaxis(added, 3, 2)


@jax.custom_vjp
def _weighted(
    weight: _Weight, slope: Float[Array, "B K G"], array: Float[Array, "B K G _ _"]
) -> Float[Array, "B K G _ _"]:
    """Returns `weight * array`, with a derivative in the logarithm of the decay for each row.

    The weights are made once for all chunks and rows. Summing their gradients instead would need a
    collective in every chunk where XLA has sharded the batch.
    """
    del slope
    return weight.value * array


def _weighted_forward(weight: _Weight, slope: Array, array: Array) -> tuple[Array, tuple]:
    return _weighted(weight, slope, array), (weight, array)


def _weighted_backward(residuals: tuple, cotangent: Array) -> tuple[None, Array, Array]:
    weight, array = residuals
    d_array = weight.value * cotangent
    d_slope = jnp.sum(weight.steps * (d_array * array), axis=(3, 4))
    return None, d_slope, d_array.astype(array.dtype)


_weighted.defvjp(_weighted_forward, _weighted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, left: Array, right: Array) -> Array:
    """An einsum in the narrower of its operands' precisions, accumulated in float32 at least.

    The derivative treats its cotangent in the same way. That of `jnp.einsum` would multiply float32
    cotangents by bfloat16 operands, which no matrix unit does.
    """
    dtype = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    accumulator = jnp.promote_types(dtype, jnp.float32)
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(equation, left, right, preferred_element_type=accumulator)


def _product_forward(equation: str, left: Array, right: Array) -> tuple[Array, tuple]:
    return _product(equation, left, right), (left, right)


def _product_backward(equation: str, operands: tuple, cotangent: Array) -> tuple[Array, Array]:
    left, right = operands
    terms, result = equation.split("->")
    first, second = terms.split(",")
    d_left = _product(f"{result},{second}->{first}", cotangent, right)
    d_right = _product(f"{first},{result}->{second}", left, cotangent)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


_product.defvjp(_product_forward, _product_backward)


def _parts(tokens: int, chunk_size: int) -> list[_Part]:
    whole, rest = divmod(tokens, chunk_size)
    parts = (_Part(0, whole, chunk_size, chunk_size), _Part(whole, 1, rest, chunk_size))
    return [part for part in parts if part.count and part.size]


def _loop(
    part: _Part, step: Callable[[Any, Any], Any], carry: Any, *, backwards: bool = False
) -> Any:
    """Calls `step(chunk, carry)` for all chunks of a part."""
    last = part.first + part.count - 1

    def body(n: Any, carry: Any) -> Any:
        return step(last - n if backwards else part.first + n, carry)

    return body(0, carry) if part.count == 1 else jax.lax.fori_loop(0, part.count, body, carry)


def _cut(array: Array, start: Any, size: int, dtype: DTypeLike) -> Array:
    """Cuts tokens out of [B, T, heads, features] as [B, heads, tokens, features].

    XLA takes the turn along with the cut, while products of the arrays as they are would be slow.
    """
    chunk = jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
    return jnp.moveaxis(chunk, 1, -2).astype(dtype)


def _put(array: Array, chunk: Array, start: Any) -> Array:
    """Is the inverse of `_cut`."""
    chunk = jnp.moveaxis(chunk, -2, 1).astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, start, axis=1)


def _grouped(array: Array, axis: int, group: int) -> Array:
    """Splits query heads into key heads and the group that each of them serves."""
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])


def _zeros(x: Inputs, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    # Made from an input so that inside of a shard_map it varies as the inputs do.
    return jnp.zeros_like(x.query, shape=shape, dtype=dtype)


def _precision(x: Inputs) -> DTypeLike:
    """Returns the dtype of products: the inputs', but the sums of many tokens overflow float16."""
    return jnp.float32 if x.query.dtype == jnp.float16 else x.query.dtype
