"""The optimiser step: sharding, accumulation, schedule, and what a non-finite loss does."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments import parallel
from experiments.config import MeshConfig, OptimizerConfig, presets
from experiments.data.text import BOS
from experiments.errors import ExperimentError
from experiments.step import Trainer, learning_rate
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")
TINY = presets()["tiny"]


def mesh_of(data, fsdp, tensor):
    count = data * fsdp * tensor
    return jax.make_mesh(
        (data, fsdp, tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:count],
    )


def batches(count, rows=8, length=33, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = rng.integers(97, 105, (rows, length)).astype(np.int32)
        segments = np.ones_like(tokens)
        starts = rng.integers(1, length, rows)
        for row, start in enumerate(starts):
            tokens[row, start] = BOS
            segments[row, start:] = 2
        yield {"tokens": tokens, "segment_ids": segments}


@functools.cache
def trainer_of(mesh, model=TINY.model, **options):
    """A trainer of 20 steps; the tests share its programs."""
    return Trainer(model, TINY.optimizer, mesh, steps=20, **options)


def run(mesh, steps, model=TINY.model, rows=8, **options):
    """Losses of a short run, and its last state."""
    losses = []
    with parallel.use_mesh(mesh):
        trainer = trainer_of(mesh, model, **options)
        state = trainer.initial()
        for batch in batches(steps, rows):
            state, metrics = trainer.step(state, parallel.global_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    return losses, state, trainer


@pytest.mark.parametrize("mechanism", ["lightning_attention", "softmax_attention"])
def test_fsdp_4_tensor_2_gives_the_losses_of_one_device_over_20_steps(mechanism):
    model = dataclasses.replace(TINY.model, mechanism=mechanism)
    alone, _, _ = run(mesh_of(1, 1, 1), 20, model)
    spread, state, _ = run(mesh_of(1, 4, 2), 20, model)
    assert alone[-1] < alone[0] - 0.5, "it must have learnt something"
    np.testing.assert_allclose(spread, alone, atol=1e-4, rtol=0)
    kernels = [x for x in jax.tree.leaves(state.parameters) if x.ndim == 2]
    split = [x for x in kernels if x.addressable_shards[0].data.size * 8 == x.size]
    assert len(split) > len(kernels) / 2, "parameters must really be split 8 ways"


def test_other_meshes_start_with_the_same_parameters():
    _, state, trainer = run(mesh_of(1, 1, 1), 0)
    for shape in ((2, 2, 2), (8, 1, 1), (1, 8, 1)):
        _, other, _ = run(mesh_of(*shape), 0)
        chex.assert_trees_all_equal(
            jax.device_get(state.parameters), jax.device_get(other.parameters)
        )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, trainer.template)


def test_accumulation_is_the_whole_batch():
    mesh = mesh_of(2, 2, 1)
    whole, state, _ = run(mesh, 4, rows=16)
    parts, other, _ = run(mesh, 4, rows=16, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=2e-6)
    assert_close(other.parameters, state.parameters, jnp.float32, factor=100)


def test_bfloat16_compute_trains_float32_parameters():
    """A preset for accelerators, made small: bfloat16, rematerialised, layers in a loop."""
    models = [presets()[name].model for name in ("transformer_medium", "transnormer_llm_medium")]
    assert all(m.dtype == "bfloat16" and m.remat == "dots" and m.scan_layers for m in models)
    model = dataclasses.replace(models[-1], features=32, head_dim=16, num_layers=3, num_heads=2)
    mesh = mesh_of(2, 2, 2)
    with parallel.use_mesh(mesh):
        trainer = Trainer(model, TINY.optimizer, mesh, steps=20)
        state, losses = trainer.initial(), []
        for batch in batches(20):
            state, metrics = trainer.step(state, parallel.global_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        exact = Trainer(dataclasses.replace(model, dtype="float32"), TINY.optimizer, mesh, steps=20)
        total, count = exact.measure(state.parameters, parallel.global_batch(batch, mesh))
        same, _ = trainer.measure(state.parameters, parallel.global_batch(batch, mesh))
        total, same = total["loss"], same["loss"]
    leaves = jax.tree.leaves((state.parameters, state.optimizer))
    assert {x.dtype for x in leaves} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert losses[-1] < 0.75 * losses[0]
    assert same != total, "bfloat16 must have been used"
    np.testing.assert_allclose(same / count, total / count, rtol=1e-2)


def test_halted_state_is_that_from_before_the_step():
    mesh = mesh_of(1, 1, 1)
    with parallel.use_mesh(mesh):
        trainer = trainer_of(mesh)
        state = trainer.initial()
        poisoned = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.parameters)
        state = dataclasses.replace(state, parameters=poisoned)
        before = jax.device_get(state)
        for batch in batches(2):
            state, metrics = trainer.step(state, parallel.global_batch(batch, mesh))
            assert metrics["halted"] == 1
            after = jax.device_get(dataclasses.replace(state, halted=np.zeros((), bool)))
            chex.assert_trees_all_equal(after, before)


def test_targets_of_another_document_do_not_count():
    mesh = mesh_of(1, 1, 1)
    (batch,) = batches(1)
    with parallel.use_mesh(mesh):
        trainer = trainer_of(mesh)
        parameters = trainer.initial().parameters
        sums, weight = trainer.measure(parameters, parallel.global_batch(batch, mesh))
        marks = (batch["tokens"][:, 1:] == BOS).sum()
        assert marks == 8 and weight == batch["tokens"][:, 1:].size - marks
        assert sums["loss"] / weight == pytest.approx(np.log(257), rel=0.2)


@pytest.mark.parametrize("preset", ["transnormer_llm", "transformer"])
def test_only_matrices_are_decayed(preset):
    config = dataclasses.replace(TINY.optimizer, weight_decay=1.0, warmup_steps=0)
    model = dataclasses.replace(presets()[preset].model, features=32, num_layers=1, num_heads=2)
    mesh = mesh_of(1, 1, 1)
    with parallel.use_mesh(mesh):
        trainer = Trainer(model, config, mesh, steps=20)
        state = trainer.initial()
        zeros = jax.tree.map(jnp.zeros_like, state.parameters)
        update = jax.jit(trainer._optimizer.update)
        updates, _ = update(zeros, state.optimizer, state.parameters)
    decayed = set()
    for (path, x), update in zip(
        jax.tree.leaves_with_path(state.parameters), jax.tree.leaves(updates), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2]
        kept = name in ("theta", "scale")
        want = jnp.zeros_like(x) if kept else -config.learning_rate * x
        np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-9, err_msg=name)
        decayed.add((name, kept))
    still = {"transnormer_llm": "theta", "transformer": "scale"}[preset]
    assert decayed == {("kernel", False), ("embedding", False), (still, True)}


def test_learning_rate():
    schedule = learning_rate(
        OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), 110
    )
    rates = [float(schedule(step)) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == 1 and rates[110] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.55) and np.argmax(rates) == 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), "fsdp x tensor = 3 x 1 = 3 does not divide the 8 devices"),
        (MeshConfig(data=3, fsdp=2), "3 x 2 x 1 = 6, but there are 8 devices"),
        (MeshConfig(tensor=0), "mesh.tensor: 0; it must be a positive number"),
        (MeshConfig(data=0), "mesh.data: 0; it must be a positive number"),
    ],
)
def test_mesh_that_does_not_fit(config, message):
    with pytest.raises(ExperimentError, match=message):
        parallel.make_mesh(config)


def test_batch_and_heads_that_do_not_fit():
    mesh = parallel.make_mesh(MeshConfig(fsdp=4, tensor=2))
    parallel.check_fit(mesh, batch_size=16, accumulate=4, num_heads=2)
    with pytest.raises(ExperimentError, match=r"batch_size: 16 in 8 parts"):
        parallel.check_fit(mesh, batch_size=16, accumulate=8, num_heads=2)
    with pytest.raises(ExperimentError, match=r"mesh.tensor: 2 does not divide the 3 attention"):
        parallel.check_fit(mesh, batch_size=16, accumulate=1, num_heads=3)


def test_every_matrix_of_the_presets_has_a_rule():
    mesh = parallel.make_mesh(MeshConfig(fsdp=2, tensor=2))
    for name in ("transnormer_llm", "transformer", "transformer_medium"):
        with parallel.use_mesh(mesh):
            template = Trainer(presets()[name].model, OptimizerConfig(), mesh, steps=1).template
        for path, leaf in jax.tree_util.tree_leaves_with_path(template.parameters):
            if len(leaf.shape) >= 2:
                assert any(leaf.sharding.spec), jax.tree_util.keystr(path)
        assert "tensor" in str([x.sharding.spec for x in jax.tree.leaves(template.optimizer)])
