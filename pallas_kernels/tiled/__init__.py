"""Tiled attention: exact attention that never holds the matrix of scores.

With queries q, keys k and values v, query i at position i + offset among the keys, c the soft cap
and R the reach of the table of relative positions, for every head

    s_ij = c tanh(scale q_i . k_j / c) + logit_bias + bias_ij - slope |i + offset - j|
           + table[clip(j - (i + offset), -R, R) + R]
    Z_i  = exp(sink_i) + sum_j w(s_ij),    j over the keys that the mask allows
    p_ij = w(s_ij) / Z_i,  or w(s_ij) where weights are not normalised
    o_i  = sum_j p_ij v_j
    lse_i = log Z_i

where every term that is not given is left out, and w is

    softmax   exp(s)               Vaswani et al. 2017; the sink by Miller 2023 and in gpt-oss 2025
    sigmoid   1 / (1 + exp(-s))    Ramapuram et al. 2024, not normalised
    softplus  log(1 + exp(s))      Gao et al. 2025 (LSSA), normalised
    relu      max(s, 0)            Wortsman et al. 2023; here normalised if not told otherwise

A normaliser that needs the whole row first takes two passes: a call that returns the log-sum-exp,
and one that takes what is made of it as the row statistic c,

    p_ij = w(s_ij) exp(-c_i),
    or reweighted, with a power and an offset:
    r_ij = max(w(s_ij) exp(-c_i) - offset, 0)^power,   Z_i = sum_j r_ij,   p_ij = r_ij / Z_i

With c the log-sum-exp of scores s, the scores s + b make a softmax times exp(b): a decay after the
softmax. With c the logarithm of the mean of a row's weights, an offset of 1 keeps what is above the
mean.

With a group size, keys come in groups of as many, the last of each its landmark (Mohtashami and
Jaggi 2023). Groups compete by the scores of their landmarks, and the other keys of a group share
what it gets: for key j of a group g with landmark l, s_il + s_ij - log sum_{m in g - {l}} exp(s_im)
takes the place of s_ij, and -inf that of s_il. A group is not there if its landmark is masked, or
all its others are.

A row whose sum is 0, such as that of a query that is allowed no key, has o = 0 and lse = -inf; with
a sink lse is the sink. The sums are computed a tile of keys at a time; a softmax online, relative
to the maximum so far (Rabe and Staats 2021), if no bound on the scores makes that needless. The
backward recomputes the weights, from the log-sum-exp where they are normalised (Dao et al. 2022):
residuals are the inputs, o and lse. Both results are differentiable, and results over disjoint sets
of keys merge (`merge_partials`); those that are not normalised just add up.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choose, partition
from pallas_kernels.checks import check_arrays
from pallas_kernels.masks import Blocks, Mask, Shape, as_bound, parts
from pallas_kernels.tiled import gpu, reference, tpu, xla
from pallas_kernels.tiled.inputs import WEIGHTS, Inputs, Options
from pallas_kernels.tiled.merge import merge_partials

__all__ = ["merge_partials", "tiled_attention", "tiled_attention_transposed"]

IMPLEMENTATIONS = {"xla": xla, "pallas_tpu": tpu, "pallas_gpu": gpu, "reference": reference}

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
"""The kernel that is the best implementation, by platform."""

LARGEST_BOUND = 60.0
"""Scores up to which exp, and its sum over any number of keys, is safe in float32."""

_NAMES = (
    "query",
    "key",
    "value",
    "bias",
    "alibi_slopes",
    "relative_bias",
    "sink",
    "row_statistic",
    "query_offset",
    "mask",
)
"""The arguments that the fields of Inputs come from."""


def tiled_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S L V"],
    *,
    scale: float | Float[Array, ""] | None = None,
    logits_soft_cap: float | None = None,
    weights: str = "softmax",
    normalise: bool | None = None,
    logit_bias: float | Float[Array, ""] = 0.0,
    logits_bound: float | None = None,
    bias: Float[ArrayLike, "B|1 N|1 T|1 S|1"] | None = None,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
    relative_bias: Float[ArrayLike, "N|1 2*R+1"] | None = None,
    sink: Float[ArrayLike, "N"] | Float[ArrayLike, "B|1 T|1 N"] | None = None,
    row_statistic: Float[ArrayLike, "N"] | Float[ArrayLike, "B|1 T|1 N"] | None = None,
    reweight: tuple[float, float] | None = None,
    group_size: int | None = None,
    mask: Mask | None = None,
    query_offset: int | Int[ArrayLike, ""] | Int[ArrayLike, "B"] = 0,
    return_lse: bool = False,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    function: str = "tiled_attention",
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Computes exact attention (see the module) in O(T + S) memory.

    Scores, weights and sums are in float32 (float64 for float64 queries), products in the precision
    of the query, into which keys and values are cast; in float32 where float16 might not hold the
    weights (softplus, relu, and those that a row statistic divides). First derivatives exist in
    reverse mode for query, key, value, scale, logit_bias, bias, slopes, relative_bias, sink and
    row_statistic; the implementation "reference" has all.

    The mask's ranges hide what stands at other positions altogether: queries and keys beyond
    `lengths`, and keys that by `causal`, `window` or `prefix` no query sees, may hold anything, NaN
    too, and get zero gradients.

    Args:
      query: float array. Rows of scores belong to it.
      key: K divides N; each key head serves N / K consecutive query heads.
      value: its last dimension may differ from the key's, and so may its number of heads, L, which
        divides N too. If it does, both are repeated to the least common multiple of K and L heads,
        O(S) memory, and that is the number of key heads for `mask`.
      scale: factor of the logits, by default 1 / sqrt(H); a float, or a scalar array, which is
        differentiable.
      logits_soft_cap: bounds the scaled logits by c tanh(logits / c); None for no bound.
      weights: w, one of "softmax", "sigmoid", "softplus" and "relu".
      normalise: whether weights are divided by their row sum; None for all but sigmoid, and those
        that a row statistic divides.
      logit_bias: added to all scaled and capped logits; a float, or a scalar array, which is
        differentiable.
      logits_bound: the caller's word that no score, and no sink, is larger in absolute value. Up to
        60 it spares a softmax the maximum; so does a soft cap where scores have no other terms.
      bias: added to the scaled and capped logits; -inf hides a key.
      alibi_slopes: slope of each head in distance (ALiBi, Press et al. 2021).
      relative_bias: table of terms by relative position key - query, clipped to -R .. R (Shaw et
        al. 2018), for all heads or each. T5's buckets are such a table (Raffel et al. 2020).
      sink: logit of each head, or of each row in the layout of the log-sum-exp, that takes part in
        the row sum only.
      row_statistic: c, by which exp(c) divides the weights in place of their row sum; of a head, or
        of a row in the layout of the log-sum-exp. exp(score - c) of a softmax must not overflow: it
        is at most 1 where c is the log-sum-exp of no lower scores. A row of c = -inf is empty.
      reweight: (power, offset), power > 0 and offset >= 0, of the weights that the row statistic
        divides; None to leave them. A row is empty, with an output of 0, if no weight is above the
        offset by 1e-5.
      group_size: number of keys in a group whose last one is a landmark, of a softmax without row
        statistic; it divides S and the blocks of a list. None for keys that compete singly.
      mask: which query may attend to which key; None for all.
      query_offset: position of query 0 among the keys, for `alibi_slopes` and `relative_bias`. A
        mask has its own.
      return_lse: whether to return the log-sum-exp too, float32.
      implementation: see `pallas_kernels.choose`.
      tile_sizes: number of queries and of keys in a tile; None for the default. Kernels round it
        to what they can do, and take the tiles of a block list from the list.
      function: name in error messages.

    Returns:
      The output in the dtype of query, and the log-sum-exp if asked for.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    attend, options, inputs = _prepared(
        query,
        key,
        value,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        weights=weights,
        normalise=normalise,
        logit_bias=logit_bias,
        logits_bound=logits_bound,
        bias=bias,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        sink=sink,
        row_statistic=row_statistic,
        reweight=reweight,
        group_size=group_size,
        mask=mask,
        query_offset=query_offset,
        implementation=implementation,
        tile_sizes=tile_sizes,
        function=function,
    )
    if return_lse and not options.normalise:
        raise ValueError(
            "return_lse: weights that are not normalised have no log-sum-exp; partial results of "
            "them add up as they are"
        )
    inputs = Inputs(*partition.aligned(inputs, inputs.dims, options.axes, _NAMES))
    out, lse = attend(options, inputs)
    out = out.astype(jnp.asarray(query).dtype)
    return (out, lse) if return_lse else out


def tiled_attention_transposed(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    x: Float[ArrayLike, "B T N V"],
    **options: Any,
) -> Float[Array, "B S K V"]:
    """Applies the transposed weights of `tiled_attention`: from the queries back to the keys.

        y_j = sum_i p_ij x_i,    i over the queries of all heads that key head serves

    with p of `tiled_attention`, normalised, if at all, over keys. It takes the memory and about the
    time of attention and of the part of its backward that is the gradient of the values. First
    derivatives exist in reverse mode, as of `tiled_attention`.

    Args:
      query: as for `tiled_attention`.
      key: likewise.
      x: what is passed from every query and head to the keys, cast to the dtype of query.
      **options: all others of `tiled_attention`, except value and `return_lse`.

    Returns:
      The sums in the dtype of query. Keys that no query sees get 0.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.
    """
    query, key, x = (jnp.asarray(array) for array in (query, key, x))
    if x.ndim != 4 or x.shape[:3] != query.shape[:3] or not x.shape[3]:
        raise ValueError(f"x: must be [B, T, N, V], as query {query.shape}; got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: must be floating point; got {x.dtype}")
    # Attention is linear in the values: P^T X is the gradient of <P V, X> by V, at any V. It comes
    # in the dtype of V.
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    value = jnp.zeros((*key.shape[:-1], x.shape[3]), dtype)
    options = {"function": "tiled_attention_transposed"} | options
    attend, static, inputs = _prepared(query, key, value, **options)
    dims, names = (*inputs.dims, "btnv"), (*_NAMES, "x")
    x = x.astype(query.dtype).astype(inputs.query.dtype)
    *inputs, x = partition.aligned((*inputs, x), dims, static.axes, names)
    transposed = _attend_transposed if attend is _attend else _defined_transposed
    return transposed(static, Inputs(*inputs), x).astype(query.dtype)


def _prepared(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: Any = None,
    logits_soft_cap: float | None = None,
    weights: str = "softmax",
    normalise: bool | None = None,
    logit_bias: Any = 0.0,
    logits_bound: float | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    sink: ArrayLike | None = None,
    row_statistic: ArrayLike | None = None,
    reweight: tuple[float, float] | None = None,
    group_size: int | None = None,
    mask: Mask | None = None,
    query_offset: Any = 0,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    function: str,
) -> tuple[Callable[[Options, Inputs], tuple[Array, Array]], Options, Inputs]:
    """Returns the function that serves a call of `tiled_attention`, and its arguments, checked."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, separate_value_heads=True)
    batch, queries, heads, features = query.shape
    kv_heads = math.lcm(key.shape[2], value.shape[2])
    key, value = (_repeated(x, kv_heads) for x in (key, value))
    keys = key.shape[1]

    if weights not in WEIGHTS:
        raise ValueError(f"weights: must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    softmax = weights == "softmax"
    if row_statistic is not None:
        row_statistic = _of_rows(row_statistic, "row_statistic", batch, queries, heads)
        normalise = _checked_normalise(normalise, reweight)
    elif reweight is not None:
        raise ValueError("reweight: is of weights that a row_statistic divides; got none")
    normalise = weights != "sigmoid" if normalise is None else bool(normalise)
    if softmax and not normalise and row_statistic is None:
        raise ValueError(
            "normalise: must be None or True for softmax: exp(score) overflows unless it is "
            "relative to its row"
        )
    unbounded = weights in ("softplus", "relu") or row_statistic is not None
    if unbounded and query.dtype == jnp.float16:
        query = query.astype(jnp.float32)
    if scale is None:
        scale = 1 / math.sqrt(features)
    elif not _is_number(scale):
        # A scale that is traced goes into the query, with no rounding to its precision.
        scale = _array(scale, "scale", ())
        query = query.astype(jnp.promote_types(query.dtype, jnp.float32))
        query, scale = query * scale.astype(query.dtype), 1.0
    logits_soft_cap = _positive(logits_soft_cap, "logits_soft_cap")
    logits_bound = _positive(logits_bound, "logits_bound")
    if bias is not None:
        bias = _broadcastable(bias, "bias", (batch, heads, queries, keys))
    if not _is_number(logit_bias):
        logit_bias = _array(logit_bias, "logit_bias", ()).reshape(1, 1, 1, 1)
        bias, logit_bias = logit_bias if bias is None else bias + logit_bias, 0.0
    slopes = None if alibi_slopes is None else _array(alibi_slopes, "alibi_slopes", (heads,))[None]
    table = None if relative_bias is None else _table(relative_bias, heads)
    if sink is not None:
        if not normalise:
            raise ValueError("sink: is a term of the row sum, which takes normalise=True")
        if row_statistic is not None:
            raise ValueError("sink: belongs to the call that the row_statistic comes from")
        sink = _of_rows(sink, "sink", batch, queries, heads)
    offset = None
    if slopes is not None or table is not None:
        offset = jnp.atleast_1d(jnp.asarray(as_bound(query_offset, "query_offset"), jnp.int32))
        if offset.shape[0] not in (1, batch):
            raise ValueError(f"query_offset: shape {offset.shape} does not fit the batch, {batch}")
    if mask is not None:
        if not isinstance(mask, Mask):
            raise TypeError(f"mask: must be a mask of the algebra; got {type(mask).__name__}")
        mask = mask.resolve(Shape(queries, keys, batch, heads, kv_heads))
    if group_size is not None:
        _check_groups(group_size, keys, mask, softmax and row_statistic is None)

    no_terms = all(term is None for term in (bias, slopes, table, sink))
    if logits_bound is None and logits_soft_cap is not None and no_terms:
        logits_bound = logits_soft_cap + abs(logit_bias)
    bounded = softmax and logits_bound is not None and logits_bound <= LARGEST_BOUND
    tile_q, tile_k = _checked_tiles(tile_sizes)
    options = Options(
        scale=float(scale),
        logits_soft_cap=logits_soft_cap,
        weights=weights,
        normalise=normalise,
        reweight=_checked_reweight(reweight),
        logit_bias=float(logit_bias),
        group_size=group_size,
        bounded=bounded,
        axes=partition.current_axes(),
        tile_q=tile_q,
        tile_k=tile_k,
        implementation=implementation,
    )
    inputs = Inputs(query, key, value, bias, slopes, table, sink, row_statistic, offset, mask)
    choose.resolve_implementation(
        implementation,
        {name: module.supports for name, module in IMPLEMENTATIONS.items()},
        function=function,
        options=options,
        inputs=inputs,
    )
    return _defined if implementation == "reference" else _attend, options, inputs


@functools.partial(jax.jit, static_argnums=0)
def _defined(options: Options, inputs: Inputs) -> tuple[Array, Array]:
    forward = functools.partial(reference.forward, options)
    return partition.sharded(forward, inputs.dims, ("btnv", "btn"), options.axes)(*inputs)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> tuple[Array, Array]:
    forward = _implemented("forward", options, inputs, options)
    ins = _constant(inputs.dims)
    return partition.partitioned(forward, ins, ("btnv", "btn"), options.axes)(*inputs)


def _implemented(
    function: str, options: Options, inputs: Inputs, *static: Any, gradients: Sequence[str] = ()
) -> Callable[..., Any]:
    """Returns a function of the implementation that serves a call, with its static arguments.

    What the forward keeps means the same in all of them, so the backward may be of another.

    Args:
      function: "forward" or "backward".
      options: static part of the call.
      inputs: its arrays.
      *static: first arguments of the function.
      gradients: names of the inputs whose gradients it is to return.

    Raises:
      NotImplementedError: the named implementation does not have one of the gradients.
    """
    return choose.implemented(
        function,
        IMPLEMENTATIONS,
        KERNELS,
        options.implementation,
        *static,
        function="tiled_attention",
        options=options,
        inputs=inputs,
        gradients=gradients,
    )


def _attend_forward(options: Options, inputs: Inputs) -> tuple[tuple[Array, Array], tuple]:
    wanted = _wanted(inputs)
    inputs = jax.custom_derivatives.custom_vjp_primal_tree_values(inputs)
    out, lse = _attend(options, inputs)
    return (out, lse), (inputs, out, lse, wanted)


def _attend_backward(options: Options, residuals: tuple, cotangents: tuple) -> tuple[Inputs]:
    inputs, out, lse, wanted = residuals
    names = ("query", "key", "value", *(name for name in Inputs._fields if name in wanted))
    cotangents = (
        jnp.zeros_like(result) if isinstance(cotangent, SymbolicZero) else cotangent
        for result, cotangent in zip((out, lse), cotangents, strict=True)
    )
    gradients = _gradients(options, names, inputs, out, lse, *cotangents)
    return (Inputs(**dict.fromkeys(Inputs._fields) | gradients),)


def _gradients(
    options: Options, names: Sequence[str], inputs: Inputs, *results: Array
) -> dict[str, Array]:
    """Returns gradients by name, from the inputs, the results and the cotangents of the results."""
    backward = _implemented("backward", options, inputs, options, names, gradients=names)
    dims = dict(zip(Inputs._fields, inputs.dims, strict=True))
    outs = tuple(dims[name] for name in names)
    kept = (d if name in names else _constant(d) for name, d in dims.items())
    ins = (*kept, "btnv", "btn", "btnv", "btn")
    gradients = partition.partitioned(backward, ins, outs, options.axes)(*inputs, *results)
    return {
        name: gradient.astype(getattr(inputs, name).dtype)
        for name, gradient in zip(names, gradients, strict=True)
    }


_attend.__wrapped__.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _defined_transposed(options: Options, inputs: Inputs, x: Array) -> Array:
    def attended(value: Array) -> Array:
        return _defined(options, inputs._replace(value=value))[0]

    return jax.vjp(attended, inputs.value)[1](x)[0]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_transposed(options: Options, inputs: Inputs, x: Array) -> Array:
    out, lse = _attend(options, inputs)
    return _gradients(options, ("value",), inputs, out, lse, x, jnp.zeros_like(lse))["value"]


def _transposed_forward(options: Options, inputs: Inputs, x: Any) -> tuple[Array, tuple]:
    wanted = _wanted(inputs)
    inputs, x = jax.custom_derivatives.custom_vjp_primal_tree_values((inputs, x))
    return _attend_transposed(options, inputs, x), (inputs, x, wanted)


def _transposed_backward(
    options: Options, residuals: tuple, cotangent: Array
) -> tuple[Inputs, Array]:
    # With cotangent G of P^T X, the loss <P^T X, G> = <X, P G> is one of attention to values G.
    inputs, x, wanted = residuals

    def attended(arrays: dict[str, Array]) -> Array:
        return _attend(options, inputs._replace(value=cotangent, **arrays))[0]

    arrays = {name: getattr(inputs, name) for name in ("query", "key", *wanted)}
    d_x, vjp = jax.vjp(attended, arrays)
    return Inputs(**dict.fromkeys(Inputs._fields) | vjp(x)[0]), d_x


_attend_transposed.__wrapped__.defvjp(
    _transposed_forward, _transposed_backward, symbolic_zeros=True
)


def _wanted(inputs: Inputs) -> dict[str, tuple[()]]:
    """Returns the names of the optional inputs whose gradients are asked for.

    They may be as large as all scores, so only those are made. A dict of empty tuples has no
    leaves: the names are static residuals.
    """
    return {
        name: ()
        for name in ("bias", "slopes", "table", "sink", "statistic")
        if getattr(inputs, name) is not None and getattr(inputs, name).perturbed
    }


def _constant(dims: Any) -> Any:
    """Returns the dimensions of arrays whose gradients are not wanted."""
    return jax.tree.map(lambda letters: letters.replace("+", "1"), dims)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def _positive(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name}: must be a positive number or None; got {value!r}")
    return float(value)


def _repeated(array: Array, heads: int) -> Array:
    """Returns keys or values with every head repeated, if need be, for this number of heads."""
    return array if array.shape[2] == heads else jnp.repeat(array, heads // array.shape[2], axis=2)


def _floating(value: ArrayLike) -> Array:
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)


def _array(value: ArrayLike, name: str, shape: tuple[int, ...]) -> Array:
    value = _floating(value)
    if value.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}; got {value.shape}")
    return value


def _table(value: ArrayLike, heads: int) -> Array:
    value = _floating(value)
    if value.ndim != 2 or value.shape[0] not in (1, heads) or not value.shape[1] % 2:
        raise ValueError(
            f"relative_bias: must be [{heads} or 1, 2 R + 1], for distances -R .. R; got shape "
            f"{value.shape}"
        )
    return value[None]


def _of_rows(value: ArrayLike, name: str, batch: int, queries: int, heads: int) -> Array:
    """Returns numbers of heads or rows as [B|1, N, T|1]."""
    value = _floating(value)
    if value.shape == (heads,):
        return value[None, :, None]
    rows = (1, batch), (1, queries), (heads,)
    if value.ndim != 3 or any(a not in b for a, b in zip(value.shape, rows, strict=True)):
        raise ValueError(
            f"{name}: must have shape ({heads},), or [{batch} or 1, {queries} or 1, {heads}]; got "
            f"{value.shape}"
        )
    return jnp.swapaxes(value, 1, 2)


def _checked_normalise(normalise: bool | None, reweight: Any) -> bool:
    """Returns whether weights that a row statistic divides are normalised after that."""
    if normalise not in (None, reweight is not None):
        raise ValueError(
            f"normalise: must be None or {reweight is not None}, as weights that a row_statistic "
            f"divides are normalised if reweighted, and only then; got {normalise!r}"
        )
    return reweight is not None


def _checked_reweight(reweight: tuple[float, float] | None) -> tuple[float, float] | None:
    if reweight is None:
        return None
    pair = reweight if isinstance(reweight, tuple | list) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not (pair[0] > 0 and pair[1] >= 0):
        raise ValueError(
            "reweight: must be two numbers (power, offset), power > 0 and offset >= 0; got "
            f"{reweight!r}"
        )
    return float(pair[0]), float(pair[1])


def _check_groups(size: int, keys: int, mask: Mask | None, plain: bool) -> None:
    """Checks the size of groups against the keys and lists that they are of."""
    if not plain:
        raise ValueError("group_size: is of softmax weights without a row_statistic")
    if not isinstance(size, int) or size < 2 or keys % size:
        raise ValueError(
            f"group_size: must be an integer of at least 2 that divides the {keys} keys; got "
            f"{size!r}"
        )
    for part in () if mask is None else parts(mask):
        if isinstance(part, Blocks) and part.block_k % size:
            raise ValueError(f"group_size: {size} does not divide block_k, {part.block_k}")


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
