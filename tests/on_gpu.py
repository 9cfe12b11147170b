"""Tests on a GPU, in several processes: what hangs or breaks one does not take the others along.

And what has passed is what is chosen there: a file `test_gpu_device.py` has `CALLS`, a mapping by
name, of which each is an instance of `test_results_and_gradients`; `parts`, which returns the parts
of a call by its name; and `PROVED`, the table of its family, see `pallas_kernels.gpu_proved`.
"""

import faulthandler
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROVING = "test_gpu_device.py", "test_results_and_gradients"


class OnGpu:
    """Ends processes that are of no use any more, and says what has passed."""

    def __init__(
        self,
        config: pytest.Config,
        works: Callable[[], bool],
        most_seconds: float,
        write: bool,
    ):
        """Is told once for all tests.

        Args:
          config: pytest's.
          works: whether the device still computes, called after a failure.
          most_seconds: after which a test is given up, where tests have several processes.
          write: whether to write what has passed.
        """
        self._works, self._write = works, write
        self._worker = hasattr(config, "workerinput")
        self._most_seconds, self._broken = most_seconds, False
        self._passed: dict[str, dict[str, bool]] = {}
        self._said: list[str] = []

    # In the process that runs a test

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Ends a worker in which a test does not end; pytest-xdist has another one go on."""
        if not self._worker:
            return (yield)
        faulthandler.dump_traceback_later(self._most_seconds, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Finds out whether a test that failed has left a device for the next one."""
        report = yield
        if report.failed and not self._works():
            self._broken = True
            item.session.shouldfail = f"the device computes no more after {item.nodeid}"
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Ends a worker whose device does not compute: the next one has a device that does."""
        if self._worker and self._broken:
            os._exit(1)

    # Where reports come together

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes which calls have passed."""
        file, _, test = report.nodeid.partition("::")
        test, _, name = test.removesuffix("]").partition("[")
        if (Path(file).name, test) == PROVING and (report.when == "call" or report.failed):
            calls = self._passed.setdefault(file, {})
            calls[name] = calls.get(name, True) and report.passed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compares what is chosen on a GPU with what has passed, or writes it."""
        if self._worker:
            return
        for file, calls in self._passed.items():
            module = importlib.import_module(".".join(Path(file).with_suffix("").parts))
            if not self._proved(module, calls):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _proved(self, module: Any, calls: dict[str, bool]) -> bool:
        """Returns whether the table of a family has no more than what has passed.

        Args:
          module: of the family.
          calls: that were tried, by name, and whether they have passed.
        """
        table = module.PROVED
        # A part counts only if no call that has it failed, or was not tried.
        parts, failed = set(), set()
        for name in module.CALLS:
            (parts if calls.get(name) else failed).update(module.parts(name))
        parts -= failed
        left = len(module.CALLS.keys() - calls.keys())
        if self._write:
            table.write(parts)
            tried = f"; {left} calls were not tried" if left else ""
            self._said.append(f"{table.package}: {len(parts)} parts have passed, written{tried}")
        missing = table.parts() - parts
        if not missing:
            return True
        if left:
            self._said.append(f"{table.package}: what is chosen was not all tried")
            return True
        self._said.append(
            f"{table.package}: chosen, but they have not passed: {', '.join(sorted(missing))}"
        )
        return False

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says what has passed."""
        for line in self._said:
            terminalreporter.write_line(line)
