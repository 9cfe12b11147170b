"""Scans: recurrences in which no token ever sees another, but through a state.

The gated scan, with a decay a_t = exp(log_decay_t) for each token and channel,

    h_t = a_t h_{t-1} + x_t,    y_t = h_t

The selective scan, S6, with a step, an input vector and an output vector that depend on the token;
each channel d has a state of its own, of N numbers (A and h are [N, D] here),

    h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t,    y_t = C_t . h_t + D x_t

The softmax scan, attention to all tokens so far by a query that is always the same (Aaren),

    y_t = sum_{i<=t} exp(s_i) v_i / sum_{i<=t} exp(s_i)

with a state of three parts (m, u, w): the largest score, and the two sums relative to exp(m).

The time is linear in the number of tokens and the state does not grow. Nothing is ever divided by
a decay and no exponent above 0 is formed of decays up to 1, so they may be anything from 0. Where
the segment changes, the state begins anew. A scan that is called with the state of an earlier one
continues it: the step form of each is a call of one token, or of several. Output and last state
are differentiable in all inputs, and the backward computes the states again, chunk by chunk.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choose, partition
from pallas_kernels.checks import segment_begins
from pallas_kernels.scan import gpu, reference, tpu, xla
from pallas_kernels.scan.inputs import (
    Gated,
    Inputs,
    Options,
    Parameters,
    ScanState,
    Selective,
    Softmax,
    SoftmaxState,
    kept_dims,
)

__all__ = ["ScanState", "SoftmaxState", "gated_scan", "selective_scan", "softmax_scan"]

IMPLEMENTATIONS = {"xla": xla, "reference": reference, "pallas_tpu": tpu, "pallas_gpu": gpu}

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
"""The implementation that has the kernels for a platform."""

CHUNK_SIZE = 128
"""Tokens in a chunk."""


def gated_scan(
    x: Float[ArrayLike, "B T D"],
    log_decay: Float[ArrayLike, "B T D"],
    *,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: ScanState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], ScanState]:
    """Computes h_t = exp(log_decay_t) h_{t-1} + x_t for every channel.

    The state is in float32 (float64 for float64 x). First derivatives exist in reverse mode; the
    implementation "reference" has all.

    Args:
      x: what each token adds.
      log_decay: logarithm of what is left of the state before, in any floating dtype: the decays
        near 1 that a long memory needs would be rounded to 1 in bfloat16. -inf is a decay of 0,
        with a gradient of 0.
      segment_ids: document of each token. A token whose number differs from that of the token
        before begins with a state of zero; equal numbers further apart are different segments.
      initial_state: the state before the first token, whose segment it belongs to; None for zero.
      return_state: whether to return the state after the last token, which is that of its segment.
      chunk_size: tokens from one state that is kept for the backward to the next, of no influence
        on the result but by rounding; None for `CHUNK_SIZE`.
      implementation: see `pallas_kernels.choose`.

    Returns:
      The state after each token, in the dtype of x, and the last one as a `ScanState` if asked for.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    x = _floating(x, "x", "B T D")
    log_decay = _floating(log_decay, "log_decay", "B T D", B=len(x), T=x.shape[1], D=x.shape[2])
    state = _hidden(initial_state, x, (x.shape[0], x.shape[2]))
    return _called(
        "gated",
        Gated(x, log_decay),
        Parameters(),
        ("x", "log_decay"),
        state,
        segment_ids=segment_ids,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def selective_scan(
    x: Float[ArrayLike, "B T D"],
    delta: Float[ArrayLike, "B T D"],
    A: Float[ArrayLike, "D N"],
    B: Float[ArrayLike, "B T N"] | Float[ArrayLike, "B T G N"],
    C: Float[ArrayLike, "B T N"] | Float[ArrayLike, "B T G N"],
    *,
    D: Float[ArrayLike, "D"] | None = None,
    delta_bias: Float[ArrayLike, "D"] | None = None,
    softplus: bool = True,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: ScanState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], ScanState]:
    """Computes the selective scan of Mamba, S6 (see the module).

    The state and all sums are in float32 (float64 for float64 x). The states of tokens are never
    written to memory. Bias and softplus of the step are applied inside, so that it is read as it
    is, in the dtype of x and before it is widened; a gate of the output stays outside, where XLA
    makes it part of what comes next. First derivatives exist in reverse mode; the implementation
    "reference" has all.

    Args:
      x: the input of each channel.
      delta: the step, before bias and softplus.
      A: the rates, below 0 for a state that fades.
      B: the input vectors, for all channels or for G groups of D / G consecutive channels.
      C: the output vectors, likewise.
      D: what of the input goes straight to the output; None for nothing.
      delta_bias: is added to the step; None for nothing.
      softplus: whether the step is softplus(delta + delta_bias), or that sum itself.
      segment_ids: as in `gated_scan`.
      initial_state: the state before the first token, [B, N, D]; None for zero.
      return_state: whether to return the state after the last token.
      chunk_size: as in `gated_scan`.
      implementation: see `pallas_kernels.choose`.

    Returns:
      The output in the dtype of x, and the last state if asked for.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    x = _floating(x, "x", "B T D")
    batch, tokens, channels = x.shape
    delta = _floating(delta, "delta", "B T D", B=batch, T=tokens, D=channels)
    A = _floating(A, "A", "D N", D=channels)
    sizes = dict(B=batch, T=tokens, N=A.shape[1])
    B, C = jnp.asarray(B), jnp.asarray(C)
    grouped = B.ndim == 4
    B = _floating(B, "B", "B T G N" if grouped else "B T N", **sizes)
    if grouped and channels % B.shape[2]:
        raise ValueError(f"B: {B.shape[2]} groups do not divide the {channels} channels of x")
    sizes |= dict(G=B.shape[2]) if grouped else {}
    C = _floating(C, "C", "B T G N" if grouped else "B T N", **sizes)
    if not grouped:
        B, C = B[:, :, None], C[:, :, None]
    dtype = _accumulator(x)
    vectors = (
        None if array is None else _floating(array, name, "D", D=channels).astype(dtype)[None]
        for array, name in ((D, "D"), (delta_bias, "delta_bias"))
    )
    return _called(
        "selective",
        Selective(x, delta, B, C),
        Parameters(A.T.astype(dtype)[None], *vectors),
        ("x", "delta", "B", "C"),
        _hidden(initial_state, x, (batch, A.shape[1], channels)),
        softplus=bool(softplus),
        segment_ids=segment_ids,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def softmax_scan(
    score: Float[ArrayLike, "B T N"],
    value: Float[ArrayLike, "B T K V"],
    *,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: SoftmaxState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
    function: str = "softmax_scan",
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], SoftmaxState]:
    """Computes for every token the mean of all values so far, weighted by exp(score).

    The state is in float32 (float64 for float64 values). Its maximum only says what the sums are
    relative to: gradients are right for all that does not depend on it, such as a scan that
    continues, w / u, or m + log(u). First derivatives exist in reverse mode; the implementation
    "reference" has all.

    Args:
      score: logit of each token, of any size; -inf leaves the token out.
      value: K divides N, and each head of values serves N / K consecutive heads of scores.
      segment_ids: as in `gated_scan`.
      initial_state: the state before the first token; None for that of no tokens, (-inf, 0, 0).
      return_state: whether to return the state after the last token.
      chunk_size: as in `gated_scan`.
      implementation: see `pallas_kernels.choose`.
      function: the public name of the call, for messages.

    Returns:
      The output in the dtype of value, zeros where there is no token to attend to, and the last
      state if asked for.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    score = _floating(score, "score", "B T N")
    batch, tokens, heads = score.shape
    value = _floating(value, "value", "B T K V", B=batch, T=tokens)
    if heads % value.shape[2]:
        raise ValueError(f"value: {value.shape[2]} heads do not divide the {heads} heads of score")
    dtype, rows = _accumulator(value), (batch, heads)
    shapes = dict(maximum=rows, total=rows, weighted=(*rows, value.shape[3]))
    if initial_state is None:
        parts = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
        initial_state = SoftmaxState(**parts | dict(maximum=jnp.full(rows, -jnp.inf, dtype)))
    return _called(
        "softmax",
        Softmax(score, value),
        Parameters(),
        ("score", "value"),
        _checked_state(initial_state, SoftmaxState, shapes, dtype),
        function=function,
        segment_ids=segment_ids,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def _called(
    scan: str,
    tokens: Any,
    parameters: Parameters,
    names: Sequence[str],
    state: Any,
    *,
    segment_ids: ArrayLike | None,
    return_state: bool,
    chunk_size: int | None,
    implementation: str | None,
    softplus: bool = False,
    function: str | None = None,
) -> Any:
    """Calls the implementation of a scan; `names` are those of the tokens, for messages."""
    if chunk_size is None:
        chunk_size = CHUNK_SIZE
    elif not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: must be a positive integer or None; got {chunk_size!r}")
    begins = None if segment_ids is None else segment_begins(segment_ids, tokens[0].shape[:2])
    inputs = Inputs(tokens, parameters, begins, state)
    axes = partition.current_axes()
    options = Options(scan, chunk_size, softplus, axes, implementation)
    choose.resolve_implementation(
        implementation,
        {name: module.supports for name, module in IMPLEMENTATIONS.items()},
        function=function or f"{scan}_scan",
        options=options,
        inputs=inputs,
    )
    inputs = _aligned(inputs, axes, names)
    out, state = (_defined if implementation == "reference" else _scan)(options, inputs)
    return (out, state) if return_state else out


def _aligned(x: Inputs, axes: partition.Axes, names: Sequence[str]) -> Inputs:
    """Returns the inputs with types that agree, see `partition`."""
    owners = (*names, "A", "D", "delta_bias", "segment_ids", "initial_state")
    arrays, dims = ((*y.tokens, *y.parameters, y.begins, y.state) for y in (x, x.dims))
    args, ins, owners = ((*(of[i] for i in x.guides), *of) for of in (arrays, dims, owners))
    _, _, *arrays = partition.aligned(args, ins, axes, owners)
    tokens, (*parameters, begins, state) = arrays[: len(x.tokens)], arrays[len(x.tokens) :]
    return Inputs(type(x.tokens)(*tokens), Parameters(*parameters), begins, state)


def _on_shards(
    how: Callable[..., Any],
    options: Options,
    fn: Callable[..., Any],
    outs: Any,
    inputs: Inputs,
    *more: tuple[Any, Any],
) -> Any:
    """Calls a function of local arrays; the dimensions of its results are a tree, `outs`.

    Args:
      how: `partition.partitioned` or `partition.sharded`.
      options: of the call.
      fn: takes the inputs and more.
      outs: dimensions of the results.
      inputs: the inputs.
      *more: pairs of further arguments and their dimensions.
    """
    dims = inputs.dims
    guides, guide_dims = ([of.tokens[i] for i in inputs.guides] for of in (inputs, dims))

    def local(_: Any, *args: Any) -> list[Array]:
        return jax.tree.leaves(fn(*args))

    ins = (guide_dims, dims, *(letters for _, letters in more))
    args = (guides, inputs, *(array for array, _ in more))
    results = how(local, ins, jax.tree.leaves(outs), options.axes)(*args)
    return jax.tree.structure(outs).unflatten(results)


def _implemented(function: str, options: Options, inputs: Inputs) -> Callable[..., Any]:
    """Returns a function of the implementation that serves a call.

    What the forward keeps means the same in all of them.
    """
    return choose.implemented(
        function,
        IMPLEMENTATIONS,
        KERNELS,
        options.implementation,
        options,
        function=f"{options.scan}_scan",
        options=options,
        inputs=inputs,
    )


@functools.partial(jax.jit, static_argnums=0)
def _defined(options: Options, inputs: Inputs) -> tuple[Array, Any]:
    forward = functools.partial(reference.forward, options)
    return _on_shards(partition.sharded, options, forward, inputs.results, inputs)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: Options, inputs: Inputs) -> tuple[Array, Any]:
    forward = _implemented("forward", options, inputs)
    return _on_shards(partition.partitioned, options, forward, inputs.results, inputs)


def _scan_forward(options: Options, inputs: Inputs) -> tuple[tuple[Array, Any], tuple]:
    forward = _implemented("forward_keeping", options, inputs)
    outs = (*inputs.results, kept_dims(inputs.dims.state))
    out, state, kept = _on_shards(partition.partitioned, options, forward, outs, inputs)
    return (out, state), (inputs, kept)


def _scan_backward(options: Options, residuals: tuple, cotangents: tuple) -> tuple[Inputs]:
    inputs, kept = residuals
    dims = inputs.dims
    backward = _implemented("backward", options, inputs)
    given = zip((kept, *cotangents), (kept_dims(dims.state), *inputs.results), strict=True)
    tokens, parameters, state = _on_shards(
        partition.partitioned,
        options,
        backward,
        (dims.tokens, dims.parameters, dims.state),
        inputs,
        *given,
    )
    return (Inputs(tokens, parameters, None, state),)


_scan.__wrapped__.defvjp(_scan_forward, _scan_backward)


def _accumulator(array: Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)


def _floating(array: ArrayLike, name: str, dims: str, **sizes: int) -> Array:
    """Returns an argument as an array, checked.

    Args:
      array: the argument.
      name: its name.
      dims: letters of its dimensions.
      **sizes: what some of them must be.
    """
    array, letters = jnp.asarray(array), dims.split()
    wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    fits = array.ndim == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, array.shape, strict=True)
    )
    if not fits or 0 in array.shape:
        raise ValueError(f"{name}: must have shape [{wanted}]; got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: must be floating point; got {array.dtype}")
    return array


def _hidden(state: ScanState | None, x: Array, shape: tuple[int, ...]) -> ScanState:
    dtype = _accumulator(x)
    state = ScanState(jnp.zeros(shape, dtype)) if state is None else state
    return _checked_state(state, ScanState, {"hidden": shape}, dtype)


def _checked_state(state: Any, kind: type, shapes: dict[str, tuple[int, ...]], dtype: Any) -> Any:
    """Returns an initial state in the dtype of states."""
    if not isinstance(state, kind):
        raise TypeError(f"initial_state: must be a {kind.__name__}; got {type(state).__name__}")
    parts = {}
    for name, shape in shapes.items():
        sizes = dict(zip("abcd", shape, strict=False))
        part = _floating(getattr(state, name), f"initial_state: {name}", " ".join(sizes), **sizes)
        parts[name] = part.astype(dtype)
    return kind(**parts)
