"""Command lines, presets and JSON."""

import dataclasses
import json
import re

import pytest

from experiments import config as configs
from experiments.config import MeshConfig, TextConfig
from experiments.errors import ExperimentError


@pytest.mark.parametrize("preset", configs.presets())
def test_json_round_trip_and_command_line(preset):
    config = configs.parse(["--preset", preset, "--mesh.fsdp", "4"], "train")
    assert config.preset == preset and config.mesh == MeshConfig(fsdp=4)
    values = json.loads(json.dumps(configs.to_json(config)))
    assert configs.from_json(TextConfig, values) == config


def test_unknown_preset_names_the_near_one():
    with pytest.raises(ExperimentError, match="Did you mean 'transformer'") as caught:
        configs.parse(["--preset=transfomer"], "train")
    assert caught.value.exit_code == 2


def fields(cls, prefix=""):
    for field in dataclasses.fields(cls):
        kind = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        value = kind() if kind else field.default
        if dataclasses.is_dataclass(value):
            yield from fields(type(value), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_option_is_documented(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as caught:
        configs.parse(["--help"], "train")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    names = ["--" + name.replace("_", "-") for name in fields(TextConfig)]
    assert len(names) > 40
    blocks = text.replace("│", " ").split("\n")
    for name in names:
        at = next((i for i, line in enumerate(blocks) if line.strip().startswith(name)), None)
        assert at is not None, name
        described = " ".join(blocks[at + 1 : at + 3]).partition("(default")[0]
        assert not blocks[at + 1].strip().startswith("--"), f"{name} has no description"
        assert len(re.findall("[A-Za-z]{2,}", described)) >= 2, f"{name}: {described}"


def saved_run(tmp_path, **changes):
    run = tmp_path / "run"
    run.mkdir()
    config = dataclasses.replace(configs.presets()["tiny"], **changes)
    (run / "config.json").write_text(json.dumps(configs.to_json(config)))
    return run


def test_resume_takes_the_configuration_of_the_run(tmp_path):
    run = saved_run(tmp_path, steps=77, batch_size=24)
    config = configs.parse(["--resume", "--run", str(run), "--mesh.tensor", "2"], "train")
    assert (config.steps, config.batch_size, config.preset) == (77, 24, "tiny")
    assert config.resume and config.run == run and config.mesh.tensor == 2


def test_resume_refuses_another_configuration_and_names_each_field(tmp_path):
    run = saved_run(tmp_path)
    with pytest.raises(ExperimentError) as caught:
        configs.parse(
            ["--resume", "--run", str(run), "--steps", "9", "--optimizer.beta1", "0.5"], "train"
        )
    message = str(caught.value)
    assert "--steps: the run has 20, the command says 9" in message
    assert "--optimizer.beta1: the run has 0.9, the command says 0.5" in message


def test_broken_or_foreign_config_is_named(tmp_path):
    with pytest.raises(ExperimentError, match="no run in"):
        configs.load(tmp_path / "none")
    run = saved_run(tmp_path)
    (run / "config.json").write_text('{"steps": 1, "stepz": 2}')
    with pytest.raises(ExperimentError, match="TextConfig has no field stepz"):
        configs.load(run)
    (run / "config.json").write_text('{"steps": ')
    with pytest.raises(ExperimentError, match=r"config\.json cannot be read"):
        configs.load(run)
