"""The TPU kernels of scans, compiled for TPUs on a machine that has none."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.partition import axes
from tests.pallas_kernels.scan.cases import TPU_CASES, Case
from tests.sharding import COLLECTIVE
from tests.tpu import compile_for_tpu, tpu_mesh

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
WIDE = Case("selective", tokens=65536, batch=1, channels=2048, features=16, chunk=None)
LARGE = {
    "gated, 64k tokens": (dataclasses.replace(WIDE, scan="gated"), TOPOLOGIES[0]),
    "selective, 64k tokens": (WIDE, TOPOLOGIES[1]),
    "softmax, 64k tokens": (
        dataclasses.replace(WIDE, scan="softmax", channels=12, features=64),
        TOPOLOGIES[1],
    ),
    "selective, 256 numbers": (
        dataclasses.replace(WIDE, tokens=256, channels=384, features=256),
        TOPOLOGIES[0],
    ),
}
# Nothing here depends on the generation: each case is compiled for one, each scan for both.
CASES = LARGE | {name: (case, TOPOLOGIES["bfloat16" in name]) for name, case in TPU_CASES.items()}


def _types(case, dtype):
    narrow = ("x", "delta", "B", "C", "log_decay", "score", "value")
    return {
        name: jax.ShapeDtypeStruct(shape, dtype if name in narrow else jnp.float32)
        for name, shape in case.shapes.items()
    }


def _gradients(case):
    def run(arrays, segment_ids):
        def loss(arrays):
            results = case.traced(arrays, None, segment_ids)
            return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(results)), results

        return jax.grad(loss, has_aux=True)(arrays)

    return run


def _ids(case):
    return jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32) if case.segments else None


def _kernels(text):
    """Returns the number of calls of kernels in a program."""
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_a_kernel_each(name):
    (case, topology), dtype = CASES[name], jnp.float32 if "float32" in name else jnp.bfloat16
    text = compile_for_tpu(
        _gradients(case), _types(case, dtype), _ids(case), topology=topology
    ).as_text()
    assert _kernels(text) == 2


@pytest.mark.parametrize("scan", ("gated", "selective", "softmax"))
def test_forward_alone(scan):
    case = TPU_CASES[f"{scan}, float32"]

    def run(arrays, segment_ids):
        return case.traced(arrays, None, segment_ids)

    text = compile_for_tpu(run, _types(case, jnp.float32), _ids(case)).as_text()
    assert _kernels(text) == 1


@pytest.mark.parametrize("scan", ("gated", "selective", "softmax"))
def test_a_token_is_no_kernel(scan):
    case = Case(scan, tokens=1, chunk=None, state=True)
    assert (
        _kernels(compile_for_tpu(_gradients(case), case.arrays(jnp.float32), None).as_text()) == 0
    )


def test_sharded():
    """Each device has a kernel for its rows and channels; of collectives there is one kind."""
    case = Case("selective", tokens=256, batch=4, channels=256, chunk=None)
    devices = tpu_mesh((2, 2), ("data", "tensor"), kind=AxisType.Auto)
    shared = {"A": P("tensor"), "D": P("tensor"), "delta_bias": P("tensor")}
    shared |= dict.fromkeys(("B", "C"), P("data"))
    arrays = {
        name: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(devices, shared.get(name, P("data", None, "tensor"))),
        )
        for name, x in _types(case, jnp.bfloat16).items()
    }
    with axes(batch="data", heads="tensor"):
        text = compile_for_tpu(_gradients(case), arrays, None, devices=devices).as_text()
    assert _kernels(text) == 2
    assert set(COLLECTIVE.findall(text)) == {"all-reduce"}
