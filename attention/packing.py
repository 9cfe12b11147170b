"""Documents packed into rows."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from pallas_kernels.checks import segment_begins


def places(
    segment_ids: Int[ArrayLike, "B T"] | None, batch: int, tokens: int
) -> Int[Array, "B|1 T"]:
    """Returns the number of each token in its document, from 0.

    A document is a run of equal ids; None is one for each row.

    Raises:
      TypeError, ValueError: the ids do not fit.
    """
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    if segment_ids is None:
        return index
    begins = segment_begins(segment_ids, (batch, tokens))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
