"""What all tests share: eight CPU devices, unless those of a GPU are asked for, and fixtures."""

import gc
import os

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "gpu", "emulated"),
        default="cpu",
        help="what to run on: emulated is a CPU for the tests of a GPU (default: cpu)",
    )
    parser.addoption(
        "--most-seconds",
        type=float,
        default=300,
        help="with --device gpu: after which a test is given up (default: 300)",
    )
    parser.addoption(
        "--write-proved",
        action="store_true",
        help="with --device gpu: write what has passed, which is what is chosen there",
    )


def pytest_configure(config):
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # JAX reads these once, when it is first used: no test module has been imported yet.
    device = config.getoption("--device")
    if device != "gpu":
        if config.getoption("--write-proved"):
            pytest.exit(
                f"--write-proved: not with --device {device}; what is chosen on a GPU must have "
                "passed on one",
                returncode=pytest.ExitCode.USAGE_ERROR,
            )
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    else:
        # Several processes share it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if jax.default_backend() != "gpu":
            pytest.exit(
                "--device gpu: JAX finds no GPU here. `make EXTRA=cuda env` installs its CUDA "
                "wheels",
                returncode=pytest.ExitCode.USAGE_ERROR,
            )
        from experiments.benchmark.gpu import works
        from tests.on_gpu import OnGpu

        seconds, write = config.getoption("--most-seconds"), config.getoption("--write-proved")
        config.pluginmanager.register(OnGpu(config, works, seconds, write))


def pytest_collection_finish():
    # Tracing makes objects by the million and hardly a cycle: by default a tenth of all time goes
    # into looking for some.
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


def pytest_collection_modifyitems(config, items):
    # Skipped, not left out: the end of the output says what could not run here.
    if config.getoption("--device") == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))


@pytest.fixture(autouse=True)
def emulated_gpu(request):
    """Emulates the kernels of tests for a GPU, with --device emulated."""
    if request.config.getoption("--device") != "emulated" or "gpu" not in request.keywords:
        yield
        return
    from tests.gpu import emulated

    with emulated():
        yield


@pytest.fixture
def quick_compilation(request):
    """Compiles with few optimisations, where it is not the program that is tested.

    Tests marked `optimized` are left as they are.
    """
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    if not request.node.get_closest_marker("optimized"):
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    """Allows float64."""
    import jax

    with jax.enable_x64(True):
        yield
