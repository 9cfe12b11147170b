"""How matrices start: normal, truncated at two standard deviations, of variance 1 / inputs."""

from __future__ import annotations

from flax import nnx
from flax.typing import Initializer

KERNEL_INIT: Initializer = nnx.initializers.lecun_normal()
"""For a matrix [inputs, outputs]: variance 1 / inputs, so that outputs are as large as inputs."""

EMBEDDING_INIT: Initializer = nnx.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=0
)
"""For a table [tokens, features]: variance 1 / features."""


def residual_init(num_layers: int) -> Initializer:
    """For matrices that add to the residual stream, two a layer: variance 1 / (2 layers x inputs).

    Together they then add to the stream about what one of them would with `KERNEL_INIT`.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3.
    """
    return nnx.initializers.variance_scaling(0.5 / num_layers, "fan_in", "truncated_normal")
