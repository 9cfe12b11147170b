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
TRAIN = ("text", "--preset", "tiny", "--log.no-tensorboard")


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
    """Checks that a run of twenty steps is, bit for bit, the one that nothing disturbed."""
    assert losses(run) == losses(undisturbed)
    expected, actual = parameters(undisturbed, 20), parameters(run, 20)
    assert expected.keys() == actual.keys() and len(expected) > 10
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.fixture(scope="module")
def finished(shared_directory, data_directory, request, tmp_path_factory):
    """A run of twenty steps that nothing disturbed."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def undisturbed(finished, run_command):
    if not finished.exists():
        code, out, err = run_command("experiments.train", *TRAIN, "--run", finished)
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


def test_killed_at_a_random_step_then_resumed_ends_bit_identical(undisturbed, command, tmp_path):
    run = tmp_path / "run"
    rng = random.Random(time.time_ns())
    at = sorted(rng.sample(range(1, 20), 2))
    print(f"killed at steps {at}")
    resume = ()
    for step in at:
        process = command("experiments.train", *TRAIN, "--run", run, *resume)
        wait_for_step(process, run, step)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0), out
        resume = ("--resume",)
    process = command("experiments.train", *TRAIN, "--run", run, "--resume")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert len(losses(run)) == 20
    check_same_end(run, undisturbed)


def test_sigterm_saves_and_exits_0(undisturbed, command, run_command, tmp_path):
    run = tmp_path / "run"
    process = command("experiments.train", *TRAIN, "--run", run)
    wait_for_step(process, run, 7)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "stopped by SIGTERM after step" in out and "--resume" in out
    step = complete_steps(run / "checkpoints")[-1]
    assert f"after step {step};" in out and 7 <= step < 20
    code, out, err = run_command("experiments.train", *TRAIN, "--run", run, "--resume")
    assert code == 0, out + err
    assert f"at step {step}" in out
    check_same_end(run, undisturbed)


def test_sigint_saves_and_exits_130(command, tmp_path):
    run = tmp_path / "run"
    process = command("experiments.train", *TRAIN, "--run", run)
    wait_for_step(process, run, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "stopped by SIGINT after step" in out
    assert "Traceback" not in err


def largest_files(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 2]
    return sorted(files, key=lambda path: -path.stat().st_size)


@pytest.mark.parametrize("which", ["array data", "data position", "structure"])
def test_truncated_newest_checkpoint_is_reported_and_the_one_before_used(
    which, undisturbed, run_command, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before, newest = complete_steps(run / "checkpoints")[-2:]
    folder = run / "checkpoints" / str(newest)
    path = {
        "array data": lambda: largest_files(folder / "state")[0],
        "data position": lambda: largest_files(folder / "data")[0],
        "structure": lambda: folder / "state" / "_METADATA",
    }[which]()
    os.truncate(path, path.stat().st_size // 2)
    code, out, err = run_command("experiments.train", *TRAIN, "--run", run, "--resume")
    assert code == 0, out + err
    assert f"warning: the checkpoint of step {newest} cannot be read" in out
    assert f"resuming {run} at step {before}" in out
    assert "Traceback" not in err
    assert (run / "checkpoints" / f"damaged-{newest}").is_dir()
    check_same_end(run, undisturbed)


def test_all_checkpoints_damaged_is_one_message(undisturbed, run_command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    steps = complete_steps(run / "checkpoints")
    for step in steps:
        for path in largest_files(run / "checkpoints" / str(step) / "state"):
            os.truncate(path, 1)
    code, out, err = run_command("experiments.train", *TRAIN, "--run", run, "--resume")
    assert code == 1
    assert err.startswith("error: no checkpoint in") and "Traceback" not in err + out
    assert complete_steps(run / "checkpoints") == steps, "nothing may be deleted"


def test_full_disk_keeps_the_checkpoints_there_are(command, tmp_path):
    run = tmp_path / "run"
    # Checkpoints of this run are larger than a file may become after its step 9.
    options = ("--model.features", "128", "--model.num-layers", "3", "--steps", "40")
    process = command("experiments.train", *TRAIN, "--run", run, *options)
    wait_for_step(process, run, 8)
    until = time.monotonic() + 60
    while not complete_steps(run / "checkpoints") and time.monotonic() < until:
        time.sleep(0.02)
    kept = complete_steps(run / "checkpoints")
    assert kept
    # What a file system without room does to a writer, a limit on the size of files does too.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, (process.returncode, out, err)
    assert "could not be written to" in err and "the newest complete one is that of step" in err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert set(kept) & set(complete_steps(run / "checkpoints"))
    process = command("experiments.train", *TRAIN, "--run", run, "--resume", *options)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert [step for step, _ in losses(run)] == list(range(1, 41))


def test_non_finite_loss_stops_with_step_batch_and_an_earlier_checkpoint(run_command, tmp_path):
    run = tmp_path / "run"
    code, out, err = run_command(
        "experiments.train", *TRAIN, "--run", run, "--optimizer.learning-rate", "1e38",
        "--optimizer.warmup-steps", "0", "--optimizer.clip-norm", "1e30",
    )  # fmt: skip
    assert code == 1, out + err
    assert "Traceback" not in err
    step = int(err.split("error: step ")[1].split(":")[0])
    assert "the loss is" in err and f"The batch is number {step} of seed 0 (crc32" in err
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


def test_existing_run_is_neither_deleted_nor_mixed(undisturbed, run_command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    listing = sorted(run.rglob("*"))
    code, _, err = run_command("experiments.train", *TRAIN, "--run", run)
    assert code == 1 and "exists already. --resume" in err
    code, _, err = run_command(
        "experiments.train", *TRAIN, "--run", run, "--resume", "--model.features", "64"
    )
    assert code == 2
    assert "--model.features: the run has 32, the command says 64" in err
    assert sorted(run.rglob("*")) == listing
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    code, _, err = run_command("experiments.train", *TRAIN, "--run", other, "--overwrite")
    assert code == 1 and "not overwritten" in err
    assert (other / "thesis.txt").read_text() == "precious"
