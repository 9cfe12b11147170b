"""The merge of attention to disjoint sets of keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def merge_partials(
    outs: Sequence[Float[ArrayLike, "B T N V"]], lses: Sequence[Float[ArrayLike, "B T N"]]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Merges normalised attention to disjoint sets of keys into attention to all of them.

        lse = log sum_p exp(lse_p),    o = sum_p exp(lse_p - lse) o_p

    It is exact for every normalised form of `tiled_attention`, whose log-sum-exp is the logarithm
    of the row sum of weights (Dao et al. 2023, Flash-Decoding), and differentiable in all
    arguments. Where all parts are empty, o = 0, lse = -inf and gradients are 0. A sink belongs to
    one part only.

    Args:
      outs: outputs of the parts.
      lses: their log-sum-exps, -inf for a row without keys.

    Returns:
      The output in the dtype of the first part, and the log-sum-exp in float32, or float64 if
      one of the arguments is.

    Raises:
      ValueError: there are no parts, or shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attention import merge_partials, softmax_attention
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
      >>> halves = [
      ...     softmax_attention(query, key[:, part], value[:, part], return_residual=True)
      ...     for part in (slice(0, 2), slice(2, 6))
      ... ]
      >>> out, lse = merge_partials(*zip(*halves))
      >>> bool(jnp.allclose(out, softmax_attention(query, key, value), atol=1e-6))
      True
    """
    outs, lses = [jnp.asarray(x) for x in outs], [jnp.asarray(x) for x in lses]
    if not outs or len(lses) != len(outs):
        raise ValueError(
            f"lses: there must be one for each output, and at least one; got {len(lses)} for "
            f"{len(outs)}"
        )
    for name, arrays, shape in (("outs", outs, outs[0].shape), ("lses", lses, outs[0].shape[:-1])):
        for array in arrays:
            if array.shape != shape:
                raise ValueError(f"{name}: all must have the shape {shape}; got {array.shape}")
    dtype = jnp.promote_types(jnp.result_type(*outs, *lses), jnp.float32)
    logs = jnp.stack([lse.astype(dtype) for lse in lses])
    maximum = jax.lax.stop_gradient(logs.max(axis=0))
    maximum = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weights = jnp.exp(logs - maximum)
    total = weights.sum(axis=0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    parts = (
        (weight / total)[..., None] * out.astype(dtype)
        for weight, out in zip(weights, outs, strict=True)
    )
    lse = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))
    return sum(parts).astype(outs[0].dtype), lse
