"""Linear attention on Hopper GPUs where all rows of the memory decay alike, without the delta rule.

The gradients are walks as well: with the cotangents d of the outputs,

    dq_i = sum_{j<=i} D_ij (d_i . v_j) k_j       reads v^T k with d, from the first token on
    dk_j = sum_{i>=j} D_ij (v_j . d_i) q_i       reads d^T q with v, from the last one back
    dv_j = sum_{i>=j} D_ij (k_j . q_i) d_i       reads q^T d with k, from the last one back

and with S and dS the memory and its gradient before a token t, that of the logarithm of its decay
is S . dS where t is the first token of a chunk, and by q_t . dq_t - k_t . dk_t less at t + 1.
"""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.gpu_call import Call, begun, numbers, transposed
from pallas_kernels.linear.gpu_walk import CHUNK, Walk, walk
from pallas_kernels.linear.inputs import LOWEST


def forward(call: Call, *, keep: bool) -> tuple[Array, Array, Array | None]:
    """Returns the outputs, the last state and, if asked for, those to keep."""
    logs = call.logs
    given = Walk(
        *(call.key, call.value, call.memory[:, None]),
        numbers=numbers(logs, reverse=False),
        scale=call.scale,
        out_dtype=call.out_dtype,
        dtype=call.dtype,
        feature_map=call.feature_map,
        mapped=("reader", "writer"),
    )
    given = begun(given, logs, call.spans, "linear_state")
    given = given._replace(reader=call.query, keep=call.spans.kept if keep else 0)
    walked = walk(given, "linear_forward")
    return walked.out, walked.memory[:, -1], walked.kept


def backward(
    call: Call,
    names: Collection[str],
    kept: Float[Array, "B count M F V"],
    d_out: Float[Array, "B T M V"],
    d_memory: Float[Array, "B M F V"],
) -> dict[str, Array]:
    """Returns gradients by name, one of queries, keys and values for each memory.

    Args:
      call: the call; if the gradient of logarithms is wanted there is one for each token.
      names: of the gradients that are wanted.
      kept: the states that the forward kept.
      d_out: of the outputs as they are before `call.scale`.
      d_memory: of the last state.
    """
    decays, spans, logs = "logs" in names, call.spans, call.logs
    out_dtype, keep = (jnp.float32, 1) if decays else (call.out_dtype, 0)
    back = Walk(
        *(call.query, d_out, d_memory[:, None]),
        numbers=numbers(logs, reverse=True),
        reverse=True,
        out_dtype=out_dtype,
        dtype=call.dtype,
        feature_map=call.feature_map,
        mapped=("reader", "writer"),
    )
    back = begun(back, logs, spans, "linear_state_gradient")
    gradients = {}
    if "query" in names or decays:
        given = Walk(
            *(call.value, call.key, transposed(spans.starts(kept)).astype(jnp.float32)),
            reader=d_out,
            numbers=numbers(logs, reverse=False),
            span=spans.span,
            keep=keep,
            out_dtype=out_dtype,
            dtype=call.dtype,
            feature_map=call.feature_map,
            mapped=("value",),
        )
        walked = walk(given, "linear_backward_query")
        gradients["query"], before = walked.out, walked.kept
    if "key" in names or decays:
        given = back._replace(
            writer=d_out,
            value=call.query,
            memory=transposed(back.memory),
            reader=call.value,
            keep=keep,
            mapped=("value",),
        )
        walked = walk(given, "linear_backward_key")
        gradients["key"], gradients["memory"] = walked.out, transposed(walked.memory[:, 0])
    if decays:
        changes = _dots(call, "query", gradients) - _dots(call, "key", gradients)
        d_before = transposed(gradients["memory"])[:, None].astype(call.dtype)
        d_before = jnp.concatenate([d_before, walked.kept[:, :-1]], axis=1)
        first = jnp.sum(before.astype(jnp.float32) * d_before, axis=(-2, -1))
        gradients["logs"] = _d_logs(call.logs, first, changes)
    if "value" in names or ("memory" in names and "memory" not in gradients):
        walked = walk(back._replace(reader=call.key), "linear_backward_value")
        gradients["value"], gradients["memory"] = walked.out, walked.memory[:, 0]
    return {name: gradients[name] for name in names}


def _dots(call: Call, name: str, gradients: dict[str, Array]) -> Float[Array, "B T M"]:
    """Returns the product of each token's features and their gradient."""
    rows = call.features(name).astype(jnp.float32)
    batch, tokens, heads, size = rows.shape
    gradient = gradients[name].reshape(batch, tokens, heads, -1, size)
    return jnp.sum(rows[:, :, :, None] * gradient, axis=-1).reshape(batch, tokens, -1)


def _d_logs(
    logs: Float[Array, "B T M"], first: Float[Array, "B chunks M"], changes: Float[Array, "B T M"]
) -> Float[Array, "B T M"]:
    """Returns gradients of logarithms, from those of the first of every chunk."""
    changes = changes.reshape(*first.shape[:2], CHUNK, -1)
    before = jnp.cumsum(changes, axis=2) - changes
    gradients = (first[:, :, None] - before).reshape(logs.shape)
    return jnp.where(logs > LOWEST, gradients, 0)
