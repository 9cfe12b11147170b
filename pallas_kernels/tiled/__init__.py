"""Tiled attention: exact softmax attention that never holds the matrix of scores.

With queries q, keys k and values v, query i at position i + offset among the keys, and c the soft
cap, for every head

    s_ij = c tanh(scale q_i . k_j / c) + bias_ij - slope |i + offset - j|
    p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)),    j over the keys that the mask allows
    o_i  = sum_j p_ij v_j
    lse_i = log(exp(sink) + sum_j exp(s_ij))

where every term that is not given is left out. A query that is allowed no key has o = 0, and
lse = -inf or the sink. The softmax is computed online, a tile of keys at a time (Rabe and Staats
2021), and the backward recomputes it from the log-sum-exp (Dao et al. 2022): residuals are the
inputs, o and lse. Both results are differentiable.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choose, partition
from pallas_kernels.checks import check_arrays
from pallas_kernels.masks import Mask, Shape, as_bound
from pallas_kernels.tiled import reference, xla
from pallas_kernels.tiled.inputs import Inputs, Options

IMPLEMENTATIONS = {"xla": xla, "reference": reference}


def tiled_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    scale: float | Float[Array, ""] | None = None,
    logits_soft_cap: float | None = None,
    bias: Float[ArrayLike, "B|1 N|1 T|1 S|1"] | None = None,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
    sink: Float[ArrayLike, "N"] | None = None,
    mask: Mask | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
    return_lse: bool = False,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    function: str = "tiled_attention",
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Computes exact attention (see the module) in O(T + S) memory.

    Scores, softmax and sums are in float32 (float64 for float64 queries), products in the precision
    of the query, into which keys and values are cast. First derivatives exist in reverse mode for
    query, key, value, scale, bias, slopes and sink; the implementation "reference" has all.

    The mask's ranges hide what stands at other positions altogether: queries and keys beyond
    `lengths`, and keys that by `causal`, `window` or `prefix` no query sees, may hold anything, NaN
    too, and get zero gradients.

    Args:
      query: float array. Rows of scores belong to it.
      key: K divides N; each key head serves N / K consecutive query heads.
      value: its last dimension may differ from the key's.
      scale: factor of the logits, by default 1 / sqrt(H); a float, or a scalar array, which is
        differentiable.
      logits_soft_cap: bounds the scaled logits by c tanh(logits / c); None for no bound.
      bias: added to the scaled and capped logits; -inf hides a key.
      alibi_slopes: slope of each head in distance (ALiBi).
      sink: logit of each head that takes part in the denominator only.
      mask: which query may attend to which key; None for all.
      query_offset: position of query 0 among the keys, for `alibi_slopes`. A mask has its own.
      return_lse: whether to return the log-sum-exp too, float32.
      implementation: see `pallas_kernels.choose`.
      tile_sizes: number of queries and of keys in a tile of "xla"; None for the default.
      function: name in error messages.

    Returns:
      The output in the dtype of query, and the log-sum-exp if asked for.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value)
    batch, queries, heads, features = query.shape
    keys, kv_heads = key.shape[1:3]
    dtype = query.dtype

    if scale is None:
        scale = 1 / math.sqrt(features)
    elif not isinstance(scale, int | float | np.number):
        # A scale that is traced goes into the query, with no rounding to its precision.
        scale = _array(scale, "scale", ())
        query = query.astype(jnp.promote_types(dtype, jnp.float32))
        query, scale = query * scale.astype(query.dtype), 1.0
    if logits_soft_cap is not None:
        if not isinstance(logits_soft_cap, int | float | np.number) or not logits_soft_cap > 0:
            raise ValueError(
                f"logits_soft_cap: must be a positive number or None; got {logits_soft_cap!r}"
            )
        logits_soft_cap = float(logits_soft_cap)
    if bias is not None:
        bias = _broadcastable(bias, "bias", (batch, heads, queries, keys))
    slopes = None if alibi_slopes is None else _array(alibi_slopes, "alibi_slopes", (heads,))[None]
    sink = None if sink is None else _array(sink, "sink", (heads,))[None]
    offset = None
    if slopes is not None:
        offset = jnp.atleast_1d(jnp.asarray(as_bound(query_offset, "query_offset"), jnp.int32))
        if offset.shape[0] not in (1, batch):
            raise ValueError(f"query_offset: shape {offset.shape} does not fit the batch, {batch}")
    if mask is not None:
        if not isinstance(mask, Mask):
            raise TypeError(f"mask: must be a mask of the algebra; got {type(mask).__name__}")
        mask = mask.resolve(Shape(queries, keys, batch, heads, kv_heads))
    tile_q, tile_k = _checked_tiles(tile_sizes)

    axes = partition.current_axes()
    options = Options(float(scale), logits_soft_cap, axes, tile_q, tile_k)
    inputs = Inputs(query, key, value, bias, slopes, sink, offset, mask)
    name = choose.resolve_implementation(
        implementation,
        {name: module.supports for name, module in IMPLEMENTATIONS.items()},
        function=function,
        options=options,
        inputs=inputs,
    )
    names = ("query", "key", "value", "bias", "alibi_slopes", "sink", "query_offset", "mask")
    inputs = Inputs(*partition.aligned(inputs, inputs.dims, axes, names))
    out, lse = (_defined if name == "reference" else _attend)(options, inputs)
    out = out.astype(dtype)
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnums=0)
def _defined(options: Options, inputs: Inputs) -> tuple[Array, Array]:
    forward = functools.partial(reference.forward, options)
    return partition.sharded(forward, inputs.dims, ("btnv", "btn"), options.axes)(*inputs)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> tuple[Array, Array]:
    forward = functools.partial(xla.forward, options)
    ins = _constant(inputs.dims)
    return partition.partitioned(forward, ins, ("btnv", "btn"), options.axes)(*inputs)


def _attend_forward(options: Options, inputs: Inputs) -> tuple[tuple[Array, Array], tuple]:
    # Gradients of these may be as large as all scores, so only those that are asked for are made. A
    # dict of empty tuples has no leaves: the names are static residuals.
    wanted = {
        name: ()
        for name in ("bias", "slopes", "sink")
        if getattr(inputs, name) is not None and getattr(inputs, name).perturbed
    }
    inputs = jax.custom_derivatives.custom_vjp_primal_tree_values(inputs)
    out, lse = _attend(options, inputs)
    return (out, lse), (inputs, out, lse, wanted)


def _attend_backward(options: Options, residuals: tuple, cotangents: tuple) -> tuple[Inputs]:
    inputs, out, lse, wanted = residuals
    names = ("query", "key", "value", *(name for name in Inputs._fields if name in wanted))
    backward = functools.partial(xla.backward, options, names)
    dims = dict(zip(Inputs._fields, inputs.dims, strict=True))
    outs = tuple(dims[name] for name in names)
    kept = (d if name in names else _constant(d) for name, d in dims.items())
    ins = (*kept, "btnv", "btn", "btnv", "btn")
    cotangents = (
        jnp.zeros_like(result) if isinstance(cotangent, SymbolicZero) else cotangent
        for result, cotangent in zip((out, lse), cotangents, strict=True)
    )
    gradients = partition.partitioned(backward, ins, outs, options.axes)(
        *inputs, out, lse, *cotangents
    )
    gradients = {
        name: gradient.astype(getattr(inputs, name).dtype)
        for name, gradient in zip(names, gradients, strict=True)
    }
    return (Inputs(**dict.fromkeys(Inputs._fields) | gradients),)


_attend.__wrapped__.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _constant(dims: Any) -> Any:
    """Returns the dimensions of arrays whose gradients are not wanted."""
    return jax.tree.map(lambda letters: letters.replace("+", "1"), dims)


def _array(value: ArrayLike, name: str, shape: tuple[int, ...]) -> Array:
    value = jnp.asarray(value)
    if value.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}; got {value.shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(jnp.float32)
    return value


def _broadcastable(value: ArrayLike, name: str, shape: tuple[int, ...]) -> Array:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name}: must be floating point; got {value.dtype}")
    value = value.reshape((1,) * (4 - value.ndim) + value.shape)
    if value.ndim != 4 or any(a not in (1, b) for a, b in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name}: shape {value.shape} does not broadcast to {shape}")
    return value


def _checked_tiles(tile_sizes: tuple[int, int] | None) -> tuple[int | None, int | None]:
    if tile_sizes is None:
        return None, None
    if len(tile_sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in tile_sizes):
        raise ValueError(f"tile_sizes: must be two positive integers; got {tile_sizes!r}")
    return tile_sizes
