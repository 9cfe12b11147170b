"""Trains mechanisms at equal size and budget and reports: `python -m experiments.compare mqar`.

Every contestant is a run in a directory of its own. The command can be stopped and called again:
finished runs are kept and cut-off ones resumed. One that fails is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from flax import nnx

from attention import catalogue
from experiments import config as configs
from experiments import tasks
from experiments.checkpoint import complete_steps
from experiments.config import RunConfig
from experiments.errors import USAGE, ExperimentError, run_command
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.report import Result, directory_name, write_report
from experiments.train import train
from models.language import DecoderConfig, DecoderLM, parameter_count
from models.layers.mixers import MIXERS


@dataclass(frozen=True)
class CompareConfig:
    """Trains contestants on one task, everything else equal, and writes a report."""

    task: Annotated[str, tyro.conf.Positional]
    """What they are trained on; a task of language models."""
    mechanisms: str = ""
    """Contestants, separated by commas: mechanisms of the catalogue, mixers or models, such as
    softmax_attention,based:feature_dim=8,base_conv. Default: those of the task's publication."""
    preset: str | None = None
    """Preset of the task that says model, data and budget; default: the task's own."""
    run: Path | None = None
    """Directory of the comparison; default: runs/compare/PRESET."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Options of the training that differ for all, such as steps 2000 data.pairs 16."""
    only_report: bool = False
    """Train nothing: write the report of what is there."""


@dataclass(frozen=True)
class Contestant:
    """One of those that are compared: a name and what it changes in the preset's model."""

    name: str
    """As given, such as based:feature_dim=8."""
    model: DecoderConfig


def main() -> None:
    """The command line."""
    config = tyro.cli(CompareConfig, prog="python -m experiments.compare", description=__doc__)
    results = compare(config)
    if all(result.error for result in results):
        sys.exit(1)


def compare(config: CompareConfig) -> list[Result]:
    """Trains and measures every contestant and writes the report.

    Raises:
      ExperimentError: for an unknown task, preset, contestant or option; not for a contestant that
        fails.
    """
    if config.task not in CONTESTANTS:
        raise ExperimentError(
            f"task: {config.task!r} must be one of {', '.join(CONTESTANTS)}", USAGE
        )
    preset = config.preset or configs.CONFIGS[config.task].preset
    arguments = ["--preset", preset]
    for name, value in config.overrides.items():
        arguments += [f"--{name.replace('_', '-')}", *value.split()]
    base = configs.parse(arguments, f"python -m experiments.train {config.task}", config.task)
    names = config.mechanisms or CONTESTANTS[config.task]
    contestants = [contestant(name.strip(), base.model) for name in names.split(",")]
    if len({c.name for c in contestants}) < len(contestants):
        raise ExperimentError(f"mechanisms: {names!r} names one of them twice", USAGE)
    directory = config.run or Path("runs") / "compare" / preset
    task = tasks.of(base)
    results = []
    for number, one in enumerate(contestants, 1):
        run = dataclasses.replace(base, model=one.model, run=directory / directory_name(one.name))
        if config.only_report:
            results.append(_known(one, run))
            continue
        print(f"\n[{number}/{len(contestants)}] {one.name}", flush=True)
        results.append(_one(one, run, task))
        if number < len(contestants):
            write_report(directory, task, base, results)
    report = write_report(directory, task, base, results)
    print(f"\n{report.read_text()}\nreport  {report}")
    return results


def contestant(name: str, base: DecoderConfig) -> Contestant:
    """The model of a contestant, in the place of the attention layers of the preset's.

    Args:
      name: a mechanism, a mixer or a model of MODELS, and options of it, such as
        based:feature_dim=8:window=16.
      base: the preset's model.

    Raises:
      ExperimentError: the name, an option or its value is unknown.
    """
    kind, *pairs = name.split(":")
    options = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise ExperimentError(f"mechanisms: {name!r}: {pair!r} must be OPTION=VALUE", USAGE)
        options[option] = _value(value)
    try:
        if kind in MODELS:
            return Contestant(name, MODELS[kind](base, **options))
        if kind not in MIXERS:
            record = catalogue.get(kind)
            if "self causal" not in record.patterns:
                raise ValueError(f"mechanism: {kind!r} has no causal form")
        own = {f"{kind}.{option}": value for option, value in options.items()}
        layers = tuple(name if name in MIXERS else kind for name in base.mixers)
        return Contestant(name, dataclasses.replace(base, layers=layers, options=own))
    except (ValueError, TypeError) as error:
        near = difflib.get_close_matches(kind, [*MODELS, *MIXERS], n=1)
        hint = f" (or did you mean {near[0]}?)" if near and kind not in MODELS else ""
        raise ExperimentError(f"mechanisms: {name!r}: {error}{hint}", USAGE) from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _based(base: DecoderConfig, *, feature_dim: int = 16, window: int = 16) -> DecoderConfig:
    """BASED: short convolution, linear attention by Taylor's polynomial, sliding window."""
    linear, softmax = "based_linear_attention", "softmax_attention"
    if base.num_layers < 3:
        raise ValueError(f"model.num_layers: {base.num_layers}; based takes turns of three layers")
    return dataclasses.replace(
        base,
        layers=("base_conv", linear, softmax),
        options={
            f"{linear}.head_dim": feature_dim,
            f"{linear}.value_dim": base.head_channels,
            f"{linear}.positions": None,
            f"{linear}.chunk_size": 16,
            f"{softmax}.local_window_size": window - 1,
        },
    )


MODELS: dict[str, Callable[..., DecoderConfig]] = {"based": _based}
"""Models of several mechanisms, by name: functions of the preset's model and of options."""

CONTESTANTS = {
    "mqar": ",".join(
        [
            "softmax_attention",
            "based:feature_dim=16:window=4",
            "based:feature_dim=2:window=4",
            "based:feature_dim=1:window=4",
            "based:feature_dim=1:window=16",
            "based:feature_dim=1:window=32",
            "norm_attention",
            "base_conv",
        ]
    )
}
"""Who is compared on a task where nothing else is asked for."""


def _one(one: Contestant, run: RunConfig, task: tasks.Task) -> Result:
    """Trains and measures a contestant; whatever goes wrong with it is its result."""
    directory = run.run_directory
    done = run.steps in complete_steps(directory / "checkpoints")
    known = _known(one, run)
    if done and not known.error and known.values:
        print(f"{directory} is finished")
        return known
    began = time.monotonic() - known.seconds
    try:
        if not done:
            resume = _resumable(run)
            outcome = train(dataclasses.replace(run, resume=resume, overwrite=not resume))
            if outcome.stopped:
                print(f"stopped by {outcome.stopped}; the same command goes on")
                sys.exit(130 if outcome.stopped == "SIGINT" else 0)
        seconds = time.monotonic() - began
        evaluation = evaluate(EvaluateConfig(directory, baselines=False))
        lengths = [row_length(run), *getattr(run.data, "evaluate_lengths", ())]
        values = dict(zip(map(str, lengths), evaluation.values.values(), strict=False))
        result = dataclasses.replace(known, values=values, seconds=seconds, error=None)
    except Exception as error:
        traceback.print_exc()
        result = dataclasses.replace(known, error=f"{type(error).__name__}: {_first_line(error)}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _result_path(run).write_text(json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def _result_path(run: RunConfig) -> Path:
    return run.run_directory.with_name(f"{run.run_directory.name}.json")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _resumable(run: RunConfig) -> bool:
    """Whether a run of the same configuration was begun."""
    with contextlib.suppress(ExperimentError):
        saved = configs.to_json(configs.load(run.run_directory))
        return not configs.differences(saved, configs.to_json(run))
    return False


def _known(one: Contestant, run: RunConfig) -> Result:
    """What is known of a contestant before it is trained, or was written down after."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        if _resumable(run):
            return Result(**json.loads(_result_path(run).read_text()))
    parameters, sizes = 0, {}
    with contextlib.suppress(ValueError, TypeError, NotImplementedError):
        parameters = parameter_count(one.model)
        length = row_length(run)
        sizes = {str(n): state_bytes(one.model, n) for n in (length, 4 * length)}
    return Result(one.name, parameters, sizes, {}, 0.0)


def row_length(run: RunConfig) -> int:
    """Tokens of a sequence of a run's data."""
    length = getattr(run, "sequence_length", None)
    return run.data.length if length is None else length


def state_bytes(model: DecoderConfig, length: int) -> int:
    """Bytes of what a model keeps of one sequence of so many tokens while it generates.

    Raises:
      ValueError: a mechanism has no step form.
    """
    state = jax.eval_shape(lambda: DecoderLM(model, rngs=nnx.Rngs(0)).init_state(1, length))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.layers))


if __name__ == "__main__":
    run_command(main)
