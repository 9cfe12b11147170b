"""The parts of a call of tiled attention: its dtype, weights, terms, masks and gradients."""

from collections.abc import Sequence
from math import gcd

import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.gpu_proved import Proved
from pallas_kernels.tiled.gpu_backward import one_pass
from pallas_kernels.tiled.inputs import Inputs, Options


def parts_of(*, options: Options, inputs: Inputs, gradients: Sequence[str] = ()) -> frozenset[str]:
    """Names the parts of a call."""
    terms = {
        "soft cap": options.logits_soft_cap is not None,
        "logit bias": bool(options.logit_bias),
        "bounded": options.bounded,
        "reweighted": options.reweight is not None,
        "negative scale": options.scale < 0,
        "not normalised": not options.normalise,
        "grouped heads": inputs.query.shape[2] != inputs.key.shape[2],
        "wider or narrower values": inputs.query.shape[3] != inputs.value.shape[3],
        "gradients in one pass": one_pass(options, inputs, gradients) is not None,
    }
    for name in ("bias", "slopes", "table", "sink", "statistic"):
        terms[name] = getattr(inputs, name) is not None
    named = {name for name, there in terms.items() if there}
    dtype = jnp.dtype(inputs.query.dtype).name
    named |= {dtype, options.weights, f"{dtype}, {_size(inputs)} features"}
    if inputs.bias is not None:
        named.add(f"bias of {_kind(inputs.bias.shape[2:])}")
    for part in () if inputs.mask is None else masks.parts(inputs.mask):
        named.add(f"mask: {type(part).__name__.lower()}")
        if isinstance(part, masks.Dense):
            named.add(f"mask: dense of {_kind(part.array.shape[2:])}")
        if isinstance(part, masks.Blocks):
            named.add(f"mask: blocks of {gcd(part.block_q, 128)} by {gcd(part.block_k, 128)}")
    return frozenset(named | {f"gradient of {name}" for name in gradients})


def _size(inputs: Inputs) -> int:
    """Returns the features of a head, filled up to the next size that has kernels of its own."""
    most = max(inputs.query.shape[3], inputs.value.shape[3])
    return -(-most // 64) * 64


def _kind(shape: Sequence[int]) -> str:
    return {(True, True): "pairs", (True, False): "queries", (False, True): "keys"}.get(
        tuple(size > 1 for size in shape), "heads"
    )


PROVED = Proved(__package__, parts_of)
