"""What XLA prepares of chunks for linear attention with momentum on GPUs, see `gpu_prepared`.

The memory of a walk is two, S above U. What token j writes to U is added to S at every token l from
j to i: with A_il and M_lj the decays of S and of U, it counts W_ij = sum_l A_il M_lj at token i, as
in `gates`. Readers, writers and what erases are two as well, side by side.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear import blocks
from pallas_kernels.linear.gpu_call import Call, in_chunks, of_memories, of_tokens, product
from pallas_kernels.linear.gpu_prepare import Prepared
from pallas_kernels.linear.gpu_walk import CHUNK
from pallas_kernels.linear.inputs import finite


def prepared(call: Call) -> Prepared:
    """Prepares a call."""
    query, key, value = of_memories(call)
    decays, momentums = (
        blocks.decays(finite(in_chunks(array[..., None])))
        for array in (call.logs, call.log_momentum)
    )
    own, moved = (blocks.decay_matrix(x) for x in (decays, momentums))
    within = _matmul(own, moved)
    decayed, moved = decays.since, _matmul(own, momentums.since)

    def both(first: Array, second: Array, array: Array) -> Float[Array, "B chunks M C F"]:
        return jnp.concatenate([first * array, second * array], axis=-1)

    def narrow(array: Array) -> Float[Array, "B T M F"]:
        return of_tokens(array.astype(call.dtype))

    erase = None
    if call.beta is not None:
        # Compared is with the memory as it was before the token, which has not decayed.
        before = (_shifted(call, x, first) for x, first in ((within, 0), (decayed, 1), (moved, 0)))
        within_before, *before = before
        beta = in_chunks(call.beta[..., None].astype(jnp.float32))
        lower = beta * within_before * product("...ih,...jh->...ij", key, key)
        inverse = blocks.inverse(jnp.tril(lower, -1))
        value = _matmul(inverse, beta * value)
        erase = narrow(_matmul(inverse, beta * both(*before, key)))
    last_within, last_decayed, last_moved = (_last(call, x) for x in (within, decayed, moved))
    mixing = jnp.concatenate([last_decayed, last_moved, momentums.whole], axis=-1)
    return Prepared(
        reader=narrow(both(decayed, moved, query)),
        writer=narrow(both(jnp.swapaxes(last_within, -1, -2), momentums.until, key)),
        scores=narrow(within * product("...ih,...jh->...ij", query, key)),
        value=narrow(value),
        decays=None,
        erase=erase,
        mixing=mixing[..., 0, :],
    )


def _last(call: Call, rows: Float[Array, "B chunks M C n"]) -> Float[Array, "B chunks M 1 n"]:
    """Returns the row of the last token of each chunk, which is not what fills up the last one."""
    last = (call.count - 1) % CHUNK
    parts = rows[:, :-1, :, CHUNK - 1 :], rows[:, -1:, :, last : last + 1]
    return jnp.concatenate(parts, axis=1)


def _shifted(
    call: Call, rows: Float[Array, "B chunks M C n"], first: float
) -> Float[Array, "B chunks M C n"]:
    """Returns the rows of the tokens before, and 0 where there is none in the segment."""
    pad = [(0, 0)] * 3 + [(1, 0), (0, 0)]
    rows = jnp.pad(rows[..., :-1, :], pad, constant_values=first)
    if call.begins is None:
        return rows
    begins = call.begins.reshape(call.begins.shape[0], -1, 1, CHUNK, 1)
    return jnp.where(begins, 0, rows)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")
