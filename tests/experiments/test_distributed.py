"""Two processes on loopback train one model."""

import signal
import socket
import time

import numpy as np
import pytest

from experiments.checkpoint import complete_steps
from experiments.record import read_metrics

pytestmark = pytest.mark.slow
TRAIN = (
    "text", "--preset", "tiny", "--model.num-layers", "1", "--log.no-tensorboard",
    "--checkpoint.every", "4",
)  # fmt: skip


@pytest.fixture
def train(small_text):
    return (*TRAIN, *small_text)


def start_pair(command, *arguments):
    """Two processes of two devices each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    peers = ("--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", 2)
    return [
        command("experiments.train", *arguments, *peers, "--distributed.process", i, devices=2)
        for i in range(2)
    ]


def finish(processes, code=0, timeout=300):
    outputs = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


def losses(run):
    return {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}


def test_two_processes_train_one_model_resume_and_stop_together(command, refused, train, tmp_path):
    run = tmp_path / "run"
    options = (*train, "--run", run, "--mesh.fsdp", 2, "--steps", 400)
    pair = start_pair(command, *options)
    until = time.monotonic() + 240
    while not ((run / "metrics.jsonl").exists() and len(losses(run)) >= 9):
        assert time.monotonic() < until and all(p.poll() is None for p in pair), [
            p.communicate() for p in pair
        ]
        time.sleep(0.05)
    # A scheduler that takes the nodes back may signal any one of them first.
    pair[1].send_signal(signal.SIGTERM)
    (out, _), (quiet, _) = finish(pair)
    assert "stopped by SIGTERM after step" in out
    assert "step" not in quiet, "only one process reports"
    stopped = complete_steps(run / "checkpoints")[-1]
    assert 9 <= stopped < 400

    first = losses(run)
    assert max(first) == stopped
    values = [first[step] for step in sorted(first)]
    assert np.mean(values[-3:]) < np.mean(values[:3])

    # The same job on one process with as many devices reads other documents at a time, but a
    # checkpoint of two processes has two positions in the data: it says so.
    code, err = refused("experiments.train", *options, "--resume")
    assert code == 1
    assert "2 processes" in err and "1 process" in err
    assert complete_steps(run / "checkpoints")[-1] == stopped, "nothing is moved or lost"


def test_two_processes_give_the_losses_of_one_where_they_read_the_same_rows(
    command, call, train, tmp_path
):
    # With tensor=4 over both processes each reads every row, as one process does.
    spanning = (*train, "--mesh.tensor", 4, "--model.num-heads", 4, "--steps", 10)
    finish(start_pair(command, *spanning, "--run", tmp_path / "span"))
    call("experiments.train", *spanning, "--run", tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "span")
    assert one.keys() == two.keys()
    assert sorted(one) == list(range(1, 11))
    for step in one:
        assert abs(one[step] - two[step]) < 1e-4, (step, one[step], two[step])


def test_a_process_without_its_peers_says_so(run_command, tmp_path):
    code, _, err = run_command(
        "experiments.train", *TRAIN, "--run", tmp_path / "run", "--distributed.initialize"
    )
    assert code == 1
    assert err.count("error: distributed:") == 1 and "--distributed.coordinator" in err
