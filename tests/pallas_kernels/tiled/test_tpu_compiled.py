"""The TPU kernel of tiled attention, compiled for TPUs on a machine that has none."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import masks
from pallas_kernels.partition import axes
from pallas_kernels.tiled import tiled_attention
from tests.pallas_kernels.tiled.features import FEATURES, Call
from tests.sharding import COLLECTIVE
from tests.tpu import compile_for_tpu, tpu_mesh

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
SLOWEST = 30.0
"""Seconds of a processor that a compilation may take. Most take less than 1, none more than 11."""


def _gradients(call):
    """Returns a function to results and gradients of a call, and its arguments."""

    def run(arrays, mask):
        def loss(arrays):
            results = call(arrays, mask=mask)
            return sum(jnp.sum(x.astype(jnp.float32)) for x in results), results

        return jax.grad(loss, has_aux=True)(arrays)

    return run, call.shapes, call.options.get("mask")


def _text(function, *args, **where):
    """Compiles a function and returns its program."""
    start = time.process_time()
    text = compile_for_tpu(function, *args, **where).as_text()
    assert time.process_time() - start < SLOWEST
    return text


def _kernels(text):
    """Returns the number of calls of kernels in a program."""
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, topology):
    """The program is a kernel for the forward and a kernel for the backward."""
    assert _kernels(_text(*_gradients(FEATURES[feature]), topology=topology)) == 2


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("features", [32, 64, 80, 96, 128, 192, 256])
def test_features_of_a_head(features, topology):
    call = Call({"mask": masks.causal()}, features=features, dtype=jnp.bfloat16)
    assert _kernels(_text(*_gradients(call), topology=topology)) == 2


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_forward_alone(topology):
    call = FEATURES["grouped"]
    assert _kernels(_text(call, call.shapes, topology=topology)) == 1


CROSS = Call(batch=2, queries=1, keys=5000, heads=4, features=64, dtype=jnp.bfloat16)
LONG = {"features": 128, "dtype": jnp.bfloat16, "options": {"mask": masks.causal()}}
LENGTHS = {
    "one query": (CROSS, TOPOLOGIES[0], 2),
    "one query, v6e": (CROSS, TOPOLOGIES[1], 2),
    # The gradients of 32k queries are made by two kernels.
    "32k tokens": (Call(queries=2**15, keys=2**15, **LONG), TOPOLOGIES[0], 3),
    "16k tokens, v6e": (Call(queries=2**14, keys=2**14, **LONG), TOPOLOGIES[1], 2),
}


@pytest.mark.parametrize(("call", "topology", "kernels"), LENGTHS.values(), ids=LENGTHS)
def test_tiles_of_the_default_size(call, topology, kernels):
    call = dataclasses.replace(call, options={**call.options, "tile_sizes": None})
    assert _kernels(_text(*_gradients(call), topology=topology)) == kernels


def _listed(tokens, kept, batch=4, heads=16):
    """Returns the arguments of a call with lists of so many blocks of 64 tokens."""
    count = tokens // 64
    x = jax.ShapeDtypeStruct((batch, tokens, heads, 128), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((batch, heads, count, kept), jnp.int32)
    return x, indices, jax.ShapeDtypeStruct(indices.shape[:-1], jnp.int32)


def _with_lists(x, indices, counts):
    return tiled_attention(x, x, x, mask=masks.blocks(indices, counts, 64, 64))


def test_block_lists_of_128k_tokens():
    assert _kernels(_text(_with_lists, *_listed(2**17, 256))) == 1


def test_gradients_with_block_lists():
    def loss(*args):
        return _with_lists(*args).astype(jnp.float32).sum()

    assert _kernels(_text(jax.grad(loss), *_listed(2**12, 16))) == 2


def test_a_gradient_of_a_bias_is_made_without_a_kernel():
    """The forward is the kernel's, whose log-sum-exp the backward takes up."""
    call = FEATURES["bias"]
    bias = call.options["bias"]

    def loss(arrays, bias):
        return call(arrays, bias=bias)[0].sum()

    text = _text(jax.grad(loss, argnums=(0, 1)), call.shapes, bias)
    assert _kernels(text) == 1
    assert _kernels(_text(jax.grad(loss), call.shapes, bias)) == 2


def _sharded(kind):
    """Returns a mesh, and arguments that lie on it over batch and heads."""
    mesh = tpu_mesh((4, 2), ("data", "tensor"), kind=kind, topology="v5e:4x4")
    call = Call(batch=8, queries=300, keys=300, heads=4, features=64, dtype=jnp.bfloat16)
    spec = NamedSharding(mesh, P("data", None, "tensor"))
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)
        for name, x in call.shapes.items()
    }
    return mesh, arrays


LEARNED = {"sink": jnp.zeros(4), "alibi_slopes": jnp.zeros(4)}


def _loss(arrays, learned, implementation=None):
    out = tiled_attention(**arrays, **learned, mask=masks.causal(), implementation=implementation)
    return out.astype(jnp.float32).sum()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded(kind):
    """Every device runs the kernels on its own part, and only sums over the batch are sent."""
    mesh, arrays = _sharded(kind)
    with axes(batch="data", heads="tensor"):
        text = _text(jax.grad(_loss), arrays, LEARNED, devices=mesh)
        assert _kernels(text) == 2
        assert not COLLECTIVE.findall(text)
        text = _text(jax.grad(_loss, argnums=(0, 1)), arrays, LEARNED, devices=mesh)
        assert _kernels(text) == 2
        assert set(COLLECTIVE.findall(text)) == {"all-reduce"}


def test_sharded_in_a_way_that_is_not_known():
    mesh, arrays = _sharded(AxisType.Auto)
    assert _kernels(_text(jax.grad(_loss), arrays, LEARNED, devices=mesh)) == 0
    with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
        compile_for_tpu(
            lambda *args: _loss(*args, implementation="pallas_tpu"), arrays, LEARNED, devices=mesh
        )
