"""The selective scan of Mamba, S6, and the routes of SS2D through an image."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from attention.catalogue import Mechanism
from attention.state import check_state
from pallas_kernels import scan
from pallas_kernels.scan import ScanState


def selective_scan(
    x: Float[ArrayLike, "B T D"],
    delta: Float[ArrayLike, "B T D"],
    A: Float[ArrayLike, "D N"],
    B: Float[ArrayLike, "B T N"] | Float[ArrayLike, "B T G N"],
    C: Float[ArrayLike, "B T N"] | Float[ArrayLike, "B T G N"],
    *,
    D: Float[ArrayLike, "D"] | None = None,
    z: Float[ArrayLike, "B T D"] | None = None,
    delta_bias: Float[ArrayLike, "D"] | None = None,
    delta_softplus: bool = True,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: ScanState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], ScanState]:
    """A linear recurrence for each channel, whose step, input and output depend on the token.

    Channel d has a state h of N numbers. With s_t = softplus(delta_t + delta_bias),

        h_t = exp(s_t A_d) h_{t-1} + s_t x_t B_t,    y_t = C_t . h_t + D_d x_t

    and the output is y_t, or y_t silu(z_t). The input is discretised by Euler's rule, as in the
    released code: the exact one would have (exp(s_t A) - 1) / A for s_t. O(T D N) time and O(T D)
    memory, forward and backward; states and sums are float32, or float64 for float64 x. First
    derivatives exist in reverse mode; the implementation "reference" has all.

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023).

    Args:
      x: the input of each channel.
      delta: the step, before bias and softplus.
      A: the rates of the states, below 0 for states that fade.
      B: the input vectors, for all channels or for G groups of D / G consecutive channels.
      C: the output vectors, likewise.
      D: what of the input goes straight to the output; None for nothing.
      z: gate of the output; None for none.
      delta_bias: added to the step; None for nothing.
      delta_softplus: whether the step is softplus(delta + delta_bias), the default, or that sum
        itself.
      segment_ids: documents packed into a row: the state begins anew wherever the id changes.
      initial_state: the state after the tokens before, which belong to the first segment.
      return_state: whether to return the state after the last token too.
      chunk_size: tokens between two states that are kept for the backward, by default a number that
        was measured to be fast; no influence but on rounding.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in the dtype of x; with `return_state` also the state.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> x, delta = jax.random.normal(jax.random.key(0), (2, 1, 50, 8))
      >>> B, C = jax.random.normal(jax.random.key(1), (2, 1, 50, 4))
      >>> A = -jnp.tile(jnp.arange(1.0, 5.0), (8, 1))
      >>> out = selective_scan(x, delta, A, B, C, D=jnp.ones(8))
      >>> out.shape
      (1, 50, 8)
    """
    x = jnp.asarray(x)
    if z is not None:
        z = jnp.asarray(z)
        if z.shape != x.shape:
            raise ValueError(f"z: must have the shape of x, {x.shape}; got {z.shape}")
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise TypeError(f"z: must be floating point; got {z.dtype}")
    out, state = scan.selective_scan(
        x,
        delta,
        A,
        B,
        C,
        D=D,
        delta_bias=delta_bias,
        softplus=delta_softplus,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    if z is not None:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        out = (out.astype(wide) * jax.nn.silu(z.astype(wide))).astype(x.dtype)
    return (out, state) if return_state else out


def selective_scan_step(
    state: ScanState,
    x: Float[ArrayLike, "B T D"],
    delta: Float[ArrayLike, "B T D"],
    A: Float[ArrayLike, "D N"],
    B: Float[ArrayLike, "B T N"] | Float[ArrayLike, "B T G N"],
    C: Float[ArrayLike, "B T N"] | Float[ArrayLike, "B T G N"],
    *,
    D: Float[ArrayLike, "D"] | None = None,
    z: Float[ArrayLike, "B T D"] | None = None,
    delta_bias: Float[ArrayLike, "D"] | None = None,
    delta_softplus: bool = True,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], ScanState]:
    """Continues `selective_scan` by T >= 1 tokens: a prompt at once, or token by token.

    The time of a step and the size of the state do not depend on the tokens before.

    Args:
      state: that of the tokens before, from `init_selective_scan_state`, from the step before, or
        from `selective_scan(..., return_state=True)`.
      x: as for `selective_scan`, of the new tokens.
      delta: likewise.
      A: as for `selective_scan`.
      B: likewise, of the new tokens.
      C: likewise.
      D: as for `selective_scan`.
      z: likewise, of the new tokens.
      delta_bias: as for `selective_scan`.
      delta_softplus: likewise.
      chunk_size: likewise.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `selective_scan`.

    Example:
      >>> state = init_selective_scan_state(1, 1000, 8, 4)
      >>> x, delta = jax.random.normal(jax.random.key(0), (2, 1, 3, 8))
      >>> B, C = jax.random.normal(jax.random.key(1), (2, 1, 3, 4))
      >>> out, state = selective_scan_step(state, x, delta, -jnp.ones((8, 4)), B, C)
      >>> out.shape, state.hidden.shape
      ((1, 3, 8), (1, 4, 8))
    """
    return selective_scan(
        x,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=check_state(state, ScanState),
        return_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def init_selective_scan_state(
    batch: int, max_length: int, channels: int, state_size: int, dtype: DTypeLike = jnp.float32
) -> ScanState:
    """Returns the state of no tokens for `selective_scan_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the state does not depend on it.
      channels: D.
      state_size: N.
      dtype: of the inputs to come; the state is float32, or float64 for float64.
    """
    del max_length
    dtype = jnp.promote_types(dtype, jnp.float32)
    return ScanState(jnp.zeros((batch, state_size, channels), dtype))


def cross_scan(x: Shaped[ArrayLike, "B T *C"], shape: tuple[int, int]) -> Shaped[Array, "B 4 T *C"]:
    """Returns the tokens of an image in the order of four routes, each for a scan of its own.

    Row by row, column by column, and both backwards: so that, over all routes, every token comes
    after every other one.

    Source: Liu et al., VMamba: Visual State Space Model (2024), SS2D.

    Args:
      x: tokens of the image, row by row.
      shape: its height and width.

    Raises:
      ValueError: the shape is not that of these tokens.

    Example:
      >>> cross_scan(jnp.arange(6)[None], (2, 3))[0]
      Array([[0, 1, 2, 3, 4, 5],
             [0, 3, 1, 4, 2, 5],
             [5, 4, 3, 2, 1, 0],
             [5, 2, 4, 1, 3, 0]], dtype=int32)
    """
    x = jnp.asarray(x)
    height, width = _image(shape, x.shape[1])
    rows = x.reshape(x.shape[0], height, width, *x.shape[2:])
    forwards = jnp.stack([x, jnp.swapaxes(rows, 1, 2).reshape(x.shape)], axis=1)
    return jnp.concatenate([forwards, jnp.flip(forwards, axis=2)], axis=1)


def cross_merge(
    x: Shaped[ArrayLike, "B 4 T *C"], shape: tuple[int, int]
) -> Shaped[Array, "B 4 T *C"]:
    """Puts the tokens of the routes of `cross_scan` back, each route row by row.

    SS2D sums the four: `cross_merge(x, shape).sum(axis=1)`.

    Args:
      x: tokens of the image in the order of each route.
      shape: its height and width.

    Raises:
      ValueError: the shape is not that of these tokens, or there are not four routes.

    Example:
      >>> routes = cross_scan(jnp.arange(6)[None], (2, 3))
      >>> cross_merge(routes, (2, 3))[0, 3]
      Array([0, 1, 2, 3, 4, 5], dtype=int32)
    """
    x = jnp.asarray(x)
    if x.ndim < 3 or x.shape[1] != 4:
        raise ValueError(f"x: must be [B, 4, T, ...], four routes; got {x.shape}")
    height, width = _image(shape, x.shape[2])
    forwards = jnp.concatenate([x[:, :2], jnp.flip(x[:, 2:], axis=2)], axis=1)
    columns = forwards[:, 1::2].reshape(x.shape[0], 2, width, height, *x.shape[3:])
    rows = jnp.swapaxes(columns, 2, 3).reshape(x[:, 1::2].shape)
    return jnp.stack([forwards[:, 0], rows[:, 0], forwards[:, 2], rows[:, 1]], axis=1)


def _image(shape: tuple[int, int], tokens: int) -> tuple[int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 2 or shape[0] * shape[1] != tokens:
        raise ValueError(f"shape: must be a height and a width of {tokens} tokens; got {shape!r}")
    return tuple(shape)


def _arguments(
    rng: np.random.Generator,
    batch: int,
    tokens: int,
    dtype: DTypeLike,
    channels: int = 8,
    state_size: int = 4,
) -> Mapping[str, Any]:
    x, delta = rng.standard_normal((2, batch, tokens, channels)).astype(dtype)
    B, C = rng.standard_normal((2, batch, tokens, state_size)).astype(dtype)
    A = -np.exp(rng.standard_normal((channels, state_size))).astype(dtype)
    return dict(x=x, delta=delta, A=A, B=B, C=C)


RECORD = Mechanism(
    slug="selective_scan",
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    year=2023,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="scan",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=selective_scan,
    arguments=_arguments,
    step=selective_scan_step,
    init_state=init_selective_scan_state,
    extras=(ScanState, cross_scan, cross_merge),
)
