"""Linear attention as Pallas kernels for Hopper GPUs: see docs/kernels.md.

Here is what all calls have in common: features of queries and keys, sums of weights, heads that
memories share. How memories are walked is in `gpu_scalar`, `gpu_prepared` and `gpu_noncausal`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear import (
    features,
    gpu_noncausal,
    gpu_prepare_gradient,
    gpu_prepared,
    gpu_scalar,
)
from pallas_kernels.linear.gpu_call import Call, Spans
from pallas_kernels.linear.gpu_features import MAPS, NOTHING, TAYLOR, unmapped
from pallas_kernels.linear.gpu_proved import PROVED
from pallas_kernels.linear.gpu_walk import CHUNK
from pallas_kernels.linear.inputs import Inputs, Options, finite
from pallas_kernels.tpu import padded

__all__ = ["backward", "forward", "forward_keeping", "supports", "unproved"]

unproved = PROVED.unproved

MOST_FEATURES, MOST_FEATURES_FLOAT32 = 256, 192
"""Rows or columns of a memory, filled up: with the sums of weights there are more columns."""

MOST_FEATURES_ERASED_FLOAT32 = 128
"""Rows for which there is space for what the delta rule erases, too."""

COUNTS = 2
"""Values of 1 that count keys where outputs are divided by sums of weights: see `backward`."""

_FIELDS = {"log_decay": "logs", "key_sum": "memory", "momentum": "memory"}
"""Where inputs are in a `Call`, if not under their own names."""


def supports(*, options: Options, inputs: Inputs) -> str | None:
    """Returns why the kernels do not serve a call, or None."""
    if inputs.query.dtype == jnp.float64:
        return "it does not compute in float64"
    if not options.causal and inputs.runs is not None:
        return "it has no segments if causal is False"
    if options.kept % CHUNK:
        return f"chunk_size must divide 256 or be a multiple of {CHUNK}; got {options.chunk_size}"
    exact = inputs.precision == jnp.float32
    most = MOST_FEATURES_FLOAT32 if exact else MOST_FEATURES
    normalised, momentum = options.epsilon is not None, inputs.log_momentum is not None
    rows, of_rows = most, ""
    if momentum:  # two memories, of whole 64 rows
        rows, of_rows = most // 2 // gpu.FEATURES * gpu.FEATURES, " with momentum"
    elif exact and inputs.beta is not None:
        rows, of_rows = MOST_FEATURES_ERASED_FLOAT32, " by the delta rule"
    sizes = {
        "features": (features.count(options.feature_map, inputs.query.shape[3]), rows, of_rows),
        "values": (
            inputs.value.shape[3],
            most - COUNTS * normalised,
            ", as the output is normalised" * normalised,
        ),
    }
    for what, (size, limit, why) in sizes.items():
        if size > limit:
            return f"{what} of {inputs.query.dtype} must be at most {limit}{why}; got {size}"
    return None


def forward(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns the output in the dtype of the query, and the state after the last token."""
    return _forward(options, Inputs(*inputs), keep=False)


def forward_keeping(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns, too, what the backward needs: the states before each group of `options.kept`."""
    return _forward(options, Inputs(*inputs), keep=True)


def _forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Array, ...]:
    out_dtype = x.precision if options.epsilon is None else jnp.float32
    fused = _fused(options, x)
    call = _call(options, x, _arrays(options, x, fused=fused), out_dtype, fused)
    out, memory, kept = _walks(options, x).forward(call, keep=keep)
    out = out[:, : x.query.shape[1]]
    if options.epsilon is not None:
        out = options.scale * out[..., :-COUNTS] / (out[..., -COUNTS:][..., :1] + options.epsilon)
    states = (memory, kept) if keep else (memory,)
    return out.astype(x.query.dtype), *(part for s in states for part in _unpacked(options, x, s))


def backward(options: Options, names: Sequence[str], *arguments: Array | None) -> tuple[Array, ...]:
    """Returns the gradients of the inputs with these names, see `xla.backward`."""
    count = len(Inputs._fields)
    x, rest = Inputs(*arguments[:count]), arguments[count:]
    states = len(x.state_shapes(options))
    kept, d_out, d_memory = rest[:states], rest[states], rest[states + 1 :]
    wanted = {_FIELDS.get(name, name) for name in names}

    def arrays(given: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        found = _arrays(options, x._replace(**given), by_token="log_decay" in names)
        return {name: found[name] for name in wanted}, found

    given = {name: getattr(x, name) for name in names}
    _, pull, found = jax.vjp(arrays, given, has_aux=True)
    alone = x.query.shape[2] == x.key.shape[2] == x.value.shape[2]
    given = found
    if fused := _fused(options, x, backward=True):
        plain = _arrays(options, x, fused=fused)
        given = found | {name: plain[name] for name in ("query", "key")}
    call = _call(options, x, given, x.precision if alone else jnp.float32, fused)
    if options.epsilon is not None:
        # Of what is divided, and of what it is divided by.
        sums = _walks(options, x).forward(call._replace(out_dtype=jnp.float32), keep=False)[0]
        sums = sums[:, : x.query.shape[1]]
        weights = sums[..., -COUNTS:][..., :1] + options.epsilon
        d_out = options.scale * d_out.astype(jnp.float32) / weights
        d_weights = -jnp.sum(d_out * sums[..., :-COUNTS], axis=-1, keepdims=True) / weights
        # Much of it cancels what is of the values, so that it is as exact as two numbers are.
        high = d_weights.astype(jnp.bfloat16).astype(jnp.float32)
        d_out = jnp.concatenate([d_out, high, d_weights - high], axis=-1)
        d_counts = jnp.stack([d_memory[1], jnp.zeros_like(d_memory[1])], axis=-1)
        d_memory = jnp.concatenate([d_memory[0], d_counts], axis=-1)
    else:
        d_out = options.scale * d_out.astype(jnp.float32)
        d_memory = _packed(options, d_memory)
    d_out = padded(d_out.astype(x.precision), 1, call.query.shape[1])
    gradients = _walks(options, x).backward(call, wanted, _packed(options, kept), d_out, d_memory)
    gradients = {name: _folded(gradient, found[name]) for name, gradient in gradients.items()}
    gradients = pull(gradients)[0]
    return tuple(gradients[name] for name in names)


def _walks(options: Options, x: Inputs) -> Any:
    """Returns the module that serves a call."""
    if not options.causal:
        return gpu_noncausal
    by_row = x.log_decay is not None and x.log_decay.ndim == 4
    others = x.beta is not None or x.log_momentum is not None
    return gpu_prepared if by_row or others else gpu_scalar


def _call(
    options: Options, x: Inputs, arrays: dict[str, Array], out_dtype: DTypeLike, fused: bool
) -> Call:
    """Returns a call of these arrays; if `fused` kernels are to make features."""
    return Call(
        **arrays,
        spans=Spans.of(options, x),
        scale=options.scale if options.epsilon is None else 1.0,
        dtype=x.precision,
        out_dtype=out_dtype,
        count=x.query.shape[1],
        feature_map=options.feature_map if fused else None,
    )


def _fused(options: Options, x: Inputs, *, backward: bool = False) -> bool:
    """Returns whether kernels map queries and keys to features themselves."""
    walks = _walks(options, x)
    if options.feature_map == TAYLOR:  # which are no values
        return walks is gpu_scalar and not backward
    # What XLA prepares, and its derivative of what is prepared, is of features.
    by_kernel = gpu_prepare_gradient.serves(x.precision, x.log_momentum)
    by_xla = x.log_momentum is not None or (backward and not by_kernel)
    return options.feature_map in MAPS and not (walks is gpu_prepared and by_xla)


def _arrays(
    options: Options, x: Inputs, *, by_token: bool = False, fused: bool = False
) -> dict[str, Array | None]:
    """Returns the arrays of a `Call`.

    Args:
      options: of the call.
      x: its inputs.
      by_token: whether logarithms are to be those of each token.
      fused: whether queries and keys are what kernels make features of.
    """
    batch, count = x.query.shape[:2]
    fill = NOTHING.get(options.feature_map, 0) if fused else 0
    tokens, keys = (gpu.whole(array.shape[1], CHUNK) for array in (x.query, x.key))

    def mapped(array: Array) -> Array:
        if fused:
            array = unmapped(options.feature_map, array)
        elif options.feature_map is not None:
            array = features.mapped(options.feature_map, array.astype(jnp.float32))
        if x.log_momentum is not None:
            array = padded(array, 3, gpu.whole(array.shape[3]))
        return array.astype(x.precision)

    logs, value = x.log_decay, x.value.astype(x.precision)
    if x.runs is not None or (logs is not None and logs.ndim == 2):
        if x.runs is not None or by_token or tokens != count:
            # Padding must not decay the last state.
            zeros = jnp.zeros_like(x.query, shape=(batch, x.heads), dtype=jnp.float32)
            logs = zeros if logs is None else logs
            shape = batch, count, x.heads
            logs = logs if logs.ndim > 2 else jnp.broadcast_to(logs[:, None], shape)
        else:
            logs = jnp.broadcast_to(logs[:, None], (logs.shape[0], CHUNK, x.heads))
    begins, momentum = x.begins, x.log_momentum
    if begins is not None:
        logs = jnp.where(begins.reshape(*begins.shape, *(1,) * (logs.ndim - 2)), -jnp.inf, logs)
    if momentum is not None:
        if begins is not None:
            momentum = jnp.where(begins[..., None], -jnp.inf, momentum)
            begins = padded(begins, 1, tokens)
        momentum = padded(finite(momentum.astype(jnp.float32)), 1, tokens)
    if logs is not None:
        logs = finite(logs.astype(jnp.float32))
        logs = logs if logs.shape[1] == CHUNK else padded(logs, 1, tokens)
    if options.epsilon is not None:
        ones = jnp.ones_like(value, shape=(*value.shape[:3], COUNTS))
        value = jnp.concatenate([value, ones], axis=-1)
    return {
        "query": padded(mapped(x.query), 1, tokens, fill),
        "key": padded(mapped(x.key), 1, keys, fill),
        "value": padded(value, 1, keys),
        "logs": logs,
        "beta": None if x.beta is None else padded(x.beta.astype(jnp.float32), 1, tokens),
        "memory": _packed(options, tuple(x.initial_state(options).values())),
        "log_momentum": momentum,
        "begins": None if momentum is None else begins,
    }


def _packed(options: Options, state: Sequence[Array]) -> Float[Array, "*lead F V"]:
    """Returns the memory, with the sum of keys in more columns, or momentum in more rows."""
    if options.epsilon is None:
        if len(state) == 1:
            return state[0]
        rows = gpu.whole(state[0].shape[-2])
        return jnp.concatenate([padded(part, part.ndim - 2, rows) for part in state], axis=-2)
    return jnp.concatenate([state[0], *(state[1][..., None],) * COUNTS], axis=-1)


def _unpacked(options: Options, x: Inputs, memory: Float[Array, "*lead F V"]) -> tuple[Array, ...]:
    """Is the inverse of `_packed`."""
    if options.epsilon is None:
        parts = jnp.split(memory, 2, axis=-2) if x.log_momentum is not None else (memory,)
        rows = features.count(options.feature_map, x.query.shape[3])
        return tuple(part[..., :rows, :] for part in parts)
    return memory[..., :-COUNTS], memory[..., -COUNTS]


def _folded(gradient: Array, array: Array) -> Array:
    """Returns the gradient of an array, from that of what memories read of it."""
    if gradient.ndim == 4 and gradient.shape != array.shape:
        heads = array.shape[2]
        gradient = jnp.sum(gradient.reshape(*gradient.shape[:2], heads, -1, gradient.shape[3]), 3)
    return gradient.astype(array.dtype)
