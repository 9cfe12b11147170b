"""Norms that are part of a mechanism."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_over_heads(x: Float[Array, "B T N V"], epsilon: float) -> Float[Array, "B T N V"]:
    """Returns x / (rms(x) + epsilon), the root mean square over a token's heads together.

    It is computed in float32 or better. Zeros stay zeros, with a gradient that is finite.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.mean(wide**2, axis=(2, 3), keepdims=True)
    root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide / (root + epsilon)).astype(x.dtype)
