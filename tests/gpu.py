"""Kernels for GPUs, emulated or compiled on a machine that has none."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmark import hopper
from experiments.benchmark.table import markdown
from experiments.errors import ExperimentError
from tests import ptx

PRODUCTS_IN_PARTS = 16.0
"""How far float32 may be: products of two parts of bfloat16 each have 16 bits, not 24."""


@functools.cache
def _has_compiler():
    try:
        hopper.check_compiler()
    except ExperimentError:
        return False
    return True


_NO_COMPILER = "needs JAX's CUDA plugin and nvcc, here those for Linux x86-64"
needs_compiler = pytest.mark.skipif(not _has_compiler(), reason=_NO_COMPILER)


def emulated(seed=0):
    """Emulates GPU kernels that are traced inside of it, see tests/ptx; yields those it compiled.

    Wait for results inside. Where they cannot be compiled, the test is skipped.

    Args:
      seed: of the order in which everything happens.
    """
    if not _has_compiler():
        pytest.skip(_NO_COMPILER)
    return ptx.emulated(seed)


def compiled(kernels):
    """Returns what became of emulated kernels, in the order of a record."""
    return sorted((x.compiled for x in kernels), key=lambda x: (x.kernel, x.wgmma))


def kernels_of(case):
    """Returns what becomes of the kernels of a case, compiled with nothing around them."""
    with emulated() as kernels:
        jax.jit(case.function).lower(*case.arguments)
    return compiled(kernels)


class Record:
    """What became of kernels when their record, hopper.json, was written."""

    def __init__(self, test):
        """Reads the record beside a test."""
        found = json.loads(Path(test).with_name("hopper.json").read_text())
        self.versions, self.records = found["versions"], found["records"]

    def of(self, case):
        """Returns the records of the kernels of a case."""
        return [record for record in self.records if record["case"] == case]

    @property
    def cases(self):
        """Returns the names of the cases."""
        return {record["case"] for record in self.records}

    @property
    def spills(self):
        """Returns the records of kernels that spill registers."""
        return [record for record in self.records if record.get("spill_bytes")]

    def check(self, case, kernels):
        """Asserts that kernels need no more registers than they did."""
        for kernel, known in zip(kernels, self.of(case), strict=True):
            assert kernel.registers <= known["registers"], self.versions
            assert kernel.spill_bytes <= known["spill_bytes"], self.versions

    def check_table(self, cases):
        """Asserts that the table of cases in docs/benchmarks.md is of this record."""
        shown = [hopper.row(record) for name in cases for record in self.of(name)]
        benchmarks = Path(__file__).parents[1] / "docs" / "benchmarks.md"
        assert f"\n{markdown(shown)}\n" in benchmarks.read_text()


class Gpus:
    """A mesh of Hopper GPUs with explicit axes, to compile for."""

    def __init__(self, shape, names):
        """Makes the mesh."""
        topology = f"1x{int(np.prod(shape))}x1"
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=hopper.H200, topology=topology
        )
        devices = np.array(topology.devices).reshape(shape)
        self.mesh = Mesh(devices, names, axis_types=(AxisType.Explicit,) * len(names))

    def array(self, shape, dtype, *spec):
        """Returns the type of an array."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def compile(self, function, *arguments):
        """Returns the program of each device."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            traced = jax.jit(function).trace(*arguments)
            return traced.lower(lowering_platforms=("cuda",)).compile().as_text()
