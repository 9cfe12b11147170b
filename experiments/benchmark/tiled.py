"""Reports on tiled attention, each side by side with its peers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import Array

from experiments.benchmark import gpu, measure, tiled_cases, tiled_features, tiled_hopper
from experiments.benchmark.measure import CompileConfig, compile_all, cost, directed
from experiments.benchmark.table import Report, progress
from experiments.benchmark.tiled_gpu import GpuConfig
from experiments.benchmark.tiled_tune import TuneConfig
from experiments.compile_report import Case, Compiled, chosen
from experiments.errors import ExperimentError
from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention

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
class ScheduleConfig(CompileConfig):
    """TPU schedules, in bundles per 512 x 512 scores. Needs no TPU, but libtpu."""

    cases: Path = Path(tiled_cases.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""

    def fill(self, report: Report) -> None:
        """Compiles every case for every TPU."""

        def cells(compiled: Compiled) -> dict[str, str]:
            return {column: cell(compiled) for column, cell in SCHEDULE_COLUMNS.items()}

        def check(name: str, case: Case) -> None:
            if case.kernels is None:
                raise ExperimentError(f"cases: {name} must say what its kernels compute")

        compile_all(
            self,
            report,
            tuple(SCHEDULE_COLUMNS),
            lambda name, _: {name: cells},
            schedules=True,
            check=check,
        )


@dataclass(frozen=True)
class CompileTimeConfig(measure.CompileTimeConfig):
    """Seconds to compile kernels for TPU. Needs no TPU, but libtpu."""

    cases: Path = Path(tiled_features.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""


@dataclass(frozen=True)
class CpuConfig(measure.CpuConfig):
    """Time and memory of the XLA implementation beside `jax.nn`'s, on this machine's CPU."""

    tokens: tuple[int, ...] = (1024, 2048, 4096)
    """Lengths to run."""
    compiled_tokens: tuple[int, ...] = (8192, 16384)
    """Lengths that are only compiled, for their memory."""

    def fill(self, report: Report) -> None:
        """Runs ours and theirs, forward and gradient; growth is over the length before."""
        self.prepare(tokens=self.tokens, compiled_tokens=self.compiled_tokens)
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
        shape = (3, 1, tokens, self.heads, self.features)
        arrays = tuple(jax.random.normal(jax.random.key(0), shape))
        repeats = self.repeats if tokens in self.tokens else 0
        sizes = {}
        for name, attention in (("ours", _ours), ("jax.nn", _jax_nn)):
            function = directed(direction, functools.partial(attention, "xla", mask), range(3))
            seconds, size = cost(function, arrays, repeats)
            if seconds is not None:
                record[f"{name} seconds"] = seconds
            row[f"{name} ms"] = "-" if seconds is None else f"{1e3 * seconds:.1f}"
            record[f"{name} bytes"] = sizes[name] = size
            row[f"{name} MiB"] = f"{size / 2**20:.1f}"
            row[f"{name} growth"] = f"{size / before[name]:.2f}" if before.get(name) else "-"
        report.add(row, record)
        return sizes


@dataclass(frozen=True)
class HopperConfig(gpu.HopperConfig):
    """The assembler's report on the GPU kernels. Needs no GPU, but JAX's CUDA plugin and nvcc."""

    cases: Path = Path(tiled_hopper.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""


REPORTS = {
    "schedule": ScheduleConfig,
    "hopper": HopperConfig,
    "cpu": CpuConfig,
    "compile_time": CompileTimeConfig,
    "gpu": GpuConfig,
    "tune": TuneConfig,
}


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
