"""Reports on tiled attention, each side by side with its peers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmark import tiled_cases, tiled_features
from experiments.benchmark.table import Report, progress
from experiments.benchmark.tiled_cases import gradient
from experiments.compile_report import (
    Compiled,
    check_compiler,
    chip_of,
    chosen,
    compile_case,
    load_cases,
)
from experiments.errors import ExperimentError
from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
AREA = 512**2
"""Scores that schedules are compared on."""


def _bundles(compiled: Compiled) -> float:
    """Returns those of a case's hot blocks, summed over its kernels, such as a backward's two."""
    return sum(schedule.per_scores(schedule.hot_bundles, AREA) for schedule in compiled.schedules)


def _issues(compiled: Compiled) -> float:
    return sum(schedule.per_scores(schedule.matrix_issues, AREA) for schedule in compiled.schedules)


def _full(compiled: Compiled) -> float:
    """Returns the share of matrix slots that are filled."""
    return _issues(compiled) / (compiled.schedules[0].matrix_slots * _bundles(compiled))


SCHEDULE_COLUMNS = {
    "bundles": lambda compiled: f"{_bundles(compiled):,.0f}",
    "matrix issues": lambda compiled: f"{_issues(compiled):,.0f}",
    "MXU": lambda compiled: f"{_full(compiled):.0%}",
    "spills": lambda compiled: f"{sum(s.hot_spills for s in compiled.schedules):,}",
}


@dataclass(frozen=True)
class ReportConfig:
    """What all reports take."""

    only: str = ""
    """Leave out what does not have this text in its name."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class ScheduleConfig(ReportConfig):
    """TPU schedules, in bundles per 512 x 512 scores. Needs no TPU, but libtpu."""

    topologies: tuple[str, ...] = TOPOLOGIES
    """TPUs to compile for."""
    cases: Path = Path(tiled_cases.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""

    def fill(self, report: Report) -> None:
        """Compiles every case for every TPU."""
        _compile_all(self, report, SCHEDULE_COLUMNS, schedules=True)


@dataclass(frozen=True)
class CompileTimeConfig(ReportConfig):
    """Seconds to compile kernels for TPU. Needs no TPU, but libtpu."""

    topologies: tuple[str, ...] = TOPOLOGIES
    """TPUs to compile for."""
    cases: Path = Path(tiled_features.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""

    def fill(self, report: Report) -> None:
        """Compiles every case for every TPU; the last row has the longest times."""
        columns = {"seconds": lambda compiled: f"{compiled.seconds:.1f}"}
        _compile_all(self, report, columns, schedules=False)
        longest = {"kernel": "longest"}
        for topology in self.topologies:
            seconds = [
                record["seconds"]
                for record in report.records
                if record["topology"] == topology and "seconds" in record
            ]
            if seconds:
                longest[f"{chip_of(topology)} seconds"] = f"{max(seconds):.1f}"
        report.rows.append(longest)


@dataclass(frozen=True)
class CpuConfig(ReportConfig):
    """Time and memory of the XLA implementation beside `jax.nn`'s, on this machine's CPU."""

    tokens: tuple[int, ...] = (1024, 2048, 4096)
    """Lengths to run."""
    compiled_tokens: tuple[int, ...] = (8192, 16384)
    """Lengths that are only compiled, for their memory."""
    heads: int = 4
    """Number of heads."""
    features: int = 64
    """Head dimension."""
    repeats: int = 5
    """Runs, of which the fastest counts."""

    def fill(self, report: Report) -> None:
        """Runs ours and theirs, forward and gradient; growth is over the length before."""
        for name in ("tokens", "compiled_tokens"):
            if any(tokens < 1 for tokens in getattr(self, name)):
                raise ExperimentError(f"{name}: {getattr(self, name)}; all must be at least 1")
        if self.repeats < 1:
            raise ExperimentError(f"repeats: {self.repeats}; it must be at least 1")
        # libtpu, where it is installed, would complain that it finds no TPU.
        jax.config.update("jax_platforms", "cpu")
        for mask, direction in chosen(_passes(), self.only).values():
            before = {}
            for tokens in sorted({*self.tokens, *self.compiled_tokens}):
                before = self._add(report, mask, direction, tokens, before)

    def _add(
        self, report: Report, mask: str, direction: str, tokens: int, before: dict[str, int]
    ) -> dict[str, int]:
        """Adds a row; takes and returns the bytes of each implementation."""
        row = {"pass": f"{direction}, {mask}", "tokens": f"{tokens:,}"}
        record = {"mask": mask, "direction": direction, "tokens": tokens}
        progress(f"{row['pass']}, {tokens} tokens")
        shape = (1, tokens, self.heads, self.features)
        sizes = {}
        for name, attention in (
            ("ours", functools.partial(_ours, "xla", mask)),
            ("jax.nn", functools.partial(_jax_nn, "xla", mask)),
        ):
            function = attention if direction == "forward" else gradient(attention)
            arguments = (jax.ShapeDtypeStruct(shape, jnp.float32),) * 3
            compiled = jax.jit(function).lower(*arguments).compile()
            if tokens in self.tokens:
                arrays = jax.random.normal(jax.random.key(0), (3, *shape))
                seconds = fastest(compiled, tuple(arrays), self.repeats)
                record[f"{name} seconds"] = seconds
            row[f"{name} ms"] = f"{1e3 * seconds:.1f}" if tokens in self.tokens else "-"
            size = compiled.memory_analysis().temp_size_in_bytes
            record[f"{name} bytes"] = sizes[name] = size
            row[f"{name} MiB"] = f"{size / 2**20:.1f}"
            row[f"{name} growth"] = f"{size / before[name]:.2f}" if before.get(name) else "-"
        report.add(row, record)
        return sizes


@dataclass(frozen=True)
class GpuConfig(ReportConfig):
    """Time of ours, cuDNN's and tokamax's attention on a CUDA device."""

    tokens: int = 4096
    """Length."""
    batch: int = 4
    """Number of sequences."""
    heads: int = 8
    """Number of heads."""
    features: int = 128
    """Head dimension."""
    repeats: int = 20
    """Runs, of which the fastest counts."""

    def fill(self, report: Report) -> None:
        """Runs all of them in turn on the same arrays."""
        if jax.default_backend() != "gpu":
            raise ExperimentError(
                "JAX finds no CUDA device here; `make EXTRA=cuda env` installs its CUDA wheels"
            )
        shape = (self.batch, self.tokens, self.heads, self.features)
        arrays = tuple(jax.random.normal(jax.random.key(0), (3, *shape), jnp.bfloat16))
        peers = {
            "ours": functools.partial(_ours, None),
            "cuDNN": functools.partial(_jax_nn, "cudnn"),
        }
        if importlib.util.find_spec("tokamax"):
            peers["tokamax"] = _tokamax
        for label, (mask, direction) in chosen(_passes(), self.only).items():
            row, record = {"pass": label}, {"mask": mask, "direction": direction}
            for name, peer in peers.items():
                attention = functools.partial(peer, mask)
                function = attention if direction == "forward" else gradient(attention)
                progress(f"{label}: {name}")
                seconds = fastest(jax.jit(function), arrays, self.repeats)
                record[f"{name} seconds"] = seconds
                row[f"{name} ms"] = f"{1e3 * seconds:.3f}"
            report.add(row, record)


REPORTS = {
    "schedule": ScheduleConfig,
    "cpu": CpuConfig,
    "compile_time": CompileTimeConfig,
    "gpu": GpuConfig,
}


def fastest(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """Returns the seconds of the fastest of some calls, after one that does not count."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def _passes() -> dict[str, tuple[str, str]]:
    return {
        f"{direction}, {mask}": (mask, direction)
        for direction in ("forward", "gradient")
        for mask in ("causal", "full")
    }


def _ours(implementation: str | None, mask: str, *arrays: Array) -> Array:
    causal = masks.causal() if mask == "causal" else None
    return tiled_attention(*arrays, mask=causal, implementation=implementation)


def _jax_nn(implementation: str, mask: str, *arrays: Array) -> Array:
    return jax.nn.dot_product_attention(
        *arrays, is_causal=mask == "causal", implementation=implementation
    )


def _tokamax(mask: str, *arrays: Array) -> Array:
    import tokamax

    return tokamax.dot_product_attention(
        *arrays, is_causal=mask == "causal", implementation="mosaic"
    )


def _compile_all(
    config: ScheduleConfig | CompileTimeConfig,
    report: Report,
    columns: dict[str, Callable[[Compiled], str]],
    *,
    schedules: bool,
) -> None:
    """Adds a row for every case to a report, with the same columns for every TPU."""
    check_compiler(*config.topologies)
    for name, case in chosen(load_cases(config.cases), config.only).items():
        row = {"kernel": name}
        for topology in config.topologies:
            record = {"kernel": name, "topology": topology}
            cells = dict.fromkeys(columns, "-")
            first = next(iter(columns))
            if isinstance(case, str):
                cells[first] = record["missing"] = case
            else:
                progress(f"compiling {name} for {topology}")
                try:
                    if schedules and case.kernels is None:
                        raise ExperimentError(f"cases: {name} must say what its kernels compute")
                    compiled = compile_case(config.cases, name, topology, schedules=schedules)
                    cells = {column: cell(compiled) for column, cell in columns.items()}
                    record |= dataclasses.asdict(compiled)
                except ExperimentError as error:
                    report.failures.append(str(error))
                    cells[first] = "does not compile"
                    record["error"] = str(error)
            row |= {f"{chip_of(topology)} {column}": cell for column, cell in cells.items()}
            report.records.append(record)
        report.rows.append(row)
