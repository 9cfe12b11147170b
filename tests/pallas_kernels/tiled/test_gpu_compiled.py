"""The GPU kernels of tiled attention, compiled for a Hopper GPU on a machine that has none.

After a change of the kernels, or of the compiler,

    python -m experiments.benchmark tiled hopper --cases CASES --output RECORD

with gpu_cases.py and hopper.json of this folder writes the record again, and prints what
docs/benchmarks.md has of it.
"""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import hopper, tiled_hopper
from experiments.compile_report import NotSupported
from pallas_kernels.tiled import tiled_attention
from tests.gpu import Gpus, Record, kernels_of, needs_compiler
from tests.pallas_kernels.tiled.features import FEATURES
from tests.pallas_kernels.tiled.gpu_cases import TABLE, cases
from tests.sharding import COLLECTIVE

CASES = cases()
RECORD = Record(__file__)

# Keys and values are together so wide that a kernel sums the gradients of each.
APART = {
    "reweighted softmax, 80 features, whole tiles",
    "causal, bfloat16, 192 features",
    "causal, bfloat16, 256 features",
    "causal, float32, 128 features",
    "alibi, bias, causal, bfloat16, 256 features",
}
ONE_PASS = {
    "negative scale, causal, window, bfloat16",
    "causal, bfloat16, 64 features",
    "causal, bfloat16, 128 features",
}
REFUSED = {
    "groups of 16, alibi, sink, bias, dense, causal": "groups of keys",
    "groups of 128, bounded, lengths, bfloat16": "groups of keys",
    "blocks of 16, statistic of heads, soft cap": "multiples of 64 tokens; got block_q 16",
    "blocks of 32 by 64, groups of 8": "groups of keys",
    "blocks of 48 by 96, statistic of a sigmoid, bias of heads": "multiples of 64 tokens; got",
}


def check_kernels(name, kernels):
    """Asserts that the kernels of a case are those of the record, or no worse.

    They need no more registers than they did, and all loops but those that copy multiply.
    """
    by_keys = ["tiled_backward_keys"] * (2 if name in APART else 1)
    by_queries = [] if name in ONE_PASS else ["tiled_backward_queries"]
    expected = [*by_keys, *by_queries, "tiled_forward"]
    assert [kernel.kernel for kernel in kernels] == expected
    RECORD.check(name, kernels)
    for kernel in kernels:
        assert kernel.wgmma and kernel.bulk_copies and not kernel.serialized
        # Where blocks are persistent they copy queries in their one loop, too; sums by distance
        # are written in a loop of their own.
        known = {"copies", "wgmma", "wgmma and copies"} | (
            {"neither"} if "relative" in name else set()
        )
        assert {*kernel.loops.split(", ")} <= known and "wgmma" in kernel.loops


# The others are compiled where they are run, see test_gpu.py.
@needs_compiler
@pytest.mark.parametrize("name", [name for name in CASES if name not in {*FEATURES, TABLE}])
def test_kernels(name):
    check_kernels(name, kernels_of(CASES[name]))


@needs_compiler
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_lack(name):
    with pytest.raises(NotSupported, match=f"'pallas_gpu' does not serve .*{REFUSED[name]}"):
        hopper.compile_kernels(CASES[name].function, CASES[name].arguments)


def test_nothing_spills():
    assert RECORD.cases == CASES.keys()
    assert not RECORD.spills


def test_the_table_of_the_benchmarks_is_of_the_record():
    RECORD.check_table(tiled_hopper.cases())


@needs_compiler
def test_sharded():
    """Each of four devices runs the kernels on its part of batch and heads, alone."""
    gpus = Gpus((2, 2), ("data", "tensor"))
    x = gpus.array((4, 128, 4, 64), jnp.bfloat16, "data", None, "tensor")

    def loss(*arrays):
        return tiled_attention(*arrays, implementation="pallas_gpu").astype(jnp.float32).sum()

    text = gpus.compile(jax.grad(loss, argnums=(0, 1, 2)), x, x, x)
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    assert len(calls) == 2
    assert all("bf16[2,128,2,64]" in call for call in calls)
    assert not COLLECTIVE.search(text)
