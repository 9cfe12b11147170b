"""The GPU kernels of linear attention on a GPU: what has passed is what is chosen there.

`make test-gpu ARGS=--write-proved` writes the names of the parts of all calls that passed, see
`pallas_kernels.gpu_proved` and tests/on_gpu.py.
"""

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.linear.gpu_proved import PROVED  # noqa: F401
from tests.pallas_kernels.linear.cases import Case
from tests.pallas_kernels.linear.gpu_calls import GPU_CASES, check, dtype_of, parts_of
from tests.training import check_training

pytestmark = pytest.mark.gpu

RULES = {
    "nothing decays": dict(decay=None),
    "decay": dict(decay=(-0.01, -0.3)),
    "steps": dict(decay="step"),
    "channels": dict(decay="channel"),
    "delta": dict(decay=None, beta=True),
    "delta, decay": dict(decay=(-0.01, -0.3), beta=True),
    "delta, steps": dict(decay="step", beta=True),
    "delta, channels": dict(decay="channel", beta=True),
    "momentum": dict(decay="step", beta=True, momentum=True),
    "momentum, sums": dict(decay="step", momentum=True),
}
SIZES = {64: (64, 64), 128: (128, 128), 192: (64, 192), 256: (256, 128)}
CALLS = (
    {name: (case, dtype_of(name)) for name, case in GPU_CASES.items()}
    | {
        f"{name}, {dtype}": (
            Case(1000, heads=2, kv_heads=2, features=64, width=64, state=True, **rule),
            jnp.dtype(dtype),
        )
        for name, rule in RULES.items()
        for dtype in ("bfloat16", "float16", "float32")
    }
    | {
        f"{name}, {features} by {width}, {dtype}": (
            Case(300, heads=2, kv_heads=2, features=features, width=width, **RULES[name]),
            jnp.dtype(dtype),
        )
        for name in ("steps", "channels", "delta, steps", "delta, channels")
        for features, width in SIZES.values()
        for dtype in ("bfloat16", "float16", "float32")
        if dtype == "bfloat16" or features <= (128 if "delta" in name else 192)
    }
    | {
        f"several spans, {name}, bfloat16": (
            Case(8192, 1, 2, 2, features=64, width=64, **RULES[name]),
            jnp.dtype(jnp.bfloat16),
        )
        for name in ("decay", "steps", "channels", "delta, steps", "delta, channels", "momentum")
    }
)


def parts(name):
    """Returns the parts of a call."""
    return parts_of(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name):
    case, dtype = CALLS[name]
    arrays = case.arrays(dtype)
    run = case.differentiated
    results, gradients = jax.block_until_ready(run(arrays, "pallas_gpu"))
    assert results["out"].dtype == dtype
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    check((results, gradients), case.defined(arrays), dtype, factor=2)
    chex.assert_trees_all_equal(run(arrays, "pallas_gpu"), (results, gradients))


@pytest.mark.parametrize("devices", [1, None], ids=["one device", "all devices"])
def test_a_language_model_trains(devices):
    """A few steps on the kernels are the steps on plain JAX, sharded over batch and heads too."""
    check_training("lightning_attention", devices)
