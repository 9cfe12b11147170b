"""Titans: attention to a window or a segment, beside, behind or before a memory that learns."""

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

from attention.cache.kv_cache import KVCache, init_kv_cache
from attention.cache.window_cache import WindowCache, init_window_cache
from attention.dense.softmax_attention import softmax_attention, softmax_attention_step
from attention.linear.titans_neural_memory import titans_neural_memory
from attention.positions import rope
from attention.state import check_state
from models.checks import check_inputs, check_positive
from models.layers.attention import check_options, default_head_dim
from models.layers.initializers import KERNEL_INIT
from models.layers.norm import RMSNorm
from models.layers.titans_memory import RESERVED, TitansMemory, TitansMemoryState
from pallas_kernels.tiled.merge import merge_partials


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansLayerState:
    """What a layer of Titans carries from token to token; its size does not depend on their number.

    Attributes:
      memory: that of the memory.
      attention: turned keys, and values, of the tokens in the window; or of the segment so far, of
        its tokens and of what the memory says of them.
    """

    memory: TitansMemoryState
    attention: WindowCache | tuple[KVCache, KVCache]


class _Titans(nnx.Module):
    """What the layers share: attention with persistent tokens, a memory, and the gate of both."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        tokens: int,
        *,
        head_dim: int | None,
        num_persistent: int,
        gated: bool,
        dtype: Dtype | None,
        param_dtype: Dtype,
        kernel_init: Initializer,
        out_kernel_init: Initializer | None,
        rngs: nnx.Rngs,
        **memory: Any,
    ):
        check_positive(features=features, num_heads=num_heads)
        head_dim = default_head_dim(features, num_heads) if head_dim is None else head_dim
        check_positive(head_dim=head_dim)
        if not isinstance(num_persistent, int) or num_persistent < 0:
            raise ValueError(f"num_persistent: {num_persistent!r} must be an int of at least 0")
        if head_dim % 2:
            raise ValueError(f"head_dim: {head_dim} must be even, for rotary positions")
        self.features = features
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.tokens = tokens
        self.num_persistent = num_persistent
        self.dtype = dtype
        self.param_dtype = param_dtype

        inner = num_heads * head_dim
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, **common)
        self.query = linear(features, inner, kernel_init=kernel_init)
        self.key = linear(features, inner, kernel_init=kernel_init)
        self.value = linear(features, inner, kernel_init=kernel_init)
        self.out = linear(inner, features, kernel_init=out_kernel_init or kernel_init)
        if num_persistent:
            shape = (num_persistent, features)
            self.persistent = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))
        self.memory = TitansMemory(
            features,
            num_heads,
            head_dim=head_dim,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            **memory,
            **common,
        )
        if gated:
            self.attention_norm = RMSNorm(features, param_dtype=param_dtype, rngs=rngs)
            self.memory_norm = RMSNorm(features, param_dtype=param_dtype, rngs=rngs)

    def init_state(
        self, batch: int, max_length: int, dtype: Dtype | None = None
    ) -> TitansLayerState:
        """The state before the first token, for `step`.

        Args:
          batch: B.
          max_length: the most tokens that will be seen; the state does not depend on it.
          dtype: dtype of keys and values that are kept; None for that of the computation.
        """
        sizes = self.num_heads, self.head_dim, self.head_dim
        attention = self._cache(batch, *sizes, dtype or self.dtype or self.param_dtype)
        return TitansLayerState(self.memory.init_state(batch, max_length, dtype), attention)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)

    def _keys(self, x: Array, positions: Array | None) -> tuple[Array, Array]:
        return rope(self._split(self.key(x)), positions), self._split(self.value(x))

    def _merged(self, query: Array, parts: list[tuple[Array, Array]], **options: Any) -> Array:
        """Projects attention to some keys and to the persistent tokens, which have no positions."""
        if self.num_persistent:
            tokens = self.persistent[...][None]
            shape = (len(query), self.num_persistent, self.num_heads, self.head_dim)
            key, value = (
                jnp.broadcast_to(p(tokens).reshape(1, *shape[1:]), shape)
                for p in (self.key, self.value)
            )
            parts = [
                *parts,
                softmax_attention(query, key, value, return_residual=True, **options),
            ]
        out = merge_partials(*zip(*parts, strict=True))[0]
        return self.out(out.reshape(*out.shape[:2], -1))

    def _windowed(
        self, x: Array, segment_ids: Array | None, options: Mapping[str, Any]
    ) -> Float[Array, "B T D"]:
        query = self._split(self.query(x))
        part = softmax_attention(
            rope(query),
            *self._keys(x, None),
            is_causal=True,
            local_window_size=(self.tokens - 1, 0),
            segment_ids=segment_ids,
            return_residual=True,
            **options,
        )
        return self._merged(query, [part], **options)

    def _windowed_step(
        self, x: Array, cache: WindowCache, position: Array | int
    ) -> tuple[Array, WindowCache]:
        """Returns the output and what is kept."""
        positions = position + jnp.arange(x.shape[1])
        query = self._split(self.query(x))
        part, cache = softmax_attention_step(
            cache,
            rope(query, positions),
            *self._keys(x, positions),
            local_window_size=(self.tokens - 1, 0),
            return_residual=True,
        )
        return self._merged(query, [part]), cache

    def _gated(self, y: Array, memory: Array) -> Array:
        """The gate is 1 where the memory has nothing to say."""
        return self.attention_norm(y) * (2 * jax.nn.sigmoid(self.memory_norm(memory)))


class _Windowed(_Titans):
    """Titans with a sliding window."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        window: int,
        *,
        head_dim: int | None = None,
        num_persistent: int = 4,
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
        check_positive(window=window)
        super().__init__(
            features,
            num_heads,
            window,
            head_dim=head_dim,
            num_persistent=num_persistent,
            gated=isinstance(self, TitansMAG),
            depth=depth,
            expansion=expansion,
            chunk_size=chunk_size,
            conv_width=conv_width,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends over whole sequences, and remembers them.

        Args:
          x: the inputs.
          segment_ids: document of every token; tokens see their document only.
          options: `implementation` for attention and memory.

        Raises:
          ValueError: a shape does not fit, or an option is not that.
        """
        check_inputs(x, self.features)
        options = dict(options or {})
        memory = self.memory(x, segment_ids=segment_ids, options=options)
        return self._both(x, memory, lambda y: self._windowed(y, segment_ids, options))

    def step(
        self, x: Float[Array, "B T D"], state: TitansLayerState, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], TitansLayerState]:
        """Attends from T >= 1 new tokens to those before in the window, and remembers them.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: number of tokens before.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          TypeError, ValueError: a shape or the state does not fit.
        """
        check_inputs(x, self.features)
        check_state(state, TitansLayerState)
        memory, after = self.memory.step(x, state.memory, position)
        kept = []

        def attend(y: Array) -> Array:
            out, cache = self._windowed_step(y, state.attention, position)
            kept.append(cache)
            return out

        out = self._both(x, memory, attend)
        return out, TitansLayerState(after, *kept)

    def _cache(self, batch: int, *sizes: Any) -> WindowCache:
        return init_window_cache(batch, self.tokens - 1, *sizes)


class TitansMAG(_Windowed):
    """Memory as a gate: `norm(attention(x)) * 2 sigmoid(norm(memory(x)))`.

    Attention is to the `window` tokens up to a token's own, with rotary positions, and to
    `num_persistent` learned tokens without. The memory is `TitansMemory`, as deep and wide as said;
    its `weights`, with which each document begins, are learned: what it would keep of the
    persistent tokens, which the paper lets it read first, is part of them. The gate is not
    published beyond a norm with learned weights and a non-linearity; here a memory that returns
    zeros leaves attention as it is.

    Source: Behrouz et al., Titans: Learning to Memorize at Test Time (2024).

    Args:
      features: D, channels of input and output.
      num_heads: N, of attention and of the memory.
      window: tokens that a token sees by attention, with its own.
      head_dim: H, which is even; None for D / N.
      num_persistent: number of persistent tokens; 4 by default.
      depth: of the memory, as for `TitansMemory`.
      expansion: likewise.
      chunk_size: likewise.
      conv_width: likewise.
      dtype: dtype of computation and output; None for that of input and parameters together.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of the projections; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of the last ones; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size does not fit.
      TypeError: a size is not an integer.
    """

    def _both(self, x: Array, memory: Array, attend: Any) -> Array:
        return self._gated(attend(x), memory)


class TitansMAL(_Windowed):
    """Memory as a layer: `attention(x + memory(x))`.

    Attention, persistent tokens, memory and arguments are those of `TitansMAG`. The sum, in the
    place of the memory's output alone, keeps what a memory that has yet to learn would lose.

    Source: Behrouz et al., Titans: Learning to Memorize at Test Time (2024).
    """

    def _both(self, x: Array, memory: Array, attend: Any) -> Array:
        return attend(x + memory)


class TitansMAC(_Titans):
    """Memory as context: attention within segments of C tokens, to what the memory says of them.

    In the segment of token i, from its j-th tokens x_j, j <= i, and the persistent tokens p,

        h_j = what the memory, as it was before the segment, says of x_j
        y_i = attention of x_i to all p, and to h_j and x_j
        m_i = what the memory says of y_i, having learned y_j
        o_i = norm(y_i) * 2 sigmoid(norm(m_i))

    The memory learns from y, by gradients at the segment's beginning; the past before a segment is
    in the memory alone. The paper, read literally, attends to all of h and updates once at the end
    of a segment, by which tokens see later ones; here none does. Norms and gate are those of
    `TitansMAG`; positions of x and h are rotary, persistent tokens have none; the memory has no
    convolution, as it is read with and without being written. Segments follow one another: a call
    takes a pass over them, whose backward keeps the memory before each. Packed documents are
    refused.

    Source: Behrouz et al., Titans: Learning to Memorize at Test Time (2024).

    Args:
      features: D, channels of input and output.
      num_heads: N, of attention and of the memory.
      segment: C.
      head_dim: H, which is even; None for D / N.
      num_persistent: number of persistent tokens; 4 by default.
      depth: of the memory, as for `TitansMemory`.
      expansion: likewise.
      dtype: dtype of computation and output; None for that of input and parameters together.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of the projections; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of the last ones; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size does not fit.
      TypeError: a size is not an integer.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        segment: int,
        *,
        head_dim: int | None = None,
        num_persistent: int = 4,
        depth: int = 2,
        expansion: int = 4,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(segment=segment)
        super().__init__(
            features,
            num_heads,
            segment,
            head_dim=head_dim,
            num_persistent=num_persistent,
            gated=True,
            depth=depth,
            expansion=expansion,
            chunk_size=segment,
            conv_width=None,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends over whole sequences, and remembers them.

        Args:
          x: the inputs.
          segment_ids: None: packed documents are not served.
          options: `implementation` for attention and memory.

        Raises:
          ValueError: a shape does not fit, an option is not that, or there are packed documents.
        """
        check_inputs(x, self.features)
        check_options(titans_neural_memory, options or {}, RESERVED)
        if segment_ids is not None:
            raise ValueError("segment_ids: memory as context takes no packed documents")
        batch, tokens, _ = x.shape
        size = min(self.tokens, tokens)
        count = -(-tokens // size)
        # No token sees what stands after the last.
        x = jnp.pad(x, ((0, 0), (0, count * size - tokens), (0, 0)))
        segments = jnp.moveaxis(x.reshape(batch, count, size, -1), 1, 0)
        state = self.memory.init_state(batch, tokens)

        def one(memory: TitansMemoryState, inputs: tuple) -> tuple[TitansMemoryState, Array]:
            x, number = inputs
            positions = number * size + jnp.arange(size)
            query = self._split(self.query(x))
            turned = rope(query, positions)
            parts = [
                softmax_attention(
                    turned,
                    *self._keys(source, positions),
                    is_causal=True,
                    return_residual=True,
                    **(options or {}),
                )
                for source in (self.memory.recall(x, memory), x)
            ]
            y = self._merged(query, parts, **(options or {}))
            read, memory = self.memory.step(y, memory, 0, options=options)
            return memory, self._gated(y, read)

        _, out = jax.lax.scan(jax.checkpoint(one), state, (segments, jnp.arange(count)))
        return jnp.moveaxis(out, 0, 1).reshape(batch, count * size, -1)[:, :tokens]

    def step(
        self, x: Float[Array, "B T D"], state: TitansLayerState, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], TitansLayerState]:
        """Attends from T >= 1 new tokens, one after another, and remembers them.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: number of tokens before.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          TypeError, ValueError: a shape or the state does not fit.
        """
        check_inputs(x, self.features)
        check_state(state, TitansLayerState)

        def one(state: TitansLayerState, inputs: tuple) -> tuple[TitansLayerState, Array]:
            x, position = inputs
            x, positions = x[:, None], position[None]
            query = self._split(self.query(x))
            turned, caches, parts = rope(query, positions), [], []
            sources = self.memory.recall(x, state.memory), x
            for cache, source in zip(state.attention, sources, strict=True):
                # Of a segment that is over, nothing is seen any more.
                cache = dataclasses.replace(cache, length=cache.length % self.tokens)
                part, cache = softmax_attention_step(
                    cache, turned, *self._keys(source, positions), return_residual=True
                )
                caches.append(cache)
                parts.append(part)
            y = self._merged(query, parts)
            read, memory = self.memory.step(y, state.memory, position)
            return TitansLayerState(memory, tuple(caches)), self._gated(y, read)[:, 0]

        positions = jnp.asarray(position) + jnp.arange(x.shape[1])
        state, out = jax.lax.scan(one, state, (jnp.moveaxis(x, 1, 0), positions))
        return jnp.moveaxis(out, 0, 1), state

    def _cache(self, batch: int, *sizes: Any) -> tuple[KVCache, KVCache]:
        return (init_kv_cache(batch, self.tokens, *sizes),) * 2
