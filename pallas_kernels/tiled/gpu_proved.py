"""Which parts of a call the GPU kernels of tiled attention have been seen to compute on a GPU.

A call is made of parts: its dtype, its weights, its terms, its masks, its gradients. Where no
implementation is asked for, the kernels serve calls all of whose parts are in `FILE`, which
`make test-gpu ARGS="tests/pallas_kernels/tiled --write-proved"` writes with what has passed.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from math import gcd

import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.tiled.inputs import Inputs, Options

FILE = resources.files(__package__).joinpath("gpu_proved.json")
"""The list of names of parts."""


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


def unproved(*, options: Options, inputs: Inputs, gradients: Sequence[str] = ()) -> str | None:
    """Returns why the kernels serve a call only if they are asked for by name, or None."""
    missing = parts_of(options=options, inputs=inputs, gradients=gradients) - proved()
    return f"not yet seen on a GPU: {', '.join(sorted(missing))}" if missing else None


@functools.cache
def proved() -> frozenset[str]:
    """Returns the names of the parts that have passed."""
    return frozenset(json.loads(FILE.read_text()))


def written(parts: Iterable[str]) -> str:
    """Returns the text of the file for these parts."""
    return json.dumps(sorted(parts), indent=1) + "\n"


def _size(inputs: Inputs) -> int:
    """Returns the features of a head, filled up to the next size that has kernels of its own."""
    most = max(inputs.query.shape[3], inputs.value.shape[3])
    return -(-most // 64) * 64


def _kind(shape: Sequence[int]) -> str:
    return {(True, True): "pairs", (True, False): "queries", (False, True): "keys"}.get(
        tuple(size > 1 for size in shape), "heads"
    )
