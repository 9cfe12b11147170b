"""Measures in processes of their own, which may hang or die: what they have measured stays known.

A process that waits for a device cannot be interrupted, only killed. The next one begins anew, with
all that is known, and so comes to what is next. Several processes make ready, which is to compile,
at the same time, and have the device one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from experiments.benchmark.table import Report
from experiments.errors import ExperimentError, quiet_libraries

BETWEEN = 120.0
"""Seconds that a process has at least for what it does not measure: to start, to make arrays."""

_here: _Told | None = None
"""The report of this process, if it is one of those that measure."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Has no other process use the device inside of it: those that measure wait for each other."""
    if _here is None:
        yield
        return
    # A lock that ends with the process, however that ends.
    with _here.work.lock.open("w") as file:
        _here.tell("waits")
        fcntl.flock(file, fcntl.LOCK_EX)
        _here.tell("goes on")
        yield


@dataclass(frozen=True)
class _Work:
    """What processes are to do: see `run`."""

    fill: Callable[[Any, Report], None]
    config: Any
    works: Callable[[], bool]
    most_seconds: float
    lock: Path


def run(
    fill: Callable[[Any, Report], None],
    config: Any,
    report: Report,
    *,
    most_seconds: float,
    works: Callable[[], bool],
    processes: int = 1,
) -> None:
    """Fills a report in another process, and in more of them if one hangs or dies.

    What it did last is then recorded as failed, and is not tried again.

    Args:
      fill: a module's function; gets the configuration and a report, and calls its `measure` for
        whatever may hang or die. It is called again in every process; what should happen once
        only, it does where the report is `whole`.
      config: its first argument, which can be pickled.
      report: what is filled; what it has measured already is not measured again.
      most_seconds: the longest that something measured may take, without waiting to be `alone`.
      works: a module's function, called when something has failed: whether the process can go on.
      processes: how many are to measure. If more than one, another one then fills the report.

    Raises:
      ExperimentError: if `fill` does, or fails outside of what it measures.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(fill, config, works, most_seconds, Path(folder, "device"))
        if processes > 1:
            _run(work, report, [(i, processes) for i in range(processes)])
        _run(work, report, [None])


Share = tuple[int, int] | None
"""Which part of how many a process measures; None for all of it."""


def _run(work: _Work, report: Report, shares: Sequence[Share]) -> None:
    """Has each share done by a process, or by several, one after the other."""
    running: list[_Process] = []
    try:
        running += (_Process(work, report, share) for share in shares)
        while running:
            left = max(min(process.left for process in running), 0)
            hears = [process.hears for process in running]
            said = wait(hears, left if left < float("inf") else None)
            for i, process in reversed([*enumerate(running)]):
                if process.hears not in said and process.left > 0:
                    continue
                if (ended := process.listen(report)) is None:
                    continue
                process.end()
                if ended:
                    del running[i]
                else:
                    running[i] = _Process(work, report, process.share)
    finally:
        for process in running:
            process.end()


class _Process:
    """A process that measures."""

    def __init__(self, work: _Work, report: Report, share: Share):
        self.share, self._work = share, work
        # Nothing of this process is in it: a fork has threads that are gone and locks that stay.
        context = multiprocessing.get_context("spawn")
        self.hears, tells = context.Pipe(duplex=False)
        arguments = work, dict(report.measured), share, tells
        self._process = context.Process(target=_fill, args=arguments, daemon=True)
        self._process.start()
        tells.close()
        self._of, self._waits, self._since, self._rows = None, False, time.monotonic(), 0

    @property
    def left(self) -> float:
        """Returns the seconds after which it must have said something."""
        most = self._work.most_seconds if self._of else max(self._work.most_seconds, BETWEEN)
        return float("inf") if self._waits else self._since + most - time.monotonic()

    def end(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.hears.close()

    def listen(self, report: Report) -> bool | None:
        """Adds to a report what it says, if anything.

        Returns:
          Whether it came to its end, not another one is to go on; None if it is at work.
        """
        said = self._said()
        if isinstance(said, str):
            if self._of is None:
                raise ExperimentError(f"the process that measures {said}")
            report.measured[self._of] = {"error": f"the process that measured it {said}"}
            report.save(report)
            return False
        self._since = time.monotonic()
        match said:
            case ("begins", of):
                self._of = of
            case ("waits" | "goes on" as state,):
                self._waits = state == "waits"
            case ("measured", name, found, works):
                self._of = None
                report.measured[name] = found
                report.save(report)
                return None if works else False
            case ("row", row, record):
                # Those of processes before come again.
                self._rows += 1
                if self._rows > len(report.rows):
                    report.add(row, record)
            case ("failed", error):
                raise error
            case ("ended", failures):
                report.failures += failures
                return True
        return None

    def _said(self) -> Any:
        """Returns what it says next, or why it says nothing, as text."""
        try:
            if self.hears.poll():
                return self.hears.recv()
        except EOFError:
            self._process.join()
            return f"has died, with code {self._process.exitcode}"
        return f"has not ended within {self._work.most_seconds:g} seconds"


class _Told(Report):
    """The report of a process that measures, which tells all that happens to it."""

    def __init__(self, work: _Work, known: Mapping[str, Any], share: Share, tells: Connection):
        super().__init__()
        self.measured = dict(known)
        self.whole = share is None
        self.work, self._share, self._tells = work, share, tells

    def tell(self, *said: Any) -> None:
        """Tells something to the process that listens, or ends if there is none."""
        try:
            self._tells.send(said)
        except BrokenPipeError:
            os._exit(1)

    def add(self, row: Mapping[str, str], record: Mapping[str, Any] | None = None) -> None:
        """Adds a row."""
        super().add(row, record)
        if self.whole:
            self.tell("row", self.rows[-1], self.records[-1])

    def measure(self, of: str, function: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns what a function measures; ends the process if nothing more works after it."""
        if of in self.measured:
            return self.measured[of]
        if self._share is not None:
            part, parts = self._share
            if zlib.crc32(of.encode()) % parts != part:
                return {"error": "another process measures it"}
        self.tell("begins", of)
        found = super().measure(of, function)
        works = "error" not in found or self.work.works()
        self.tell("measured", of, found, works)
        if not works:
            os._exit(1)  # what is left of a broken device may wait for ever
        return found


def _fill(work: _Work, known: Mapping[str, Any], share: Share, tells: Connection) -> None:
    """Is the other process."""
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever listens to it decides
    quiet_libraries()
    _here = report = _Told(work, known, share, tells)
    try:
        work.fill(work.config, report)
    except ExperimentError as error:
        report.tell("failed", error)
    except Exception as error:
        traceback.print_exc()
        message = f"the process that measures failed: {type(error).__name__}: {error}"
        report.tell("failed", ExperimentError(message))
    else:
        report.tell("ended", report.failures if report.whole else [])
