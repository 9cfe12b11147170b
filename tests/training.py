"""First steps of training, as the experiments do them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from experiments import parallel
from experiments.config import OptimizerConfig
from experiments.step import Trainer
from models.language import DecoderConfig
from tests.numerics import assert_close


def check_training(mechanism, devices=None, *, length=256, layers=2, steps=5):
    """Asserts that a language model learns with GPU kernels what it does with plain JAX.

    Args:
      mechanism: of its attention.
      devices: how many; None for all. Batch and heads are split among them.
      length: tokens of a row.
      layers: of the model.
      steps: of training.
    """
    devices = devices or jax.device_count()
    tensor = 2 if devices % 2 == 0 else 1
    options = dict(shape=(devices // tensor, 1, tensor), length=length, layers=layers, steps=steps)
    actual = losses(mechanism, "pallas_gpu", **options)
    assert_close(actual, losses(mechanism, "xla", **options), jnp.bfloat16)


def losses(mechanism, implementation, *, shape, length, layers, steps):
    """Returns the losses of a language model's first steps; `shape` is that of the mesh."""
    count = math.prod(shape)
    model = DecoderConfig(
        vocab_size=64,
        features=128,
        num_layers=layers,
        num_heads=2,
        dtype="bfloat16",
        mechanism=mechanism,
        implementation=implementation,
    )
    mesh = jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:count],
    )
    tokens = np.random.default_rng(0).integers(0, 64, (2 * shape[0], length + 1), np.int32)
    documents = np.broadcast_to(1 + (np.arange(length + 1) >= length // 3), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": documents.astype(np.int32)}
    found = []
    with parallel.use_mesh(mesh):
        trainer = Trainer(model, OptimizerConfig(warmup_steps=1), mesh, steps=steps)
        state = trainer.initial()
        for _ in range(steps):
            state, metrics = trainer.step(state, parallel.global_batch(batch, mesh))
            found.append(metrics["loss"])
        return jnp.stack(jax.device_get(found))
