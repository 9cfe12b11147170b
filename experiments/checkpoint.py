"""Checkpoints of a run: model, optimiser, step, position in the data and configuration together."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from experiments.config import CheckpointConfig
from experiments.errors import ExperimentError

METRIC = "validation_loss"
DAMAGED = "damaged-"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found."""

    step: int
    state: Any
    """The state, placed as the template's shardings say."""
    damaged: tuple[str, ...]
    """A line for each newer checkpoint that could not be read."""


class Checkpoints:
    """The checkpoints below `run/checkpoints`, one folder a step.

    Writing is asynchronous and atomic: a folder with a step's number is complete, whatever killed
    the process. The newest `config.keep` are kept, and the best by validation loss.

    Args:
      run: the run's directory.
      config: how many to keep.
    """

    def __init__(self, run: Path, config: CheckpointConfig):
        self.directory = (run / "checkpoints").absolute()
        self._config = config
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return complete_steps(self.directory)

    def save(
        self, step: int, state: Any, data: Any, config: dict[str, Any], validation: float | None
    ) -> None:
        """Starts writing a checkpoint; a step that has one already is left as it is.

        Raises:
          ExperimentError: if this or the one before could not be written; the older ones remain.
        """
        if step in self.steps():
            return
        try:
            self._open().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                    config=ocp.args.JsonSave(config),
                ),
                metrics=None if validation is None else {METRIC: validation},
                force=True,
            )
        except Exception as error:  # tensorstore, Orbax and the system all have their own
            raise self._not_written(step, error) from error

    def wait(self) -> None:
        """Waits until all that was saved is on disk.

        Raises:
          ExperimentError: as `save`.
        """
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._not_written(None, error) from error

    def close(self) -> None:
        """Waits, then gives up the threads."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None

    def restore(self, template: Any, data: Any) -> Restored | None:
        """Reads the newest checkpoint that can be read; None where there is none at all.

        A checkpoint that cannot be read is moved aside (its name gets the prefix `damaged-`), and
        the one before it is taken.

        Args:
          template: the state's tree of jax.ShapeDtypeStruct with shardings.
          data: the data's iterator, set to where it was.

        Raises:
          ExperimentError: if there are checkpoints and none can be read, or if another number of
            processes wrote them, each of which had its own position in the data.
        """
        damaged = []
        for step in reversed(self.steps()):
            self._check_processes(step)
            start = data.get_state()
            try:
                found = self._reader().restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(template),
                        data=grain.checkpoint.CheckpointRestore(data),
                    ),
                )
            except Exception as error:
                _silence_coroutines()
                data.set_state(start)
                damaged.append(f"the checkpoint of step {step} cannot be read ({_brief(error)})")
                continue
            self._move_aside(range(step + 1, self.steps()[-1] + 1))
            return Restored(step, found["state"], tuple(damaged))
        if damaged:
            raise ExperimentError(
                f"no checkpoint in {self.directory} can be read:\n  " + "\n  ".join(damaged)
            )
        return None

    def _check_processes(self, step: int) -> None:
        positions = (self.directory / str(step) / "data").glob("process_*-of-*.json")
        counts = {int(path.stem.rpartition("-")[2]) for path in positions}
        here = jax.process_count()
        if counts and here not in counts:
            raise ExperimentError(
                f"the checkpoint of step {step} was written by {_processes(counts.pop())}, each at "
                f"its own position in the data; this job has {_processes(here)}. Resume it with as "
                "many processes as before (the mesh may change)"
            )

    def _move_aside(self, steps: range) -> None:
        if jax.process_index() == 0:
            for step in self.steps():
                if step in steps:
                    path = self.directory / str(step)
                    path.rename(_free_name(self.directory / f"{DAMAGED}{step}"))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints moved aside")

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            keep = checkpoint_managers.AnyPreservationPolicy(
                [
                    checkpoint_managers.LatestN(self._config.keep),
                    checkpoint_managers.BestN(
                        get_metric_fn=lambda metrics: -metrics[METRIC],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            )
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep,
                    cleanup_tmp_directories=True,
                    # Without these Orbax does not write the metrics down.
                    best_fn=lambda metrics: metrics[METRIC],
                    best_mode="min",
                ),
            )
        return self._manager

    def _reader(self) -> ocp.CheckpointManager:
        return reader(self.directory)

    def _not_written(self, step: int | None, error: Exception) -> ExperimentError:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        steps = self.steps()
        rest = (
            f"the newest complete one is that of step {steps[-1]}; put it right and go on with "
            "--resume"
            if steps
            else "there is no earlier one"
        )
        return ExperimentError(
            f"{which} could not be written to {self.directory}: {_brief(error)}; {rest}"
        )


def reader(directory: Path) -> ocp.CheckpointManager:
    """A manager that only reads, and looks at nothing before it is asked to."""
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            read_only=True, create=False, lightweight_initialize=True
        ),
    )


def restore_state(directory: Path, step: int, template: Any) -> Any:
    """The state of one checkpoint.

    Raises:
      ExperimentError: if it cannot be read, or is of another model than the template.
    """
    try:
        restored = reader(directory).restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
        )
    except Exception as error:
        _silence_coroutines()
        raise ExperimentError(
            f"the checkpoint of step {step} in {directory} cannot be read: {_brief(error)}"
        ) from error
    return restored["state"]


def best_step(directory: Path) -> int:
    """The step with the least validation loss; the newest where none was measured."""
    manager = reader(directory)
    steps = complete_steps(directory)
    # One value a checkpoint: runs of earlier versions had another name for it.
    measured = [(*m.values(), step) for step in steps if (m := manager.metrics(step))]
    return min(measured)[1] if measured else steps[-1]


def complete_steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _free_name(path: Path) -> Path:
    names = [path] + [path.with_name(f"{path.name}.{i}") for i in range(1, 1000)]
    return next(name for name in names if not name.exists())


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _silence_coroutines() -> None:
    """Keeps coroutines of Orbax that are thrown away halfway from printing tracebacks.

    Where it fails to read an array, it leaves those that read the others, for whenever the
    interpreter gets rid of them.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        thrown = unraisable.object
        if not (inspect.iscoroutine(thrown) and "orbax" in thrown.cr_code.co_filename):
            before(unraisable)

    sys.unraisablehook = hook


def _brief(error: BaseException) -> str:
    """The first line of an error, which for tensorstore's is the one that says what happened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
