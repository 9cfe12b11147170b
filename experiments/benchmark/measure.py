"""What the reports on all kernel families share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.table import Report, progress
from experiments.compile_report import (
    Case,
    Compiled,
    NotSupported,
    check_compiler,
    chip_of,
    chosen,
    compile_case,
    load_cases,
)
from experiments.errors import ExperimentError

Cells = Callable[[Compiled], Mapping[str, str]]
"""Returns the columns of a row."""
Rows = Callable[[str, Case | str], Mapping[str, Cells]]
"""Returns the rows of a case by name, from its name."""


@dataclass(frozen=True)
class ReportConfig:
    """What all reports take."""

    only: str = ""
    """Leave out what does not have this text in its name."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class CompileConfig(ReportConfig):
    """What reports on compiled kernels take."""

    topologies: tuple[str, ...] = ("v5e:2x2", "v6e:2x2")
    """TPUs to compile for."""


@dataclass(frozen=True)
class CompileTimeConfig(CompileConfig):
    """Seconds to compile; a family adds its `cases`."""

    def fill(self, report: Report) -> None:
        """Compiles every case for every TPU; the last row has the longest times."""

        def seconds(compiled: Compiled) -> dict[str, str]:
            return {"seconds": f"{compiled.seconds:.1f}"}

        compile_all(self, report, ("seconds",), lambda name, _: {name: seconds}, schedules=False)
        longest = {"kernel": "longest"}
        for topology in self.topologies:
            times = [
                record["seconds"]
                for record in report.records
                if record["topology"] == topology and "seconds" in record
            ]
            if times:
                longest[f"{chip_of(topology)} seconds"] = f"{max(times):.1f}"
        report.rows.append(longest)


@dataclass(frozen=True)
class CpuConfig(ReportConfig):
    """What reports on running on this machine's CPU take."""

    heads: int = 4
    """Number of heads."""
    features: int = 64
    """Head dimension."""
    repeats: int = 5
    """Runs, of which the fastest counts."""

    def prepare(self, **lengths: tuple[int, ...]) -> None:
        """Checks options, the lengths by name, and leaves JAX the CPU alone."""
        for name, tokens in lengths.items():
            if any(length < 1 for length in tokens):
                raise ExperimentError(f"{name}: {tokens}; all must be at least 1")
        if self.repeats < 1:
            raise ExperimentError(f"repeats: {self.repeats}; it must be at least 1")
        # libtpu, where it is installed, would complain that it finds no TPU.
        jax.config.update("jax_platforms", "cpu")


def compile_all(
    config: Any,
    report: Report,
    columns: Sequence[str],
    rows: Rows,
    *,
    schedules: bool,
    check: Callable[[str, Case], None] = lambda name, case: None,
) -> None:
    """Adds the rows of every case to a report, with the same columns for every TPU.

    Args:
      config: a CompileConfig with `cases`, the file that has them.
      report: to add to.
      columns: their names; the first one says why there is nothing to show.
      rows: what a case shows.
      schedules: whether that is from schedules.
      check: raises an ExperimentError if a case does not say what its rows need.
    """
    check_compiler(*config.topologies)
    for name, case in chosen(load_cases(config.cases), config.only).items():
        shown = rows(name, case)
        table = {row: {"kernel": row} for row in shown}
        for topology in config.topologies:
            compiled, record = None, {"kernel": name, "topology": topology}
            instead = case
            if isinstance(case, str):
                record["missing"] = case
            else:
                try:
                    check(name, case)
                    progress(f"compiling {name} for {topology}")
                    compiled = compile_case(config.cases, name, topology, schedules=schedules)
                    record |= dataclasses.asdict(compiled)
                except NotSupported as error:
                    instead, record["missing"] = "not supported", str(error)
                except ExperimentError as error:
                    instead, record["error"] = "does not compile", str(error)
                    report.failures.append(str(error))
            for row, cells in shown.items():
                found = {columns[0]: instead} if compiled is None else cells(compiled)
                found = dict.fromkeys(columns, "-") | found
                table[row] |= {f"{chip_of(topology)} {c}": cell for c, cell in found.items()}
            report.records.append(record)
        report.rows += table.values()


def directed(
    direction: str, function: Callable[..., jax.Array], argnums: Sequence[int]
) -> Callable[..., Any]:
    """Returns a function itself, "forward", or else that of its sum's gradients."""
    if direction == "forward":
        return function

    def loss(*arrays: Any) -> jax.Array:
        return jnp.sum(function(*arrays).astype(jnp.float32))

    return jax.grad(loss, argnums=tuple(argnums))


def cost(
    function: Callable[..., Any], arrays: Sequence[Any], repeats: int
) -> tuple[float | None, int]:
    """Returns seconds, if there are repeats, and the bytes beside arguments and results."""
    compiled = jax.jit(function).lower(*arrays).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    return fastest(compiled, arrays, repeats) if repeats else None, size


def fastest(function: Callable[..., Any], arguments: Sequence[Any], repeats: int) -> float:
    """Returns the seconds of the fastest of some calls, after one that does not count."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)
