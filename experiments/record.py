"""What a run writes down: metrics.jsonl, TensorBoard, a progress line, the plot of its curves."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.config import LogConfig
from experiments.errors import ExperimentError
from experiments.tasks import Task

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
PLOT = "curves.png"


class Record:
    """Writes a run's metrics and shows its progress. Only one process of a run should hold one.

    Args:
      run: the run's directory.
      config: how often, and whether TensorBoard too.
      task: what is trained, which says what is measured.
      steps: length of the run.
      start: steps that are done; later lines of an interrupted run are taken back.
    """

    def __init__(self, run: Path, config: LogConfig, task: Task, steps: int, start: int = 0):
        self._run, self._config, self._task, self._steps = run, config, task, steps
        self._console = Console(stderr=False)
        self._live = self._console.is_terminal
        try:
            self._keep_until(start)
            self._file = (run / METRICS).open("a", buffering=1)
            self._board = _open_board(run, start) if config.tensorboard else None
        except OSError as error:
            raise ExperimentError(f"cannot write to {run}: {error}") from error
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._bar = self._progress.add_task("train", total=steps, completed=start, text="")
        self._clock = time.monotonic()
        self._since = start
        self._started, self._first = self._clock, start

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """Takes the metrics of a finished step of so many tokens."""
        if step % self._config.every and step != self._steps:
            self._progress.update(self._bar, completed=step)
            return
        now = time.monotonic()
        speed = tokens * (step - self._since) / max(now - self._clock, 1e-9)
        self._clock, self._since = now, step
        measures = self._task.measures(metrics)
        self.write(step, {**measures, "tokens_per_second": round(speed)})
        text = f"{self._task.line(measures)}  {speed:,.0f} tokens/s"
        self._progress.update(self._bar, completed=step, text=text)
        if not self._live:
            left = (now - self._started) / (step - self._first) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {text}  left {_duration(left)}")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of metrics.

        Raises:
          ExperimentError: if the disk does not take it.
        """
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise ExperimentError(f"cannot write {self._run / METRICS}: {error}") from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pause(self) -> None:
        """Call after a break such as an evaluation, so that it does not count as slow steps."""
        self._clock = time.monotonic()

    def _keep_until(self, start: int) -> None:
        path = self._run / METRICS
        if path.exists():
            kept = [row for row in read_metrics(self._run) if row["step"] <= start]
            new = path.with_suffix(".new")
            new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            new.replace(path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in (run / METRICS).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"note: {run / METRICS} has an incomplete line, left out", file=sys.stderr)
    return rows


def plot(run: Path, task: Task, baselines: dict[str, float] | None = None) -> Path:
    """Draws a run's curves into `curves.png` in its directory.

    Args:
      run: the run's directory.
      task: what was trained; its measure is drawn.
      baselines: the measure by name, drawn as horizontal lines.

    Returns:
      The picture's path.
    """
    # Half a second to import, which only a command that draws should wait for.
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    name = task.metric
    training = [(row["step"], row[name]) for row in rows if name in row]
    name = f"validation_{name}"
    validation = [(row["step"], row[name]) for row in rows if name in row]
    rates = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if training:
        steps, values = np.asarray(training).T
        above.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1)
        above.plot(steps, _smooth(values), color="tab:blue", label="training")
    if validation:
        above.plot(*np.asarray(validation).T, "o-", color="tab:orange", label="validation")
    for (name, value), style in zip((baselines or {}).items(), ("--", "-.", ":") * 9, strict=False):
        above.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} (test)")
    above.set_ylabel(task.metric_label)
    if task.metric_range:
        above.set_ylim(*task.metric_range)
    above.grid(alpha=0.3)
    if above.get_legend_handles_labels()[0]:
        above.legend()
    if rates:
        below.plot(*np.asarray(rates).T, color="tab:green")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.grid(alpha=0.3)
    figure.suptitle(run.name)
    path = run / PLOT
    figure.savefig(path, dpi=120)
    return path


def _open_board(run: Path, start: int) -> SummaryWriter:
    from tensorboardX import SummaryWriter  # slow to import, and not every run has one

    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)


def _smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential mean, corrected for its start."""
    mean, norm, smooth = 0.0, 0.0, []
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(mean / norm)
    return np.asarray(smooth)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
