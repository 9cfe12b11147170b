"""The TPU kernels of linear attention, compiled for TPUs on a machine that has none."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear import linear_attention
from pallas_kernels.partition import axes
from tests.pallas_kernels.linear.cases import STATE, VARIANTS, Case, called
from tests.sharding import COLLECTIVE
from tests.tpu import compile_for_tpu, tpu_mesh

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
BOTH = ["linear_forward", "linear_backward"]


def _case(variant, **shapes):
    """Returns a case of 512 tokens with heads of 128; Taylor features are of 16."""
    features = 16 if VARIANTS[variant].get("feature_map") == "taylor" else 128
    sizes = dict(tokens=512, batch=1, heads=2, kv_heads=2, features=features, width=128)
    return Case(**sizes | VARIANTS[variant] | shapes)


def _types(case, dtype=jnp.bfloat16):
    return jax.eval_shape(lambda: case.arrays(dtype))


def _gradients(case):
    def loss(arrays):
        results = called(case, arrays, None)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in results.values()), results

    return jax.grad(loss, has_aux=True)


def _kernels(compiled):
    """Returns the names of the kernels that a program calls."""
    return re.findall(r"%([a-z_]+)\S* = .*\"tpu_custom_call\"", compiled.as_text())


# On v6e chunks of scalar gates without the delta rule are longer; all others are as on v5e.
@pytest.mark.parametrize(
    ("variant", "topology"),
    [
        *((variant, TOPOLOGIES[0]) for variant in VARIANTS),
        *((variant, TOPOLOGIES[1]) for variant in ("decay", "steps", "taylor")),
    ],
)
def test_forward_and_backward_are_a_kernel_each(variant, topology):
    # Each memory of a grid step takes as long to compile: v6e and the tests below have two.
    heads = 1 if topology == TOPOLOGIES[0] else 2
    case = _case(variant, state=True, heads=heads, kv_heads=heads)
    compiled = compile_for_tpu(_gradients(case), _types(case), topology=topology)
    assert _kernels(compiled) == BOTH


@pytest.mark.parametrize(
    ("variant", "topology"),
    [("decay", TOPOLOGIES[0]), *(("taylor", topology) for topology in TOPOLOGIES)],
)
def test_to_all_tokens(variant, topology):
    """A kernel for what keys write and one for what queries read, and for the gradients of each."""
    case = _case(variant, causal=False, decay=None, keys=256, state=True)
    compiled = compile_for_tpu(_gradients(case), _types(case), topology=topology)
    names = ("read_backward", "read_forward", "sum_backward", "sum_forward")
    assert sorted(_kernels(compiled)) == [f"linear_{name}" for name in names]


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    (
        (jnp.float32, dict(kv_heads=1, segments=True)),
        (jnp.float16, dict(heads=1, kv_heads=1, value_heads=2, tokens=300, features=80)),
    ),
    ids=("float32", "float16"),
)
def test_other_shapes(dtype, shapes):
    case = _case("decay", **shapes)
    assert _kernels(compile_for_tpu(_gradients(case), _types(case, dtype))) == BOTH


def test_64k_tokens():
    x = jax.ShapeDtypeStruct((1, 2**16, 2, 128), jnp.bfloat16)

    def loss(x):
        out = linear_attention(x, x, x, log_decay=(-0.1, -0.01))
        return jnp.sum(out.astype(jnp.float32))

    assert _kernels(compile_for_tpu(jax.grad(loss), x)) == BOTH


def test_a_prompt_and_a_token():
    """A token by itself is no kernel."""
    case = _case("steps", tokens=513)

    def run(arrays):
        prompt = called(case, {n: x[:, :512] for n, x in arrays.items()}, None)
        token = {n: x[:, 512:] for n, x in arrays.items()}
        state = {n: prompt[n] for n in STATE if n in prompt}
        return prompt["out"], called(case, token | state, None)

    assert _kernels(compile_for_tpu(run, _types(case))) == BOTH[:1]


@pytest.mark.parametrize("variant", ("decay", "delta"))
def test_sharded(variant):
    """Each device has kernels for its rows and heads; a decay of all rows sums its gradient."""
    case = _case(variant, batch=2, heads=4, kv_heads=2)
    devices = tpu_mesh((2, 2), ("data", "tensor"), kind=AxisType.Auto)

    def placed(x):
        spec = P("tensor") if x.ndim == 1 else P("data", None, "tensor")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, spec))

    with axes(batch="data", heads="tensor"):
        types = jax.tree.map(placed, _types(case))
        compiled = compile_for_tpu(_gradients(case), types, devices=devices)
    assert _kernels(compiled) == BOTH
    assert COLLECTIVE.findall(compiled.as_text()) == ["all-reduce"] * (variant == "decay")
