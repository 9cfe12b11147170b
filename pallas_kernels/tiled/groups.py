"""Groups of keys that compete by their landmarks, in the TPU kernels of tiled attention.

A key's weight is that of its landmark, the last key of its group, times its share in a softmax over
the other keys of the group. Keys have to lie along sublanes, where registers are cut into groups
for nothing: the forward transposes its scores for it, which is far less than rotations along lanes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.tpu import LANES

SIZES = tuple(2**n for n in range(3, LANES.bit_length()))
"""Numbers of keys in a group that the kernels know: whole registers, and parts of a tile's part."""


def by_landmarks(scores: Array, size: int, exp: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Returns for keys of groups the scores of their landmarks, and their shares in groups.

    Args:
      scores: of part of a tile, [keys, queries], masked, in the kernels' unit.
      size: keys in a group.
      exp: the exponential of scores in that unit.
    """
    groups, last = _groups(scores, size)
    shared = jnp.where(last, -jnp.inf, groups)
    maximum = jnp.max(shared, axis=1, keepdims=True)
    empty = jnp.isneginf(maximum)
    shares = exp(shared - jnp.where(empty, 0, maximum))
    total = jnp.sum(shares, axis=1, keepdims=True)
    landmark = jnp.max(jnp.where(last, groups, -jnp.inf), axis=1, keepdims=True)
    landmark = jnp.broadcast_to(jnp.where(empty, -jnp.inf, landmark), groups.shape)
    shares /= jnp.where(empty, 1, total)
    return landmark.reshape(scores.shape), shares.reshape(scores.shape)


def before_landmarks(d_scores: Array, shares: Array, size: int) -> Array:
    """Returns gradients of scores, [keys, queries], from those of the logarithms of weights."""
    groups, last = _groups(d_scores, size)
    landmark = jnp.sum(groups, axis=1, keepdims=True)
    own = groups - shares.reshape(groups.shape) * landmark
    return jnp.where(last, landmark, own).reshape(d_scores.shape)


def _groups(x: Array, size: int) -> tuple[Array, Bool[Array, "groups size queries"]]:
    """Returns the groups of keys, and where their landmarks are."""
    groups = x.reshape(-1, size, x.shape[1])
    return groups, jax.lax.broadcasted_iota(jnp.int32, groups.shape, 1) == size - 1
