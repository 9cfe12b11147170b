"""Linear attention: a memory of keys and values that each token adds to and each query reads.

With queries q, keys k, values v and a decay lam = exp(log_decay) in [0, 1], for every head

    S_t = lam S_{t-1} + k_t^T v_t,    o_t = scale q_t S_t

so that o_t = scale sum_{j<=t} lam^(t-j) (q_t . k_j) v_j: the time is linear in the number of tokens
and the state S, [H, V], does not grow. Where the segment changes, S begins anew from zero. Output
and last state are differentiable in all inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choose, partition
from pallas_kernels.checks import check_arrays
from pallas_kernels.linear import reference, xla
from pallas_kernels.linear.inputs import Inputs, Options

IMPLEMENTATIONS = {"xla": xla, "reference": reference}

CHUNK_SIZE = 64
"""Tokens in a chunk of "xla"."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """What linear attention carries from token to token; its size does not depend on their number.

    Attributes:
      memory: the sum of decayed products of keys and values, float32 (float64 for float64 inputs).
    """

    memory: Float[Array, "B N H V"]


def linear_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    log_decay: Float[ArrayLike, "N"] | None = None,
    scale: float | Float[Array, ""] = 1.0,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
    function: str = "linear_attention",
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], LinearState]:
    """Computes causal linear attention (see the module) in O(T) time and memory.

    Memory and sums are in float32 (float64 for float64 queries), products in the precision of the
    query; "xla" takes those of float16 in float32. First derivatives exist in reverse mode; the
    implementation "reference" has all.

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise; V may differ from H.
      log_decay: logarithm of each query head's decay per token, at most 0; -inf for a decay of 0
        (a token sees itself only), None for none. Values above 0 are refused where they are known
        before the program runs, that is in tuples and NumPy arrays.
      scale: factor of the output; a float, or a scalar array, which is differentiable.
      segment_ids: document of each token. A token whose number differs from that of the token
        before begins with an empty memory; equal numbers further apart are different segments.
      initial_state: the memory before the first token, whose segment it belongs to; None for zero.
      return_state: whether to return the memory after the last token, which is that of its segment.
      chunk_size: tokens that "xla" takes at a time, of no influence on the result but by rounding;
        None for `CHUNK_SIZE`.
      implementation: see `pallas_kernels.choose`.
      function: name in error messages.

    Returns:
      The output in the dtype of query, and the state if asked for.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {array.dtype} must be query's, {query.dtype}")
    dtype = query.dtype
    accumulator = jnp.promote_types(dtype, jnp.float32)
    batch, tokens, heads, features = query.shape

    if not isinstance(scale, int | float | np.number):
        scale = jnp.asarray(scale)
        if scale.shape:
            raise ValueError(f"scale: must be a number or a scalar array; got shape {scale.shape}")
        # A scale that is traced goes into the query, with no rounding to its precision.
        query, scale = query.astype(accumulator) * scale.astype(accumulator), 1.0
    if chunk_size is None:
        chunk_size = CHUNK_SIZE
    elif not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: must be a positive integer or None; got {chunk_size!r}")

    memory = None
    if initial_state is not None:
        memory = _checked_memory(initial_state, (batch, heads, features, value.shape[3]))
        memory = memory.astype(accumulator)
    inputs = Inputs(
        query,
        key.astype(query.dtype),
        value.astype(query.dtype),
        None if log_decay is None else _checked_decay(log_decay, heads).astype(accumulator)[None],
        None if segment_ids is None else _runs(segment_ids, (batch, tokens)),
        memory,
    )
    axes = partition.current_axes()
    options = Options(float(scale), chunk_size, axes)
    name = choose.resolve_implementation(
        implementation,
        {name: module.supports for name, module in IMPLEMENTATIONS.items()},
        function=function,
        options=options,
        inputs=inputs,
    )
    names = ("query", "key", "value", "log_decay", "segment_ids", "initial_state")
    inputs = Inputs(*partition.aligned(inputs, inputs.dims, axes, names))
    out, memory = (_defined if name == "reference" else _attend)(options, inputs)
    out = out.astype(dtype)
    return (out, LinearState(memory)) if return_state else out


@functools.partial(jax.jit, static_argnums=0)
def _defined(options: Options, inputs: Inputs) -> tuple[Array, Array]:
    forward = functools.partial(reference.forward, options)
    return partition.sharded(forward, inputs.dims, ("btnv", "bnhv"), options.axes)(*inputs)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> tuple[Array, Array]:
    forward = functools.partial(xla.forward, options)
    ins = jax.tree.map(lambda dims: dims.replace("+", "b"), inputs.dims)
    return partition.partitioned(forward, ins, ("btnv", "bnhv"), options.axes)(*inputs)


def _attend_forward(options: Options, inputs: Inputs) -> tuple[tuple[Array, Array], tuple]:
    forward = functools.partial(xla.forward_keeping, options)
    ins = jax.tree.map(lambda dims: dims.replace("+", "b"), inputs.dims)
    outs = ("btnv", "bnhv", "bcnhv")
    out, memory, memories = partition.partitioned(forward, ins, outs, options.axes)(*inputs)
    return (out, memory), (inputs, memories)


def _attend_backward(options: Options, residuals: tuple, cotangents: tuple) -> tuple[Inputs]:
    inputs, memories = residuals
    backward = functools.partial(xla.backward, options)
    given = {n: d for n, d in zip(Inputs._fields, inputs.dims, strict=True) if d and n != "runs"}
    ins = (*inputs.dims, "bcnhv", "btnv", "bnhv")
    gradients = partition.partitioned(backward, ins, tuple(given.values()), options.axes)(
        *inputs, memories, *cotangents
    )
    gradients = dict(zip(given, gradients, strict=True))
    return (Inputs(**dict.fromkeys(Inputs._fields) | gradients),)


_attend.__wrapped__.defvjp(_attend_forward, _attend_backward)


def _checked_memory(state: LinearState, shape: tuple[int, ...]) -> Array:
    if not isinstance(state, LinearState):
        raise TypeError(f"initial_state: must be a LinearState; got {type(state).__name__}")
    memory = jnp.asarray(state.memory)
    if memory.shape != shape:
        raise ValueError(f"initial_state: memory of shape {memory.shape} must have shape {shape}")
    if not jnp.issubdtype(memory.dtype, jnp.floating):
        raise TypeError(f"initial_state: memory must be floating point; got {memory.dtype}")
    return memory


def _checked_decay(log_decay: ArrayLike, heads: int) -> Array:
    if not isinstance(log_decay, jax.Array):
        log_decay = np.asarray(log_decay, np.float64)
        if not np.all(log_decay <= 0):
            raise ValueError(f"log_decay: must be at most 0; got {log_decay}")
    log_decay = jnp.asarray(log_decay)
    if log_decay.shape != (heads,):
        raise ValueError(
            f"log_decay: must have shape ({heads},), one for each head of query; got "
            f"{log_decay.shape}"
        )
    if not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise TypeError(f"log_decay: must be floating point; got {log_decay.dtype}")
    return log_decay


def _runs(segment_ids: ArrayLike, shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """Numbers the runs of equal ids of each row, from 0."""
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != shape:
        raise ValueError(f"segment_ids: must have shape {shape}; got {segment_ids.shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids: must be integers; got {segment_ids.dtype}")
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(begins, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
