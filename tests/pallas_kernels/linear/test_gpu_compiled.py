"""The GPU kernels of linear attention, compiled for a Hopper GPU on a machine that has none.

After a change of the kernels, or of the compiler,

    python -m experiments.benchmark linear hopper --cases CASES --output RECORD

with gpu_cases.py and hopper.json of this folder writes the record again, and prints what
docs/benchmarks.md has of it.
"""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import linear_hopper
from pallas_kernels.linear import linear_attention
from tests.gpu import Gpus, Record, kernels_of, needs_compiler
from tests.pallas_kernels.linear.gpu_calls import GPU_CASES
from tests.pallas_kernels.linear.gpu_cases import cases
from tests.sharding import COLLECTIVE

CASES = cases()
RECORD = Record(__file__)


def _expected(name):
    """Returns the names of the kernels of a case, and its gradients."""
    if name.startswith("all"):
        return ["linear_sum"] * 2
    found = ["linear_forward"]
    if name in GPU_CASES and GPU_CASES[name].normalize:  # what divides is found again
        found += ["linear_forward"]
    if any(x in name for x in ("delta", "channel", "momentum")):
        found += ["linear_states", "linear_states_gradient"]
        found += [] if "momentum" in name else ["linear_prepare"]
        found += ["linear_states_products"] if "bfloat16" in name else []
        if "bfloat16" in name and "momentum" not in name:
            found += ["linear_prepare_gradient"]
            if "delta" in name:  # what is prepared for gradients has more
                found += ["linear_prepare", "linear_delta_gradient"]
    else:
        found += [f"linear_backward_{array}" for array in ("key", "query", "value")]
    # Several spans; with momentum they are too few to be worth it.
    if name in linear_hopper.cases() and "momentum" not in name:
        found += ["linear_state", "linear_state_gradient"]
    return sorted(found)


def check_kernels(name, kernels):
    """Asserts that the kernels of a case are those of the record, or no worse.

    They need no more registers than they did, and all loops but those that copy multiply.
    """
    assert [kernel.kernel for kernel in kernels] == _expected(name)
    RECORD.check(name, kernels)
    for kernel in kernels:
        assert kernel.wgmma and kernel.bulk_copies and not kernel.serialized
        if name in linear_hopper.cases():
            assert {*kernel.loops.split(", ")} <= {"copies", "wgmma", "wgmma and copies"}


# The others are compiled where they are run, see test_gpu.py.
@needs_compiler
@pytest.mark.parametrize("name", linear_hopper.cases())
def test_kernels(name):
    check_kernels(name, kernels_of(CASES[name]))


def test_nothing_spills():
    assert RECORD.cases == CASES.keys()
    assert not RECORD.spills


def test_the_table_of_the_benchmarks_is_of_the_record():
    RECORD.check_table(linear_hopper.cases())


@needs_compiler
def test_sharded():
    """Each of four devices runs the kernels on its part of batch and memories, alone."""
    gpus = Gpus((2, 2), ("data", "tensor"))

    def loss(*arrays):
        out = linear_attention(*arrays, implementation="pallas_gpu")
        return jnp.sum(out.astype(jnp.float32))

    x = gpus.array((4, 128, 4, 64), jnp.bfloat16, "data", None, "tensor")
    text = gpus.compile(jax.grad(loss, argnums=(0, 1, 2)), x, x, x)
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    assert len(calls) == 4
    assert all("bf16[2,128,2,64]" in call for call in calls)
    assert not COLLECTIVE.search(text)
