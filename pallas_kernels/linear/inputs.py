"""What the implementations of linear attention are called with."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear import features
from pallas_kernels.partition import Axes

LOWEST = -120.0
"""Of logarithms: float32 has no smaller exponential but 0."""

GRID = 2.0**9
"""Sums of 256 multiples of its inverse, of at most 120 each, are exact in float32."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call. What else is static shows in which inputs are None."""

    scale: float
    chunk_size: int
    kept: int
    """Tokens from one state that is kept for the backward to the next: some chunks."""
    causal: bool
    epsilon: float | None
    """What is added to the sum of keys that divides the output; None to divide by nothing."""
    feature_map: str | None
    """Name in `features.MAPS`, of queries and keys."""
    min_log_decay: float | None
    """What the caller says no decay of a token is below."""
    axes: Axes
    implementation: str | None
    """None for a choice by what the call is lowered for."""


class Inputs(NamedTuple):
    """The arrays of a call, checked.

    N, K and L are the heads of queries, keys and values: K divides N, and L is K or a multiple of
    N. The larger of N and L, here M, is the number of memories. F is the number of features that
    the H of a key are mapped to.

    Under `jax.vmap` the batch of a `log_decay` for each head may be 1 in the forward and whole in
    the backward, see `partition`.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S L V"]
    log_decay: Float[Array, "B|1 M"] | Float[Array, "B T M"] | Float[Array, "B T M H"] | None
    beta: Float[Array, "B T M"] | None
    log_momentum: Float[Array, "B T M"] | None
    runs: Int[Array, "B T"] | None
    """Number of the run of equal segment ids, from 0."""
    memory: Float[Array, "B M F V"] | None
    """The state before the first token, as the next two; None for zero."""
    key_sum: Float[Array, "B M F"] | None
    momentum: Float[Array, "B M F V"] | None

    @property
    def begins(self) -> Bool[Array, "B T"] | None:
        """Returns which tokens begin a segment; the first one goes on with that of the state."""
        if self.runs is None:
            return None
        return jnp.pad(self.runs[:, 1:] != self.runs[:, :-1], ((0, 0), (1, 0)))

    @property
    def dims(self) -> tuple[str | None, ...]:
        """Names the dimensions, as in `partition`."""
        decay = None if self.log_decay is None else {2: "+n", 3: "btn", 4: "btnh"}
        letters = (
            *("btnh", "bsnh", "bsnv"),
            decay and decay[self.log_decay.ndim],
            *("btn", "btn", "bt"),
            *("bnhv", "bnh", "bnhv"),
        )
        return tuple(None if x is None else d for x, d in zip(self, letters, strict=True))

    @property
    def accumulator(self) -> jnp.dtype:
        """Returns the dtype of states and sums."""
        return jnp.promote_types(self.query.dtype, jnp.float32)

    @property
    def heads(self) -> int:
        """Returns the number of memories."""
        return max(self.query.shape[2], self.value.shape[2])

    def state_shapes(self, options: Options) -> dict[str, tuple[int, ...]]:
        """Returns the shape of what is carried from token to token, by name in this order."""
        batch, _, _, size = self.query.shape
        width = self.value.shape[3]
        shape = batch, self.heads, features.count(options.feature_map, size), width
        shapes = {"memory": shape}
        if options.epsilon is not None:
            shapes["key_sum"] = shape[:3]
        if self.log_momentum is not None:
            shapes["momentum"] = shape
        return shapes

    def state_dims(self, options: Options) -> tuple[str, ...]:
        """Names the dimensions of the state, as in `partition`."""
        return tuple("bnhv"[: len(shape)] for shape in self.state_shapes(options).values())

    def kept_shapes(self, options: Options) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of the states that are kept; the only one if not causal."""
        count = -(-self.query.shape[1] // options.kept) if options.causal else 1
        return tuple((batch, count, *rest) for batch, *rest in self.state_shapes(options).values())

    def kept_dims(self, options: Options) -> tuple[str, ...]:
        """Names their dimensions."""
        return tuple(f"{dims[0]}c{dims[1:]}" for dims in self.state_dims(options))

    @property
    def precision(self) -> jnp.dtype:
        """Returns the dtype of products, and of the states that are kept.

        It is the query's, but the sums of many overflow float16.
        """
        return jnp.dtype(jnp.float32 if self.query.dtype == jnp.float16 else self.query.dtype)

    def initial_state(self, options: Options) -> dict[str, Array]:
        """Returns the state before the first token, by name."""
        return {
            # Made from an input so that inside of a shard_map it varies as the inputs do.
            name: jnp.zeros_like(self.query, shape=shape, dtype=self.accumulator)
            if getattr(self, name) is None
            else getattr(self, name)
            for name, shape in self.state_shapes(options).items()
        }


def finite(log_decay: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the logarithm with -inf replaced by a number whose exponential is 0 as well.

    Sums of logarithms, and their multiples, are exponents, and 0 * -inf would be NaN; the gradient
    here is 0.
    """
    return jnp.maximum(log_decay, -1e30)


def zero_unless(condition: Bool[Array, "..."], array: Array) -> Array:
    """Returns the array, or zeros where a condition on its first dimensions does not hold."""
    condition = condition.reshape(*condition.shape, *(1,) * (array.ndim - condition.ndim))
    return jnp.where(condition, array, 0)
