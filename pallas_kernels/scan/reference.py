"""Scans one token after another: the definition."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
    """Returns None: the definition serves every call."""
    del call


def forward(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns the output and, as one pytree, the state after the last token."""
    step = {"gated": _gated, "selective": _selective, "softmax": _softmax}[options.scan]
    tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x.tokens, x.begins))

    def one(state: Any, token: tuple[Any, Array | None]) -> tuple[Any, Array]:
        token, begins = token
        wide = jax.tree.map(lambda array: array.astype(x.accumulator), token)
        if begins is not None:
            state = _dropped(state, begins)
        return step(options, x.parameters, state, wide)

    state, out = jax.lax.scan(one, x.state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(x.out.dtype), state


def _dropped(state: Any, begins: Array) -> Any:
    """Returns the state, that of no tokens where a segment begins."""

    def where(array: Array, empty: float = 0.0) -> Array:
        return jnp.where(begins.reshape(-1, *(1,) * (array.ndim - 1)), empty, array)

    if isinstance(state, ScanState):
        return ScanState(where(state.hidden))
    return SoftmaxState(where(state.maximum, -jnp.inf), where(state.total), where(state.weighted))


def _gated(_: Options, __: Parameters, state: ScanState, token: Gated) -> tuple[ScanState, Array]:
    hidden = jnp.exp(token.log_decay) * state.hidden + token.x
    return ScanState(hidden), hidden


def _selective(
    options: Options, parameters: Parameters, state: ScanState, token: Selective
) -> tuple[ScanState, Array]:
    delta = token.delta if parameters.bias is None else token.delta + parameters.bias
    delta = jax.nn.softplus(delta) if options.softplus else delta
    channels = token.x.shape[-1]
    b, c = (per_channel(array, channels) for array in (token.b, token.c))
    decay = jnp.exp(delta[:, None] * parameters.a)
    hidden = decay * state.hidden + (delta * token.x)[:, None] * b
    out = jnp.sum(c * hidden, axis=1)
    if parameters.skip is not None:
        out += parameters.skip * token.x
    return ScanState(hidden), out


def _softmax(
    _: Options, __: Parameters, state: SoftmaxState, token: Softmax
) -> tuple[SoftmaxState, Array]:
    value = jnp.repeat(token.value, token.score.shape[1] // token.value.shape[1], axis=1)
    state = join(state, SoftmaxState(token.score, jnp.ones_like(token.score), value))
    return state, read(state)
