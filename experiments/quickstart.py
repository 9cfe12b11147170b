"""The main job, `make train`: trains a small model, evaluates it, and shows what it writes.

Takes every option of `python -m experiments.train text`. A run that was cut off goes on where its
last checkpoint was; a finished one is kept, and the next goes into a new directory.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

from experiments import config as configs
from experiments.checkpoint import complete_steps
from experiments.config import TextConfig
from experiments.errors import ExperimentError, run_command
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.generate import GenerateConfig, generate
from experiments.record import plot
from experiments.train import train


def main() -> None:
    """The command line."""
    began = time.monotonic()
    config = configs.parse(sys.argv[1:], "make train")
    if config.run is None and not config.resume:
        config = _next_run(config)
    outcome = train(config)
    run = outcome.run
    if outcome.stopped:
        if outcome.stopped == "SIGINT":
            sys.exit(130)
        return
    evaluation = evaluate(EvaluateConfig(run=run))
    evaluation.print()
    baselines = dict(list(evaluation.values.items())[1:])
    picture = plot(run, evaluation.task, baselines)
    prompt = "def "
    try:
        sample = (prompt + "".join(generate(GenerateConfig(run)))).replace("\n", "\n    ")
        print(f"a sample (temperature 0.8, after {prompt!r}):\n\n    {sample}")
    except ExperimentError as error:  # a mechanism without a step form
        print(f"no sample: {error}")
    other = "transformer" if config.preset != "transformer" else "transnormer_llm"
    print(
        f"\ncheckpoint  {run / 'checkpoints' / str(outcome.step)}\n"
        f"curves      {picture}\n"
        f"metrics     {run / 'metrics.jsonl'}, {run / 'tensorboard'}\n"
        f"took        {time.monotonic() - began:.0f} s\n\n"
        "What to try next:\n"
        f'  .venv/bin/python -m experiments.generate {run} --prompt "class " --temperature 0.5\n'
        f'  make train ARGS="--preset {other}"\n'
        '  make train ARGS="--steps 5000 --run runs/longer"\n'
        "  .venv/bin/python -m experiments.train text --help\n"
        "  .venv/bin/python -m attention"
    )


def _next_run(config: TextConfig) -> TextConfig:
    """The first free directory of the preset's name, or the unfinished run of the same options."""
    values = configs.to_json(config)
    first = config.run_directory
    for number in range(1, 10_000):
        run = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if not run.exists():
            return dataclasses.replace(config, run=run)
        if (run / "config.json").exists():
            saved = configs.to_json(configs.load(run))
            unfinished = config.steps not in complete_steps(Path(run) / "checkpoints")
            if unfinished and not configs.differences(saved, values):
                return dataclasses.replace(config, run=run, resume=True)
    raise AssertionError("ten thousand runs")


if __name__ == "__main__":
    run_command(main)
