"""Models over eight devices give what they give on one."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attention
from models.language import DecoderLM, transformer, transnormer_llm
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"vocab_size": 32, "features": 16, "num_layers": 2, "num_heads": 4, "hidden_features": 32}
CONFIGS = {
    "transformer": transformer(**TINY, num_kv_heads=2),
    "transnormer_llm": transnormer_llm(**TINY),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_mesh():
    axes = (AxisType.Auto,) * 3
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=axes)


def sharding_of(mesh):
    """Matrices over fsdp and tensor, so that heads and hidden features lie on tensor."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/out/" in name or "/down/" in name or "embedding" in name:
            return NamedSharding(mesh, P("tensor", "fsdp"))
        if "kernel" in name:
            return NamedSharding(mesh, P("fsdp", "tensor"))
        return NamedSharding(mesh, P("tensor") if "theta" in name else P())

    return lambda tree: jax.tree_util.tree_map_with_path(one, tree)


def make_step(config):
    graph, _ = nnx.split(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))

    def loss(parameters, tokens, segments):
        logits = nnx.merge(graph, parameters)(tokens, segment_ids=segments)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return jax.value_and_grad(loss)


@every_model
def test_sharded_is_unsharded(config):
    config = dataclasses.replace(config, num_layers=3, scan_layers=True, remat="dots")
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 32)
    segments = (np.arange(12) >= np.arange(8)[:, None] + 2).astype(np.int32)
    _, parameters = nnx.split(DecoderLM(config, rngs=nnx.Rngs(0)), nnx.Param)
    expected = jax.jit(make_step(config))(parameters, tokens, segments)

    mesh = make_mesh()
    layout = sharding_of(mesh)(parameters)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with (
        jax.set_mesh(mesh),
        attention.parallel.axes(batch=("data", "fsdp"), heads="tensor"),
    ):
        step = jax.jit(make_step(config), out_shardings=(NamedSharding(mesh, P()), layout))
        placed = jax.device_put((parameters, tokens, segments), (layout, rows, rows))
        loss, gradients = step(*placed)
    assert_close(loss, expected[0])
    # Sums over batch and features are taken in another order.
    assert_close(gradients, expected[1], factor=3)
    for gradient, parameter in zip(*map(jax.tree.leaves, (gradients, parameters)), strict=True):
        shard = gradient.addressable_shards[0].data
        if parameter.ndim == 2:
            assert math.prod(shard.shape) < parameter.size


@every_model
def test_created_in_place(config):
    """Every device makes its own part of the parameters, the same as without a mesh."""

    def initial():
        return nnx.split(DecoderLM(config, rngs=nnx.Rngs(0)), nnx.Param)[1]

    mesh = make_mesh()
    with jax.set_mesh(mesh):
        layout = sharding_of(mesh)(jax.eval_shape(initial))
        parameters = jax.jit(initial, out_shardings=layout)()
    assert_close(parameters, initial())
    kernels = parameters["layers"][1]["feed_forward"]
    assert kernels["up"]["kernel"][...].addressable_shards[0].data.shape == (8, 16)
