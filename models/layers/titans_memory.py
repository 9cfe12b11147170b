"""Titans' long-term memory as a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from attention.linear.titans_neural_memory import (
    TitansState,
    init_titans_neural_memory_state,
    titans_neural_memory,
    titans_neural_memory_step,
    titans_recall,
    titans_weights,
)
from attention.state import check_state
from models.checks import check_inputs, check_positive
from models.layers.attention import check_options, default_head_dim
from models.layers.convolution import CausalDepthwiseConv
from models.layers.initializers import KERNEL_INIT

RESERVED = frozenset(
    "query key value weights rate log_decay log_momentum chunk_size segment_ids initial_state "
    "return_state".split()
)
"""What layers set themselves of `titans_neural_memory`'s arguments."""

FORGETTING = 4.0
"""Forgetting starts at sigmoid(-4), about 2 % a token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansMemoryState:
    """What a `TitansMemory` carries from token to token.

    Attributes:
      memory: weights that learn, and their momentum.
      convolution: the last inputs of the convolution; None without one.
    """

    memory: TitansState
    convolution: Float[Array, "B width-1 3*N*H"] | None


class TitansMemory(nnx.Module):
    """Titans' long-term memory as a layer: `out(titans_neural_memory(query, key, value, ...))`.

    Queries, keys and values are projected from x, convolved causally, and go through silu; queries
    and keys are then of length 1 in each head. Every token and head has a rate, a momentum and a
    forgetting of its own, sigmoids of a projection of x, `gates`; the rate is at most
    1 / chunk_size, which no chunk of keys of length 1 lets overshoot. `weights` are those that the
    memory begins every document with: learned, as everything else.

    Source: Behrouz et al., Titans: Learning to Memorize at Test Time (2024). The range of rates is
    not published.

    Args:
      features: D, channels of input and output.
      num_heads: N, each with a memory of its own.
      head_dim: H; None for D / N.
      depth: matrices of a memory; 1 for a linear one, 2 by default.
      expansion: channels between two of them, in H; 4 by default.
      chunk_size: tokens whose gradients are taken at the same weights; 64 by default.
      conv_width: tokens that the convolution sees; 4 by default, None for no convolution.
      dtype: dtype of computation and output; None for that of input and parameters together.
        Memories are float32 in any case.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of the projections; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of `out`; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size is not positive, or heads do not divide.
      TypeError: a size is not an integer.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: int = 4,
        chunk_size: int = 64,
        conv_width: int | None = 4,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(features=features, num_heads=num_heads, depth=depth, expansion=expansion)
        head_dim = default_head_dim(features, num_heads) if head_dim is None else head_dim
        check_positive(head_dim=head_dim, chunk_size=chunk_size)
        self.features = features
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.dtype = dtype
        self.param_dtype = param_dtype

        inner = num_heads * head_dim
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = functools.partial(linear, use_bias=False, kernel_init=kernel_init)
        self.query = project(features, inner)
        self.key = project(features, inner)
        self.value = project(features, inner)
        self.gates = linear(features, 3 * num_heads, kernel_init=kernel_init)
        self.out = linear(
            inner, features, use_bias=False, kernel_init=out_kernel_init or kernel_init
        )
        if conv_width is None:
            self.conv = None
        else:
            self.conv = CausalDepthwiseConv(
                3 * inner, conv_width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )
        weights = titans_weights(
            rngs.params(), num_heads, head_dim, depth=depth, expansion=expansion, dtype=param_dtype
        )
        self.weights = nnx.List([nnx.Param(w) for w in weights])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Writes whole sequences into memories, and reads them.

        Args:
          x: the inputs.
          segment_ids: document of every token; memories begin anew with each.
          options: `implementation` for `attention.titans_neural_memory`.

        Raises:
          ValueError: a shape does not fit, or an option is not one of those.
        """
        check_inputs(x, self.features)
        check_options(titans_neural_memory, options or {}, RESERVED)
        heads = self._convolved(self._projected(x), segment_ids)
        out = titans_neural_memory(
            *self._heads(heads),
            **self._gates(x),
            weights=self._weights,
            segment_ids=segment_ids,
            **(options or {}),
        )
        return self._out(out)

    def init_state(
        self, batch: int, max_length: int, dtype: Dtype | None = None
    ) -> TitansMemoryState:
        """The state before the first token, for `step`.

        Args:
          batch: B.
          max_length: the most tokens that will be seen; the state does not depend on it.
          dtype: dtype of the inputs that the convolution keeps; None for that of the computation.
        """
        sizes = batch, max_length, self.num_heads, self.num_heads, self.head_dim, self.head_dim
        memory = init_titans_neural_memory_state(
            *sizes, self.dtype or self.param_dtype, weights=self._weights
        )
        convolution = None if self.conv is None else self.conv.init_state(batch, dtype)
        return TitansMemoryState(memory, convolution)

    def step(
        self,
        x: Float[Array, "B T D"],
        state: TitansMemoryState,
        position: Int[Array, ""] | int,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], TitansMemoryState]:
        """Writes T >= 1 new tokens into memories, whose state is given, and reads them.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: number of tokens before; nothing depends on it.
          options: as for the call.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          TypeError, ValueError: a shape or the state does not fit.
        """
        del position
        check_inputs(x, self.features)
        check_state(state, TitansMemoryState)
        heads, convolution = self._projected(x), state.convolution
        if self.conv is not None:
            heads, convolution = self.conv.step(heads, convolution)
        out, memory = titans_neural_memory_step(
            state.memory, *self._heads(heads), **self._gates(x), **(options or {})
        )
        return self._out(out), TitansMemoryState(memory, convolution)

    def recall(self, x: Float[Array, "B T D"], state: TitansMemoryState) -> Float[Array, "B T D"]:
        """Reads, and does not write, by the weights with which the chunk of the next token begins.

        Raises:
          ValueError: a shape does not fit, or the layer has a convolution.
        """
        check_inputs(x, self.features)
        if self.conv is not None:
            raise ValueError("conv_width: must be None, for a memory that is read without writing")
        opens = (state.memory.place % self.chunk_size == 0)[:, None, None, None]
        weights = jax.tree.map(
            lambda now, start: jnp.where(opens, now, start),
            state.memory.weights,
            state.memory.start,
        )
        query = self._heads(jnp.tile(self.query(x), 3))[0]
        return self._out(titans_recall(weights, query))

    @property
    def _weights(self) -> tuple[Array, ...]:
        return tuple(w[...] for w in self.weights)

    def _projected(self, x: Array) -> Array:
        return jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)

    def _convolved(self, heads: Array, segment_ids: Array | None) -> Array:
        return heads if self.conv is None else self.conv(heads, segment_ids)

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, T, N, H] of projections side by side."""
        query, key, value = jnp.split(jax.nn.silu(x), 3, axis=-1)
        split = (*x.shape[:2], self.num_heads, self.head_dim)
        query, key = (_unit(a.reshape(split)) for a in (query, key))
        return query, key, value.reshape(split)

    def _gates(self, x: Array) -> dict[str, Any]:
        gates = self.gates(x)
        gates = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
        rate, momentum, forgetting = jnp.split(gates, 3, axis=-1)
        return dict(
            rate=jax.nn.sigmoid(rate) / self.chunk_size,
            log_momentum=jax.nn.log_sigmoid(momentum),
            log_decay=jax.nn.log_sigmoid(FORGETTING - forgetting),
            chunk_size=self.chunk_size,
        )

    def _out(self, x: Array) -> Array:
        return self.out(x.reshape(*x.shape[:2], -1))


def _unit(x: Array) -> Array:
    """Heads of length 1, computed in float32 or better; zeros stay zeros."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norm = jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * norm).astype(x.dtype)
