"""Evaluates a run on its test data: `python -m experiments.evaluate RUN`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import config as configs
from experiments import parallel, tasks
from experiments.checkpoint import best_step, complete_steps, restore_state
from experiments.config import MeshConfig, OptimizerConfig, RunConfig
from experiments.errors import ExperimentError, run_command
from experiments.step import Trainer
from experiments.tasks import Task
from experiments.train import measure, name_of

RESULTS = "evaluation.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures a run's model on its task's test data, and baselines on the same."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (by validation loss), or a step."""
    max_bytes: int | None = None
    """Bytes of a text's test split that are used, from its beginning; default: all of it."""
    baselines: bool = True
    """Also measure what a model must beat: of text, byte models of order 0 and 2, fitted to the
    training split, and LZMA; of series, the last value or season and a linear map."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    step: int
    """Step of the checkpoint."""
    task: Task
    targets: int
    """Number of targets on which the model was measured first, such as the bytes of a text."""
    values: dict[str, float]
    """The task's measure by name: the model under its mechanism's, then the model on further data
    or baselines on the same."""
    picture: Path | None = None
    """Where a plot of the values is, if they have one."""

    def print(self) -> None:
        """Shows the table."""
        title = f"test split, {self.targets:,} {self.task.targets}"
        table = Table(box=box.SIMPLE, title=title)
        table.add_column("model")
        table.add_column(self.task.metric_label, justify="right")
        for name, value in self.values.items():
            table.add_row(name, f"{value:.4f}")
        Console().print(table)
        if self.picture is not None:
            print(f"plot  {self.picture}")

    def write(self, run: Path) -> None:
        """Writes `evaluation.json` beside a run.

        Raises:
          ExperimentError: if the disk does not take it.
        """
        found = {"step": self.step, self.task.targets: self.targets, self.task.metric: self.values}
        try:
            (run / RESULTS).write_text(json.dumps(found) + "\n")
        except OSError as error:
            raise ExperimentError(f"cannot write to {run}: {error}") from error


def main() -> None:
    """The command line."""
    config = tyro.cli(EvaluateConfig, prog="python -m experiments.evaluate", description=__doc__)
    evaluate(config).print()


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures a run's model, and baselines, and writes `evaluation.json` beside the run.

    Raises:
      ExperimentError: if there is no such run or checkpoint, or the data cannot be read.
    """
    run = configs.load(config.run)
    task = tasks.of(run)
    step, trainer, parameters, mesh = load_model(config.run, run, config.checkpoint, config.mesh)
    values, targets = {}, []
    try:
        with parallel.use_mesh(mesh):
            for label, batches in task.test_data(run, config.max_bytes).items():
                measures, count = measure(trainer, parameters, mesh, task, batches)
                values[", ".join(filter(None, (name_of(run.model), label)))] = measures[task.metric]
                targets.append(count)
        if config.baselines:
            values |= task.baselines(run, targets[0], config.max_bytes)
    except (ValueError, OSError) as error:
        raise ExperimentError(f"data: {error}") from error
    evaluation = Evaluation(step, task, targets[0], values)
    evaluation.write(config.run)
    try:
        picture = task.plot(run, values, config.run)
    except OSError as error:
        raise ExperimentError(f"cannot write to {config.run}: {error}") from error
    return dataclasses.replace(evaluation, picture=picture)


def load_model(
    path: Path, run: RunConfig, checkpoint: str, mesh_config: MeshConfig
) -> tuple[int, Trainer, Any, jax.sharding.Mesh]:
    """The parameters of one of a run's checkpoints, placed on a mesh.

    Args:
      path: the run's directory.
      run: its configuration.
      checkpoint: "last", "best" or a step.
      mesh_config: the mesh to place them on; need not be that of the training.

    Returns:
      The checkpoint's step, a trainer of the model, the parameters and the mesh.

    Raises:
      ExperimentError: if the checkpoint does not exist or cannot be read.
    """
    directory = path / "checkpoints"
    steps = complete_steps(directory)
    if not steps:
        raise ExperimentError(f"{path} has no checkpoint yet")
    if checkpoint == "last":
        step = steps[-1]
    elif checkpoint == "best":
        step = best_step(directory)
    elif checkpoint.isdecimal() and int(checkpoint) in steps:
        step = int(checkpoint)
    else:
        listed = ", ".join(map(str, steps))
        raise ExperimentError(
            f"checkpoint: {checkpoint!r}; it must be last, best or one of {listed}"
        )
    mesh = parallel.make_mesh(mesh_config)
    with parallel.use_mesh(mesh):
        try:
            trainer = Trainer(
                run.model, OptimizerConfig(), mesh, steps=run.steps, task=tasks.of(run)
            )
        except (ValueError, TypeError) as error:
            raise ExperimentError(f"model: {error}") from error
        state = restore_state(directory, step, trainer.template)
    return step, trainer, state.parameters, mesh


if __name__ == "__main__":
    run_command(main)
