"""The GPU kernels of scans, compiled for a Hopper GPU on a machine that has none.

After a change of the kernels, or of the compiler,

    python -m experiments.benchmark linear hopper --cases CASES --output RECORD

with gpu_cases.py and hopper.json of this folder writes the record again.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.scan import gated_scan
from tests.gpu import Gpus, Record, kernels_of, needs_compiler
from tests.pallas_kernels.scan.gpu_cases import STEPS, cases
from tests.sharding import COLLECTIVE

CASES = cases()
RECORD = Record(__file__)


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    """They need no more registers than they did, and copy ahead in a loop."""
    kernels = kernels_of(CASES[name])
    assert [kernel.kernel for kernel in kernels] == [known["kernel"] for known in RECORD.of(name)]
    RECORD.check(name, kernels)
    for kernel in kernels:
        assert kernel.bulk_copies and not kernel.serialized
        # Of the few tiles of a chunk all copies may be issued at once.
        short = name in STEPS or "few channels" in name or kernel.kernel.endswith("_again")
        assert short or kernel.loops == "copies, neither"


def test_nothing_spills():
    assert RECORD.cases == CASES.keys()
    assert not RECORD.spills


@needs_compiler
def test_sharded():
    """Each of four devices runs the kernels on its part of batch and channels, alone."""
    gpus = Gpus((2, 2), ("data", "tensor"))
    x = gpus.array((4, 256, 512), jnp.bfloat16, "data", None, "tensor")

    def loss(*arrays):
        return gated_scan(*arrays, implementation="pallas_gpu").astype(jnp.float32).sum()

    text = gpus.compile(jax.grad(loss, argnums=(0, 1)), x, x)
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    assert len(calls) == 3
    assert sum("bf16[2,256,256]" in call for call in calls) == 2
    assert not COLLECTIVE.search(text)
