"""Evaluates a run on its test split: `python -m experiments.evaluate RUN`."""

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
from experiments import parallel
from experiments.baselines import ByteModel, lzma_bits
from experiments.checkpoint import best_step, complete_steps, restore_state
from experiments.config import MeshConfig, OptimizerConfig, TextConfig
from experiments.data import text
from experiments.errors import ExperimentError, run_command
from experiments.step import Trainer
from experiments.train import measure

RESULTS = "evaluation.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """Bits per byte of a run's model on the test split, beside baselines on the same bytes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (by validation loss), or a step."""
    max_bytes: int | None = None
    """Bytes of the test split that are used, from its beginning; default: all of it."""
    baselines: bool = True
    """Also measure byte models of order 0 and 2, fitted to the training split, and LZMA."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, all on the same bytes."""

    step: int
    bytes: int
    bits_per_byte: dict[str, float]
    """By name: the model under its mechanism's, then the baselines."""

    def print(self) -> None:
        """Shows the table."""
        table = Table(box=box.SIMPLE, title=f"test split, {self.bytes:,} bytes")
        table.add_column("model")
        table.add_column("bits per byte", justify="right")
        for name, bits in self.bits_per_byte.items():
            table.add_row(name, f"{bits:.4f}")
        Console().print(table)


def main() -> None:
    """The command line."""
    config = tyro.cli(EvaluateConfig, prog="python -m experiments.evaluate", description=__doc__)
    evaluate(config).print()


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures a run's model and the baselines, and writes `evaluation.json` beside the run.

    Raises:
      ExperimentError: if there is no such run or checkpoint, or the data cannot be read.
    """
    run = configs.load(config.run)
    step, trainer, parameters, mesh = load_model(config.run, run, config.checkpoint, config.mesh)
    try:
        documents = list(text.documents(run.data, run.data.test_split, config.max_bytes))
        with parallel.use_mesh(mesh):
            bits, count = measure(
                trainer,
                parameters,
                mesh,
                run,
                split=run.data.test_split,
                max_bytes=config.max_bytes,
            )
        assert count == sum(map(len, documents)), "the model must be measured on every byte"
        rows = {run.model.mechanism: bits}
        if config.baselines:
            for order in (2, 0):
                fitted = ByteModel(order, text.documents(run.data, run.data.train_split))
                rows[f"order-{order} byte model"] = fitted.bits(documents) / count
            rows["lzma"] = lzma_bits(documents) / count
    except (ValueError, OSError) as error:
        raise ExperimentError(f"data: {error}") from error
    evaluation = Evaluation(step, count, rows)
    try:
        (config.run / RESULTS).write_text(json.dumps(dataclasses.asdict(evaluation)) + "\n")
    except OSError as error:
        raise ExperimentError(f"cannot write to {config.run}: {error}") from error
    return evaluation


def load_model(
    path: Path, run: TextConfig, checkpoint: str, mesh_config: MeshConfig
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
            trainer = Trainer(run.model, OptimizerConfig(), mesh, steps=run.steps)
        except (ValueError, TypeError) as error:
            raise ExperimentError(f"model: {error}") from error
        state = restore_state(directory, step, trainer.template)
    return step, trainer, state.parameters, mesh


if __name__ == "__main__":
    run_command(main)
