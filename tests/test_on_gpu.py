"""What becomes of tests on a GPU that hang or break it, and of the table of what has passed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONFTEST = """
    from tests.on_gpu import OnGpu

    BROKEN = []

    def pytest_addoption(parser):
        parser.addoption("--write", action="store_true")

    def pytest_configure(config):
        write = config.getoption("--write")
        config.pluginmanager.register(OnGpu(config, lambda: not BROKEN, 4.0, write))
"""
CALLS = """
    import os
    import time
    from pathlib import Path

    import pytest

    from pallas_kernels import gpu_proved

    class Proved(gpu_proved.Proved):
        file = Path(__file__).with_name("gpu_proved.json")

    PROVED = Proved("family", None)
    CALLS = {
        "passes": {"float32", "mask"},
        "passes, too": {"float32", "bias"},
        "fails": {"bfloat16", "bias"},
        "dies": {"float16", "mask: lists"},
        "breaks": {"mask: segments"},
        "hangs": {"mask: lengths"},
        "passes, last": {"slopes"},
    }

    def parts(name):
        return frozenset(CALLS[name])

    @pytest.mark.parametrize("name", CALLS)
    def test_results_and_gradients(name, request):
        (plugin,) = [x for x in request.config.pluginmanager.get_plugins() if hasattr(x, "BROKEN")]
        assert not plugin.BROKEN
        if name == "dies":
            os._exit(1)
        if name == "breaks":
            plugin.BROKEN.append(name)
        while name == "hangs":
            time.sleep(1)
        assert name.startswith("passes")
"""


@pytest.fixture
def run(tmp_path):
    """Runs tests of a family, and returns the end of what pytest says, and its exit code."""
    family = tmp_path / "family"
    family.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\naddopts = -p no:cacheprovider")
    (tmp_path / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (family / "test_gpu_device.py").write_text(textwrap.dedent(CALLS))
    (family / "gpu_proved.json").write_text('["slopes"]')
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*options):
        command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-rfE"]
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.stdout, done.returncode

    return run


def test_others_go_on_and_what_has_passed_is_written(run, tmp_path):
    out, code = run("-n", "1", "--write")
    assert code == pytest.ExitCode.TESTS_FAILED, out
    assert "3 passed" in out, out
    failed = {line.split("[")[1].split("]")[0] for line in out.splitlines() if "FAILED" in line}
    assert failed == {"fails", "dies", "breaks", "hangs"}, out
    # A bias is a part of a call that failed.
    assert "family: 3 parts have passed, written\n" in out
    written = json.loads((tmp_path / "family" / "gpu_proved.json").read_text())
    assert written == ["float32", "mask", "slopes"]


def test_what_is_chosen_must_have_passed(run, tmp_path):
    passing = "-k", "passes or fails"
    out, code = run("-n", "1", *passing)
    assert "family: what is chosen was not all tried" not in out  # slopes were
    assert code == pytest.ExitCode.TESTS_FAILED
    out, code = run("-k", "too")
    assert code == pytest.ExitCode.OK and "family: what is chosen was not all tried" in out
    out, code = run("-k", "last", "--write")
    assert "family: 1 parts have passed, written; 6 calls were not tried\n" in out
    (tmp_path / "family" / "gpu_proved.json").write_text('["slopes", "mask: lengths"]')
    out, code = run("-n", "1")
    assert "family: chosen, but they have not passed: mask: lengths" in out, out


def test_one_process_stops_where_the_device_is_broken(run):
    out, code = run("-k", "breaks or last")
    assert "the device computes no more after" in out and "passed" not in out, out
    assert code == pytest.ExitCode.TESTS_FAILED
