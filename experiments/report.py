"""The report of a comparison: a table and plots, as Markdown and PNG."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.record import METRICS, read_metrics
from experiments.tasks import Task

REPORT = "report.md"
PLOTS = {
    "state.png": "against the size of the state",
    "length.png": "against the length of the sequence",
    "curves.png": "while training",
}


@dataclass(frozen=True)
class Result:
    """What is known of a contestant."""

    name: str
    """As it was given on the command line."""
    parameters: int
    state_bytes: dict[str, int]
    """Bytes of the state of one sequence by its length; empty where there is no step form."""
    values: dict[str, float]
    """The task's measure on its test data, by the length of its sequences; the first is that which
    was trained."""
    seconds: float
    """Of the training."""
    error: str | None = None
    """Why it failed."""


def write_report(directory: Path, task: Task, run: RunConfig, results: list[Result]) -> Path:
    """Writes `report.md` and its plots into a directory.

    Args:
      directory: of the comparison; the runs lie in it.
      task: what was trained.
      run: what all runs have in common.
      results: one for each contestant.

    Returns:
      The report's path.

    Raises:
      ExperimentError: if the disk does not take it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        drawn = [name for name in PLOTS if _draw(name, directory, task, results)]
        path = directory / REPORT
        path.write_text("\n".join(_lines(task, run, results, drawn)) + "\n")
    except OSError as error:
        raise ExperimentError(f"cannot write to {directory}: {error}") from error
    return path


def _lines(task: Task, run: RunConfig, results: list[Result], drawn: list[str]) -> list[str]:
    _, units = task.units(run)
    device = jax.devices()[0]
    lines = [
        f"# Comparison: {task.what}",
        "",
        f"{run.steps} steps of {units}, seed {run.seed}, on {jax.device_count()} "
        f"{device.device_kind} device(s) ({platform.machine()}, {platform.system()}); preset "
        f"`{run.preset}`.",
        "",
    ]
    lengths = list(dict.fromkeys(length for r in results for length in r.values))
    sizes = list(dict.fromkeys(length for r in results for length in r.state_bytes))
    header = ["contestant", "parameters"]
    header += [f"state, {length} tokens (bytes)" for length in sizes]
    header += [f"{task.metric_label}, {length} tokens" for length in lengths] + ["minutes"]
    lines += [_row(header), _row(["---"] + ["---:"] * (len(header) - 1))]
    for r in results:
        cells = [f"`{r.name}`", f"{r.parameters:,}" if r.parameters else "-"]
        cells += [f"{r.state_bytes[n]:,}" if n in r.state_bytes else "-" for n in sizes]
        cells += [f"{r.values[n]:.4f}" if n in r.values else "-" for n in lengths]
        lines.append(_row([*cells, f"{r.seconds / 60:.1f}" if r.values else "-"]))
    failed = [r for r in results if r.error]
    if failed:
        lines += ["", "Failed:", "", *(f"- `{r.name}`: {r.error}" for r in failed)]
    for name in drawn:
        lines += ["", f"![{task.metric_label} {PLOTS[name]}]({name})"]
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw(name: str, directory: Path, task: Task, results: list[Result]) -> bool:
    """Draws a plot, unless there is nothing to be drawn."""
    # Half a second to import, which only a command that draws should wait for.
    from matplotlib.figure import Figure

    lines = {
        "state.png": _by_state,
        "length.png": _by_length,
        "curves.png": _by_step,
    }[name](directory, task, results)
    if not lines:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-" if len(points) < 20 else "-", label=label)
    labels = {
        "state.png": "bytes of the state of one sequence",
        "length.png": "tokens of a sequence",
        "curves.png": "step",
    }
    axes.set_xlabel(labels[name])
    axes.set_ylabel(task.metric_label)
    if name != "curves.png":
        axes.set_xscale("log", base=2)
    if task.metric_range:
        low, high = task.metric_range
        axes.set_ylim(low, high + 0.02 * (high - low))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(directory / name, dpi=120)
    return True


Lines = dict[str, list[tuple[float, float]]]


def _by_state(directory: Path, task: Task, results: list[Result]) -> Lines:
    """A line for each kind of contestant, through its variants."""
    del directory, task
    lines: Lines = {}
    for r in results:
        if r.values and r.state_bytes:
            point = next(iter(r.state_bytes.values())), next(iter(r.values.values()))
            lines.setdefault(r.name.partition(":")[0], []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


def _by_length(directory: Path, task: Task, results: list[Result]) -> Lines:
    del directory, task
    return {
        r.name: [(int(length), value) for length, value in r.values.items()]
        for r in results
        if len(r.values) > 1
    }


def _by_step(directory: Path, task: Task, results: list[Result]) -> Lines:
    lines: Lines = {}
    for r in results:
        run = directory / directory_name(r.name)
        if (run / METRICS).exists():
            key = f"validation_{task.metric}"
            points = [(row["step"], row[key]) for row in read_metrics(run) if key in row]
            if points:
                lines[r.name] = points
    return lines


def directory_name(name: str) -> str:
    """A contestant's name as that of a directory."""
    return name.replace(":", ",")
