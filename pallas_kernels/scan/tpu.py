"""Scans as Pallas kernels for TPU: which calls they serve."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.scan import tpu_gated, tpu_selective, tpu_softmax
from pallas_kernels.scan.inputs import Inputs, Options, Selective
from pallas_kernels.tpu import FEWEST_TOKENS, LANES

KERNELS = {"gated": tpu_gated, "selective": tpu_selective, "softmax": tpu_softmax}

LONGEST = 512
"""Tokens in a tile."""

MOST_NUMBERS = 2**15
"""Of a channel's states of a tile, which the backward has in memory at once: 16 MiB for a register
of channels."""


def supports(*, options: Options, inputs: Inputs) -> str | None:
    """Returns why the kernels do not serve a call, or None."""
    dtypes = {array.dtype.name for array in inputs.tokens}
    if "float64" in dtypes:
        return "it does not compute in float64"
    if inputs.out.shape[1] < FEWEST_TOKENS:
        return f"it takes {FEWEST_TOKENS} tokens or more; got {inputs.out.shape[1]}"
    if options.chunk_size % LANES or options.chunk_size > LONGEST:
        return (
            f"chunk_size must be a multiple of {LANES}, at most {LONGEST}; got {options.chunk_size}"
        )
    if isinstance(inputs.tokens, Selective):
        groups = inputs.tokens.b.shape[2]
        channels = inputs.out.shape[2] // groups
        if groups > 1 and channels % LANES:
            return f"channels of a group must be a multiple of {LANES}; got {channels}"
        numbers = inputs.state.hidden.shape[1] * options.chunk_size
        if numbers > MOST_NUMBERS:
            return f"N times chunk_size must be at most {MOST_NUMBERS}; got {numbers}"
    return None


def forward(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns the output and the last state."""
    return _forward(options, x, keep=False)


def forward_keeping(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns, too, the states before all chunks."""
    return _forward(options, x, keep=True)


def _forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    out, *states = KERNELS[options.scan].forward(options, _taken(x), keep=keep)
    return out.astype(x.out.dtype), *states


def backward(options: Options, x: Inputs, kept: Any, d_out: Array, d_state: Any) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state; see `xla.backward`."""
    tokens, *others = KERNELS[options.scan].backward(options, _taken(x), kept, d_out, d_state)
    return jax.tree.map(lambda g, array: g.astype(array.dtype), tokens, x.tokens), *others


def _taken(x: Inputs) -> Inputs:
    """Returns the inputs with float16, which a TPU does not have, in float32."""

    def wide(array: Array) -> Array:
        return array.astype(jnp.float32) if array.dtype == jnp.float16 else array

    return x._replace(tokens=jax.tree.map(wide, x.tokens))
