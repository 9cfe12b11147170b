"""Trains a model for a task: `python -m experiments.train text --help`.

One process on one or many devices, or one process on each host of a TPU slice or Slurm job. A run
is a directory: config.json, metrics.jsonl, checkpoints/, tensorboard/, curves.png.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments import config as configs
from experiments import parallel, tasks
from experiments.checkpoint import Checkpoints
from experiments.config import RunConfig
from experiments.errors import USAGE, ExperimentError, run_command
from experiments.record import Record, plot
from experiments.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    run: Path
    step: int
    """Steps that the newest checkpoint has behind it."""
    stopped: str | None = None
    """Name of the signal that ended it early."""


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    task = arguments[0] if arguments else None
    if task not in tasks.TASKS:
        listing = "\n".join(f"  {name:8}{task.what}" for name, task in tasks.TASKS.items())
        usage = f"usage: python -m experiments.train TASK [OPTIONS]\ntasks:\n{listing}"
        if task in ("-h", "--help"):
            print(usage)
            return
        problem = "no task given" if task is None else f"task: {task!r} is unknown"
        raise ExperimentError(f"{problem}\n{usage}", USAGE)
    outcome = train(configs.parse(arguments[1:], f"python -m experiments.train {task}", task))
    if outcome.stopped == "SIGINT":
        sys.exit(130)


def train(config: RunConfig) -> Outcome:
    """Trains as a configuration says, until its last step or a signal to stop.

    Raises:
      ExperimentError: for whatever the user can put right; what was saved before remains.
    """
    _check(config)
    task = tasks.of(config)
    parallel.start_processes(config.distributed)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_fit(
        mesh,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        num_heads=config.model.num_heads,
    )
    part, parts = parallel.reader(mesh)
    with parallel.use_mesh(mesh):
        try:
            trainer = Trainer(
                config.model,
                config.optimizer,
                mesh,
                steps=config.steps,
                seed=config.seed,
                accumulate=config.accumulate,
                task=task,
            )
        except (ValueError, TypeError) as error:
            raise ExperimentError(f"model: {error}") from error
        parallel.on_first_process(lambda: _prepare_directory(config))
        try:
            dataset = task.train_dataset(
                config,
                batch_size=config.batch_size // parts,
                process_index=part,
                process_count=parts,
            )
        except (ValueError, OSError) as error:
            raise ExperimentError(f"data: {error}") from error
        return _Run(config, trainer, mesh, iter(dataset), part, parts).go()


def _check(config: RunConfig) -> None:
    for name in ("steps", "batch_size"):
        value = getattr(config, name)
        if value < 1:
            raise ExperimentError(f"{name}: {value}; it must be at least 1")
    for name in ("checkpoint", "log"):
        value = getattr(config, name).every
        if value < 1:
            raise ExperimentError(f"{name}.every: {value}; it must be at least 1 step")
    tasks.of(config).check(config)


def _prepare_directory(config: RunConfig) -> None:
    run = config.run_directory
    try:
        if config.resume:
            return
        if run.exists() and any(run.iterdir()):
            if not config.overwrite:
                raise ExperimentError(
                    f"run: {run} exists already. --resume goes on with it, --overwrite deletes it "
                    "first, --run DIR names another"
                )
            if not (run / "config.json").exists():
                raise ExperimentError(f"run: {run} is no run (no config.json): not overwritten")
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        plain = dataclasses.replace(config, resume=False, overwrite=False, run=None)
        values = {"task": configs.task_of(config)} | configs.to_json(plain)
        new = run / "config.json.new"
        new.write_text(json.dumps(values, indent=2) + "\n")
        new.replace(run / "config.json")
    except OSError as error:
        raise ExperimentError(f"run: cannot write to {run}: {error}") from error


@dataclasses.dataclass
class _Pending:
    """A step whose metrics the host has not looked at yet."""

    step: int
    metrics: dict[str, jax.Array]
    rows: dict[str, np.ndarray]
    position: Any


class _Run:
    """The loop over the steps of one run."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        mesh: Mesh,
        rows: grain.DatasetIterator,
        part: int,
        parts: int,
    ):
        self._config, self._trainer, self._mesh, self._rows = config, trainer, mesh, rows
        self._task = tasks.of(config)
        self._part, self._parts = part, parts
        self._directory = config.run_directory
        self._json = configs.to_json(config)
        self._checkpoints = Checkpoints(self._directory, config.checkpoint)
        self._record: Record | None = None
        self._validation: tuple[int, float] | None = None

    def go(self) -> Outcome:
        state, start = self._start()
        steps = self._config.steps
        if start >= steps:
            self._say(f"nothing to do: the run has its {steps} steps")
            return Outcome(self._directory, start)
        with _StopSignals() as signals:
            if jax.process_index() == 0:
                self._record = Record(self._directory, self._config.log, self._task, steps, start)
                with self._record:
                    outcome = self._loop(state, start, signals)
                plot(self._directory, self._task)
            else:
                outcome = self._loop(state, start, signals)
        return outcome

    def _start(self) -> tuple[TrainState, int]:
        if self._config.resume:
            restored = self._checkpoints.restore(self._trainer.template, self._rows)
            if restored is not None:
                for line in restored.damaged:
                    self._say(f"warning: {line}; moved aside, using step {restored.step}")
                self._say(f"resuming {self._directory} at step {restored.step}")
                return restored.state, restored.step
            self._say(f"{self._directory} has no checkpoint yet: starting at step 0")
        return self._trainer.initial(), 0

    def _loop(self, state: TrainState, start: int, signals: _StopSignals) -> Outcome:
        config, steps = self._config, self._config.steps
        self._introduce(state, start)
        pending: _Pending | None = None
        for step in range(start + 1, steps + 1):
            position = self._rows.get_state()
            rows = self._next_rows()
            state, metrics = self._trainer.step(state, parallel.global_batch(rows, self._mesh))
            # The step before is looked at while this one runs.
            self._look_at(pending, state)
            pending = _Pending(step, metrics, rows, position)
            stop = signals.received(step)
            last = step == steps
            measure = last or (config.log.evaluate_every and step % config.log.evaluate_every == 0)
            if stop or measure or step % config.checkpoint.every == 0:
                self._look_at(pending, state)
                pending = None
                if measure and not stop:
                    self._measure(step, state)
                if stop or last or step % config.checkpoint.every == 0:
                    self._save(step, state)
            if stop:
                self._checkpoints.close()
                self._say(
                    f"stopped by {stop} after step {step}; the checkpoint is written. "
                    f"Go on with --resume --run {self._directory}"
                )
                return Outcome(self._directory, step, stop)
        self._checkpoints.close()
        return Outcome(self._directory, steps)

    def _next_rows(self) -> dict[str, np.ndarray]:
        try:
            return next(self._rows)
        except OSError as error:
            raise ExperimentError(f"data: {error}") from error

    def _look_at(self, pending: _Pending | None, state: TrainState) -> None:
        """Waits for a step's metrics, writes them down, and ends the run where they are not finite.

        Args:
          pending: the step, or None.
          state: the newest state; after a non-finite step it is still that from before the step.
        """
        if pending is None:
            return
        metrics = {name: float(value) for name, value in pending.metrics.items()}
        if metrics.pop("halted"):
            self._halt(pending, metrics, state)
        if self._record is not None:
            tokens, _ = self._task.units(self._config)
            self._record.step(pending.step, metrics, tokens)

    def _halt(self, pending: _Pending, metrics: dict[str, float], state: TrainState) -> None:
        before = pending.step - 1
        self._rows.set_state(pending.position)
        self._save(before, dataclasses.replace(state, halted=np.zeros((), bool)))
        self._checkpoints.close()
        name = f"batch-{pending.step}-part-{self._part}.npz"
        np.savez(self._directory / name, **pending.rows)
        checksum = zlib.crc32(b"".join(x.tobytes() for x in pending.rows.values()))
        raise ExperimentError(
            f"step {pending.step}: the loss is {metrics['loss']} and the gradient's norm "
            f"{metrics['gradient_norm']}. The batch is number {pending.step} of seed "
            f"{self._config.seed} (crc32 {checksum:08x}, kept in {self._directory / name}). "
            f"The parameters from before it are the checkpoint of step {before} in "
            f"{self._checkpoints.directory}. A lower --optimizer.learning-rate or "
            "--optimizer.clip-norm often helps, in a new run"
        )

    def _measure(self, step: int, state: TrainState) -> None:
        measures = self.validate(state.parameters)
        self._validation = step, measures["loss"]
        if self._record is not None:
            named = {f"validation_{name}": value for name, value in measures.items()}
            self._record.write(step, named)
            value = measures[self._task.metric]
            self._record.say(f"step {step}: validation {value:.4f} {self._task.metric_label}")
            self._record.pause()

    def validate(self, parameters: Any) -> dict[str, float]:
        """What the task measures, on its validation data."""
        try:
            batches = self._task.evaluation_batches(self._config, "validation")
            part = self._part, self._parts
            return measure(self._trainer, parameters, self._mesh, self._task, batches, part)[0]
        except (ValueError, OSError) as error:
            raise ExperimentError(f"data: {error}") from error

    def _save(self, step: int, state: TrainState) -> None:
        value = self._validation
        self._checkpoints.save(
            step,
            state,
            self._rows,
            self._json,
            value[1] if value is not None and value[0] == step else None,
        )

    def _introduce(self, state: TrainState, start: int) -> None:
        count = sum(x.size for x in jax.tree.leaves(state.parameters))
        config, shape = self._config, dict(self._mesh.shape)
        _, units = self._task.units(config)
        self._say(
            f"{name_of(config.model)}: {count:,} parameters, {config.steps - start} steps of "
            f"{units}, on {self._mesh.size} {jax.default_backend()} device(s) {shape}, into "
            f"{self._directory}"
        )

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True) if self._record is None else self._record.say(text)


def name_of(model: Any) -> str:
    """The mechanisms of a model's configuration, in words."""
    return ", ".join(dict.fromkeys(model.mixers))


def measure(
    trainer: Trainer,
    parameters: Any,
    mesh: Mesh,
    task: tasks.Task,
    batches: Iterator[dict[str, np.ndarray]],
    part: tuple[int, int] = (0, 1),
) -> tuple[dict[str, float], int]:
    """What a task measures of a model on some batches, and how many targets were counted.

    Args:
      trainer: of the model.
      parameters: its parameters.
      mesh: where they lie.
      task: what the model is for.
      batches: whole batches, the same in every process.
      part: which part of their rows this process measures, and of how many.
    """
    index, count = part
    total: dict[str, float] = {}
    found = []
    for rows in batches:
        local = len(next(iter(rows.values()))) // count
        mine = {name: x[index * local : (index + 1) * local] for name, x in rows.items()}
        found.append(trainer.measure(parameters, parallel.global_batch(mine, mesh)))
    weight = 0.0
    for sums, targets in jax.device_get(found):
        weight += float(targets)
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
    means = {name: value / weight for name, value in total.items()}
    return task.measures(means), round(weight)


class _StopSignals:
    """Notes SIGTERM and SIGINT, so that a run can save before it ends.

    In a job of several processes JAX's own preemption service takes SIGTERM, and tells every
    process to stop after the same step; the keyboard's signal then simply ends the process.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    def received(self, step: int) -> str | None:
        """The signal's name, if the run is to stop after this step."""
        if jax.process_count() == 1:
            return self._name
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None


if __name__ == "__main__":
    run_command(main)
