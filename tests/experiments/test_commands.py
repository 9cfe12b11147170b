"""The commands of a whole job: quickstart (make train), evaluate, generate."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.checkpoint import complete_steps
from experiments.record import PLOT, read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["lightning_attention", "softmax_attention"])
def job(request, shared_directory, tmp_path_factory):
    return request.param, tmp_path_factory.mktemp("job") / "run"


@pytest.fixture
def done(job, run_command):
    """The output of `make train` with a tiny model, and its run."""
    mechanism, run = job
    log = run.parent / "out.txt"
    if not log.exists():
        options = ("--model.mechanism", mechanism, "--data.test-split", "test[:6%]")
        code, out, err = run_command(
            "experiments.quickstart", "--preset", "tiny", "--run", run, *options
        )
        assert code == 0, out + err
        log.write_text(out)
    return mechanism, run, log.read_text()


@pytest.fixture(scope="module")
def wrong_run(tmp_path_factory):
    return tmp_path_factory.mktemp("one") / "run"


@pytest.fixture
def one_run(wrong_run, run_command):
    """A run of two steps."""
    if not wrong_run.exists():
        options = ("--preset", "tiny", "--steps", 2, "--log.no-tensorboard", "--run", wrong_run)
        code, out, err = run_command("experiments.train", "text", *options)
        assert code == 0, out + err
    return wrong_run


def test_quickstart_shows_the_whole_job(done):
    mechanism, run, out = done
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
        assert str(path) in out and path.exists()
    assert (run / PLOT).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "validation_bits_per_byte" in row] == [10, 20]
    assert json.loads((run / "evaluation.json").read_text())["bits_per_byte"][mechanism] > 0


def test_evaluate_counts_the_same_bytes_for_all(done, run_command):
    mechanism, run, _ = done
    code, out, err = run_command("experiments.evaluate", run, "--max-bytes", 3000)
    assert code == 0, out + err
    assert "3,000 bytes" in out and mechanism in out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["bytes"] == 3000 and found["step"] == 20
    # Another batch layout over more devices measures the same.
    code, out, err = run_command(
        "experiments.evaluate", run, "--max-bytes", 3000, "--mesh.fsdp", 2, "--no-baselines",
        devices=4,
    )  # fmt: skip
    assert code == 0, out + err
    again = json.loads((run / "evaluation.json").read_text())["bits_per_byte"]
    assert again == {mechanism: pytest.approx(found["bits_per_byte"][mechanism], abs=1e-4)}


def test_generate(done, run_command):
    _, run, _ = done
    options = ("--prompt", "import ", "--length", 70, "--seed", 3)
    code, first, err = run_command("experiments.generate", run, *options)
    assert code == 0, first + err
    assert first.startswith("import ") and len(first) > len("import ") + 1
    _, second, _ = run_command("experiments.generate", run, *options, devices=2)
    assert first == second
    best = ("--checkpoint", "best", "--temperature", 0, "--top-k", 5, "--top-p", 0.9)
    code, out, err = run_command("experiments.generate", run, *options, *best)
    assert code == 0 and out.startswith("import "), out + err


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
        ("train", ["text", "--steps", 0], 1),
        ("evaluate", ["runs/none"], 1),
        ("generate", ["runs/none", "--top-k", 0], 2),
    ],
)
def test_a_message_is_all_that_is_printed(module, arguments, code, run_command):
    got, out, err = run_command(f"experiments.{module}", *arguments)
    assert got == code, out + err
    assert "Traceback" not in err and (code == 2 or (err.startswith("error: ") and not out))


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


def test_quickstart_that_was_cut_off_goes_on_and_a_finished_one_is_kept(
    command, run_command, tmp_path
):
    options = ("--preset", "tiny", "--log.no-tensorboard", "--data.test-split", "test[:1%]")
    root = {"cwd": tmp_path}
    run = tmp_path / "runs" / "tiny"
    process = command("experiments.quickstart", *options, **root)
    until = time.monotonic() + 200
    while not complete_steps(run / "checkpoints"):
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    code, out, err = run_command("experiments.quickstart", *options, **root)
    assert code == 0, out + err
    assert "resuming runs/tiny at step" in out
    code, out, err = run_command("experiments.quickstart", *options, **root)
    assert code == 0, out + err
    assert "runs/tiny-2" in out and (run.with_name("tiny-2") / "checkpoints" / "20").is_dir()
