"""What is measured in a process of its own, and what is known when that hangs or dies."""

import itertools
import json
import os

import pytest

from experiments.benchmark import apart, gpu, linear_gpu, tiled_gpu, tiled_tune
from experiments.benchmark import table as tables
from experiments.benchmark.table import Report, read_measured, write
from experiments.errors import ExperimentError
from tests.experiments.measuring import die, fill, refuse, works

pytestmark = pytest.mark.slow

QUICK = {"most_seconds": 60.0, "works": works}


def _begun(path):
    """Returns what was begun, and in which processes."""
    return [*zip(*(line.split() for line in path.read_text().splitlines()), strict=True)]


@pytest.mark.parametrize("processes", [1, 3])
def test_what_hangs_or_dies_is_given_up_and_the_others_go_on(processes, tmp_path):
    actions = "first", "fails", "breaks", "second", "dies", "third", "hangs", "last"
    report, path = Report(), tmp_path / "begun"
    apart.run(fill, (path, actions), report, most_seconds=2.0, works=works, processes=processes)
    begun, in_processes = _begun(path)
    assert sorted(begun) == sorted(actions)  # each once
    if processes == 1:
        assert begun == actions
        assert [in_processes.index(x) for x in in_processes] == [0, 0, 0, 3, 3, 5, 5, 7]
    assert [row["action"] for row in report.rows] == [*actions]
    assert [row["seconds"] for row in report.rows] == ["5", "-", "-", "6", "-", "5", "-", "4"]
    assert report.records == [{name: report.measured[name]} for name in actions]
    errors = {name: x["error"] for name, x in report.measured.items() if "error" in x}
    assert errors == {
        "fails": "ValueError: fails",
        "breaks": "ValueError: breaks",
        "dies": "the process that measured it has died, with code 7",
        "hangs": "the process that measured it has not ended within 2 seconds",
    }
    assert report.failures == ["it has failed"]
    times = sorted((x["began"], x["ended"]) for x in report.measured.values() if "ended" in x)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(times))


def test_what_is_known_is_not_measured_again(tmp_path):
    output, path = tmp_path / "report.json", tmp_path / "begun"

    def stopped(report):
        write(output, "a command", report)
        if len(report.rows) == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        apart.run(fill, (path, ("first", "fails", "hangs")), Report(stopped), **QUICK)
    (*_, last), (process, *_) = _begun(path)
    assert last in ("fails", "hangs")
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
    report = Report()
    report.measured |= read_measured(output)
    assert {of: x["seconds"] for of, x in report.measured.items()} == {"first": 5}
    path.unlink()
    apart.run(fill, (path, ("first", "fails", "last")), report, **QUICK)
    assert _begun(path)[0] == ("fails", "last")  # what failed is tried again
    assert [row["seconds"] for row in report.rows] == ["5", "-", "4"]


def test_what_is_wrong_outside_of_measurements_is_an_error(tmp_path, capfd):
    with pytest.raises(ExperimentError, match="tokens: 0") as error:
        apart.run(refuse, "tokens: 0", Report(), **QUICK)
    assert error.value.exit_code == 2
    with pytest.raises(ExperimentError, match="the process that measures has died, with code 3"):
        apart.run(die, 3, Report(), **QUICK)
    with pytest.raises(ExperimentError, match="the process that measures failed: TypeError: "):
        apart.run(fill, None, Report(), **QUICK)
    assert "Traceback" in capfd.readouterr().err


def test_files_to_resume_from(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    assert read_measured(path) == {}
    report = Report()
    report.measured |= {"a": {"seconds": 1.5}, "b": {"error": "no"}}
    write(path, "a command", report)
    assert json.loads(path.read_text())["measured"] == report.measured
    assert [*tmp_path.iterdir()] == [path]
    assert read_measured(path) == {"a": {"seconds": 1.5}}
    monkeypatch.setattr(tables, "machine", lambda: {"machine": "another"})
    with pytest.raises(ExperimentError, match=r"resume: .* is of machine .*; here it is another"):
        read_measured(path)
    for text, reason in (("{", "cannot read .*"), ("[]", ".* is no report")):
        path.write_text(text)
        with pytest.raises(ExperimentError, match=f"resume: {reason}"):
            read_measured(path)
    with pytest.raises(ExperimentError, match="resume: there is no output"):
        read_measured(None)


@pytest.mark.parametrize(
    ("config", "other", "name"),
    [
        (tiled_gpu.GpuConfig(), tiled_gpu.GpuConfig(total=4096), "total: 32768"),
        (tiled_tune.TuneConfig(), tiled_tune.TuneConfig(tokens=4096), "tokens: 8192"),
        (linear_gpu.GpuConfig(), linear_gpu.GpuConfig(features=64), "features: 128"),
        (tiled_gpu.GpuConfig(), None, "device: cpu"),
    ],
)
def test_what_was_measured_otherwise_is_refused(config, other, name):
    report = Report()
    gpu.check_known(other or config, report)
    (known,) = report.measured.values()
    assert gpu.works()
    if other is None:
        gpu.check_known(config, report)
        known["device"] = "NVIDIA H200"
    value = known[name.partition(":")[0]]
    with pytest.raises(
        ExperimentError, match=f"resume: {name}; what is known was measured with {value}"
    ):
        gpu.check_known(config, report)


def test_reports_on_a_gpu_say_that_there_is_none(run_command):
    code, out, err = run_command("experiments.benchmark", "tiled", "tune", "--write")
    assert code == 1 and not out and err.startswith("error: JAX finds no CUDA device"), err
