"""What a report shows and writes: a markdown table and JSON."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError

PACKAGES = ("jax", "jaxlib", "libtpu", "nvidia-cuda-nvcc", "tokamax")


class Report:
    """Rows of a table and the records that they were made from."""

    def __init__(self, save: Callable[[Report], None] = lambda report: None) -> None:
        """Starts an empty report.

        Args:
          save: called whenever there is more in it.
        """
        self.rows: list[Mapping[str, str]] = []
        self.records: list[Mapping[str, Any]] = []
        self.failures: list[str] = []
        self.measured: dict[str, Mapping[str, Any]] = {}
        """By what it is of, what `measure` returned."""
        self.whole = True
        """Whether it is all there is, not a part of what is measured."""
        self.save = save

    def add(self, row: Mapping[str, str], record: Mapping[str, Any] | None = None) -> None:
        """Adds a row, and a record of what was measured; without one, of the row."""
        self.rows.append(row)
        self.records.append(record or row)
        self.save(self)

    def measure(self, of: str, function: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns what a function measures, or why it fails, as "error"; each thing once.

        Args:
          of: what is measured, for the terminal, too.
          function: returns numbers by what they are.
        """
        if of not in self.measured:
            progress(of)
            try:
                self.measured[of] = dict(function())
            except Exception as error:  # of whatever is measured
                self.measured[of] = {"error": f"{type(error).__name__}: {error}"}
            self.save(self)
        return self.measured[of]

    def fail(self, row: Mapping[str, str], error: Exception) -> None:
        """Adds a row without measurements, and the reason."""
        self.add(row, {**row, "error": str(error)})
        self.failures.append(str(error))


def progress(message: str) -> None:
    """Says on stderr what is going on."""
    logging.getLogger("experiments").info(message)


def show(report: Report, output: Path | None, command: str) -> None:
    """Prints the table and writes the JSON file, if one is asked for.

    Raises:
      ExperimentError: if the file cannot be written, or a row has failed.
    """
    print(markdown(report.rows))
    write(output, command, report)
    if report.failures:
        raise ExperimentError("\n".join(report.failures))


def write(output: Path | None, command: str, report: Report) -> None:
    """Writes the JSON file of a report, if one is asked for, in place of what was there.

    Raises:
      ExperimentError: if it cannot be written.
    """
    if output is None:
        return
    written = {"command": command, **machine(), "records": report.records}
    written |= {"measured": report.measured} if report.measured else {}
    # Whoever is killed meanwhile leaves the file as it was.
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.write_text(json.dumps(written, indent=1) + "\n")
        partial.replace(output)
    except OSError as error:
        raise ExperimentError(f"output: cannot write {output}: {error.strerror}") from error


def read_measured(output: Path | None) -> dict[str, Mapping[str, Any]]:
    """Returns what a report that was written has measured, without what failed.

    Args:
      output: its file; there need not be one yet.

    Raises:
      ExperimentError: if it is no report, or of another machine or of other versions.
    """
    if output is None:
        raise ExperimentError("resume: there is no output, the file with what was measured before")
    try:
        found = json.loads(output.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ExperimentError(f"resume: cannot read {output}: {error}") from error
    if not isinstance(found, dict) or "records" not in found:
        raise ExperimentError(f"resume: {output} is no report")
    for name, here in machine().items():
        if found.get(name) != here:
            raise ExperimentError(
                f"resume: {output} is of {name} {found.get(name)}; here it is {here}"
            )
    return {of: x for of, x in found.get("measured", {}).items() if "error" not in x}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a table with the columns of all rows, in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "-") or "-" for name in columns] for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    # Names to the left, numbers to the right.
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


@functools.cache
def machine() -> dict[str, Any]:
    """Returns what figures depend on: the processor, and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "versions": versions}
