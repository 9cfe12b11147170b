"""Root mean square normalisation, with a learned gain and without parameters, and LayerNorm.

All are those of Flax under this library's dtype policy: mean, root and gain are computed in
float32 (float64 for float64 input), and the result is rounded to the input's dtype.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

NormKind = Literal["rms", "srms"]


class RMSNorm(nnx.RMSNorm):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, with a learned gain per channel.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4.

    Args:
      features: channels of the last axis.
      epsilon: added to the mean square; 1e-6 by default.
      param_dtype: dtype of the gain, which starts at 1; float32 by default.
      rngs: not drawn from, as the gain starts constant.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        return super().__call__(x).astype(x.dtype)


class SRMSNorm(nnx.RMSNorm):
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis: no parameters.

    Source: Qin et al., Scaling TransNormer to 175 Billion Parameters (2023), SimpleRMSNorm; the
    epsilon is inside of the root, as in the released models.

    Args:
      features: channels of the last axis.
      epsilon: added to the mean square; 1e-6 by default.
      rngs: not drawn from; it is here so that norms are interchangeable.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        super().__init__(features, epsilon=epsilon, use_scale=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        return super().__call__(x).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """`(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over the last axis.

    Source: Ba et al., Layer Normalization (2016).

    Args:
      features: channels of the last axis.
      epsilon: added to the variance; 1e-6 by default.
      param_dtype: dtype of gain and bias, which start at 1 and 0; float32 by default.
      rngs: not drawn from, as both start constant.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        return super().__call__(x).astype(x.dtype)


NORMS: dict[NormKind, type[nnx.RMSNorm]] = {"rms": RMSNorm, "srms": SRMSNorm}
