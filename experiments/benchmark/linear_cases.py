"""What schedules of linear kernels and scans are compared on: ours, and tokamax's."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array

from experiments.benchmark.linear_variants import BOUND, VARIANTS, LinearCase
from experiments.benchmark.measure import directed
from pallas_kernels import linear, scan

TOKENS, HEADS, FEATURES = 4096, 8, 128
CHANNELS, NUMBERS = 2048, 16
"""Of scans; a state has `NUMBERS` for each channel."""
LONG = "lightning, 1 head of 16,384 tokens"


def cases() -> dict[str, LinearCase | str]:
    """Returns the cases, and in place of those that cannot be made the reason."""
    return {
        f"{direction}, {name}": case
        for direction in ("forward", "backward")
        for kernels in (_ours, _tokamax, _scans)
        for name, case in kernels(direction).items()
    }


def _ours(direction: str) -> dict[str, LinearCase | str]:
    calls = {name: (variant, TOKENS, HEADS) for name, variant in VARIANTS.items()}
    calls[LONG] = (VARIANTS["lightning"], 16384, 1)
    if "pallas_tpu" not in linear.IMPLEMENTATIONS:
        return dict.fromkeys(calls, "not available")
    found = {}
    for name, (variant, tokens, heads) in calls.items():
        inputs = variant.inputs(tokens, heads, FEATURES, jnp.bfloat16)
        function = variant.function(direction, [*inputs], heads, "pallas_tpu")
        found[name] = LinearCase(
            function, tuple(inputs.values()), units=tokens * heads, forward="_forward"
        )
    return found


def _tokamax(direction: str) -> dict[str, LinearCase | str]:
    name = "tokamax Kimi Delta Attention"
    if importlib.util.find_spec("tokamax") is None:
        return {name: "not available: python -m pip install -e '.[peers]'"}

    def attention(*arrays: Array) -> Array:
        from tokamax._src.ops.kda import pallas_mosaic_tpu as kda

        class Attention(kda.PallasMosaicTpuKimiDeltaAttention):
            # It would ask this machine, not the TPU that is compiled for.
            def supported_on(self, device: jax.Device) -> bool:
                return True

        out, _ = Attention()(*arrays, lower_bound=BOUND)
        return out

    rows = ShapeDtypeStruct((HEADS, 1, TOKENS, FEATURES), jnp.bfloat16)
    gate = ShapeDtypeStruct(rows.shape, jnp.float32)
    arguments = (rows, rows, rows, gate, ShapeDtypeStruct(rows.shape[:3], jnp.bfloat16))
    function = directed(direction, attention, range(5))
    return {name: LinearCase(function, arguments, units=TOKENS * HEADS, forward="_fwd_")}


def _scans(direction: str) -> dict[str, LinearCase]:
    rows = ShapeDtypeStruct((1, TOKENS, CHANNELS), jnp.bfloat16)
    rates = ShapeDtypeStruct((CHANNELS, NUMBERS), jnp.float32)
    vectors = ShapeDtypeStruct((1, TOKENS, NUMBERS), jnp.bfloat16)
    calls = {
        "gated scan": (scan.gated_scan, (rows, rows)),
        "selective scan": (scan.selective_scan, (rows, rows, rates, vectors, vectors)),
        "softmax scan": (
            scan.softmax_scan,
            (
                ShapeDtypeStruct((1, TOKENS, HEADS), jnp.bfloat16),
                ShapeDtypeStruct((1, TOKENS, HEADS, FEATURES), jnp.bfloat16),
            ),
        ),
    }
    found = {}
    for name, (called, arguments) in calls.items():

        def function(*arrays: Array, called: Callable[..., Array] = called) -> Array:
            return called(*arrays, implementation="pallas_tpu")

        found[f"{name}, a head of 128 channels"] = LinearCase(
            directed(direction, function, range(len(arguments))),
            arguments,
            units=math.prod(arguments[1].shape) // 128,
            forward="_forward",
        )
    return found
