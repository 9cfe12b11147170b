"""Linear attention on Hopper GPUs by the delta rule, with a decay for each row, or with momentum.

All chunks are prepared at the same time: what reads and writes the memory with its decays, scores
and, for the delta rule, the corrections as if the memory before a chunk were 0, and what is read
of it by them: with the beta_t k_t scaled keys and L their strictly lower scores among keys,

    e = U - W S,    U = (1 + L)^-1 diag(beta) V,    W = (1 + L)^-1 diag(beta) R_k

so that what is left is a walk. In the backward two walks find the memory before each chunk, and its
gradient after it; the rest is products of matrices, of all chunks at the same time as well.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear import (
    blocks,
    gpu_momentum,
    gpu_prepare_gradient,
    gpu_states_gradient,
)
from pallas_kernels.linear.gpu_call import (
    Call,
    begun,
    in_chunks,
    in_full,
    of_memories,
    of_tokens,
    product,
)
from pallas_kernels.linear.gpu_prepare import Prepared, prepare
from pallas_kernels.linear.gpu_walk import CHUNK, Walk, walk
from pallas_kernels.linear.inputs import finite


def forward(call: Call, *, keep: bool) -> tuple[Array, Array, Array | None]:
    """Returns the outputs, the last state and, if asked for, those to keep."""
    x = prepare(call)[0] if call.log_momentum is None else gpu_momentum.prepared(call)
    given = _walk(call, x)._replace(
        scores=x.scores,
        keep=call.spans.kept if keep else 0,
        scale=call.scale,
        out_dtype=call.out_dtype,
    )
    walked = walk(given._replace(reader=x.reader), "linear_forward")
    return walked.out, walked.memory[:, -1], walked.kept


def _walk(call: Call, x: Prepared) -> Walk:
    """Returns the walk through the memory."""
    given = Walk(
        *(x.writer, x.value, call.memory[:, None]),
        **_decays(x),
        correct=x.erase is not None,
        dtype=call.dtype,
    )
    return begun(given, call.logs, call.spans, "linear_state")


def _decays(x: Prepared) -> dict[str, Array | None]:
    """Returns how a memory changes by itself, as arguments of a walk."""
    return {"erase": x.erase, "decays": x.decays, "mixing": x.mixing}


def backward(
    call: Call,
    names: Collection[str],
    kept: Float[Array, "B count M F V"],
    d_out: Float[Array, "B T M V"],
    d_memory: Float[Array, "B M F V"],
) -> dict[str, Array]:
    """Returns gradients by name, see `gpu_scalar.backward`."""
    arrays = {name: getattr(call, name) for name in names if name != "memory"}
    of_call = prepared if call.log_momentum is None else gpu_momentum.prepared
    by_kernel = gpu_prepare_gradient.serves(call.dtype, call.log_momentum)
    if by_kernel:
        call = gpu_prepare_gradient.divisible(call)
        x, inverse = prepare(call, keep=True)
    else:
        x, pull = jax.vjp(lambda arrays: of_call(call._replace(**arrays)), arrays)
    spans, delta = call.spans, x.erase is not None
    given = Walk(
        *(x.writer, x.value, spans.starts(kept).astype(jnp.float32)),
        **_decays(x),
        span=spans.span,
        keep=1,
        correct=delta,
        dtype=call.dtype,
    )
    walked = walk(given, "linear_states")
    memory, value = walked.kept, walked.corrected if delta else x.value
    back = Walk(
        *(x.reader, d_out, d_memory[:, None]),
        **_decays(x),
        reader=x.writer,
        scores=x.scores,
        reverse=True,
        keep=1,
        out_dtype=call.dtype,
        dtype=call.dtype,
    )
    back = begun(back, call.logs, spans, "linear_state_gradient")
    walked = walk(back, "linear_states_gradient")
    d_value, d_after = walked.out, walked.kept

    given = d_out, value, d_value, memory, d_after, x
    of_states = gpu_states_gradient.gradients if call.dtype == jnp.bfloat16 else _of_states
    d_x = of_states(*given)
    if x.mixing is not None:
        d_x = d_x._replace(mixing=_mixed(memory, d_after))
    d_x = jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), d_x, x)
    if by_kernel:
        gradients = gpu_prepare_gradient.gradients(call, x, inverse, d_x)
    else:
        with in_full(call.dtype):
            (gradients,) = pull(d_x)
    gradients |= {"memory": walked.memory[:, 0]}
    return {name: gradients[name] for name in names}


def _of_states(
    d_out: Array, value: Array, d_value: Array, memory: Array, d_after: Array, x: Prepared
) -> Prepared:
    """Returns what `gpu_states_gradient.gradients` does, of any dtype."""
    d_out, value, of_value = (in_chunks(array) for array in (d_out, value, d_value))
    erase = None
    if x.erase is not None:
        erase = of_tokens(-product("bcniv,bcnfv->bcnif", of_value, memory))
    return Prepared(
        reader=of_tokens(product("bcniv,bcnfv->bcnif", d_out, memory)),
        writer=of_tokens(product("bcniv,bcnfv->bcnif", value, d_after)),
        scores=of_tokens(product("bcniv,bcnjv->bcnij", d_out, value)),
        value=d_value,
        decays=None if x.decays is None else _dots(memory, d_after),
        erase=erase,
    )


def _dots(memory: Array, gradient: Array) -> Array:
    return jnp.sum(memory.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)


def _mixed(memory: Array, gradient: Array) -> Float[Array, "B chunks M 3"]:
    """Returns the gradients of what mixes two memories, one above the other."""
    (first, second), (of_first, of_second) = (
        jnp.split(array, 2, axis=-2) for array in (memory, gradient)
    )
    pairs = (first, of_first), (second, of_first), (second, of_second)
    return jnp.stack([jnp.sum(_dots(*pair), axis=-1) for pair in pairs], axis=-1)


def prepared(call: Call) -> Prepared:
    """Prepares a call."""
    query, key, value = of_memories(call)
    logs = call.logs
    if logs is None or logs.shape[1] != call.query.shape[1]:
        zeros = jnp.zeros_like(call.memory, shape=(1, CHUNK, call.memories))
        logs = zeros if logs is None else logs
        shape = logs.shape[0], call.spans.chunks, CHUNK, call.memories
        logs = jnp.broadcast_to(logs[:, None], shape).reshape(shape[0], -1, shape[3])
    by_row = logs.ndim == 4
    decays = blocks.decays(finite(in_chunks(logs if by_row else logs[..., None])))
    within = None if by_row else blocks.decay_matrix(decays)

    def scores(left: Array, right: Array) -> Array:
        if by_row:
            return blocks.decayed_products(decays, left, right, product)
        return within * product("...ih,...jh->...ij", left, right)

    def narrow(array: Array) -> Array:
        return of_tokens(array.astype(call.dtype))

    shape = *key.shape[:3], key.shape[-1]
    whole = jnp.broadcast_to(decays.whole[..., 0, :], shape)
    writer, erase = narrow(decays.until * key), None
    if call.beta is not None:
        beta = in_chunks(call.beta[..., None].astype(jnp.float32))
        inverse = blocks.inverse(jnp.tril(beta * scores(key, key), -1))
        value = jnp.matmul(inverse, beta * value, precision="highest")
        erase = narrow(jnp.matmul(inverse, beta * (decays.since * key), precision="highest"))
    return Prepared(
        reader=narrow(decays.since * query),
        writer=writer,
        scores=narrow(scores(query, key)),
        value=narrow(value),
        decays=whole,
        erase=erase,
    )
