"""The typed configurations of experiments: command line, presets, JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from experiments.data.images import ImageDataConfig
from experiments.data.mqar import MqarDataConfig
from experiments.data.needle import NeedleDataConfig
from experiments.data.series import SeriesDataConfig
from experiments.data.text import VOCAB_SIZE, TextDataConfig
from experiments.errors import USAGE, ExperimentError
from models.forecasting import ForecasterConfig
from models.language import DecoderConfig, transformer, transnormer_llm
from models.vision_config import (
    PyramidConfig,
    ViTConfig,
)


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out. data x fsdp x tensor must be the number of devices."""

    data: int = -1
    """Groups of devices that hold the same parameters and split the batch; -1: all that is left."""
    fsdp: int = 1
    """Devices over which parameters and optimiser state are split; they split the batch too."""
    tensor: int = 1
    """Devices over which attention heads and hidden features are split."""


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes find each other (one process needs none of it)."""

    initialize: bool = False
    """Call jax.distributed.initialize, which finds its peers by itself on TPU pods and Slurm."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where nothing tells it; implies `initialize`."""
    processes: int | None = None
    """Number of processes, with `coordinator`."""
    process: int | None = None
    """Index of this process, from 0, with `coordinator`."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipping by the global norm."""

    learning_rate: float = 3e-3
    """Peak learning rate, reached after the warm-up."""
    final_fraction: float = 0.05
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; gains, biases and angles are not decayed."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the mean of squared gradients."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one of the best validation loss."""


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training, and how often."""

    every: int = 10
    """Steps between lines of metrics.jsonl, TensorBoard and (without a terminal) of the output."""
    evaluate_every: int = 350
    """Steps between measurements on the validation split; 0: never. Also measured at the end."""
    evaluate_bytes: int = 65_536
    """Bytes of the validation split that are used, of text."""
    tensorboard: bool = True
    """Also write TensorBoard event files, into the run's directory."""


@dataclass(frozen=True)
class RunConfig:
    """What every task's run has, beside its model and its data."""

    preset: str = "transnormer_llm"
    """Named set of defaults; `--help` shows the defaults of the preset that stands before it."""
    run: Path | None = None
    """Directory of the run; default: runs/PRESET."""
    resume: bool = False
    """Go on from the newest checkpoint of the run, with the run's own configuration."""
    overwrite: bool = False
    """Delete what stands in the run's directory first."""
    steps: int = 700
    """Optimiser steps."""
    batch_size: int = 8
    """Sequences in a step, over all devices and processes."""
    accumulate: int = 1
    """Parts into which a step's batch is split, one after the other, to save memory."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def run_directory(self) -> Path:
        """Where the run's files lie."""
        return self.run if self.run is not None else Path("runs") / self.preset


@dataclass(frozen=True)
class TextConfig(RunConfig):
    """A language model on text, byte by byte."""

    sequence_length: int = 256
    """Bytes in a sequence."""
    model: DecoderConfig = field(default_factory=lambda: transnormer_llm(vocab_size=VOCAB_SIZE))
    data: TextDataConfig = field(default_factory=TextDataConfig)


@dataclass(frozen=True)
class MqarConfig(RunConfig):
    """A model that recalls values by their keys: multi-query associative recall (MQAR)."""

    preset: str = "mqar"
    """Named set of defaults; `--help` shows the defaults of the preset that stands before it."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences in a step, over all devices and processes."""
    model: DecoderConfig = field(default_factory=lambda: transformer(vocab_size=VOCAB_SIZE))
    data: MqarDataConfig = field(default_factory=MqarDataConfig)


@dataclass(frozen=True)
class NeedleConfig(RunConfig):
    """A model that finds a needle in a haystack: a few values at any depth of a sequence."""

    preset: str = "needle"
    """Named set of defaults; `--help` shows the defaults of the preset that stands before it."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences in a step, over all devices and processes."""
    model: DecoderConfig = field(default_factory=lambda: transformer(vocab_size=VOCAB_SIZE))
    data: NeedleDataConfig = field(default_factory=NeedleDataConfig)


@dataclass(frozen=True)
class ImagesConfig(RunConfig):
    """Classification of images."""

    preset: str = "vit"
    """Named set of defaults; `--help` shows the defaults of the preset that stands before it."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 64
    """Images in a step, over all devices and processes."""
    model: ViTConfig | PyramidConfig = field(default_factory=ViTConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)


@dataclass(frozen=True)
class SeriesConfig(RunConfig):
    """A model that forecasts series."""

    preset: str = "autoformer"
    """Named set of defaults; `--help` shows the defaults of the preset that stands before it."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Windows in a step, over all devices and processes."""
    model: ForecasterConfig = field(default_factory=ForecasterConfig)
    data: SeriesDataConfig = field(default_factory=SeriesDataConfig)


CONFIGS: dict[str, type[RunConfig]] = {
    "text": TextConfig,
    "mqar": MqarConfig,
    "needle": NeedleConfig,
    "images": ImagesConfig,
    "series": SeriesConfig,
}


# Fields that may differ between a run and its resumption: where it runs and what it prints, not
# what it computes.
MAY_CHANGE = (
    "run",
    "resume",
    "overwrite",
    "mesh",
    "distributed",
    "log",
    "checkpoint",
    "data.data_dir",
)


def presets(task: str = "text") -> dict[str, Any]:
    """Every preset of a task by name; the first is its default, for minutes on two CPU cores."""
    from experiments.presets import PRESETS  # which is made of the classes above

    return {
        name: dataclasses.replace(config, preset=name) for name, config in PRESETS[task]().items()
    }


def parse(arguments: list[str], program: str, task: str = "text") -> Any:
    """Reads a command line into a configuration.

    The defaults are those of `--preset`, or with `--resume` those that the run was started with.

    Args:
      arguments: the command line, without the program's name.
      program: the program's name, for the help text.
      task: which of CONFIGS.

    Raises:
      ExperimentError: for an unknown preset, a run to resume that does not exist, or an option
        that differs from what the run to resume was started with.
    """
    preset = _option(arguments, "--preset") or CONFIGS[task].preset
    known = presets(task)
    if preset not in known:
        near = difflib.get_close_matches(preset, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ExperimentError(
            f"preset: {preset!r} is unknown; the presets are {', '.join(known)}.{hint}", USAGE
        )
    default = known[preset]
    run = _option(arguments, "--run")
    directory = Path(run) if run else default.run_directory
    saved = None
    if "--resume" in arguments:
        saved = load(directory)
        if type(saved) is not CONFIGS[task]:
            raise ExperimentError(
                f"{directory} is a run of the task {task_of(saved)!r}, not of {task!r}", USAGE
            )
        default = dataclasses.replace(
            saved,
            resume=True,
            overwrite=False,
            run=Path(run) if run else None,
            distributed=DistributedConfig(),
        )
    config = tyro.cli(
        CONFIGS[task],
        args=arguments,
        default=default,
        prog=program,
        # The model is of the kind that the preset has.
        config=(tyro.conf.AvoidSubcommands,),
    )
    if saved is not None:
        changed = differences(to_json(saved), to_json(config))
        if changed:
            lines = "\n".join(
                f"  --{name.replace('_', '-')}: the run has {old!r}, the command says {new!r}"
                for name, (old, new) in changed.items()
            )
            raise ExperimentError(
                f"{directory} was started with another configuration:\n{lines}\n"
                "Leave these options out to resume it, or start a new run with --run.",
                USAGE,
            )
    return config


def task_of(config: RunConfig) -> str:
    """Name of the task that a configuration is of."""
    return next(name for name, cls in CONFIGS.items() if type(config) is cls)


def load(run: Path) -> Any:
    """The configuration that the run in a directory was started with.

    Raises:
      ExperimentError: if there is no run there, or its config.json cannot be read.
    """
    path = run / "config.json"
    try:
        values = json.loads(path.read_text())
        task = values.pop("task", "text")
        if task not in CONFIGS:
            raise ValueError(f"task {task!r} is unknown")
        return from_json(CONFIGS[task], values)
    except FileNotFoundError:
        raise ExperimentError(f"no run in {run}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from None


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json[T](cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_json`.

    Raises:
      ValueError: for a field that the class does not have.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        fitting = [
            option
            for option in options
            if dataclasses.is_dataclass(option) and set(value or ()) <= _names(option)
        ]
        return value if value is None else _from_json((fitting or options)[0], value)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    if hint is Path:
        return Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(_from_json(typing.get_args(hint)[0], item) for item in value)
    return value


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name, except those that may differ between resumptions."""
    found = {}
    for name in old.keys() | new.keys():
        dotted = prefix + name
        if dotted in MAY_CHANGE or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            found |= differences(old[name], new[name], f"{dotted}.")
        else:
            found[dotted] = (old.get(name), new.get(name))
    return dict(sorted(found.items()))


def _option(arguments: list[str], name: str) -> str | None:
    """The last value of an option that is needed before the command line can be parsed."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        if argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value
