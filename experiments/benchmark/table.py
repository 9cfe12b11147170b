"""What a report shows and writes: a markdown table and JSON."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError

PACKAGES = ("jax", "jaxlib", "libtpu", "nvidia-cuda-nvcc", "tokamax")


class Report:
    """Rows of a table and the records that they were made from."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, str]] = []
        self.records: list[Mapping[str, Any]] = []
        self.failures: list[str] = []

    def add(self, row: Mapping[str, str], record: Mapping[str, Any] | None = None) -> None:
        """Adds a row, and a record of what was measured; without one, of the row."""
        self.rows.append(row)
        self.records.append(record or row)

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
    if output is not None:
        written = {"command": command, **machine(), "records": report.records}
        try:
            output.write_text(json.dumps(written, indent=1) + "\n")
        except OSError as error:
            raise ExperimentError(f"output: cannot write {output}: {error.strerror}") from error
    if report.failures:
        raise ExperimentError("\n".join(report.failures))


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a table with the columns of all rows, in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "-") or "-" for name in columns] for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    # Names to the left, numbers to the right.
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def machine() -> dict[str, Any]:
    """Returns what figures depend on: the processor, and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "versions": versions}
