"""Runs that are killed, stopped or meet a broken disk: nothing is lost, one message says why."""

import json
import os
import random
import resource
import shutil
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.checkpoint import complete_steps
from experiments.record import read_metrics

pytestmark = pytest.mark.slow
STEPS = 40  # so many that there is time for a signal before the last
TRAIN = (
    "text", "--preset", "tiny", "--steps", str(STEPS), "--model.num-layers", "1",
    "--checkpoint.every", "10", "--checkpoint.keep", "4", "--log.evaluate-every", "20",
    "--log.no-tensorboard",
)  # fmt: skip


def parameters(run, step):
    """The arrays of a checkpoint's state, by path."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(run / "checkpoints" / str(step) / "state")
    return dict(_leaves(tree))


def _leaves(tree, prefix=""):
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}/{name}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{prefix}/{i}")
    elif tree is not None:
        yield prefix, np.asarray(tree)


def losses(run):
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def check_same_end(run, undisturbed):
    """Checks that a finished run is, bit for bit, the one that nothing disturbed."""
    assert losses(run) == losses(undisturbed)
    expected, actual = parameters(undisturbed, STEPS), parameters(run, STEPS)
    assert expected.keys() == actual.keys() and len(expected) > 10
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.fixture
def train(small_text):
    """The command line of a short run."""
    return (*TRAIN, *small_text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def undisturbed(finished, run_command, train):
    """A finished run that nothing disturbed."""
    if not finished.exists():
        code, out, err = run_command("experiments.train", *train, "--run", finished)
        assert code == 0, out + err
    return finished


def wait_for_step(process, run, step, timeout=240):
    """Waits until the run has written the metrics of a step."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        path = run / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} in {timeout} s")


def test_stopped_and_killed_then_resumed_ends_bit_identical(
    undisturbed, command, run_command, train, tmp_path
):
    run = tmp_path / "run"
    rng = random.Random(time.time_ns())

    def stop(step, number, *resume):
        process = command("experiments.train", *train, "--run", run, *resume)
        wait_for_step(process, run, step)
        if number == signal.SIGKILL:
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    code, out, err = stop(2, signal.SIGINT)
    assert code == 130, out + err
    assert "stopped by SIGINT after step" in out and "Traceback" not in err
    first = complete_steps(run / "checkpoints")[-1]
    assert f"after step {first};" in out and 2 <= first < STEPS

    code, out, err = stop(first + 1, signal.SIGTERM, "--resume")
    assert code == 0, out + err
    assert f"at step {first}" in out and "stopped by SIGTERM after step" in out
    assert "--resume" in out
    second = complete_steps(run / "checkpoints")[-1]
    assert f"after step {second};" in out and first < second < STEPS

    at = rng.randrange(second + 1, STEPS + 1)
    print(f"killed at step {at}")
    code, out, _ = stop(at, signal.SIGKILL, "--resume")
    assert code in (-signal.SIGKILL, 0), out

    code, out, err = run_command("experiments.train", *train, "--run", run, "--resume")
    assert code == 0, out + err
    assert len(losses(run)) == STEPS
    check_same_end(run, undisturbed)


def largest_files(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 2]
    return sorted(files, key=lambda path: -path.stat().st_size)


def test_truncated_newest_checkpoints_are_reported_and_the_one_before_used(
    undisturbed, run_command, train, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before, *damaged = complete_steps(run / "checkpoints")
    first, second, third = (run / "checkpoints" / str(step) for step in damaged)
    array_data = largest_files(first / "state")[0]
    position = largest_files(second / "data")[0]
    structure = third / "state" / "_METADATA"
    for path in (array_data, position, structure):
        os.truncate(path, path.stat().st_size // 2)
    code, out, err = run_command("experiments.train", *train, "--run", run, "--resume")
    assert code == 0, out + err
    for step in damaged:
        assert f"warning: the checkpoint of step {step} cannot be read" in out
        assert (run / "checkpoints" / f"damaged-{step}").is_dir()
    assert f"resuming {run} at step {before}" in out
    assert "Traceback" not in err
    check_same_end(run, undisturbed)


def test_all_checkpoints_damaged_is_one_message(undisturbed, run_command, train, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    steps = complete_steps(run / "checkpoints")
    for step in steps:
        for path in largest_files(run / "checkpoints" / str(step) / "state"):
            os.truncate(path, 1)
    code, out, err = run_command("experiments.train", *train, "--run", run, "--resume")
    assert code == 1
    assert err.startswith("error: no checkpoint in") and "Traceback" not in err + out
    assert complete_steps(run / "checkpoints") == steps, "nothing may be deleted"


def test_full_disk_keeps_the_checkpoints_there_are(command, run_command, train, tmp_path):
    run = tmp_path / "run"
    process = command("experiments.train", *train, "--run", run)
    wait_for_step(process, run, 10)
    until = time.monotonic() + 60
    while not complete_steps(run / "checkpoints") and time.monotonic() < until:
        time.sleep(0.005)
    kept = complete_steps(run / "checkpoints")
    assert kept
    # What a file system without room does to a writer, a limit on the size of files does too:
    # checkpoints of this run are larger than a file may become from here on.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, (process.returncode, out, err)
    assert "could not be written to" in err and "the newest complete one is that of step" in err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert set(kept) & set(complete_steps(run / "checkpoints"))
    code, out, err = run_command("experiments.train", *train, "--run", run, "--resume")
    assert code == 0, out + err
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))


def test_non_finite_loss_stops_with_step_batch_and_an_earlier_checkpoint(refused, train, tmp_path):
    run = tmp_path / "run"
    code, err = refused(
        "experiments.train", *train, "--run", run, "--optimizer.learning-rate", "1e38",
        "--optimizer.warmup-steps", "0", "--optimizer.clip-norm", "1e30",
    )  # fmt: skip
    assert code == 1
    step = int(err.split("step ")[1].split(":")[0])
    assert err.startswith(f"step {step}: the loss is")
    assert f"The batch is number {step} of seed 0 (crc32" in err
    before = step - 1
    assert complete_steps(run / "checkpoints")[-1] == before
    state = parameters(run, before)
    assert all(np.isfinite(value).all() for value in state.values() if value.dtype.kind == "f")
    assert state["/step"] == before
    rows = np.load(run / f"batch-{step}-part-0.npz")
    assert rows["tokens"].shape == (8, 65)
    (position,) = (run / "checkpoints" / str(before) / "data").glob("process_*")
    assert json.loads(position.read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--preset", "tinny"], 2, "preset: 'tinny' is unknown; the presets are"),
        (["--run", "/dev/null/run"], 1, "cannot write to /dev/null/run"),
        (["--model.vocab-size", "100"], 1, "model.vocab_size: 100 is smaller than the data's"),
        (["--mesh.fsdp", "3"], 1, "fsdp x tensor = 3 x 1 = 3 does not divide the 8 devices"),
        (["--mesh.data", "2"], 1, "= 2, but there are 8 devices"),
        (["--batch-size", "7", "--accumulate", "2"], 1, "batch_size: 7 in 2 parts"),
        (["--model.mechanism", "softmax"], 1, "softmax_attention"),
        (["--data.name", "no_such_text"], 1, "no_such_text"),
        (["--steps", "0"], 1, "steps: 0; it must be at least 1"),
        (["--resume"], 1, "no run in"),
    ],
)
def test_wrong_input_is_one_message(arguments, code, message, refused, tmp_path):
    run = () if "--run" in arguments else ("--run", tmp_path / "run")
    got, said = refused("experiments.train", *TRAIN, *run, *arguments)
    assert got == code, said
    assert message in said


def test_existing_run_is_neither_deleted_nor_mixed(
    undisturbed, run_command, refused, train, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    listing = sorted(run.rglob("*"))
    code, out, err = run_command("experiments.train", *train, "--run", run)
    assert code == 1 and "exists already. --resume" in err
    assert err.startswith("error: ") and not out and "Traceback" not in err
    changed = ("--resume", "--model.features", "64")
    code, err = refused("experiments.train", *train, "--run", run, *changed)
    assert code == 2
    assert "--model.features: the run has 32, the command says 64" in err
    assert sorted(run.rglob("*")) == listing
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    code, err = refused("experiments.train", *train, "--run", other, "--overwrite")
    assert code == 1 and "not overwritten" in err
    assert (other / "thesis.txt").read_text() == "precious"
