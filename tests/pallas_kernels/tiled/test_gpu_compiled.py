"""The GPU kernels of tiled attention, compiled for a Hopper GPU on a machine that has none.

After a change of the kernels, or of the compiler,

    python -m experiments.benchmark tiled hopper --cases CASES --output RECORD

with gpu_cases.py and hopper.json of this folder writes the record again, and prints what
docs/benchmarks.md has of it.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmark import hopper, tiled_hopper
from experiments.benchmark.table import markdown
from experiments.compile_report import NotSupported
from experiments.errors import ExperimentError
from pallas_kernels.tiled import tiled_attention
from tests.pallas_kernels.tiled.gpu_cases import cases
from tests.sharding import COLLECTIVE

CASES = cases()
RECORD = json.loads(Path(__file__).with_name("hopper.json").read_text())
BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks.md"

# Keys and values are together so wide that a kernel sums the gradients of each.
APART = {
    "reweighted softmax, 80 features, whole tiles",
    "causal, bfloat16, 192 features",
    "causal, bfloat16, 256 features",
    "causal, float32, 128 features",
}
REFUSED = {
    "groups of 16, alibi, sink, bias, dense, causal": "groups of keys",
    "groups of 128, bounded, lengths, bfloat16": "groups of keys",
    "blocks of 16, statistic of heads, soft cap": "multiples of 64 tokens; got block_q 16",
    "blocks of 32 by 64, groups of 8": "groups of keys",
    "blocks of 48 by 96, statistic of a sigmoid, bias of heads": "multiples of 64 tokens; got",
}


def _has_compiler() -> bool:
    try:
        hopper.check_compiler()
    except ExperimentError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not _has_compiler(), reason="needs JAX's CUDA plugin and nvcc, here those for Linux x86-64"
)


def _recorded(name):
    return [record for record in RECORD["records"] if record["case"] == name]


@needs_compiler
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_kernels(name):
    """They need no more registers than they did, and all loops but those that copy multiply."""
    case = CASES[name]
    kernels = hopper.compile_kernels(case.function, case.arguments)
    by_keys = ["tiled_backward_keys"] * (2 if name in APART else 1)
    expected = [*by_keys, "tiled_backward_queries", "tiled_forward"]
    assert [kernel.kernel for kernel in kernels] == expected
    for kernel, known in zip(kernels, _recorded(name), strict=True):
        assert kernel.wgmma and kernel.bulk_copies and not kernel.serialized
        assert kernel.loops in ("copies, wgmma", "copies, wgmma, wgmma")
        assert kernel.registers <= known["registers"], RECORD["versions"]
        assert kernel.spill_bytes <= known["spill_bytes"], RECORD["versions"]


@needs_compiler
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_lack(name):
    with pytest.raises(NotSupported, match=f"'pallas_gpu' does not serve .*{REFUSED[name]}"):
        hopper.compile_kernels(CASES[name].function, CASES[name].arguments)


def test_nothing_spills():
    found = {record["case"] for record in RECORD["records"]}
    assert found == CASES.keys()
    assert not any(record.get("spill_bytes") for record in RECORD["records"])


def test_the_table_of_the_benchmarks_is_of_the_record():
    shown = [record for name in tiled_hopper.cases() for record in _recorded(name)]
    assert f"\n{markdown([hopper.row(record) for record in shown])}\n" in BENCHMARKS.read_text()


@needs_compiler
def test_sharded():
    """Each of four devices runs the kernels on its part of batch and heads, alone."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=hopper.H200, topology="1x4x1"
    )
    devices = np.array(topology.devices).reshape(2, 2)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    x = jax.ShapeDtypeStruct((4, 128, 4, 64), jnp.bfloat16, sharding=sharding)

    def loss(*arrays):
        return tiled_attention(*arrays, implementation="pallas_gpu").astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
        text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    assert len(calls) == 3
    assert all("bf16[2,128,2,64]" in call for call in calls)
    assert not COLLECTIVE.search(text)
