"""The feed-forward part of a block, gated or not."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from models.checks import check_choice, check_positive
from models.layers.initializers import KERNEL_INIT

FeedForwardKind = Literal["swiglu", "sglu", "gelu"]


class FeedForward(nnx.Module):
    """Two or three matrices and a pointwise non-linearity, for each token by itself.

        swiglu   down(silu(gate(x)) * up(x))
        sglu     down(gate(x) * up(x)), with no activation
        gelu     down(gelu(up(x))), with no gate; gelu in its tanh form

    Sources: Shazeer, GLU Variants Improve Transformer (2020), equation 6 (SwiGLU); Qin et al.,
    Scaling TransNormer to 175 Billion Parameters (2023) (SGLU); Hendrycks and Gimpel, Gaussian
    Error Linear Units (2016).

    Args:
      features: channels of input and output.
      hidden_features: channels between.
      kind: which of the above; "swiglu" by default.
      use_bias: whether the matrices have biases, which start at 0.
      dtype: dtype of computation and output; None for that of input and parameters together.
      param_dtype: dtype of the parameters; float32 by default.
      kernel_init: initialiser of `gate` and `up`; `KERNEL_INIT` by default.
      out_kernel_init: initialiser of `down`; None for `kernel_init`.
      rngs: the initialisers draw from its `params` stream.

    Raises:
      ValueError: the kind is unknown or a size is not positive.
      TypeError: a size is not an integer.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        kind: FeedForwardKind = "swiglu",
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_choice("kind", kind, get_args(FeedForwardKind))
        check_positive(features=features, hidden_features=hidden_features)
        self.kind = kind
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if kind != "gelu":
            self.gate = linear(features, hidden_features, kernel_init=kernel_init)
        self.up = linear(features, hidden_features, kernel_init=kernel_init)
        self.down = linear(hidden_features, features, kernel_init=out_kernel_init or kernel_init)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies it to the last axis."""
        hidden = self.up(x)
        if self.kind == "swiglu":
            hidden = jax.nn.silu(self.gate(x)) * hidden
        elif self.kind == "sglu":
            hidden = self.gate(x) * hidden
        else:
            hidden = jax.nn.gelu(hidden)
        return self.down(hidden)
