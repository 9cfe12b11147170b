"""What the implementations of linear attention are called with."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.partition import Axes


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call."""

    scale: float
    chunk_size: int
    axes: Axes


class Inputs(NamedTuple):
    """The arrays of a call, checked.

    Under `jax.vmap` the batch of `log_decay` may be 1 in the forward and whole in the backward, see
    `partition`.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K V"]
    log_decay: Float[Array, "B|1 N"] | None
    runs: Int[Array, "B T"] | None  # number of the run of equal segment ids, from 0
    memory: Float[Array, "B N H V"] | None  # the initial state

    @property
    def dims(self) -> tuple[str | None, ...]:
        """Names the dimensions, as in `partition`."""
        letters = ("btnh", "btnh", "btnv", "+n", "bt", "bnhv")
        return tuple(None if x is None else d for x, d in zip(self, letters, strict=True))

    @property
    def accumulator(self) -> jnp.dtype:
        """Returns the dtype of states and sums."""
        return jnp.promote_types(self.query.dtype, jnp.float32)


def finite(log_decay: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the logarithm with -inf replaced by a number whose exponential is 0 as well.

    The exponents are `steps * log_decay`, and 0 * -inf would be NaN; the gradient here is 0.
    """
    return jnp.maximum(log_decay, -1e30)
