"""Scans in plain JAX: a loop over chunks of tokens, on any platform.

The tokens of a chunk are joined by an associative scan, so that what there is for every token and
every part of the state exists for one chunk only. The forward keeps the state before each chunk for
the backward, which walks over the chunks from the last to the first, computes each once more and
takes its derivative. Tokens after the last whole chunk are a shorter chunk of their own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.chunks import Part, chunk_loop, chunk_parts
from pallas_kernels.scan.inputs import (
    Gated,
    Inputs,
    Options,
    Parameters,
    ScanState,
    Selective,
    Softmax,
    SoftmaxState,
    join,
    per_channel,
    read,
)


def supports(**call: object) -> str | None:
    """Returns None: plain JAX serves every call."""
    del call


def forward(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns the output and the state after the last token."""
    return _forward(options, x, keep=False)[:2]


def forward_keeping(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns, too, the states before all chunks, with dimensions [B, chunks, ...]."""
    return _forward(options, x, keep=True)


def _forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    parameters = _by_row(x)
    parts = chunk_parts(x.out.shape[1], options.chunk_size)
    out = _zeros(x, x.out.shape, x.out.dtype)
    count = sum(part.count for part in parts) if keep else 0
    kept = jax.tree.map(lambda s: _zeros(x, (len(s), count, *s.shape[1:]), s.dtype), x.state)

    def step(part: Part, i: Any, carry: tuple) -> tuple:
        state, out, kept = carry
        if keep:
            kept = jax.tree.map(lambda all, one: _put(all, one[:, None], i), kept, state)
        start = i * part.stride
        tokens, begins = _cut((x.tokens, x.begins), start, part.size)
        one, state = _chunk(options, begins, parameters, state, tokens)
        return state, _put(out, one, start), kept

    carry = x.state, out, kept
    for part in parts:
        carry = chunk_loop(part, functools.partial(step, part), carry)
    state, out, kept = carry
    return out, state, kept


def backward(options: Options, x: Inputs, kept: Any, d_out: Array, d_state: Any) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state.

    Args:
      options: as for the forward.
      x: the inputs.
      kept: what `forward_keeping` returned.
      d_out: the cotangent of the output.
      d_state: the cotangent of the last state.
    """
    parameters = _by_row(x)

    def step(part: Part, i: Any, carry: tuple) -> tuple:
        d_tokens, d_parameters, d_state = carry
        start = i * part.stride
        tokens, begins = _cut((x.tokens, x.begins), start, part.size)
        state = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 1, keepdims=False), kept)
        chunk = functools.partial(_chunk, options, begins)
        _, transpose = jax.vjp(chunk, parameters, state, tokens)
        d_one = _cut(d_out, start, part.size).astype(x.accumulator)
        d_more, d_state, d_some = transpose((d_one, d_state))
        d_tokens = jax.tree.map(lambda all, some: _put(all, some, start), d_tokens, d_some)
        return d_tokens, jax.tree.map(jnp.add, d_parameters, d_more), d_state

    carry = (*jax.tree.map(jnp.zeros_like, (x.tokens, parameters)), d_state)
    for part in reversed(chunk_parts(x.out.shape[1], options.chunk_size)):
        carry = chunk_loop(part, functools.partial(step, part), carry, backwards=True)
    d_tokens, d_parameters, d_state = carry

    def summed(gradient: Array, array: Array) -> Array:
        return gradient.sum(0, keepdims=True) if array.shape[0] == 1 else gradient

    return d_tokens, jax.tree.map(summed, d_parameters, x.parameters), d_state


def _chunk(
    options: Options,
    begins: Bool[Array, "B C"] | None,
    parameters: Parameters,
    state: Any,
    tokens: Any,
) -> tuple[Array, Any]:
    """Returns the output of a chunk, in the dtype of the state, and the state after it."""
    chunk = {"gated": _gated, "selective": _selective, "softmax": _softmax}[options.scan]
    wide = jax.tree.leaves(state)[0].dtype
    return chunk(options, begins, parameters, state, jax.tree.map(lambda a: a.astype(wide), tokens))


def _gated(
    _: Options,
    begins: Bool[Array, "B C"] | None,
    __: Parameters,
    state: ScanState,
    tokens: Gated,
) -> tuple[Float[Array, "B C D"], ScanState]:
    hidden = _recurrence(_kept(tokens.log_decay, begins), tokens.x, state.hidden)
    return hidden, ScanState(hidden[:, -1])


def _selective(
    options: Options,
    begins: Bool[Array, "B C"] | None,
    parameters: Parameters,
    state: ScanState,
    tokens: Selective,
) -> tuple[Float[Array, "B C D"], ScanState]:
    bias, skip = parameters.bias, parameters.skip
    delta = tokens.delta if bias is None else tokens.delta + bias[:, None]
    delta = jax.nn.softplus(delta) if options.softplus else delta
    b, c = (per_channel(array, tokens.x.shape[2]) for array in (tokens.b, tokens.c))
    log_decay = _kept(delta[:, :, None] * parameters.a[:, None], begins)
    hidden = _recurrence(log_decay, (delta * tokens.x)[:, :, None] * b, state.hidden)
    out = jnp.sum(c * hidden, axis=2)
    if skip is not None:
        out += skip[:, None] * tokens.x
    return out, ScanState(hidden[:, -1])


def _softmax(
    _: Options,
    begins: Bool[Array, "B C"] | None,
    __: Parameters,
    state: SoftmaxState,
    tokens: Softmax,
) -> tuple[Float[Array, "B C N V"], SoftmaxState]:
    score = tokens.score
    value = jnp.repeat(tokens.value, score.shape[2] // tokens.value.shape[2], axis=2)
    # What is before a token that begins a segment counts exp(-inf) = 0 times as much.
    gap = jnp.zeros_like(score[..., :1])
    if begins is not None:
        gap = jnp.where(begins[..., None], -jnp.inf, gap)

    def combine(left: tuple, right: tuple) -> tuple:
        return left[0] + right[0], join(left[1], right[1], right[0])

    one = SoftmaxState(score, jnp.ones_like(score), value)
    gap, states = jax.lax.associative_scan(combine, (gap, one), axis=1)
    states = join(jax.tree.map(lambda array: array[:, None], state), states, gap)
    return read(states), jax.tree.map(lambda array: array[:, -1], states)


def _kept(log_decay: Float[Array, "B C *"], begins: Bool[Array, "B C"] | None) -> Array:
    """Returns the logarithm of what is left of the state before each token."""
    if begins is None:
        return log_decay
    begins = begins.reshape(*begins.shape, *(1,) * (log_decay.ndim - 2))
    return jnp.where(begins, -jnp.inf, log_decay)


@jax.custom_vjp
def _recurrence(
    log_decay: Float[Array, "B C *"], x: Float[Array, "B C *"], state: Float[Array, "B *"]
) -> Float[Array, "B C *"]:
    """Returns h_t = exp(log_decay_t) h_{t-1} + x_t for all tokens of a chunk.

    What is left of the state before the chunk is one exponential of a sum. A product of decays near
    1 has a rounding for each, all to the same side if they are equal: over the thousands of tokens
    that such a memory lasts, two or three digits.
    """
    # Made once, or XLA would make them again for every level of the scans.
    log_decay, decay, x = jax.lax.optimization_barrier((log_decay, jnp.exp(log_decay), x))
    return _joined(decay, x) + _passed(log_decay) * state[:, None]


def _passed(log_decay: Float[Array, "B C *"]) -> Float[Array, "B C *"]:
    return jnp.exp(jax.lax.associative_scan(jnp.add, log_decay, axis=1))


def _joined(decay: Array, x: Array, *, reverse: bool = False) -> Array:
    def combine(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    return jax.lax.associative_scan(combine, (decay, x), axis=1, reverse=reverse)[1]


def _recurrence_forward(log_decay: Array, x: Array, state: Array) -> tuple[Array, tuple]:
    hidden = _recurrence(log_decay, x, state)
    return hidden, (log_decay, state, hidden)


def _recurrence_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    log_decay, state, hidden = residuals
    decay = jnp.exp(log_decay)
    after = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    d_x = _joined(after, cotangent, reverse=True)
    before = jnp.concatenate([state[:, None], hidden[:, :-1]], axis=1)
    d_state = jnp.sum(_passed(log_decay) * cotangent, axis=1)
    return d_x * decay * before, d_x, d_state


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _cut(arrays: Any, start: Any, size: int) -> Any:
    """Cuts tokens out of arrays [B, T, ...]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1), arrays)


def _put(array: Array, chunk: Array, start: Any) -> Array:
    """Is the inverse of `_cut`."""
    return jax.lax.dynamic_update_slice_in_dim(array, chunk.astype(array.dtype), start, axis=1)


def _by_row(x: Inputs) -> Parameters:
    """Returns the parameters for every row of the batch.

    Their gradients are summed over the batch once: where XLA has sharded it, a sum in every chunk
    would be a collective in every chunk.
    """
    batch = x.out.shape[0]
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape[1:])), x.parameters)


def _zeros(x: Inputs, shape: tuple[int, ...], dtype: Any) -> Array:
    # Made from an input so that inside of a shard_map it varies as the inputs do.
    return jnp.zeros_like(x.tokens[0], shape=shape, dtype=dtype)
