"""Data and processes that the tests of the experiments share."""

import fcntl
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import ExperimentError

# JAX is imported where it is used: if this folder is asked for, this file is read before JAX is
# told, in `pytest_configure`, which devices to use.
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory) -> Path:
    """A directory of this test run that all its worker processes see."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    path = base / "shared"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def data_directory(shared_directory) -> Path:
    """Where the data sets of this test run are built, once."""
    return shared_directory / "tfds"


@pytest.fixture(scope="session")
def small_text(data_directory) -> tuple[str, ...]:
    """Options that take a prepared part of the library, where the text does not matter.

    To look at all of it takes each command two seconds.
    """
    from experiments.data.python_source import PythonSource, PythonSourceConfig, standard_library

    library = Path(standard_library()[0])
    source = PythonSourceConfig.of(*(library / name for name in ("asyncio", "email", "unittest")))
    builder = PythonSource(config=source, data_dir=str(data_directory), file_format="array_record")
    data_directory.mkdir(exist_ok=True)
    with (data_directory / "small.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not builder.data_path.exists():
            builder.download_and_prepare()
    name = f"python_source/{source.name}"
    return "--data.name", name, "--data.shuffle-bytes", "65536"


@pytest.fixture
def command(shared_directory, data_directory):
    """Starts `python -m MODULE ARGUMENTS` in a process of its own, with one CPU device.

    Returns a function that gives the running process; its output is text.
    """
    running = []

    def start(module: str, *arguments: object, devices: int = 1, **options) -> subprocess.Popen:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "TFDS_DATA_DIR": str(data_directory),
            "JAX_COMPILATION_CACHE_DIR": str(shared_directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "160",
            **options.pop("environment", {}),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=options.pop("cwd", ROOT),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run_command(command):
    """As `command`, but waits: returns exit code, stdout and stderr."""

    def run(module: str, *arguments: object, timeout: float = 300, **options):
        process = command(module, *arguments, **options)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    return run


@pytest.fixture
def compiled_once(shared_directory):
    """Keeps what this process compiles, for commands that compile the same again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = {
        "jax_compilation_cache_dir": str(shared_directory / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in names}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(names)
    yield
    use(before)


@pytest.fixture
def call(monkeypatch, capsys, data_directory, quick_compilation, compiled_once):
    """Calls a command's `main` in this process, with its eight devices; returns the output."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_directory))
    monkeypatch.setenv("COLUMNS", "160")

    def run(module: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        capsys.readouterr()
        importlib.import_module(module).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(call, capsys):
    """As `call`, of a command that must end with a message: returns exit code and message."""

    def run(module: str, *arguments: object) -> tuple[int, str]:
        try:
            call(module, *arguments)
        except ExperimentError as error:
            return error.exit_code, str(error)
        except SystemExit as error:
            return error.code, "".join(capsys.readouterr())
        raise AssertionError(f"{module} takes {arguments}")

    return run
