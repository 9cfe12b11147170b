"""What the implementations of tiled attention are called with."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import Bound, Mask
from pallas_kernels.partition import Axes


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call."""

    scale: float
    logits_soft_cap: float | None
    axes: Axes
    tile_q: int | None
    tile_k: int | None


class Inputs(NamedTuple):
    """The arrays of a call, checked; every one has a batch dimension, which may be 1 after `value`.

    Under `jax.vmap` the batch of `bias`, `slopes` and `sink` may be 1 in the forward and whole in
    the backward, see `partition`.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Float[Array, "B|1 N|1 T|1 S|1"] | None
    slopes: Float[Array, "B|1 N"] | None
    sink: Float[Array, "B|1 N"] | None
    offset: Int[Array, "B|1"] | None
    mask: Mask | None

    @property
    def dims(self) -> tuple[Any, ...]:
        """Names the dimensions, as in `partition`."""
        return (
            "btnh",
            "bsnh",
            "bsnv",
            None if self.bias is None else self._bias_dims(),
            None if self.slopes is None else "+n",
            None if self.sink is None else "+n",
            None if self.offset is None else "1",
            None if self.mask is None else self.mask.dims(),
        )

    def _bias_dims(self) -> str:
        batch, heads = self.bias.shape[:2]
        return ("+" if batch == 1 else "b") + ("+" if heads == 1 else "n") + "ts"


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
