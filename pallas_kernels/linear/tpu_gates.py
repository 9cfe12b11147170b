"""The gates of a chunk as the TPU kernels compute them, see `gates`; all is differentiable.

Numbers of a token are columns [C, 1], or the same in a register's columns [C, 128]. Sums of
logarithms are of two parts: that on a coarse grid is exact, and so are its differences, which
leaves no rounding but that of the small rest. A logarithm below `LOWEST` is that: its exponential
is 0, so is the gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.inputs import GRID, LOWEST
from pallas_kernels.tpu import LANES
from pallas_kernels.tpu_matrix import across, dot, iota, lower, rolled, turned

Memories = tuple[Float[Array, "F V"], ...]


class Features(NamedTuple):
    """Queries or keys of a chunk."""

    mapped: Float[Array, "C F"]
    source: tuple[Float[Array, "C H"], Float[Array, "1 1"]] | None = None
    """What Taylor features were made of, and what they are to be multiplied by."""


class Gate(Protocol):
    """How much tokens and the memory before the chunk count."""

    def scores(self, queries: Sequence[Features], key: Features) -> list[Float[Array, "C C"]]:
        """Returns q_i D_ij k_j for j <= i, else 0, for each of the queries."""

    def read(self, query: Features, memories: Memories) -> Float[Array, "C V"]:
        """Returns q_i D_i S."""

    def after(self, memories: Memories, key: Features, value: Array) -> Memories:
        """Returns S'."""

    def read_sum(self, query: Features, total: Float[Array, "1 F"]) -> Float[Array, "C 1"]:
        """Is `read` of the sum of keys."""

    def after_sum(self, total: Float[Array, "1 F"], key: Features) -> Float[Array, "1 F"]:
        """Is `after` of the sum of keys."""

    def before(self) -> "Gate":
        """Returns the gate of what a token's value is compared with."""


class _ScalarGate(NamedTuple):
    """One decay for the whole memory."""

    within: Float[Array, "C C"]  # 0 above the diagonal
    since: Array
    until: Array
    whole: Array

    def scores(self, queries: Sequence[Features], key: Features) -> list[Float[Array, "C C"]]:
        return [self.within * _products(query, key) for query in queries]

    def read(self, query: Features, memories: Memories) -> Float[Array, "C V"]:
        product = dot(query.mapped, memories[0], 1, 0)
        return across(self.since, product.shape[1]) * product

    def after(self, memories: Memories, key: Features, value: Array) -> Memories:
        return (self._decayed(memories[0]) + _written(key, self.until, value),)

    def read_sum(self, query: Features, total: Float[Array, "1 F"]) -> Float[Array, "C 1"]:
        return self.since[:, :1] * jnp.sum(query.mapped * total, axis=1, keepdims=True)

    def after_sum(self, total: Float[Array, "1 F"], key: Features) -> Float[Array, "1 F"]:
        keys = across(self.until, key.mapped.shape[1]) * key.mapped.astype(jnp.float32)
        return self._decayed(total) + jnp.sum(keys, axis=0, keepdims=True)

    def before(self) -> "_ScalarGate":
        return self

    def _decayed(self, memory: Array) -> Array:
        return across(self.whole, memory.shape[1]) * memory


class _MomentumGate(NamedTuple):
    """A decay of each of two memories S and U, of which U is added to S at every token."""

    within: Float[Array, "C C"]
    decayed: Float[Array, "C 1"]
    moved: Float[Array, "C 1"]
    momentums: _ScalarGate
    begins: Float[Array, "C 1"] | None
    """1 at the first token of a segment, else 0."""

    def scores(self, queries: Sequence[Features], key: Features) -> list[Float[Array, "C C"]]:
        return [self.within * _products(query, key) for query in queries]

    def read(self, query: Features, memories: Memories) -> Float[Array, "C V"]:
        memory, momentum = (dot(query.mapped, m, 1, 0) for m in memories)
        return self.decayed * memory + self.moved * momentum

    def after(self, memories: Memories, key: Features, value: Array) -> Memories:
        memory, momentum = memories
        kept = self.decayed[-1:] * memory + self.moved[-1:] * momentum
        return (
            kept + _written(key, turned(self.within[-1:]), value),
            self.momentums.whole * momentum + _written(key, self.momentums.until, value),
        )

    def before(self) -> "_MomentumGate":
        def shifted(weight: Array, first: float) -> Array:
            row = iota(weight.shape, 0)
            weight = jnp.where(row == 0, first, rolled(weight, 1, 0))
            return weight if self.begins is None else (1 - self.begins) * weight

        return self._replace(
            within=shifted(self.within, 0),
            decayed=shifted(self.decayed, 1),
            moved=shifted(self.moved, 0),
        )


def constant_gate(log_decay: Array, size: int) -> tuple[Array, Array, Array]:
    """Returns what `gate_of` makes the gate of, from one logarithm for all tokens."""
    row, column = (iota((size, size), axis) for axis in (0, 1))
    steps = (row - column).astype(jnp.float32)
    within = jnp.where(row >= column, jnp.exp(jnp.maximum(steps, 0) * log_decay), 0)
    token = iota((size, LANES), 0).astype(jnp.float32)
    return within, jnp.exp((token + 1) * log_decay), jnp.exp((size - 1 - token) * log_decay)


def gate_of(
    within: Float[Array, "C C"], since: Float[Array, "C _"], until: Float[Array, "C _"]
) -> Gate:
    """Returns the gate of one decay for the whole memory, from decays between tokens and ends."""
    return _ScalarGate(within, since, until, since[-1:])


def step_gates(log_decay: Float[Array, "heads C"]) -> list[Gate]:
    """Returns the gate of each head, from one logarithm for each token."""
    heads, size = log_decay.shape
    log_decay = jnp.where(log_decay > LOWEST, log_decay, LOWEST)
    coarse = jax.lax.stop_gradient(jnp.round(log_decay * GRID) / GRID)
    sums = jnp.concatenate([coarse, log_decay - coarse])
    sums = dot(sums, lower(size).astype(jnp.float32), 1, 1)
    coarse, fine = sums[:heads], sums[heads:]
    since = jnp.exp(coarse + fine)
    until = jnp.exp((coarse[:, -1:] - coarse) + (fine[:, -1:] - fine))
    columns = turned(jnp.concatenate([coarse, fine, since, until]))
    gates = []
    for head in range(heads):
        coarse_i, fine_i, since_i, until_i = (
            columns[:, i * heads + head : i * heads + head + 1] for i in range(4)
        )
        between = (coarse_i - coarse[head : head + 1]) + (fine_i - fine[head : head + 1])
        within = jnp.exp(jnp.where(lower(size), between, -jnp.inf))
        gates.append(gate_of(within, since_i, until_i))
    return gates


def momentum_gates(
    decays: Sequence[Gate],
    momentums: Sequence[Gate],
    begins: Float[Array, "C 1"] | None,
    real: Float[Array, "C 1"] | None,
) -> list[Gate]:
    """Joins the gates of memories S and of U.

    Args:
      decays: of S, by `step_gates`.
      momentums: of U.
      begins: 1 at the first token of a segment, else 0.
      real: 0 for what is no token, and adds no U to S, else 1.
    """
    gates = []
    for decay, momentum in zip(decays, momentums, strict=True):
        matrix, since = momentum.within, momentum.since
        if real is not None:
            matrix, since = real * matrix, real * since
        within = dot(decay.within, matrix, 1, 0)
        moved = jnp.sum(decay.within * turned(since), axis=1, keepdims=True)
        gates.append(_MomentumGate(within, decay.since, moved, momentum, begins))
    return gates


def _products(query: Features, key: Features) -> Float[Array, "C C"]:
    """Returns the products of features, of Taylor features from those of degree 1."""
    if query.source is None:
        return dot(query.mapped, key.mapped, 1, 1)
    x, root = query.source
    s = root * root * dot(x, key.source[0], 1, 1)
    return 1 + s + s * s / 2


def _written(key: Features, weight: Array, value: Array) -> Float[Array, "F V"]:
    """Returns the sum of products of keys and weighted values."""
    value = across(weight, value.shape[1]) * value.astype(jnp.float32)
    return dot(key.mapped, value, 0, 0)
