"""The derivative of `gpu_prepare` in bfloat16: two kernels, one of which is the delta rule's.

See `gpu_prepare_gradient_chunk` for what they compute of a chunk.
"""

import functools

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_call import Call, numbers
from pallas_kernels.linear.gpu_chunks import Fetch, Plan, own, run, steps_of
from pallas_kernels.linear.gpu_features import NOTHING
from pallas_kernels.linear.gpu_prepare import Prepared
from pallas_kernels.linear.gpu_prepare_gradient_chunk import OfChannels, OfErased, OfTokens
from pallas_kernels.linear.gpu_walk import CHUNK
from pallas_kernels.linear.inputs import LOWEST
from pallas_kernels.tpu import padded, result

SMALLEST = 1e-20
"""Instead of a beta of 0, by which what a token writes is divided: that is 0 beside all else."""


def serves(dtype: DTypeLike, log_momentum: Array | None) -> bool:
    """Returns whether the derivative of what is prepared of a call is these kernels'."""
    return dtype == jnp.bfloat16 and log_momentum is None


def divisible(call: Call) -> Call:
    """Returns a call that may be prepared for its gradients."""
    if call.beta is None:
        return call
    return call._replace(beta=jnp.where(jnp.abs(call.beta) < SMALLEST, SMALLEST, call.beta))


def gradients(call: Call, x: Prepared, inverse: Array | None, d: Prepared) -> dict[str, Array]:
    """Returns gradients of features, values, logarithms and betas, as memories have them.

    Args:
      call: what was prepared, `divisible`.
      x: what was prepared of it.
      inverse: that of the delta rule, see `gpu_prepare.prepare`.
      d: gradients of what was prepared.
    """
    batch, tokens, memories, size = d.reader.shape
    features, chunks = gpu.whole(size), tokens // CHUNK
    like = functools.partial(result, like=call.key)
    plan = Plan(
        chunks=chunks,
        steps=steps_of(chunks, memories * batch),
        fetches=(),
        stages=2,
        memories=memories,
        dtype=call.dtype,
        heads={},
        delta=call.beta is not None,
    )

    given = {"scores": d.scores}
    given |= {name: padded(getattr(d, name), 3, features) for name in ("reader", "writer")}
    found = {"value": d.value}
    if plan.delta:
        of_erased = _of_erased(call, plan, x, inverse, d)
        given |= {name: of_erased.pop(name) for name in ("among_keys", "erased")}
        found = of_erased
    arguments = {f"d_{name}": array for name, array in given.items()}

    logs, names = call.logs, ["query", "key"]
    channels = logs is not None and logs.ndim == 4
    fill = NOTHING.get(call.feature_map, 0)
    arguments |= {name: padded(getattr(call, name), 3, features, fill) for name in names}
    results = dict.fromkeys(names, like((batch, tokens, memories, features), jnp.float32))
    of_all = logs is not None and logs.shape[1] == tokens and logs.shape[0] == batch
    if channels:
        names.append("logs")
        arguments["logs"] = padded(logs, 3, features)
        results["logs"] = results["key"]
    elif logs is not None:
        arguments["numbers"] = numbers(logs, reverse=False)
        if of_all:
            results["logs"] = like((batch, memories, 3, tokens), jnp.float32)
    plan = plan._replace(
        fetches=(Fetch(features // gpu.FEATURES, {name: name for name in names}),),
        heads={name: getattr(call, name).shape[2] for name in ("query", "key")},
        channels=channels,
        same=logs is not None and logs.shape[1] == CHUNK,
        alone=logs is not None and logs.shape[0] == 1,
        feature_map=call.feature_map,
    )
    tiles = plan.fine + 2 if channels else 4
    scratch = {"tiles": [own(jnp.bfloat16)] * tiles, "out": own(jnp.float32)}
    of, name = OfChannels if channels else OfTokens, "linear_prepare_gradient"
    of_call = run(of, plan, arguments, results, scratch, name=name, batch=batch)
    found |= {name: of_call[name][..., :size] for name in ("query", "key")}
    if not of_all:
        return found

    # A chunk's own decay is that of all its tokens.
    by_chunk = logs.reshape(batch, chunks, CHUNK, memories, -1)
    of_whole = jnp.exp(jnp.sum(by_chunk, axis=2)) * d.decays
    if channels:
        of_logs = of_call["logs"][..., :size].reshape(by_chunk.shape)
    else:
        of_logs = _of_numbers(of_call["logs"].reshape(batch, memories, 3, chunks, CHUNK))
        of_whole = jnp.sum(of_whole, axis=-1, keepdims=True)
    of_logs = (of_logs + of_whole[:, :, None]).reshape(logs.shape)
    return found | {"logs": jnp.where(logs > LOWEST, of_logs, 0)}


def _of_erased(
    call: Call, plan: Plan, x: Prepared, inverse: Array | None, d: Prepared
) -> dict[str, Array]:
    """Returns gradients of values, of betas, of scores among keys and of what is erased."""
    batch, tokens, memories, width = d.value.shape
    features, values = gpu.whole(d.erase.shape[3]), gpu.whole(width)
    arguments = {"inverse": inverse, "beta": jnp.swapaxes(call.beta, 1, 2)}
    arguments |= {"value": padded(x.value, 3, values), "erase": padded(x.erase, 3, features)}
    arguments |= {"d_value": padded(d.value, 3, values), "d_erase": padded(d.erase, 3, features)}
    like = functools.partial(result, like=call.key)
    results = {
        "value": like((batch, tokens, memories, values), call.out_dtype),
        "erased": like((batch, tokens, memories, features), call.out_dtype),
        "among_keys": like((batch, tokens, memories, CHUNK), call.out_dtype),
        "beta": like((batch, memories, tokens), jnp.float32),
    }
    plan = plan._replace(
        fetches=(
            Fetch(values // gpu.FEATURES, {"query": "d_value", "key": "value"}),
            Fetch(features // gpu.FEATURES, {"query": "d_erase", "key": "erase"}),
        )
    )
    scratch = {"tiles": [own(jnp.bfloat16)] * 2, "out": own(call.out_dtype)}
    name = "linear_delta_gradient"
    found = run(OfErased, plan, arguments, results, scratch, name=name, batch=batch)
    return found | {"value": found["value"][..., :width], "beta": jnp.swapaxes(found["beta"], 1, 2)}


def _of_numbers(numbers: Float[Array, "B M 3 chunks C"]) -> Float[Array, "B chunks C M 1"]:
    """Returns the gradients of logarithms, of what `OfTokens` writes of them."""
    since, until, within = jnp.moveaxis(numbers, 2, 0)
    total = jnp.flip(jnp.cumsum(jnp.flip(since, -1), -1), -1) + jnp.cumsum(until, -1) - until
    return jnp.transpose(total + within, (0, 2, 3, 1))[..., None]
