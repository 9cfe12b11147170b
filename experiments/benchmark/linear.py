"""Reports on linear attention and scans, beside their peers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmark import gpu, linear_cases, linear_hopper, measure
from experiments.benchmark.linear_gpu import GpuConfig
from experiments.benchmark.linear_variants import VARIANTS, LinearCase, arrays_of
from experiments.benchmark.measure import Cells, CompileConfig, compile_all, directed
from experiments.benchmark.table import Report, progress
from experiments.compile_report import Case, Compiled, Schedule, chosen
from experiments.errors import ExperimentError

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
"""Options of glibc's mallopt."""

RUN = ("lightning", "gate per channel (GLA)", "gated delta rule per channel (KDA)")
"""Variants that are run."""
PEER = "jax.nn"


def _total(counts: Iterable[float | None], units: float) -> str:
    counts = list(counts)
    return "-" if None in counts or not counts else f"{sum(counts) / units:.2f}"


def _hot(compiled: Compiled, units: int) -> str:
    def of(s: Schedule) -> float | None:
        return None if s.hot_runs is None else s.hot_bundles * s.hot_runs * s.grid_steps

    return _total(map(of, compiled.schedules), units)


def _all(compiled: Compiled, units: int) -> str:
    def of(s: Schedule) -> float | None:
        return None if s.step_bundles is None else s.step_bundles * s.grid_steps

    return _total(map(of, compiled.schedules), units)


def _memory(compiled: Compiled, units: int) -> str:
    return _total((s.operand_bytes for s in compiled.schedules), units * compiled.bytes_per_bundle)


SCHEDULE_COLUMNS = {
    "hot": _hot,
    "all": _all,
    "memory": _memory,
    "apart": lambda compiled, _: f"{sum(s.apart for s in compiled.schedules):,}",
    "spills": lambda compiled, _: f"{sum(s.spills for s in compiled.schedules):,}",
}


@dataclass(frozen=True)
class ScheduleConfig(CompileConfig):
    """TPU schedules, in bundles per token and head. Needs no TPU, but libtpu."""

    cases: Path = Path(linear_cases.__file__)
    """Python file with a function `cases()` that returns `LinearCase`s by name."""

    def fill(self, report: Report) -> None:
        """Compiles every case for every TPU; a backward has a row with its forward, too."""
        compile_all(self, report, tuple(SCHEDULE_COLUMNS), _rows, schedules=True, check=_check)


def _check(name: str, case: Case) -> None:
    if not isinstance(case, LinearCase):
        raise ExperimentError(f"cases: {name} must be a LinearCase, which says what it counts by")


def _rows(name: str, case: Case | str) -> dict[str, Cells]:
    def cells(compiled: Compiled, whole: bool = True) -> dict[str, str]:
        if not whole:
            kept = tuple(s for s in compiled.schedules if case.forward not in s.kernel)
            compiled = dataclasses.replace(compiled, schedules=kept)
        return {column: cell(compiled, case.units) for column, cell in SCHEDULE_COLUMNS.items()}

    if isinstance(case, str) or not name.startswith("backward"):
        return {name: cells}
    return {name: functools.partial(cells, whole=False), f"forward + {name}": cells}


@dataclass(frozen=True)
class CompileTimeConfig(measure.CompileTimeConfig):
    """Seconds to compile kernels for TPU. Needs no TPU, but libtpu."""

    cases: Path = Path(linear_cases.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""


@dataclass(frozen=True)
class CpuConfig(measure.CpuConfig):
    """Time and memory per token of the XLA implementation, and of `jax.nn`'s, on this CPU."""

    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Lengths."""
    peer_tokens: int = 4096
    """The longest that jax.nn's attention, which takes time by its square, is run for."""
    heads: int = 2
    """Number of heads."""
    features: int = 128
    """Head dimension."""
    repeats: int = 5
    """Rounds, of which the median counts. In each all lengths take their turn."""
    work: int = 65536
    """Tokens of a turn, in calls one after another; a longer length is one call."""

    def fill(self, report: Report) -> None:
        """Runs all lengths of each pass; its last row is the largest over the smallest time."""
        self.prepare(tokens=self.tokens)
        _keep_memory()
        for label, (name, direction) in chosen(_passes(), self.only).items():
            longest = self.peer_tokens if name == PEER else max(self.tokens)
            calls = {}
            for tokens in sorted({tokens for tokens in self.tokens if tokens <= longest}):
                progress(f"{label}, {tokens} tokens")
                shape = (1, tokens, self.heads, self.features)
                function, arrays = _called(name, direction, shape, jnp.float32, "xla")
                calls[tokens] = jax.jit(function).lower(*arrays).compile(), arrays
            times, before = _times_per_token(calls, self.repeats, self.work), None
            for tokens, (compiled, _) in calls.items():
                size = compiled.memory_analysis().temp_size_in_bytes
                row = {
                    "pass": label,
                    "tokens": f"{tokens:,}",
                    "us per token": f"{1e6 * times[tokens]:.2f}",
                    "MiB": f"{size / 2**20:.1f}",
                    "growth": f"{size / before:.2f}" if before else "-",
                }
                seconds = times[tokens] * tokens
                record = {"pass": label, "tokens": tokens, "seconds": seconds, "bytes": size}
                report.add(row, record)
                before = size
            if times:
                spread = max(times.values()) / min(times.values())
                row = {"pass": label, "tokens": "spread", "us per token": f"{spread:.2f}"}
                report.add(row, {"pass": label, "spread": spread})


def _times_per_token(
    calls: Mapping[int, tuple[Callable[..., Any], Sequence[Array]]], repeats: int, work: int
) -> dict[int, float]:
    """Returns seconds by number of tokens: medians of rounds, as a machine's speed drifts."""
    times = {tokens: [] for tokens in calls}
    for turn in range(repeats + 1):
        for tokens, (function, arrays) in calls.items():
            count = max(work // tokens, 1)
            began = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(function(*arrays))
            if turn:  # the first does not count
                times[tokens].append((time.perf_counter() - began) / (count * tokens))
    return {tokens: statistics.median(found) for tokens, found in times.items()}


def _keep_memory() -> None:
    """Keeps what calls free in this process, where it runs on glibc.

    By default each large array comes as fresh pages, which the operating system must clear: a fifth
    of the time of a long call, and no part of what is measured.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1):
            mallopt(option, value)


@dataclass(frozen=True)
class HopperConfig(gpu.HopperConfig):
    """The assembler's report on the GPU kernels. Needs no GPU, but JAX's CUDA plugin and nvcc."""

    cases: Path = Path(linear_hopper.__file__)
    """Python file with a function `cases()`, as of `python -m experiments.compile_report`."""


REPORTS = {
    "schedule": ScheduleConfig,
    "hopper": HopperConfig,
    "cpu": CpuConfig,
    "compile_time": CompileTimeConfig,
    "gpu": GpuConfig,
}


def _passes() -> dict[str, tuple[str, str]]:
    return {
        f"{direction}, {name}": (name, direction)
        for direction in ("forward", "gradient")
        for name in (*RUN, PEER)
    }


def _called(
    name: str, direction: str, shape: tuple[int, ...], dtype: Any, implementation: str | None
) -> tuple[Callable[..., Any], tuple[Array, ...]]:
    """Returns the function of a pass, and its arrays."""
    batch, tokens, heads, features = shape
    inputs = VARIANTS["no decay" if name == PEER else name].inputs(
        tokens, heads, features, dtype, batch
    )
    arrays = tuple(arrays_of(inputs).values())
    if name != PEER:
        function = VARIANTS[name].function(direction, [*inputs], heads, implementation)
        return function, arrays

    def attention(*arrays: Array) -> Array:
        return jax.nn.dot_product_attention(*arrays, is_causal=True, implementation=implementation)

    return directed(direction, attention, range(3)), arrays
