"""Settings of every test process: eight CPU devices, unless the tests of a GPU are asked for."""

import os


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "gpu"), default="cpu", help="what to run on (default: cpu)"
    )


def pytest_configure(config):
    # JAX reads these once, when it is first used: no test module has been imported yet.
    if config.getoption("--device") == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
