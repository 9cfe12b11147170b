"""Checkpoints: another mesh, which are kept, and what happens to damaged ones."""

import json
import os

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import parallel
from experiments.checkpoint import Checkpoints, best_step, restore_state
from experiments.config import CheckpointConfig, MeshConfig, presets
from experiments.errors import ExperimentError
from experiments.step import Trainer
from tests.experiments.test_step import batches

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rows():
    return iter(grain.MapDataset.range(1000).shuffle(seed=1).to_iter_dataset())


def simple_state(step):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    return {"w": jax.device_put(jnp.arange(64.0) + step, sharding), "step": jnp.int32(step)}


def template():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), simple_state(0)
    )


def written(path, validation, keep=2):
    """Checkpoints of steps 1, 2, ... with these validation losses."""
    checkpoints, data = Checkpoints(path, CheckpointConfig(keep=keep)), rows()
    for step, value in enumerate(validation, 1):
        next(data)
        checkpoints.save(step, simple_state(step), data, {"a": 1}, value)
    checkpoints.close()
    return checkpoints


def test_newest_and_best_are_kept(tmp_path):
    checkpoints = written(tmp_path, [3.0, 1.0, None, 2.0, None, None])
    assert checkpoints.steps() == [2, 5, 6]
    assert best_step(checkpoints.directory) == 2
    assert json.loads((checkpoints.directory / "6" / "config" / "metadata").read_text()) == {"a": 1}


def test_best_is_the_newest_where_none_was_measured(tmp_path):
    assert best_step(written(tmp_path, [None, None]).directory) == 2


def test_restore_gives_state_and_position(tmp_path):
    written(tmp_path, [None] * 3)
    data = rows()
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore(template(), data)
    assert restored.step == 3 and restored.damaged == ()
    chex.assert_trees_all_equal(restored.state, simple_state(3))
    expected = rows()
    for _ in range(3):
        next(expected)
    assert [next(data) for _ in range(5)] == [next(expected) for _ in range(5)]


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path, CheckpointConfig()).restore(template(), rows()) is None


def test_any_truncated_file_is_noticed_or_harmless(tmp_path):
    directory = written(tmp_path, [None, 1.5]).directory
    files = [path for path in (directory / "2").rglob("*") if path.is_file()]
    noticed = 0
    for path in files:
        content = path.read_bytes()
        if len(content) < 2:
            continue
        os.truncate(path, len(content) // 2)
        data = rows()
        restored = Checkpoints(tmp_path, CheckpointConfig()).restore(template(), data)
        assert restored.step in (1, 2), path
        # Whatever was cut: never a wrong number.
        chex.assert_trees_all_equal(restored.state, simple_state(restored.step))
        expected = rows()
        for _ in range(restored.step):
            next(expected)
        assert next(data) == next(expected)
        if restored.step == 1:
            noticed += 1
            assert "step 2 cannot be read" in restored.damaged[0]
            (directory / "damaged-2").rename(directory / "2")
        path.write_bytes(content)
    assert noticed >= 3


def test_saving_goes_on_after_a_damaged_checkpoint(tmp_path):
    directory = written(tmp_path, [1.0, 0.5]).directory
    for path in (directory / "2").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    checkpoints, data = Checkpoints(tmp_path, CheckpointConfig()), rows()
    restored = checkpoints.restore(template(), data)
    assert restored.step == 1
    next(data)
    checkpoints.save(2, simple_state(2), data, {}, 0.4)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and (directory / "damaged-2").is_dir()
    assert best_step(directory) == 2


def test_checkpoint_of_another_shape_or_process_count_is_refused_and_left_alone(tmp_path):
    checkpoints = written(tmp_path, [None, None])
    wrong = {"w": jax.ShapeDtypeStruct((32,), jnp.float32), "step": template()["step"]}
    with pytest.raises(ExperimentError, match=r"no checkpoint in .* can be read"):
        Checkpoints(tmp_path, CheckpointConfig()).restore(wrong, rows())
    with pytest.raises(ExperimentError, match=r"step 2 .* cannot be read"):
        restore_state(checkpoints.directory, 2, wrong)
    position = checkpoints.directory / "2" / "data" / "process_0-of-1.json"
    position.rename(position.with_name("process_0-of-4.json"))
    with pytest.raises(ExperimentError, match=r"written by 4 processes.*this job has 1 process"):
        Checkpoints(tmp_path, CheckpointConfig()).restore(template(), rows())
    assert checkpoints.steps() == [1, 2]


def test_written_on_one_mesh_resumed_on_another(tmp_path):
    config = presets()["tiny"]
    data = list(batches(8))
    losses = {}
    for fsdp, tensor in ((4, 2), (2, 1)):
        mesh = parallel.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))
        with parallel.use_mesh(mesh):
            trainer = Trainer(config.model, config.optimizer, mesh, steps=20)
            checkpoints = Checkpoints(tmp_path, CheckpointConfig())
            restored = checkpoints.restore(trainer.template, rows())
            state = trainer.initial() if restored is None else restored.state
            start = 0 if restored is None else restored.step
            values = []
            for step in range(start + 1, 9):
                state, metrics = trainer.step(state, parallel.global_batch(data[step - 1], mesh))
                values.append(float(metrics["loss"]))
                if step == 4 and restored is None:
                    checkpoints.save(4, state, rows(), {}, None)
            checkpoints.close()
            losses[fsdp, tensor] = values
    assert len(losses[2, 1]) == 4
    np.testing.assert_allclose(losses[2, 1], losses[4, 2][4:], atol=1e-5, rtol=0)


def test_unwritable_directory_is_one_message(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(ExperimentError, match=r"could not be written to .*there is no earlier one"):
        written(tmp_path, [None])
