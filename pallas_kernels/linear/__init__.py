"""Linear attention: a memory of keys and values that each token adds to and each query reads.

With queries q, keys k, values v and features phi, for every head, from token to token

    S_t = A_t S_{t-1} + phi(k_t)^T e_t,    o_t = scale phi(q_t) S_t

so that without decay o_t = scale sum_{j<=t} (phi(q_t) . phi(k_j)) e_j: the time is linear in the
number of tokens, and the state S, [F, V], does not grow. Where the segment changes, S begins anew
from zero. Write k and q for their features; then

    A_t  decay, exp(log_decay): 1; one number of the head, lam (lightning attention, RetNet) or of
         each token, a_t (Mamba-2, gated DeltaNet); or diag(a_t), one of each token and feature of a
         key (GLA, Kimi Delta Attention). All in [0, 1].
    e_t  what the token writes: v_t; or by the delta rule what the memory has wrong (DeltaNet),
         beta_t (v_t - k_t A_t S_{t-1}).

With momentum m_t = exp(log_momentum) (Titans with a linear memory, one token at a time, where
a_t = 1 - alpha_t, m_t = eta_t and beta_t = 2 theta_t) what is added moves on by itself, and the
delta rule compares with the memory as it was, not decayed:

    U_t = m_t U_{t-1} + k_t^T e_t,    e_t = v_t  or  beta_t (v_t - k_t S_{t-1})
    S_t = a_t S_{t-1} + U_t

Normalised, the output is divided by the same sum without values, as a softmax is:

    z_t = A_t z_{t-1} + k_t^T,    o_t = scale (q_t S_t) / (q_t z_t + epsilon)

If it is not causal, every query reads the S, and z, of all keys of its segment.

Some combinations have no meaning, and are refused by name. Without a causal order there is neither
decay nor momentum nor a memory to compare with. The sum of keys normalises weights of values, which
corrections by the delta rule, or what momentum moves, are not. Momentum is defined for one decay of
the memory, not for each of its rows. The Taylor features are products of a key's, which have no
decays of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choose, partition
from pallas_kernels.checks import check_arrays, segment_begins
from pallas_kernels.linear import features, gpu, reference, tpu, xla
from pallas_kernels.linear.inputs import Inputs, Options

IMPLEMENTATIONS = {"xla": xla, "reference": reference, "pallas_tpu": tpu, "pallas_gpu": gpu}

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
"""The kernel that is the best implementation, by platform."""

CHUNK_SIZE = 64
"""Tokens in a chunk of "xla"."""

KEPT = 256
"""Tokens, about, from one state that is kept for the backward to the next."""

_NAMES = (
    *("query", "key", "value", "log_decay", "beta", "log_momentum", "segment_ids"),
    *("initial_state",) * 3,
)
"""The arguments that the fields of Inputs come from."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """What linear attention carries from token to token; its size does not depend on their number.

    There is one for each head of query or of value, whichever are more. All are float32 (float64
    for float64 inputs).

    Attributes:
      memory: S, the sum of decayed products of keys and values.
      key_sum: z, the sum of decayed keys, where the output is normalised; else None.
      momentum: U, where there is momentum; else None.
    """

    memory: Float[Array, "B N F V"]
    key_sum: Float[Array, "B N F"] | None = None
    momentum: Float[Array, "B N F V"] | None = None


def linear_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S L V"],
    *,
    log_decay: Float[ArrayLike, "M"]
    | Float[ArrayLike, "B T M"]
    | Float[ArrayLike, "B T M H"]
    | None = None,
    beta: Float[ArrayLike, "B T M"] | None = None,
    log_momentum: Float[ArrayLike, "B T M"] | None = None,
    feature_map: str | None = None,
    normalize: bool = False,
    epsilon: float = 1e-6,
    causal: bool = True,
    scale: float | Float[Array, ""] = 1.0,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    min_log_decay: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    function: str = "linear_attention",
) -> Float[Array, "B T M V"] | tuple[Float[Array, "B T M V"], LinearState]:
    """Computes linear attention (see the module) in O(T) time and memory.

    Memories and sums are in float32 (float64 for float64 queries), products in the precision of the
    query; "xla" takes those of float16 in float32. Gates of any strength are exact: no exponential
    of a positive number is taken. First derivatives exist in reverse mode; the implementation
    "reference" has all.

    It is its own step form: a call on T >= 1 tokens, with the state that the call on the tokens
    before returned, gives what one call on all of them would.

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads. S is T, unless the attention is not causal and has no segments.
      value: likewise; V may differ from H. L is K or, for more memories than queries, a multiple of
        N: then each query head reads L / N consecutive memories. M is the larger of N and L.
      log_decay: logarithm of the decay of each memory, for all tokens, for each, or for each and
        every feature of the key; at most 0, -inf for a decay of 0 (a token sees itself only), None
        for none. Values above 0 are refused where they are known before the program runs, that is
        in tuples and NumPy arrays.
      beta: step of the delta rule, of each memory and token; None for no delta rule. Between 0 and
        2 / |k|^2 the memory stays bounded.
      log_momentum: logarithm of the momentum of each memory and token, as log_decay; None for none.
      feature_map: phi, one of "elu_plus_one", "relu" and "taylor" (see `features`), applied a chunk
        at a time; None for features that are queries and keys as they are.
      normalize: whether the output is divided by the sum of its weights.
      epsilon: what is added to that sum.
      causal: whether a token reads the tokens up to itself only.
      scale: factor of the output; a float, or a scalar array, which is differentiable.
      segment_ids: document of each token. A token whose number differs from that of the token
        before begins with an empty memory; equal numbers further apart are different segments.
      initial_state: the state before the first token, whose segment it belongs to; None for zero.
      return_state: whether to return the state after the last token, which is that of its segment.
      min_log_decay: the caller's word that no log_decay is below this number, by which kernels may
        take a faster way; None for none. Results are wrong where it is broken.
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
    check_arrays(query, key, value, same_tokens=bool(causal), more_value_heads=True)
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {array.dtype} must be query's, {query.dtype}")
    dtype = query.dtype
    accumulator = jnp.promote_types(dtype, jnp.float32)
    batch, tokens, heads, size = query.shape
    heads = max(heads, value.shape[2])

    gates = {"log_decay": log_decay, "beta": beta, "log_momentum": log_momentum}
    given = tuple(name for name, gate in gates.items() if gate is not None)
    _check_combination(given, feature_map, normalize, causal)
    shape = (batch, tokens, heads, size)
    if log_decay is not None:
        log_decay = _checked_decay(log_decay, shape)
        if log_decay.ndim == 2:
            log_decay = log_decay.astype(accumulator)
        if log_decay.ndim == 4 and log_momentum is not None:
            raise ValueError("log_decay: must not be of each feature with log_momentum")
        if log_decay.ndim == 4 and feature_map == "taylor":
            raise ValueError("log_decay: must not be of each feature with feature_map 'taylor'")
    if beta is not None:
        beta = _shaped(_floating(beta, "beta"), "beta", shape[:3])
    if log_momentum is not None:
        log_momentum = _checked_log(log_momentum, "log_momentum")
        log_momentum = _shaped(log_momentum, "log_momentum", shape[:3])
        if log_decay is None or log_decay.ndim == 2:
            # Momentum mixes decays of tokens, so that a constant one has no powers to prepare.
            log_decay = jnp.zeros((), accumulator) if log_decay is None else log_decay[:, None]
            log_decay = jnp.broadcast_to(log_decay, shape[:3])
    if not isinstance(epsilon, int | float) or not epsilon >= 0:
        raise ValueError(f"epsilon: must be a number of at least 0; got {epsilon!r}")
    if chunk_size is None:
        chunk_size = CHUNK_SIZE
    elif not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: must be a positive integer or None; got {chunk_size!r}")
    if min_log_decay is not None:
        if not isinstance(min_log_decay, int | float) or not min_log_decay <= 0:
            raise ValueError(
                f"min_log_decay: must be a number of at most 0, or None; got {min_log_decay!r}"
            )
        min_log_decay = float(min_log_decay)
    factor = None
    if not isinstance(scale, int | float | np.number):
        factor, scale = jnp.asarray(scale), 1.0
        if factor.shape:
            raise ValueError(f"scale: must be a number or a scalar array; got shape {factor.shape}")
        # A scale that is traced multiplies an output that has not been rounded yet.
        query, key, value = (x.astype(accumulator) for x in (query, key, value))
    if segment_ids is not None:
        if key.shape[1] != tokens:
            raise ValueError(
                f"segment_ids: are of queries and keys, so key must have the {tokens} tokens of "
                f"query; got {key.shape[1]}"
            )
        begins = segment_begins(segment_ids, (batch, tokens))
        segment_ids = jnp.cumsum(begins, axis=1, dtype=jnp.int32)

    axes = partition.current_axes()
    epsilon = float(epsilon) if normalize else None
    options = Options(
        scale=float(scale),
        chunk_size=chunk_size,
        kept=max(KEPT // chunk_size, 1) * chunk_size,
        causal=bool(causal),
        epsilon=epsilon,
        feature_map=feature_map,
        min_log_decay=min_log_decay,
        axes=axes,
        implementation=implementation,
    )
    inputs = Inputs(query, key, value, log_decay, beta, log_momentum, segment_ids, *(None,) * 3)
    if initial_state is not None:
        shapes = inputs.state_shapes(options)
        inputs = inputs._replace(**_checked_state(initial_state, shapes, accumulator))
    choose.resolve_implementation(
        implementation,
        {name: module.supports for name, module in IMPLEMENTATIONS.items()},
        function=function,
        options=options,
        inputs=inputs,
    )
    inputs = Inputs(*partition.aligned(inputs, inputs.dims, axes, _NAMES))
    attend = _defined if implementation == "reference" else _attend
    out, *state = attend(options, inputs)
    out = (out if factor is None else factor.astype(accumulator) * out).astype(dtype)
    if not return_state:
        return out
    return out, LinearState(**dict(zip(inputs.state_shapes(options), state, strict=True)))


def init_linear_state(
    batch: int,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    feature_map: str | None = None,
    normalize: bool = False,
    momentum: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> LinearState:
    """Returns the empty state of `linear_attention`, which None stands for as well.

    Args:
      batch: number of sequences.
      num_heads: number of heads of query or of value, whichever are more.
      head_dim: width of a key.
      value_dim: width of a value.
      feature_map: as for `linear_attention`.
      normalize: likewise.
      momentum: whether the calls have log_momentum.
      dtype: of the inputs to come; the state is float32, or float64 for float64.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    shape = (batch, num_heads, features.count(feature_map, head_dim), value_dim)
    return LinearState(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape[:3], dtype) if normalize else None,
        jnp.zeros(shape, dtype) if momentum else None,
    )


@functools.partial(jax.jit, static_argnums=0)
def _defined(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    outs = ("btnv", *inputs.state_dims(options))
    forward = functools.partial(reference.forward, options)
    return partition.sharded(forward, inputs.dims, outs, options.axes)(*inputs)


def _implemented(
    function: str, options: Options, inputs: Inputs, *static: Any
) -> Callable[..., Any]:
    """Returns a function of the implementation that serves a call, with its static arguments.

    What the forward keeps means the same in all of them, so the backward may be of another.
    """
    return choose.implemented(
        function,
        IMPLEMENTATIONS,
        KERNELS,
        options.implementation,
        options,
        *static,
        function="linear_attention",
        options=options,
        inputs=inputs,
    )


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    forward = _implemented("forward", options, inputs)
    outs = ("btnv", *inputs.state_dims(options))
    return partition.partitioned(forward, _constant(inputs.dims), outs, options.axes)(*inputs)


def _attend_forward(options: Options, inputs: Inputs) -> tuple[tuple[Array, ...], tuple]:
    # A dict of empty tuples has no leaves: names are static residuals.
    wanted = {name: () for name, x in inputs._asdict().items() if x is not None and x.perturbed}
    wanted.pop("runs", None)
    inputs = jax.custom_derivatives.custom_vjp_primal_tree_values(inputs)
    forward = _implemented("forward_keeping", options, inputs)
    results = ("btnv", *inputs.state_dims(options))
    outs = (*results, *inputs.kept_dims(options))
    outs = partition.partitioned(forward, _constant(inputs.dims), outs, options.axes)(*inputs)
    return outs[: len(results)], (inputs, outs, wanted)


def _attend_backward(options: Options, residuals: tuple, cotangents: tuple) -> tuple[Inputs]:
    inputs, outs, wanted = residuals
    kept = outs[len(cotangents) :]
    cotangents = (
        jnp.zeros_like(out) if isinstance(cotangent, SymbolicZero) else cotangent
        for out, cotangent in zip(outs, cotangents, strict=False)
    )
    names = tuple(wanted)
    backward = _implemented("backward", options, inputs, names)
    dims = dict(zip(Inputs._fields, inputs.dims, strict=True))
    given = (d if n in names else _constant(d) for n, d in dims.items())
    ins = (*given, *inputs.kept_dims(options), "btnv", *inputs.state_dims(options))
    gradients = partition.partitioned(
        backward, ins, tuple(dims[name] for name in names), options.axes
    )(*inputs, *kept, *cotangents)
    gradients = dict(zip(names, gradients, strict=True))
    return (Inputs(**dict.fromkeys(Inputs._fields) | gradients),)


_attend.__wrapped__.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _constant(dims: Any) -> Any:
    """Returns the dimensions of arrays whose gradients are not wanted."""
    return jax.tree.map(lambda letters: letters.replace("+", "b"), dims)


def _check_combination(
    gates: tuple[str, ...], feature_map: str | None, normalize: bool, causal: bool
) -> None:
    """Refuses combinations that have no meaning."""
    if feature_map is not None and feature_map not in features.MAPS:
        raise ValueError(
            f"feature_map: must be None or one of {', '.join(features.MAPS)}; got {feature_map!r}"
        )
    if not causal and gates:
        raise ValueError(
            f"{gates[0]}: must be None if causal is False: without an order of tokens nothing "
            "decays and there is no memory before a token"
        )
    for name in ("beta", "log_momentum"):
        if normalize and name in gates:
            raise ValueError(
                f"{name}: must be None with normalize: the sum of keys is not that of the weights"
            )


def _checked_state(
    state: LinearState, shapes: dict[str, tuple[int, ...]], dtype: DTypeLike
) -> dict[str, Array]:
    if not isinstance(state, LinearState):
        raise TypeError(f"initial_state: must be a LinearState; got {type(state).__name__}")
    checked = {}
    for name in (field.name for field in dataclasses.fields(LinearState)):
        array = getattr(state, name)
        if (array is None) != (name not in shapes):
            must = "be None" if name not in shapes else f"have shape {shapes[name]}"
            got = "None" if array is None else "an array"
            raise ValueError(f"initial_state: {name} must {must} in this call; got {got}")
        if array is None:
            continue
        array = jnp.asarray(array)
        if array.shape != shapes[name]:
            raise ValueError(
                f"initial_state: {name} of shape {array.shape} must have shape {shapes[name]}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"initial_state: {name} must be floating point; got {array.dtype}")
        checked[name] = array.astype(dtype)
    return checked


def _checked_decay(log_decay: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Returns [1, M], [B, T, M] or [B, T, M, H], where the shape is the last."""
    log_decay = _checked_log(log_decay, "log_decay")
    if log_decay.ndim == 1:
        return _shaped(log_decay, "log_decay", shape[2:3])[None]
    return _shaped(log_decay, "log_decay", shape if log_decay.ndim == 4 else shape[:3])


def _checked_log(log: ArrayLike, name: str) -> Array:
    if not isinstance(log, jax.Array):
        known = np.asarray(log)
        if known.dtype.kind in "fiu" and not np.all(known <= 0):
            raise ValueError(f"{name}: must be at most 0; got one of {np.max(known)}")
        log = known.astype(np.float64) if isinstance(log, tuple | list) else known
    return _floating(log, name)


def _floating(array: ArrayLike, name: str) -> Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: must be floating point; got {array.dtype}")
    return array


def _shaped(array: Array, name: str, shape: tuple[int, ...]) -> Array:
    if array.shape != shape:
        raise ValueError(
            f"{name}: must have shape {shape}, with a number for each memory, which are as many as "
            f"the heads of query or of value; got {array.shape}"
        )
    return array
