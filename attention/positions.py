"""Positions: rotary embeddings (RoPE), linear biases (ALiBi), linearized encodings (LRPE).

Angles are float32 whatever the dtype of the array that they turn (float64 for float64): in bfloat16
there is no position 257.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def _angles(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "T"] | Int[Array, "B T"] | None,
    frequencies: Float[Array, "*N R"],
) -> Float[Array, "#B T #N R"]:
    if x.ndim != 4:
        raise ValueError(f"x: shape {x.shape} must be [batch, tokens, heads, head_dim]")
    batch, tokens = x.shape[:2]
    positions = jnp.arange(tokens) if positions is None else jnp.asarray(positions)
    if positions.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"positions: shape {positions.shape} must be [{tokens}] or [{batch}, {tokens}], as x"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions: dtype {positions.dtype} must be an integer type")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    positions = positions.reshape(-1, tokens, 1, 1).astype(dtype)
    return positions * frequencies.astype(dtype)


def _check_floating(x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: dtype {x.dtype} must be a floating type")


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    frequencies: Float[Array, "R/2"] | None = None,
) -> Float[Array, "B T N H"]:
    r"""Rotary position embedding: turns pairs of channels by angles that grow with the position.

    The first `R = fraction * H` channels are turned, the others pass unchanged. Channel i is paired
    with channel i + R/2 ("rotate half", the convention of GPT-NeoX and Llama; the paper pairs 2i
    with 2i + 1, which is the same map after a permutation of channels):

        y_i       = x_i cos(t w_i) - x_{i+R/2} sin(t w_i)
        y_{i+R/2} = x_{i+R/2} cos(t w_i) + x_i sin(t w_i),      w_i = base^(-2i/R),  i = 0..R/2-1

    so that the product of a turned query and a turned key depends only on the difference of their
    positions.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021),
    equations 14, 15 and 34; the fraction is from Wang and Komatsuzaki, GPT-J-6B (2021).

    Args:
      x: queries or keys.
      positions: position of every token; None for 0..T-1.
      base: ratio of the longest wavelength to the shortest, nearly; 10,000 by default.
      fraction: part of the channels that is turned, in (0, 1]; `fraction * H` must be even.
      frequencies: w, learned ones say; None for those of the base.

    Returns:
      Array of x's shape and dtype.

    Raises:
      ValueError: a shape does not fit, or `fraction * H` is not an even number of channels.
      TypeError: x is not floating or positions are not integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attention.positions import rope
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 8))
      >>> here = jnp.einsum("btnh,bsnh->bnts", rope(query), rope(key))
      >>> later = jnp.arange(6) + 100
      >>> there = jnp.einsum("btnh,bsnh->bnts", rope(query, later), rope(key, later))
      >>> bool(jnp.allclose(here, there, atol=1e-4))
      True
    """
    _check_floating(x)
    turned = round(fraction * x.shape[-1])
    if (
        not 0 < fraction <= 1
        or turned % 2
        or not turned
        or not np.isclose(turned, fraction * x.shape[-1])
    ):
        raise ValueError(
            f"fraction: {fraction} of the {x.shape[-1]} channels of x must be an even number of "
            "them, at least 2"
        )
    if frequencies is None:
        # in NumPy's float64, so that the only rounding is the one to the angles' dtype
        frequencies = jnp.asarray(base ** (-np.arange(0, turned, 2) / turned))
    elif jnp.shape(frequencies) != (turned // 2,):
        raise ValueError(
            f"frequencies: shape {jnp.shape(frequencies)} must be ({turned // 2},), half of the "
            f"{turned} channels that are turned"
        )
    angles = _angles(x, positions, frequencies)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x, (turned // 2, turned), axis=-1)
    out = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate((*(y.astype(x.dtype) for y in out), rest), axis=-1)


def reflected(x: Float[Array, "B T N H"], direction: Float[Array, "H"]) -> Float[Array, "B T N H"]:
    """Householder reflection x - 2 w (w . x) / (w . w), which turns the sign along w.

    It leaves products of two vectors as they are, so of itself it is no position encoding. Before
    RoPE it is one of the forms of LRPE.

    Source: Qin et al., Linearized Relative Positional Encoding (2023).

    Args:
      x: queries or keys.
      direction: w, of any length but 0.

    Returns:
      Array of x's shape and dtype.

    Raises:
      ValueError: a shape does not fit.
      TypeError: x is not floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attention.positions import reflected
      >>> x = jnp.arange(8.0).reshape(1, 1, 1, 8)
      >>> [int(y) for y in reflected(x, jnp.eye(8)[1])[0, 0, 0]]
      [0, -1, 2, 3, 4, 5, 6, 7]
    """
    _check_floating(x)
    direction = jnp.asarray(direction)
    if direction.shape != x.shape[-1:]:
        raise ValueError(f"direction: shape {direction.shape} must be ({x.shape[-1]},), as x")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    direction = direction.astype(wide.dtype)
    along = jnp.sum(wide * direction, axis=-1, keepdims=True) / jnp.sum(direction**2)
    return (wide - 2 * along * direction).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    r"""Slopes of ALiBi's linear biases, one per head: the bias is `-slope * distance`.

    For a power of two N, head h = 0..N-1 has `2^(-8(h+1)/N)`. Otherwise, with P the largest power
    of two below N, the P slopes of P heads, then every second one of the slopes of 2P heads,
    beginning with the first: N distinct values.

    Source: Press et al., Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation (2021), section 3; the rule for other head counts is that of the authors' code.

    Args:
      num_heads: N, at least 1.

    Returns:
      float32 [N], positive.

    Raises:
      ValueError: there is no head.

    Example:
      >>> from attention.positions import alibi_slopes
      >>> alibi_slopes(3).tolist()
      [0.0625, 0.00390625, 0.25]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: {num_heads} must be at least 1")
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
    return np.concatenate((slopes, between[: num_heads - power])).astype(np.float32)


def lrpe(
    x: Float[Array, "B T N H"],
    theta: Float[Array, "N H"],
    positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N 2*H"]:
    r"""Linearized relative position encoding (LRPE-d) of queries and keys: doubles their channels.

        y_t = concat(x_t cos(t theta), x_t sin(t theta))

    so that query t and key j score `sum_d q_d k_d cos((t - j) theta_d)`: relative, and still a
    product of a map of the query and a map of the key, as linear attention needs. `theta` is a
    learnable weight, see `init_lrpe_theta`.

    Source: Qin et al., Scaling TransNormer to 175 Billion Parameters (2023), and the code of the
    released models; the family is that of Qin et al., Linearized Relative Positional Encoding
    (2023).

    Args:
      x: queries or keys, after their activation.
      theta: angle per position, in radians, for each head (of x: key heads for keys) and channel.
      positions: position of every token; None for 0..T-1.

    Returns:
      Array of x's dtype with twice x's channels.

    Raises:
      ValueError: a shape does not fit.
      TypeError: x is not floating or positions are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from attention.positions import init_lrpe_theta, lrpe
      >>> lrpe(jnp.ones((1, 5, 2, 4)), init_lrpe_theta(2, 4)).shape
      (1, 5, 2, 8)
    """
    _check_floating(x)
    if theta.shape != x.shape[-2:]:
        raise ValueError(
            f"theta: shape {theta.shape} must be {x.shape[-2:]}, the heads and channels of x"
        )
    angles = _angles(x, positions, theta)
    return jnp.concatenate([(x * f(angles)).astype(x.dtype) for f in (jnp.cos, jnp.sin)], axis=-1)


def init_lrpe_theta(num_heads: int, head_dim: int, base: float = 10_000.0) -> Float[Array, "N H"]:
    r"""Initial angles of LRPE-d: `base^(-2i/(N H))`, with i the flat index over heads and channels.

    Source: the released code of Qin et al., Scaling TransNormer to 175 Billion Parameters (2023).

    Args:
      num_heads: N.
      head_dim: H, the channels before doubling.
      base: the last angle is nearly `base^-2`.

    Returns:
      float32 [N, H], from 1 downwards, in radians per position.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> from attention.positions import init_lrpe_theta
      >>> theta = init_lrpe_theta(4, 16)
      >>> theta.shape, float(theta[0, 0])
      ((4, 16), 1.0)
    """
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"num_heads, head_dim: {num_heads}, {head_dim} must be at least 1")
    size = num_heads * head_dim
    theta = base ** (-2.0 * np.arange(size) / size)
    return jnp.asarray(theta.reshape(num_heads, head_dim), jnp.float32)
