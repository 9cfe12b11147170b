"""The short causal convolution of each channel that recurrent layers put before a recurrence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from attention.packing import places
from models.checks import check_inputs, check_positive

CONVOLUTION_INIT: Initializer = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""For taps [width, features]: uniform in +-width^-0.5."""


class CausalDepthwiseConv(nnx.Module):
    """`y_t = bias + sum_i kernel_i * x_(t - width + 1 + i)`, for each channel by itself.

    Tokens before the first, and those of other documents, count as zeros. Sums are in float32, or
    float64 for float64 inputs.

    Args:
      features: channels.
      width: number of tokens that an output sees: its own and those just before it.
      use_bias: whether there is a bias, which starts at 0; True by default.
      dtype: dtype of the output; None for that of input and parameters together.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of the taps, `kernel` [width, features]; `CONVOLUTION_INIT` by
        default.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: a size is not positive.
      TypeError: a size is not an integer.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = CONVOLUTION_INIT,
        rngs: nnx.Rngs,
    ):
        check_positive(features=features, width=width)
        self.features = features
        self.width = width
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, features), param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Convolves whole sequences.

        Args:
          x: the inputs.
          segment_ids: document of every token; an output sees tokens of its document only.

        Raises:
          ValueError: a shape does not fit.
        """
        check_inputs(x, self.features)
        place = None if segment_ids is None else places(segment_ids, *x.shape[:2])
        return self._convolve(self.init_state(x.shape[0], x.dtype), x, place)

    def init_state(self, batch: int, dtype: Dtype | None = None) -> Float[Array, "B width-1 D"]:
        """The last inputs before the first token, which are zeros, for `step`.

        Args:
          batch: B.
          dtype: of the inputs to come; None for that of the computation.
        """
        dtype = dtype or self.dtype or self.param_dtype
        return jnp.zeros((batch, self.width - 1, self.features), dtype)

    def step(
        self, x: Float[Array, "B T D"], state: Float[Array, "B width-1 D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B width-1 D"]]:
        """Convolves T >= 1 new tokens, given the last inputs before them.

        Returns:
          The outputs, the same as `__call__` on the whole sequence, and the last inputs now.

        Raises:
          ValueError: a shape does not fit.
        """
        check_inputs(x, self.features)
        wanted = (x.shape[0], self.width - 1, self.features)
        if state.shape != wanted:
            raise ValueError(f"state: shape {state.shape} must be {wanted}")
        out = self._convolve(state.astype(x.dtype), x, None)
        last = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
        return out, last[:, last.shape[1] - self.width + 1 :]

    def _convolve(self, before: Array, x: Array, place: Array | None) -> Array:
        """Returns the outputs; `place` is the number of each token in its document."""
        parameters = [self.kernel[...], *([self.bias[...]] if self.use_bias else [])]
        dtype = self.dtype or jnp.result_type(x, *parameters)
        wide = jnp.promote_types(dtype, jnp.float32)
        # Rounded as every layer's operands are, and summed in float32.
        kernel, *bias = (p.astype(dtype).astype(wide) for p in parameters)
        every = jnp.concatenate([before, x], axis=1).astype(dtype).astype(wide)
        tokens = x.shape[1]
        out = jnp.zeros((*x.shape[:2], self.features), wide)
        for i in range(self.width):
            seen = jax.lax.slice_in_dim(every, i, i + tokens, axis=1)
            back = self.width - 1 - i
            if place is not None and back:
                seen = jnp.where((place >= back)[..., None], seen, 0)
            out += kernel[i] * seen
        return (out + bias[0] if bias else out).astype(dtype)
