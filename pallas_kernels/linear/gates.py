"""The gates of a chunk: how much its tokens and the memory before it count.

In a chunk of C tokens that begins with the memory S, with i, j = 0..C-1 and D_ij the decay from
token j to token i, D_i that from the beginning of the chunk to token i, U_j that from token j to
its end and D that of the whole chunk

    o_i = sum_{j<=i} q_i D_ij k_j^T v_j  +  q_i D_i S
    S'  = sum_j U_j k_j^T v_j            +  D S

A gate knows the terms of these sums. No exponent in them is positive (see `blocks`). The end of a
segment sets decays to zero.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear import blocks, features, products
from pallas_kernels.linear.inputs import Inputs, finite
from pallas_kernels.linear.layout import Tokens, group_count, grouped

Memories = tuple[Float[Array, "B K G H V"], ...]


class Segments(NamedTuple):
    """Which tokens of a chunk are of one segment."""

    within: Bool[Array, "B 1 1 C C"]
    since: Bool[Array, "B 1 1 C 1"]  # tokens of the segment before the chunk
    until: Bool[Array, "B 1 1 C 1"]  # tokens of the last segment in the chunk
    whole: Bool[Array, "B 1 1 1 1"]  # whether these are the same

    @classmethod
    def of(cls, runs: Int[Array, "B C"], before: Int[Array, "B 1"]) -> "Segments":
        """Returns those of a chunk with these runs, after a token of the run `before`."""
        last = runs[:, -1:]
        within = runs[:, :, None] == runs[:, None]
        masks = within, (runs == before)[..., None], (runs == last)[..., None]
        return cls(*(mask[:, None, None] for mask in (*masks, (last == before)[..., None])))


class Gate(Protocol):
    """What is common to all gates, with the queries and the keys of the chunk as arguments."""

    def scores(self, query: Array, key: Array) -> Float[Array, "B K G C C"]:
        """Returns q_i D_ij k_j for j <= i; else 0."""

    def read(self, query: Array, memories: Memories) -> Float[Array, "B K G C V"]:
        """Returns q_i D_i S."""

    def after(self, memories: Memories, key: Array, value: Array) -> Memories:
        """Returns S', given the values v_j [B, K, G|1, C, V]."""

    def before(self) -> "Gate":
        """Returns the gate of what a token's value is compared with, of which it reads j < i."""


class Weights(NamedTuple):
    """What the memory's sums are multiplied by, where it is the same for all features."""

    within: Any  # [B|1, K, G, C, C], 0 for j > i
    since: Any  # [B|1, K, G, C, 1]
    until: Any  # [B|1, K, G, C, 1]
    whole: Any  # [B|1, K, G, 1, 1]


class _Power(NamedTuple):
    """`exp(steps * log_decay)`, or 0."""

    value: Float[Array, "B|1 K G _ _"]
    steps: Int[Array, "_ _"]


def constant_weights(x: Inputs, size: int) -> Weights | None:
    """Returns the weights of a decay that is the same in all chunks of `size` tokens."""
    log_decay = x.log_decay
    if log_decay is None:
        log_decay = jnp.zeros((1, x.heads), x.accumulator)
    if log_decay.ndim > 2:
        return None
    log_decay = grouped(finite(log_decay), 1, group_count(x))[..., None, None]

    def power(steps: Int[Array, "_ _"]) -> _Power:
        value = jnp.exp(jnp.maximum(steps, 0) * log_decay)
        return _Power(jnp.where(steps >= 0, value, 0), steps)

    token = jnp.arange(size)[:, None]
    return Weights(
        within=power(token - token.T),
        since=power(token + 1),
        until=power(size - 1 - token),
        whole=power(jnp.full((1, 1), size)),
    )


def of_chunk(
    feature_map: str | None,
    constants: Weights | None,
    segments: Segments | None,
    slope: Float[Array, "B K G"],
    chunk: Tokens,
) -> Gate:
    """Returns the gate of a chunk.

    Args:
      feature_map: of the queries and keys, to which it has been applied.
      constants: of `constant_weights`.
      segments: None where there is one.
      slope: zeros. The derivative in it is that in a constant logarithm, for each row of the batch.
      chunk: its gates.
    """
    if constants is not None:
        if segments is not None:
            masked = (
                weight._replace(value=jnp.where(mask, weight.value, 0))
                for mask, weight in zip(segments, constants, strict=True)
            )
            constants = Weights(*masked)
        return _ScalarGate(feature_map, constants, slope)
    decays = blocks.decays(finite(chunk.log_decay))
    if decays.since.shape[-1] > 1:
        return _ChannelGate(decays, segments)
    weights = _step_weights(decays, segments)
    if chunk.log_momentum is None:
        return _ScalarGate(feature_map, weights, None)
    momentums = _step_weights(blocks.decays(finite(chunk.log_momentum)), segments)
    return _MomentumGate.of(feature_map, weights, momentums, segments)


def _step_weights(decays: blocks.Decays, segments: Segments | None) -> Weights:
    weights = Weights(blocks.decay_matrix(decays), decays.since, decays.until, decays.whole)
    if segments is None:
        return weights
    return Weights(*(jnp.where(m, w, 0) for m, w in zip(segments, weights, strict=True)))


@dataclasses.dataclass(frozen=True)
class _ScalarGate(Gate):
    """One decay for the whole memory, of each token or a constant, whose weights are `_Power`s."""

    feature_map: str | None
    weights: Weights
    slope: Float[Array, "B K G"] | None

    def _weigh(self, weight: Any, array: Array) -> Array:
        if self.slope is None:
            return weight * array
        shape = jnp.broadcast_shapes(array.shape, (*self.slope.shape, 1, 1))
        return _powered(weight, self.slope, jnp.broadcast_to(array, shape))

    def scores(self, query: Array, key: Array) -> Float[Array, "B K G C C"]:
        return self._weigh(self.weights.within, features.scores(self.feature_map, query, key))

    def read(self, query: Array, memories: Memories) -> Float[Array, "B K G C V"]:
        return self._weigh(self.weights.since, products.read(query, memories[0]))

    def after(self, memories: Memories, key: Array, value: Array) -> Memories:
        (memory,) = memories
        value = self._weigh(self.weights.until, value.astype(memory.dtype))
        return (self._weigh(self.weights.whole, memory) + products.written(key, value),)

    def before(self) -> "_ScalarGate":
        return self


@dataclasses.dataclass(frozen=True)
class _ChannelGate(Gate):
    """A decay for each row of the memory, that is for each feature of a key."""

    decays: blocks.Decays
    segments: Segments | None

    def _where(self, segments: str, array: Array) -> Array:
        mask = getattr(self.segments, segments, True)
        return array if mask is True else jnp.where(mask, array, 0)

    def scores(self, query: Array, key: Array) -> Float[Array, "B K G C C"]:
        scores = blocks.decayed_products(self.decays, query, key[:, :, None], products.product)
        return self._where("within", scores)

    def read(self, query: Array, memories: Memories) -> Float[Array, "B K G C V"]:
        decayed = self._where("since", self.decays.since * query)
        return products.read(decayed.astype(query.dtype), memories[0])

    def after(self, memories: Memories, key: Array, value: Array) -> Memories:
        (memory,) = memories
        decayed = self._where("until", self.decays.until * key[:, :, None]).astype(key.dtype)
        whole = jnp.swapaxes(self._where("whole", self.decays.whole), -1, -2)
        value = jnp.broadcast_to(value, (*memory.shape[:3], *value.shape[3:]))
        return (whole * memory + products.product("bkgjh,bkgjv->bkghv", decayed, value),)

    def before(self) -> "_ChannelGate":
        return self


@dataclasses.dataclass(frozen=True)
class _MomentumGate(Gate):
    """A decay of each of two memories S and U, of which U is added to S at every token.

    What token j writes to U is added to S at every token l from j to i: with A_il and M_lj the
    decays of S and of U, it counts W_ij = sum_l A_il M_lj at token i.
    """

    feature_map: str | None
    within: Float[Array, "B K G C C"]  # W
    decayed: Float[Array, "B K G C 1"]  # the S before the chunk in S
    moved: Float[Array, "B K G C 1"]  # the U before the chunk in S
    momentums: Weights
    segments: Segments | None

    @classmethod
    def of(
        cls,
        feature_map: str | None,
        decays: Weights,
        momentums: Weights,
        segments: Segments | None,
    ) -> "_MomentumGate":
        matmul = functools.partial(jnp.matmul, precision="highest")
        within = matmul(decays.within, momentums.within)
        moved = matmul(decays.within, momentums.since)
        return cls(feature_map, within, decays.since, moved, momentums, segments)

    def scores(self, query: Array, key: Array) -> Float[Array, "B K G C C"]:
        return self.within * features.scores(self.feature_map, query, key)

    def read(self, query: Array, memories: Memories) -> Float[Array, "B K G C V"]:
        memory, momentum = (products.read(query, m) for m in memories)
        return self.decayed * memory + self.moved * momentum

    def after(self, memories: Memories, key: Array, value: Array) -> Memories:
        memory, momentum = memories
        last = (..., slice(-1, None), slice(None))
        added = jnp.swapaxes(self.within[last], -1, -2) * value, self.momentums.until * value
        added_memory, added_momentum = (products.written(key, a) for a in added)
        kept = self.decayed[last] * memory + self.moved[last] * momentum
        return kept + added_memory, self.momentums.whole * momentum + added_momentum

    def before(self) -> "_MomentumGate":
        def shifted(weight: Array, first: float) -> Array:
            pad = [(0, 0)] * (weight.ndim - 2) + [(1, 0), (0, 0)]
            return jnp.pad(weight[..., :-1, :], pad, constant_values=first)

        weights = shifted(self.within, 0), shifted(self.decayed, 1), shifted(self.moved, 0)
        if self.segments is not None:
            masks = self.segments.within, self.segments.since, self.segments.since
            weights = (jnp.where(m, w, 0) for m, w in zip(masks, weights, strict=True))
        within, decayed, moved = weights
        return dataclasses.replace(self, within=within, decayed=decayed, moved=moved)


@jax.custom_vjp
def _powered(
    power: _Power, slope: Float[Array, "B K G"], array: Float[Array, "B K G _ _"]
) -> Float[Array, "B K G _ _"]:
    """Returns `power * array`, with a derivative in the logarithm of the decay for each row.

    The powers are made once for all chunks and rows. Summing their gradients instead would need a
    collective in every chunk where XLA has sharded the batch.
    """
    del slope
    return power.value * array


def _powered_forward(power: _Power, slope: Array, array: Array) -> tuple[Array, tuple]:
    return _powered(power, slope, array), (power, array)


def _powered_backward(residuals: tuple, cotangent: Array) -> tuple[None, Array, Array]:
    power, array = residuals
    d_array = power.value * cotangent
    d_slope = jnp.sum(power.steps * (d_array * array), axis=(3, 4))
    return None, d_slope, d_array.astype(array.dtype)


_powered.defvjp(_powered_forward, _powered_backward)
