"""What reports on GPUs share: those that run on one, and that on what is compiled for one."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmark import apart, hopper
from experiments.benchmark.measure import ReportConfig, fastest
from experiments.benchmark.table import Report, progress, read_measured
from experiments.compile_report import NotSupported, chosen, load_cases
from experiments.errors import ExperimentError


class Peak(NamedTuple):
    """The most that a device does in a second."""

    operations: float
    """On dense bfloat16 matrices."""
    bandwidth: float
    """Bytes that its memory moves."""


PEAKS = {"H100": Peak(989e12, 3.35e12), "H200": Peak(989e12, 4.8e12)}
"""By what the name of a device contains: NVIDIA's figures, those of the H100 for SXM."""

HIDDEN = 2048
"""Features of all heads."""

ROUND, MOST = 0.02, 16
"""Seconds, about, and at most so many calls of a round: the device does not wait for the host."""


@dataclass(frozen=True)
class DeviceConfig(ReportConfig):
    """What reports on running on a CUDA device take; each has `measure`.

    A kernel may never end, and one that fails may leave the device unusable to its process. So
    they run in another one, see `apart`: what did not end is given up, and the others go on.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    """Options that change figures, and are not in the names of what is measured."""

    most_seconds: float = 300.0
    """Seconds after which what is measured is given up."""
    resume: bool = False
    """Take from the output file what has been measured before, of the same code; add the rest."""
    processes: int = 1
    """Processes that compile at the same time, and run one after the other. What XLA tries on the
    device while it compiles may slow down another one's runs."""

    def fill(self, report: Report) -> None:
        """Runs `measure` in a process of its own."""
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            numbers = [x for x in numbers if isinstance(x, (int, float)) and x is not False]
            if any(x < 1 for x in numbers):
                raise ExperimentError(f"{name}: {value}; it must be at least 1")
        if self.resume:
            report.measured |= read_measured(self.output)
        options = dict(most_seconds=self.most_seconds, processes=self.processes)
        apart.run(_measure, self, report, works=works, **options)

    def measure(self, report: Report) -> None:
        """Fills the report, on the device at hand."""
        raise NotImplementedError


def _measure(config: DeviceConfig, report: Report) -> None:
    # Memory is left to PyTorch, unless it is said how much. JAX reads it when it finds devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    check_device()
    check_known(config, report)
    config.measure(report)
    if not report.rows:
        raise ExperimentError(f"only: {config.only!r} is in the name of nothing that is measured")


def check_device() -> None:
    """Raises an ExperimentError if JAX finds no CUDA device."""
    if jax.default_backend() != "gpu":
        raise ExperimentError(
            "JAX finds no CUDA device here; `make EXTRA=cuda env` installs its CUDA wheels"
        )


def check_known(config: DeviceConfig, report: Report) -> None:
    """Raises an ExperimentError if what is known has been measured otherwise, or elsewhere."""
    here = {"device": jax.devices()[0].device_kind}
    here |= {name: getattr(config, name) for name in config.shared}
    known = report.measure("what all of it shares", lambda: here)
    for name, value in here.items():
        if known.get(name, value) != value:
            raise ExperimentError(
                f"resume: {name}: {value}; what is known was measured with {known[name]}"
            )


def works() -> bool:
    """Returns whether the device still computes: after some errors it does not, in a process."""
    try:
        return int(jnp.ones(8).sum()) == 8
    except Exception:  # whatever it is
        return False


def shape_of(total: int, tokens: int, features: int) -> tuple[int, int, int, int]:
    """Returns sequences, tokens, heads and features of as many tokens in all, or of a sequence."""
    return max(total // tokens, 1), tokens, max(HIDDEN // features, 1), features


def normal(total: int, tokens: int, features: int) -> Arrays:
    """Returns what makes random queries, keys and values of `shape_of`, once."""
    shape = (3, *shape_of(total, tokens, features))
    return functools.cache(lambda: tuple(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)))


def share(rate: float, of: str) -> str:
    """Returns, to write after a rate, its share of the device's peak; "" if that is not known."""
    kind = jax.devices()[0].device_kind
    found = (getattr(peak, of) for name, peak in PEAKS.items() if name in kind)
    return next((f" ({rate / peak:.0%})" for peak in found), "")


def calls_of(seconds: float) -> int:
    """Returns the calls of a round, of which one has taken so long."""
    return int(min(max(ROUND / seconds, 1), MOST))


def cost(function: Callable[..., Any], arrays: Sequence[Any], repeats: int) -> dict[str, float]:
    """Returns seconds of a call in the fastest of some rounds, and bytes beside its arguments."""
    compiled = jax.jit(function).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    with apart.alone():
        count = calls_of(fastest(compiled, arrays, 1))

        def calls(*arrays: Any) -> Any:
            for _ in range(count):
                out = compiled(*arrays)
            return out

        seconds = fastest(calls, arrays, repeats) / count
    return {
        "seconds": seconds,
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }


Cost = Callable[[Sequence[Any], int], Mapping[str, Any]]
"""Measures a peer on arrays so many times."""
Arrays = Callable[[], Sequence[Any]]
"""Makes arrays when something is to be measured on them."""


def torch_cost(
    function: Callable[..., Any],
    version: str,
    direction: str,
    arrays: Sequence[jax.Array],
    repeats: int,
) -> dict[str, Any]:
    """Is `cost` of PyTorch, by the device's clock, on the same arrays; beside it are versions.

    Args:
      function: of tensors to the output, of the shape of the third of them.
      version: of what the function belongs to.
      direction: "forward", or "gradient" for that by all arrays as well.
      arrays: query, key and value first.
      repeats: rounds.
    """
    import torch

    leaves = [torch.from_dlpack(array) for array in jax.block_until_ready(arrays)]
    cotangent = torch.ones_like(leaves[2])
    for leaf in leaves:
        leaf.requires_grad_(direction == "gradient")

    def call() -> None:
        out = function(*leaves)
        if direction == "gradient":
            torch.autograd.grad(out, leaves, cotangent)

    def seconds(count: int) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(count):
            call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / count

    with apart.alone():
        try:
            seconds(1)  # in which kernels are compiled, and what is fastest is tried
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            count = calls_of(seconds(1))
            size = torch.cuda.max_memory_allocated() - before
            fastest = min(seconds(count) for _ in range(repeats))
        finally:
            torch.cuda.empty_cache()  # JAX needs memory, too
    version = f"{version}, PyTorch {torch.__version__}"
    return {"seconds": fastest, "bytes": size, "version": version}


def measured(
    report: Report,
    record: dict[str, Any],
    label: str,
    name: str,
    cost: Cost,
    arrays: Arrays,
    repeats: int,
) -> Mapping[str, Any] | None:
    """Measures a peer; if it fails that is in the record, and the others go on.

    Args:
      report: what has been measured so far.
      record: to add to what is measured, or the error.
      label: what is measured, for the terminal.
      name: of the peer.
      cost: measures it.
      arrays: on what.
      repeats: rounds.
    """

    def measure() -> Mapping[str, Any]:
        with apart.alone():
            made = jax.block_until_ready(arrays())
        return cost(made, repeats)

    found = report.measure(f"{label}: {name}", measure)
    record |= {f"{name} {what}": value for what, value in found.items()}
    return None if "error" in found else found


@dataclass(frozen=True)
class HopperConfig(ReportConfig):
    """The assembler's report on GPU kernels; a family adds its `cases`."""

    def fill(self, report: Report) -> None:
        """Compiles every case for a Hopper GPU."""
        hopper.check_compiler()
        jax.config.update("jax_platforms", "cpu")
        # What comes out of the cache leaves no reports.
        jax.config.update("jax_enable_compilation_cache", False)
        for name, case in chosen(load_cases(self.cases), self.only).items():
            progress(f"compiling {name}")
            try:
                kernels = hopper.compile_kernels(case.function, case.arguments)
            except NotSupported as error:
                row = {"case": name, "kernel": "not supported"}
                report.add(row, {"case": name, "missing": str(error)})
                continue
            except ExperimentError as error:
                report.fail({"case": name, "kernel": "does not compile"}, error)
                continue
            for kernel in kernels:
                record = {"case": name, **dataclasses.asdict(kernel)}
                report.add(hopper.row(record), record)
