"""BASED's gated short convolution, the layer between its attention layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from models.checks import check_inputs, check_positive
from models.layers.convolution import CausalDepthwiseConv
from models.layers.initializers import KERNEL_INIT


class BaseConv(nnx.Module):
    """A causal token mixer of short reach: `out_proj(silu(conv(a)) * b)`, [a, b] = `in_proj(x)`.

    It compares and shifts neighbouring tokens, which linear attention does badly, and recalls
    nothing from further back than its few taps.

    Source: Arora et al., Simple linear attention language models balance the recall-throughput
    tradeoff (2024); without silu and with a residual inside, the minimal gated convolution of Arora
    et al., Zoology: Measuring and Improving Recall in Efficient Language Models (2023).

    Args:
      features: D, channels of input and output.
      expansion: a and b have expansion * D / 2 channels each; 4 by default.
      width: tokens that the convolution sees, its own among them; 3 by default.
      use_bias: whether the projections have biases, which start at 0; True by default. The
        convolution has none.
      dtype: dtype of computation and output; None for that of input and parameters together.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of `in_proj`; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of `out_proj`; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size is not positive, or `expansion * features` is odd.
      TypeError: a size is not an integer.
    """

    def __init__(
        self,
        features: int,
        *,
        expansion: int = 4,
        width: int = 3,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(features=features, expansion=expansion, width=width)
        if expansion * features % 2:
            raise ValueError(f"expansion: {expansion} x {features} features must be even")
        inner = expansion * features // 2
        self.features = features
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.in_proj = linear(features, 2 * inner, kernel_init=kernel_init)
        self.conv = CausalDepthwiseConv(
            inner, width, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.out_proj = linear(inner, features, kernel_init=out_kernel_init or kernel_init)

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
          options: must be empty: it has none.

        Raises:
          ValueError: a shape does not fit, or there are options.
        """
        if options:
            raise ValueError(f"options: {', '.join(options)}, but this layer has none")
        check_inputs(x, self.features)
        a, b = jnp.split(self.in_proj(x), 2, axis=-1)
        return self.out_proj(jax.nn.silu(self.conv(a, segment_ids)) * b)

    def init_state(self, batch: int, max_length: int, dtype: Dtype | None = None) -> Array:
        """The last inputs of the convolution before the first token, for `step`.

        Args:
          batch: B.
          max_length: the most tokens that will be seen; the state does not depend on it.
          dtype: of the inputs that are kept; None for that of the computation.
        """
        del max_length
        return self.conv.init_state(batch, dtype)

    def step(
        self, x: Float[Array, "B T D"], state: Array, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Array]:
        """Mixes T >= 1 new tokens with those before them.

        Args:
          x: the new inputs.
          state: from `init_state` or the step before.
          position: number of tokens before; nothing depends on it.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the state after them.

        Raises:
          ValueError: a shape or the state does not fit.
        """
        del position
        check_inputs(x, self.features)
        a, b = jnp.split(self.in_proj(x), 2, axis=-1)
        a, state = self.conv.step(a, state)
        return self.out_proj(jax.nn.silu(a) * b), state
