"""Measures in a process of its own, which may hang or die: what it has measured stays known.

A process that waits for a device cannot be interrupted, only killed. The next one begins anew, with
all that is known, and so comes to what is next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from experiments.benchmark.table import Report
from experiments.errors import ExperimentError, quiet_libraries

BETWEEN = 120.0
"""Seconds that a process has at least for what it does not measure: to start, to make arrays."""


def run(
    fill: Callable[[Any, Report], None],
    config: Any,
    report: Report,
    most_seconds: float,
    works: Callable[[], bool],
) -> None:
    """Fills a report in another process, and in more of them if one hangs or dies.

    What it did last is then recorded as failed, and is not tried again.

    Args:
      fill: a module's function; gets the configuration and a report, and calls its `measure` for
        whatever may hang or die. It is called again in every process.
      config: its first argument, which can be pickled.
      report: what is filled; what it has measured already is not measured again.
      most_seconds: the longest that something measured may take.
      works: a module's function, called when something has failed: whether the process can go on.

    Raises:
      ExperimentError: if `fill` does, or fails outside of what it measures.
    """
    while not _Process(fill, config, report, works).listen(report, most_seconds):
        pass


class _Process:
    """A process that fills a report."""

    def __init__(self, fill: Any, config: Any, report: Report, works: Any):
        # Nothing of this process is in it: a fork has threads that are gone and locks that stay.
        context = multiprocessing.get_context("spawn")
        self._hears, tells = context.Pipe(duplex=False)
        arguments = fill, config, dict(report.measured), works, tells
        self._process = context.Process(target=_fill, args=arguments, daemon=True)
        self._process.start()
        tells.close()

    def listen(self, report: Report, most_seconds: float) -> bool:
        """Adds what the process says to a report; returns whether it came to its end."""
        of, rows = None, 0
        with self._ended():
            while True:
                said = self._said(most_seconds if of else max(most_seconds, BETWEEN))
                if isinstance(said, str):  # why it says nothing
                    if of is None:
                        raise ExperimentError(f"the process that measures {said}")
                    report.measured[of] = {"error": f"the process that measured it {said}"}
                    report.save(report)
                    return False
                match said:
                    case ("begins", of):
                        pass
                    case ("measured", name, found, works):
                        of = None
                        report.measured[name] = found
                        report.save(report)
                        if not works:
                            return False
                    case ("row", row, record):
                        # Those of processes before come again.
                        rows += 1
                        if rows > len(report.rows):
                            report.add(row, record)
                    case ("failed", error):
                        raise error
                    case ("ended", failures):
                        report.failures += failures
                        return True

    def _said(self, most_seconds: float) -> Any:
        """Returns what the process says next, or why it says nothing, as text."""
        try:
            if self._hears.poll(most_seconds):
                return self._hears.recv()
        except EOFError:
            self._process.join()
            return f"has died, with code {self._process.exitcode}"
        return f"has not ended within {most_seconds:g} seconds"

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        """Ends the process, whatever happens inside."""
        try:
            yield
        finally:
            self._process.kill()
            self._process.join()
            self._hears.close()


class _Told(Report):
    """The report of the other process, which tells all that happens to it."""

    def __init__(self, known: Mapping[str, Any], works: Callable[[], bool], tells: Connection):
        super().__init__()
        self.measured = dict(known)
        self._works, self._tells = works, tells

    def tell(self, *said: Any) -> None:
        """Tells something to the process that listens, or ends if there is none."""
        try:
            self._tells.send(said)
        except BrokenPipeError:
            os._exit(1)

    def add(self, row: Mapping[str, str], record: Mapping[str, Any] | None = None) -> None:
        """Adds a row."""
        super().add(row, record)
        self.tell("row", self.rows[-1], self.records[-1])

    def measure(self, of: str, function: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns what a function measures; ends the process if nothing more works after it."""
        if of not in self.measured:
            self.tell("begins", of)
            found = super().measure(of, function)
            works = "error" not in found or self._works()
            self.tell("measured", of, found, works)
            if not works:
                os._exit(1)  # what is left of a broken device may wait for ever
        return self.measured[of]


def _fill(fill: Any, config: Any, known: Mapping[str, Any], works: Any, tells: Connection) -> None:
    """Is the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever listens to it decides
    quiet_libraries()
    report = _Told(known, works, tells)
    try:
        fill(config, report)
    except ExperimentError as error:
        report.tell("failed", error)
    except Exception as error:
        traceback.print_exc()
        message = f"the process that measures failed: {type(error).__name__}: {error}"
        report.tell("failed", ExperimentError(message))
    else:
        report.tell("ended", report.failures)
