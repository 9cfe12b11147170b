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
from pallas_kernels.tiled import tiled_attention, tpu
from tests.pallas_kernels.tiled.features import FEATURES, Call
from tests.sharding import COLLECTIVE
from tests.tpu import compile_for_tpu, tpu_mesh

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
SLOWEST = 60.0
"""Seconds of a processor that a program may take. Most take less than 2; machines may be busy."""


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


# What v5e takes v6e takes, which has more instructions. Its tables are tried by a few of them.
@pytest.mark.parametrize(
    ("feature", "topology"),
    [
        *((feature, TOPOLOGIES[0]) for feature in FEATURES),
        *((feature, TOPOLOGIES[1]) for feature in list(FEATURES)[::5]),
    ],
)
def test_feature(feature, topology):
    """The program is a kernel for the forward and a kernel for the backward."""
    assert _kernels(_text(*_gradients(FEATURES[feature]), topology=topology)) == 2


# 32 is what most calls above have, 128 what the lengths below have. v6e keeps sums transposed.
@pytest.mark.parametrize(
    ("features", "topology"),
    [
        *((features, TOPOLOGIES[0]) for features in (64, 96, 192, 256)),
        *((features, TOPOLOGIES[1]) for features in (80, 192, 256)),
    ],
)
def test_features_of_a_head(features, topology):
    call = Call({"mask": masks.causal()}, features=features, dtype=jnp.bfloat16)
    assert _kernels(_text(*_gradients(call), topology=topology)) == 2


def test_forward_alone():
    call = FEATURES["alibi with offsets, causal, segments of one sequence, grouped"]
    assert _kernels(_text(call, call.shapes)) == 1


CROSS = Call(batch=2, queries=1, keys=5000, heads=4, features=64, dtype=jnp.bfloat16)
LONG = {"features": 128, "dtype": jnp.bfloat16, "options": {"mask": masks.causal()}}
LENGTHS = {
    "one query": (CROSS, TOPOLOGIES[0]),
    "16k tokens": (Call(queries=2**14, keys=2**14, **LONG), TOPOLOGIES[0]),
    # The gradients of 32k queries are made by one kernel in a loop.
    "32k tokens, v6e": (Call(queries=2**15, keys=2**15, **LONG), TOPOLOGIES[1]),
}


@pytest.mark.parametrize(("call", "topology"), LENGTHS.values(), ids=LENGTHS)
def test_tiles_of_the_default_size(call, topology):
    call = dataclasses.replace(call, options={**call.options, "tile_sizes": None})
    assert _kernels(_text(*_gradients(call), topology=topology)) == 2


def test_block_lists_of_128k_tokens():
    """With 16 heads and 256 blocks of 64 tokens kept of 2048, gradients too fit a chip's memory."""
    x = jax.ShapeDtypeStruct((1, 2**17, 16, 128), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((1, 16, 2048, 256), jnp.int32)
    counts = jax.ShapeDtypeStruct(indices.shape[:-1], jnp.int32)

    def loss(x, indices, counts):
        out = tiled_attention(x, x, x, mask=masks.blocks(indices, counts, 64, 64))
        return out.astype(jnp.float32).sum()

    assert _kernels(_text(jax.grad(loss), x, indices, counts)) == 2


def test_a_gradient_that_the_kernel_lacks_is_made_without_it(monkeypatch):
    """The forward is the kernel's, whose log-sum-exp the backward takes up."""

    def supports(*, gradients=(), **_):
        return "it has no gradient of sink" if "sink" in gradients else None

    monkeypatch.setattr(tpu, "supports", supports)
    jax.clear_caches()
    call = FEATURES["bounded, sink, segments, dense of heads, fewer value heads"]
    assert _kernels(_text(*_gradients(call))) == 1
    jax.clear_caches()


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
