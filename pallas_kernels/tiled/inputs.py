"""What the implementations of tiled attention are called with."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import Bound, Mask
from pallas_kernels.partition import Axes

WEIGHTS = {
    "softmax": jnp.exp,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
}
"""Weight of a pair by its score; a pair that is masked has the score -inf and the weight 0."""

LEAST_EXCESS = 1e-5
"""A row of reweighted weights, none of which is above the offset by as much, is empty.

In a row of equal weights, N w - 1 is not 0 in float32: it is about 4e-7, of any sign.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call."""

    scale: float
    logits_soft_cap: float | None
    weights: str
    """Name in `WEIGHTS`."""
    normalise: bool
    """Whether weights are divided by their row sum. If not, the log-sum-exp is the statistic, or
    without one 0: a sum of 1."""
    reweight: tuple[float, float] | None
    """Power and offset. With it, `normalise` is about the weights that it makes."""
    logit_bias: float
    """Is added to every score."""
    group_size: int | None
    """Keys in a group, the last of which is its landmark; None for keys that compete singly."""
    bounded: bool
    """Whether exp(score) of a softmax, with no maximum subtracted, is safe in float32."""
    axes: Axes
    tile_q: int | None
    tile_k: int | None
    implementation: str | None
    """The one that serves the call; None for a choice by what the call is lowered for."""


class Inputs(NamedTuple):
    """The arrays of a call, checked; every one has a batch dimension, which may be 1 after `value`.

    Under `jax.vmap` the batch of `bias`, `slopes`, `table`, `sink` and `statistic` may be 1 in the
    forward and whole in the backward, see `partition`.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Float[Array, "B|1 N|1 T|1 S|1"] | None
    slopes: Float[Array, "B|1 N"] | None
    table: Float[Array, "B|1 N|1 2*R+1"] | None
    """Bias by the distance key - (query + offset), clipped to -R .. R."""
    sink: Float[Array, "B|1 N T|1"] | None
    statistic: Float[Array, "B|1 N T|1"] | None
    """Logarithm of what a row's weights are divided by; -inf for a row that is empty."""
    offset: Int[Array, "B|1"] | None
    mask: Mask | None

    @property
    def dims(self) -> tuple[Any, ...]:
        """Names the dimensions, as in `partition`."""
        return (
            "btnh",
            "bsnh",
            "bsnv",
            None if self.bias is None else _leading_dims(self.bias) + "ts",
            None if self.slopes is None else "+n",
            None if self.table is None else _leading_dims(self.table) + "r",
            None if self.sink is None else _leading_dims(self.sink) + "t",
            None if self.statistic is None else _leading_dims(self.statistic) + "t",
            None if self.offset is None else "1",
            None if self.mask is None else self.mask.dims(),
        )


def _leading_dims(array: Array) -> str:
    return "".join(
        "+" if size == 1 else letter for letter, size in zip("bn", array.shape, strict=False)
    )


def without_hidden(inputs: Inputs) -> Inputs:
    """Returns the inputs with zeros in place of queries and keys that the mask's ranges rule out.

    Whatever stands there, NaN even, then cannot reach a result through a weight of zero.
    """
    if inputs.mask is None:
        return inputs
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    key_range = inputs.mask.key_range(0, queries, keys)
    query_range = inputs.mask.query_range(0, keys, queries)
    return inputs._replace(
        query=zero_outside(inputs.query, 0, *query_range),
        key=zero_outside(inputs.key, 0, *key_range),
        value=zero_outside(inputs.value, 0, *key_range),
    )


def zero_outside(array: Array, first: Bound, start: Bound, stop: Bound) -> Array:
    """Returns a slice of tokens, of which `first` is the number of the first, 0 outside of a range.

    Args:
      array: [B, tokens, ...].
      first: number of the token at index 0.
      start: first token to keep, for all rows or for each.
      stop: token before which to stop.
    """
    size = array.shape[1]
    static = all(isinstance(bound, int) for bound in (first, start, stop))
    if static and start <= first and first + size <= stop:
        return array
    start, stop = (b if isinstance(b, int) else b.reshape(-1, 1) for b in (start, stop))
    tokens = first + jnp.arange(size, dtype=jnp.int32)[None]
    inside = (start <= tokens) & (tokens < stop)
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (array.ndim - 2)), array, 0)


def of_rows(
    out: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N V"],
    d_lse: Float[Array, "B T N"],
) -> tuple[Array, Array, Array]:
    """Returns what the backward needs of rows: d_out, the divisor's logarithm, and delta.

    Here delta = sum(d_out * out) - d_lse. Of an empty row, all is 0, whatever its cotangents are.
    """
    empty = jnp.isneginf(lse)
    d_out = jnp.where(empty[..., None], 0, d_out)
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
    return d_out, as_divisor(lse), jnp.where(empty, 0, delta)


def sink_gradient(x: Inputs, lse: Array, delta: Array) -> Array:
    """Returns the gradient of the sinks, from what `of_rows` returns."""
    sink = jnp.swapaxes(x.sink, 1, 2)
    return jnp.swapaxes(unbroadcast(-jnp.exp(sink - lse) * delta, sink.shape), 1, 2)


def as_divisor(log_sum: Array) -> Array:
    """Returns logarithms of row sums with inf for -inf: divided by it, all of an empty row is 0."""
    return jnp.where(jnp.isneginf(log_sum), jnp.inf, log_sum)


def unbroadcast(array: Array, shape: Sequence[int]) -> Array:
    """Sums an array over the dimensions in which `shape` has 1."""
    axes = tuple(i for i, size in enumerate(shape) if size == 1 < array.shape[i])
    return jnp.sum(array, axes, keepdims=True) if axes else array


def four_dimensional(array: Array, dims: str) -> Array:
    """Returns an array of a call as [B|1, N|K|1, T|1, S|1]."""
    if dims.endswith("ts"):
        return array
    if dims.endswith("t") and len(dims) == 3:
        return array[:, :, :, None]
    if dims.endswith("s"):
        return array[:, :, None, :]
    return array.reshape(array.shape + (1,) * (4 - array.ndim))
