"""Scans as Pallas kernels for Hopper GPUs: which calls they serve."""

from typing import Any

from jaxtyping import Array

from pallas_kernels.scan import gpu_gated, gpu_selective, gpu_selective_backward, gpu_softmax
from pallas_kernels.scan.gpu_proved import PROVED
from pallas_kernels.scan.inputs import Inputs, Options, Selective

FORWARD = {
    "gated": gpu_gated.forward,
    "selective": gpu_selective.forward,
    "softmax": gpu_softmax.forward,
}
BACKWARD = {
    "gated": gpu_gated.backward,
    "selective": gpu_selective_backward.backward,
    "softmax": gpu_softmax.backward,
}

unproved = PROVED.unproved


def supports(*, options: Options, inputs: Inputs) -> str | None:
    """Returns why the kernels do not serve a call, or None."""
    for array in inputs.tokens:
        if array.dtype.name not in ("float32", "bfloat16", "float16"):
            return f"it does not compute in {array.dtype.name}"
    if isinstance(inputs.tokens, Selective):
        features, most = inputs.state.hidden.shape[1], gpu_selective.MOST_FEATURES
        if features > most:
            return f"N must be at most {most}; got {features}"
    return None


def forward(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns the output and the last state."""
    return FORWARD[options.scan](options, x, keep=False)


def forward_keeping(options: Options, x: Inputs) -> tuple[Any, ...]:
    """Returns, too, the states before all chunks."""
    return FORWARD[options.scan](options, x, keep=True)


def backward(options: Options, x: Inputs, kept: Any, d_out: Array, d_state: Any) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state; see `xla.backward`."""
    return BACKWARD[options.scan](options, x, kept, d_out, d_state)
