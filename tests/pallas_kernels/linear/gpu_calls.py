"""Calls of linear attention for the GPU kernels, with what parts they have."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear import gpu, gpu_proved
from tests.gpu import PRODUCTS_IN_PARTS
from tests.numerics import assert_close
from tests.pallas_kernels.linear.cases import ONE, TPU_CASES, Case

GPU_CASES = {
    "elu, nothing decays, float16": Case(65, 1, 1, 1, decay=None, feature_map="elu", state=True),
    "decay, bfloat16": Case(128, **ONE, width=70),
    "decay, segments": Case(
        70,
        1,
        4,
        2,
        features=20,
        decay=(-np.inf, -8.0, -0.02, 0.0),
        segments=True,
        state=True,
        scale=0.25,
    ),
    "steps, groups of both, wide, relu": Case(
        20,
        1,
        1,
        1,
        value_heads=2,
        features=130,
        width=12,
        decay="step",
        normalize=True,
        feature_map="relu",
        state=True,
    ),
    "steps, shared keys, elu, segments, bfloat16": Case(
        140, 1, 2, 1, decay="step", normalize=True, feature_map="elu_plus_one", segments=True
    ),
    "channels, no sum of weights to add to": TPU_CASES["channels, no sum of weights to add to"],
    "channels, shared keys, relu, segments, bfloat16": Case(
        130, 1, 2, 1, features=80, decay="channel", feature_map="relu", segments=True, state=True
    ),
    "delta, bfloat16": Case(70, 1, 2, 1, decay=None, beta=True),
    "delta, steps, groups of both, elu": Case(
        70,
        1,
        1,
        1,
        value_heads=2,
        decay="step",
        beta=True,
        feature_map="elu",
        segments=True,
        state=True,
    ),
    "delta, steps, groups, segments, bfloat16": Case(
        140, 1, 2, 1, width=70, decay="step", beta=True, segments=True, state=True
    ),
    "delta, channels, relu, bfloat16": Case(
        131, **ONE, decay="channel", beta=True, feature_map="relu"
    ),
    "momentum": Case(
        70,
        1,
        1,
        1,
        value_heads=2,
        decay="step",
        beta=True,
        momentum=True,
        segments=True,
        state=True,
    ),
    "momentum, sums, bfloat16": Case(130, 1, 2, 1, decay=-0.2, momentum=True),
    "delta of features": Case(65, **ONE, features=5, decay=-0.1, beta=True, feature_map="taylor"),
    "taylor, bfloat16": Case(
        128, **ONE, features=5, decay=None, normalize=True, feature_map="taylor"
    ),
    "taylor, steps, groups, state": Case(
        70,
        1,
        2,
        1,
        features=7,
        decay="step",
        normalize=True,
        feature_map="taylor",
        segments=True,
        state=True,
    ),
    "one token": Case(1, **ONE),
    "all": Case(70, 1, 2, 1, decay=None, causal=False, keys=140, scale=0.25),
    "all, elu, bfloat16": dataclasses.replace(TPU_CASES["all, elu, bfloat16"], tokens=140),
}
"""What the GPU kernels serve: chunks of 64 tokens, features and values in 64s, full or not."""


def dtype_of(name):
    """Returns the dtype that the name of a case says."""
    last = name.rpartition(", ")[2]
    return jnp.dtype(last if "float" in last else jnp.float32)


def parts_of(case, dtype):
    """Returns the names of the parts of a case."""
    calls = []
    with mock.patch.object(gpu, "supports", lambda **call: calls.append(call)):
        jax.eval_shape(lambda: case.call.__wrapped__(case, case.arrays(dtype), None))
    return gpu_proved.parts_of(**calls[0])


def check(actual, expected, dtype, factor=1.0):
    """Compares results and gradients.

    The gradient of a decay is a sum over tokens, of all or of a group, in which much cancels.
    """
    factor *= PRODUCTS_IN_PARTS if jnp.dtype(dtype).itemsize == 4 else 1
    (results, gradients), (expected, expected_gradients) = actual, expected
    assert_close(results, expected, dtype, factor)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        more = 4 * factor if name == "log_decay" else factor
        assert_close({name: gradient}, {name: expected_gradients[name]}, dtype, more)
