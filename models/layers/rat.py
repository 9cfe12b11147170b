"""RAT's layer: gates of a recurrence within chunks, and of the output, around `rat_attention`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from attention.linear.rat_attention import (
    CHUNK_SIZE,
    RATState,
    init_rat_attention_state,
    rat_attention,
    rat_attention_step,
)
from models.checks import check_inputs, check_positive
from models.layers.attention import check_options, default_head_dim, static_options
from models.layers.initializers import KERNEL_INIT

_OWN = frozenset("state query key value log_decay chunk_size segment_ids".split())


class RATLayer(nnx.Module):
    """A causal token mixer: `out(sigmoid(gate(x)) * rat_attention(query, key, value, decay))`.

    Values, decays and output gates are of all D = N * H channels; queries and keys have
    `num_groups` heads of their own, each serving N / `num_groups` consecutive heads. A channel
    decays by sigmoid(decay(x) + decay_bias), where `decay_bias` starts as the logarithm of numbers
    that are even in 1 to C - 1: so that for no input memories reach from 2 tokens to C.

    Source: Wei et al., RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling
    (2025). There head n has the queries and keys of group n mod `num_groups`.

    Args:
      features: D, channels of input and output.
      num_heads: N.
      num_groups: heads of queries and keys, a divisor of N; 2 by default, or 1 of an odd N.
      chunk_size: C, 16 by default.
      options: further keyword arguments for `attention.rat_attention`, such as `rope_base`.
      dtype: dtype of computation and output; None for that of input and parameters together.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of the projections; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of `out`; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size does not fit, or an option is not one of the mechanism's.
      TypeError: a size is not an integer or an option is not hashable.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_groups: int | None = None,
        chunk_size: int = CHUNK_SIZE,
        options: Mapping[str, Any] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(features=features, num_heads=num_heads, chunk_size=chunk_size)
        num_groups = 2 - num_heads % 2 if num_groups is None else num_groups
        check_positive(num_groups=num_groups)
        if num_heads % num_groups:
            raise ValueError(f"num_groups: {num_groups} must divide the {num_heads} heads")
        self.options = static_options(options)
        check_options(rat_attention, dict(self.options), _OWN)
        self.features = features
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.head_dim = default_head_dim(features, num_heads)
        self.chunk_size = chunk_size
        self.dtype = dtype
        self.param_dtype = param_dtype

        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        shared = num_groups * self.head_dim
        self.query = linear(features, shared, kernel_init=kernel_init)
        self.key = linear(features, shared, kernel_init=kernel_init)
        self.value = linear(features, features, kernel_init=kernel_init)
        self.decay = linear(features, features, kernel_init=kernel_init)
        self.gate = linear(features, features, kernel_init=kernel_init)
        self.out = linear(features, features, kernel_init=out_kernel_init or kernel_init)
        reach = jax.random.uniform(
            rngs.params(), (features,), minval=1, maxval=max(chunk_size - 1, 1)
        )
        self.decay_bias = nnx.Param(jnp.log(reach).astype(param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes whole sequences.

        Args:
          x: the inputs.
          segment_ids: document of every token; tokens see their document only.
          options: further keyword arguments for the mechanism, over those of the constructor.

        Raises:
          ValueError: a shape does not fit, or an option is not one of the mechanism's.
        """
        check_inputs(x, self.features)
        check_options(rat_attention, options or {}, _OWN)
        keywords = dict(self.options) | dict(options or {})
        out = rat_attention(
            **self._heads(x), chunk_size=self.chunk_size, segment_ids=segment_ids, **keywords
        )
        return self._gated(x, out)

    def init_state(self, batch: int, max_length: int, dtype: Dtype | None = None) -> RATState:
        """The state before the first token, for `step`: a key and a value for each chunk.

        Args:
          batch: B.
          max_length: the most tokens that will be seen.
          dtype: dtype of keys and values that are kept; None for that of the computation.
        """
        heads, channels = (self.num_heads,) * 2, (self.head_dim,) * 2
        dtype = dtype or self.dtype or self.param_dtype
        return init_rat_attention_state(
            batch, max_length, *heads, *channels, dtype, chunk_size=self.chunk_size, gated=True
        )

    def step(
        self, x: Float[Array, "B T D"], state: RATState, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], RATState]:
        """Mixes T >= 1 new tokens with all before them, whose state is given.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: number of tokens before; the state knows it.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          TypeError, ValueError: a shape or the state does not fit.
        """
        del position
        check_inputs(x, self.features)
        heads, keywords = self._heads(x), dict(self.options)
        out, state = rat_attention_step(state, **heads, chunk_size=self.chunk_size, **keywords)
        return self._gated(x, out), state

    def _heads(self, x: Array) -> dict[str, Array]:
        def split(y: Array) -> Array:
            y = y.reshape(*x.shape[:2], -1, self.head_dim)
            return jnp.repeat(y, self.num_heads // y.shape[2], axis=2)

        decay = self.decay(x)
        decay = decay.astype(jnp.promote_types(decay.dtype, jnp.float32)) + self.decay_bias[...]
        return {
            "query": split(self.query(x)),
            "key": split(self.key(x)),
            "value": split(self.value(x)),
            "log_decay": split(jax.nn.log_sigmoid(decay)),
        }

    def _gated(self, x: Array, out: Array) -> Array:
        return self.out(jax.nn.sigmoid(self.gate(x)) * out.reshape(*x.shape[:2], -1))
