"""The softmax scan as Pallas kernels for Hopper GPUs: see `gpu_rows`.

A thread has one number of the values of one head, and with it the maximum and the total of the
head, the same as its neighbours have: it shares nothing with them. The gradients of totals and
scores are sums over the numbers of a head; each thread has its part, and XLA adds them up.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.scan import gpu_rows
from pallas_kernels.scan.gpu_rows import Scan, State, channels, state_of
from pallas_kernels.scan.gpu_tiles import BEGINS, Columns, Tiling, rows_of, where
from pallas_kernels.scan.inputs import Inputs, Options, Parameters, Softmax, SoftmaxState


def cut(options: Options, x: Inputs, *, whole: bool = False) -> Tiling:
    """Returns how a call is cut; its last chunk is filled up if it is to be `whole`."""
    batch, tokens, heads, width = x.out.shape
    return gpu_rows.cut(options, (batch, tokens, heads * width), whole=whole)


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    tiling = cut(options, x)
    tile, initial = _tile(tiling, x), _rows(x.state, 1)
    results = gpu_rows.forward(_scan(x), tiling, tile, initial, x.out.dtype, keep=keep)
    heads = x.out.shape[2:]

    def state(rows: Array) -> SoftmaxState:
        maximum, total, weighted = (_of_heads(rows[..., i, :], heads) for i in range(3))
        return SoftmaxState(maximum[..., 0], total[..., 0], weighted)

    states = (state(results[name]) for name in ("last", "kept") if name in results)
    return _of_heads(results["out"][:, : x.out.shape[1]], heads), *states


def backward(
    options: Options, x: Inputs, kept: SoftmaxState, d_out: Array, d_state: SoftmaxState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    tiling = cut(options, x, whole=True)
    batch, tokens, heads, width = x.out.shape
    value_heads = x.tokens.value.shape[2]
    shared = heads != value_heads
    dtypes = {"score": jnp.float32, "value": jnp.float32 if shared else x.tokens.value.dtype}
    # The gradient of a total is the sum of parts: all of it is that of the first number.
    first = jnp.zeros((*d_state.total.shape, width), jnp.float32).at[..., 0].set(d_state.total)
    d_last = jnp.stack([_flat(first), _flat(d_state.weighted)], axis=1)
    d_out = tiling.by_token(_flat(d_out))
    results = gpu_rows.backward(
        _scan(x), tiling, _tile(tiling, x), d_out, _rows(kept, 2), d_last, dtypes
    )
    score, value = (_of_heads(results[n][:, :tokens], (heads, width)) for n in Softmax._fields)
    if shared:
        value = value.reshape(batch, tokens, value_heads, -1, width).sum(3)
    total, weighted = (_of_heads(results["initial"][:, i], (heads, width)) for i in range(2))
    total = total.sum(-1)
    # What a state is relative to scales both of its sums.
    maximum = total * x.state.total + jnp.sum(weighted * x.state.weighted, axis=-1)
    gradients = score.sum(-1).astype(x.tokens.score.dtype), value.astype(x.tokens.value.dtype)
    return Softmax(*gradients), Parameters(), SoftmaxState(maximum, total, weighted)


def _flat(array: Array) -> Array:
    """Returns [..., N, V] as channels, filled up."""
    return channels(array.reshape(*array.shape[:-2], -1))


def _of_heads(array: Array, heads: tuple[int, int]) -> Array:
    """Returns channels as [..., N, V]."""
    return array[..., : heads[0] * heads[1]].reshape(*array.shape[:-1], *heads)


def _rows(state: SoftmaxState, axis: int) -> Array:
    """Returns states as rows of channels."""
    heads = (state.maximum, state.total)
    heads = (jnp.broadcast_to(x[..., None], state.weighted.shape) for x in heads)
    return jnp.stack([_flat(part) for part in (*heads, state.weighted)], axis=axis)


def _tile(tiling: Tiling, x: Inputs) -> dict[str, Array]:
    """Returns the arrays of tokens; the score of those that are filled up is -inf."""
    _, tokens, heads, width = x.out.shape
    score, value = x.tokens
    score = jnp.broadcast_to(score[..., None], (*score.shape, width))
    value = jnp.repeat(value, heads // value.shape[2], axis=2)
    missing = ((0, 0), (0, tiling.tokens - tokens), (0, 0))
    score = jnp.pad(_flat(score), missing, constant_values=-jnp.inf)
    tile = {"score": score, "value": tiling.by_token(_flat(value))}
    return tile if x.begins is None else tile | tiling.flags(x.begins, tokens)


def _scan(x: Inputs) -> Scan:
    return Scan("softmax_scan", x.out.dtype == jnp.float32, _forward, _backward)


class Token(NamedTuple):
    """A token of a tile."""

    decay: Array
    """What is left of the sums before it."""
    weight: Array
    """What its value counts in them."""
    inverse: Array
    """One divided by the total after it, 0 if that is 0."""
    out: Array


def _tokens(
    parts: dict[str, Any], columns: Columns, value: list[Array], state: State
) -> tuple[list[Token], State]:
    """Returns the tokens of a tile, and the state after it."""
    found = []
    maximum, total, weighted = state
    for t, score in enumerate(rows_of(parts["score"], columns.inside)):
        if "flags" in parts:
            maximum = where(parts["flags"][t] == BEGINS, -jnp.inf, maximum)
        above = jnp.maximum(maximum, score)
        finite = jnp.where(above == -jnp.inf, 0.0, above)
        decay, weight = jnp.exp(maximum - finite), jnp.exp(score - finite)
        maximum, total = above, decay * total + weight
        weighted = decay * weighted + weight * value[t]
        inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
        found.append(Token(decay, weight, inverse, weighted * inverse))
    return found, [maximum, total, weighted]


def _forward(parts: dict[str, Any], columns: Columns, state: State) -> tuple[list[Array], State]:
    value = rows_of(parts["value"], columns.inside)
    tokens, state = _tokens(parts, columns, value, state)
    return [token.out for token in tokens], state


def _backward(
    parts: dict[str, Any], columns: Columns, d_state: State
) -> tuple[dict[str, list[Array]], State]:
    value, d_out = (rows_of(parts[name], columns.inside) for name in ("value", "d_out"))
    tokens, _ = _tokens(parts, columns, value, state_of(parts["before"], columns.inside))
    (d_total, d_weighted), d_score, d_value = d_state, [], []
    for t, token in reversed(list(enumerate(tokens))):
        divided = d_out[t] * token.inverse
        d_total -= divided * token.out
        d_weighted += divided
        d_score.insert(0, token.weight * (d_weighted * value[t] + d_total))
        d_value.insert(0, token.weight * d_weighted)
        d_total *= token.decay
        d_weighted *= token.decay
    return {"score": d_score, "value": d_value}, [d_total, d_weighted]
