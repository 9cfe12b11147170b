"""The commands of a whole job: quickstart (make train), evaluate, generate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import config as configs
from experiments.checkpoint import complete_steps
from experiments.errors import NO_GPU, NO_TPU
from experiments.quickstart import _next_run
from experiments.record import PLOT, read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ACCELERATORS = {"JAX_PLATFORMS", *NO_TPU, *NO_GPU}
"""Variables by which JAX does not look for accelerators."""


QUICKSTART = (
    "--preset", "tiny", "--data.train-split", "train[:10%]", "--data.test-split", "test[:6%]"
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


@pytest.fixture
def done(job, command, run_command):
    """The output of `make train` with a tiny model that was killed and started again, its run."""
    run, log = job / "runs" / "tiny", job / "out.txt"
    if not log.exists():
        process = command("experiments.quickstart", *QUICKSTART, cwd=job)
        until = time.monotonic() + 200
        while not complete_steps(run / "checkpoints"):
            assert time.monotonic() < until and process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        code, out, err = run_command("experiments.quickstart", *QUICKSTART, cwd=job)
        assert code == 0, out + err
        log.write_text(out)
    return run, log.read_text()


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return tmp_path_factory.mktemp("one") / "run"


@pytest.fixture
def one_run(short_run, call, small_text):
    """A run of two steps with another mechanism than the presets'."""
    if not short_run.exists():
        options = ("--preset", "tiny", "--steps", 2, "--model.num-layers", 1)
        options += ("--model.mechanism", "softmax_attention", "--log.no-tensorboard", *small_text)
        call("experiments.train", "text", *options, "--run", short_run)
    return short_run


def test_quickstart_shows_the_whole_job(done):
    run, out = done
    mechanism = "lightning_attention"
    table = [line.split() for line in out.splitlines()]
    values = {" ".join(words[:-1]): words[-1] for words in table if len(words) > 1}
    bits = {
        name: float(values[name])
        for name in (mechanism, "order-2 byte model", "order-0 byte model", "lzma")
    }
    assert 0 < bits["order-2 byte model"] < bits["order-0 byte model"] < 8
    assert 0 < bits[mechanism] < 8
    assert "def " in out and "What to try next" in out
    for path in (run / "checkpoints" / "20", run / PLOT, run / "metrics.jsonl"):
        assert str(path.relative_to(run.parents[1])) in out and path.exists()
    assert (run / PLOT).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "validation_bits_per_byte" in row] == [10, 20]
    assert json.loads((run / "evaluation.json").read_text())["bits_per_byte"][mechanism] > 0


def test_quickstart_that_was_cut_off_goes_on_and_a_finished_one_is_kept(
    done, monkeypatch, tmp_path
):
    run, out = done
    assert "resuming runs/tiny at step" in out

    def next_run(*more):
        return _next_run(configs.parse([*QUICKSTART, *more], "make train"))

    monkeypatch.chdir(run.parents[1])
    found = next_run()
    assert found.run == Path("runs/tiny-2") and not found.resume
    # Longer than it is, the run is unfinished; but it was started with another number of steps.
    assert not next_run("--steps", "40").resume
    shutil.copytree(run, tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns("20"))
    monkeypatch.chdir(tmp_path)
    found = next_run()
    assert found.run == Path("runs/tiny") and found.resume
    found = next_run("--seed", "1")
    assert found.run == Path("runs/tiny-2") and not found.resume


def test_evaluate_counts_the_same_bytes_for_all(done, call):
    run, _ = done
    mechanism = "lightning_attention"
    first = json.loads((run / "evaluation.json").read_text())
    # Another batch layout over more devices measures the same as the quickstart did.
    call("experiments.evaluate", run, "--mesh.fsdp", 2, "--no-baselines")
    again = json.loads((run / "evaluation.json").read_text())
    assert again["bytes"] == first["bytes"] > 3000
    expected = first["bits_per_byte"][mechanism]
    assert again["bits_per_byte"] == {mechanism: pytest.approx(expected, abs=1e-4)}
    out = call("experiments.evaluate", run, "--max-bytes", 3000)
    assert "3,000 bytes" in out and mechanism in out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["bytes"] == 3000 and found["step"] == 20
    assert len(found["bits_per_byte"]) == 4
    (run / "evaluation.json").write_text(json.dumps(first))


def test_generate(done, call):
    run, shown = done
    options = ("--prompt", "import ", "--length", 70)
    first = call("experiments.generate", run, *options, "--seed", 3)
    assert first.startswith("import ") and len(first) > len("import ") + 1
    assert call("experiments.generate", run, *options, "--seed", 3) == first
    assert call("experiments.generate", run, *options, "--seed", 4) != first
    # The quickstart had one device.
    same = call("experiments.generate", run).rstrip("\n")
    assert same.replace("\n", "\n    ") in shown
    best = ("--checkpoint", "best", "--temperature", 0, "--top-k", 5, "--top-p", 0.9)
    assert call("experiments.generate", run, *options, *best).startswith("import ")


def test_another_mechanism_goes_through_every_command(one_run, call):
    out = call("experiments.evaluate", one_run, "--max-bytes", 600, "--no-baselines")
    assert "softmax_attention" in out
    bits = json.loads((one_run / "evaluation.json").read_text())["bits_per_byte"]
    assert 0 < bits["softmax_attention"] < 12
    out = call("experiments.generate", one_run, "--prompt", "import ", "--length", 5)
    assert out.startswith("import ")


@pytest.mark.parametrize(
    ("module", "arguments", "code", "message"),
    [
        ("evaluate", ["runs/none"], 1, "no run in runs/none"),
        ("evaluate", ["RUN", "--checkpoint", "7"], 1, "checkpoint: '7'; it must be last, best or"),
        ("evaluate", ["RUN", "--mesh.tensor", "5"], 1, "does not divide the 8 devices"),
        ("generate", ["RUN", "--top-p", "0"], 2, "top_p: 0.0; it must be above 0 and at most 1"),
        ("generate", ["RUN", "--top-k", "0"], 2, "top_k: 0; it must be at least 1"),
        ("generate", ["RUN", "--temperature", "-1"], 2, "temperature: -1.0; it must be 0 or more"),
        ("generate", ["RUN", "--length", "0"], 2, "length: 0; it must be at least 1"),
        ("train", [], 2, "no task given"),
        ("train", ["pictures"], 2, "task: 'pictures' is unknown"),
        ("train", ["text", "--setps", "3"], 2, "--steps"),
    ],
)
def test_wrong_input_is_one_message(module, arguments, code, message, refused, one_run):
    run = str(one_run)
    arguments = [run if argument == "RUN" else argument for argument in arguments]
    got, said = refused(f"experiments.{module}", *arguments)
    assert got == code, said
    assert message in said


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [
        ("evaluate", ["runs/none"], 1),
        ("generate", ["runs/none", "--top-k", 0], 2),
    ],
)
def test_a_message_is_all_that_is_printed(module, arguments, code, run_command):
    got, out, err = run_command(f"experiments.{module}", *arguments)
    assert got == code, out + err
    assert "Traceback" not in err and (code == 2 or (err.startswith("error: ") and not out))


def test_compilers_do_not_complain_that_their_devices_are_missing():
    """What the `dev` extra has for TPUs and GPUs is found by JAX, which looks for the devices."""
    program = "import experiments.errors as e, jax; e.run_command(lambda: print(jax.devices()))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ACCELERATORS},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stderr == "" and "id=0" in result.stdout


def test_a_reader_that_has_had_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)  # before the command writes anything
    try:
        result = subprocess.run(
            [sys.executable, "-m", "experiments.train", "text", "--help"],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert result.returncode == 128 + signal.SIGPIPE and result.stderr == ""
