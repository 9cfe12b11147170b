"""Static TPU schedules: what the TPU compiler makes of Pallas kernels, on a machine without a TPU.

    python -m experiments.compile_report CASES.py --topology v5e:2x2

A TensorCore issues one VLIW bundle a cycle, in an order that is fixed when it is compiled, so the
bundles of the basic block in which a kernel spends its time are close to the cycles of one pass
through it, and the same in every run. CASES.py has a function `cases()` that returns
`{name: Case}`; every `pallas_call` in them needs a `name`. The reports that are read here are the
compiler's own and no public interface: compare kernels that one version of libtpu has compiled.
"""

from __future__ import annotations

import glob
import importlib.util
import math
import multiprocessing
import os
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmark.bundles import read_code
from experiments.benchmark.table import Report, progress, show
from experiments.errors import NO_TPU, ExperimentError, run_command

# Elements of the square of weights by which a matrix unit multiplies a row in one bundle.
WEIGHTS = {"v4": 128**2, "v5e": 128**2, "v5p": 128**2, "v6e": 256**2, "tpu7x": 256**2}
LOG = "stderr.log"
_ENVIRONMENT = NO_TPU | {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process stops at libtpu's lock file
}


@dataclass(frozen=True)
class Case:
    """A function to compile for TPU."""

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    kernels: Mapping[str, Work] | None = None
    """The kernels to report, by name, with what they do; None for all."""


@dataclass(frozen=True)
class Work:
    """What one pass through a kernel's hot block computes, for attention."""

    products: int
    """Matrix products that have the tile of scores as an operand or a result."""
    features: int
    """Head dimension, of query and value alike."""
    scores: int | None = None
    """Scores in the tile; None for the power of two nearest to the block's matrix issues."""


@dataclass(frozen=True)
class Schedule:
    """The schedule of one kernel."""

    kernel: str
    bundles: int
    hot_bundles: int
    """Of the hot block: the one with most matrix issues, and of several alike the shortest."""
    twins: tuple[int, ...]
    """Bundles of the other blocks alike, such as those of tiles that need the mask."""
    matrix_issues: int
    """Of the hot block, as all that follow up to its spills: busy units, summed over bundles.

    Products that start in a burst overlap in the compiler's count, and count less.
    """
    matrix_slots: int
    """Matrix units of a bundle."""
    slots: dict[str, float]
    """Issues by kind of slot, as a share of what the block's bundles could hold."""
    hot_spills: int
    """Vector registers that the block stores and loads for want of registers."""
    spills: int
    """Those of the whole kernel."""
    grid_steps: int | None
    """None if the traced function does not tell."""
    hot_runs: float | None
    """Passes through the hot block in a grid step; None if it cannot be told."""
    step_bundles: float | None
    """Bundles that a grid step runs in all, loops as often as they run; None likewise."""
    apart: int
    """Bundles that are not in them, as only one step runs them, such as the first of a row."""
    operand_bytes: int | None
    """Of operands and results, each counted once; None as `grid_steps`."""
    scores: int | None = None
    """Scores that one pass through the hot block computes."""

    def per_scores(self, count: float, scores: int) -> float | None:
        """Scales a count of the hot block to a number of scores."""
        return None if self.scores is None else count * scores / self.scores


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    seconds: float
    """From the function to the executable."""
    temporary_bytes: int
    bytes_per_bundle: float
    """That the TPU's memory moves in the time of a bundle."""
    schedules: tuple[Schedule, ...] = ()
    """Empty if they were not asked for."""


class NotSupported(ExperimentError):
    """A case that its implementation refuses."""


class Call(NamedTuple):
    """What a traced function says of a `pallas_call`."""

    grid_steps: int | None
    operand_bytes: int | None


@dataclass(frozen=True)
class CompileReportConfig:
    """Compiles kernels for TPU and shows their static schedules."""

    cases: Annotated[Path, tyro.conf.Positional]
    """Python file with a function `cases()`."""
    topology: str = "v5e:2x2"
    """The TPU, such as v5e:2x2, v6e:2x2, v5p:2x2x1, tpu7x:2x2x1."""
    only: str = ""
    """Leave out cases without this text in their name."""
    output: Path | None = None
    """JSON file to write."""


def main() -> None:
    """The command line."""
    config = tyro.cli(
        CompileReportConfig, prog="python -m experiments.compile_report", description=__doc__
    )
    check_compiler(config.topology)
    report = Report()
    for name, case in chosen(load_cases(config.cases), config.only).items():
        if isinstance(case, str):
            report.add({"case": name, "kernel": case})
            continue
        progress(f"compiling {name} for {config.topology}")
        try:
            compiled = compile_case(config.cases, name, config.topology)
        except ExperimentError as error:
            report.fail({"case": name, "kernel": "does not compile"}, error)
            continue
        for schedule in compiled.schedules:
            row = {"case": name, "kernel": schedule.kernel} | _row(schedule)
            record = {"case": name, "seconds": compiled.seconds, **asdict(schedule)}
            report.add(row | {"seconds": f"{compiled.seconds:.1f}"}, record)
    show(report, config.output, f"compile_report {config.cases} --topology {config.topology}")


def _row(schedule: Schedule) -> dict[str, str]:
    fullest = sorted(schedule.slots.items(), key=lambda slot: -slot[1])[:3]
    return {
        "bundles": f"{schedule.bundles:,}",
        "hot block": f"{schedule.hot_bundles:,}",
        "bundles a step": "-" if schedule.step_bundles is None else f"{schedule.step_bundles:,.0f}",
        "twins": " ".join(f"{twin:,}" for twin in schedule.twins),
        "matrix issues": f"{schedule.matrix_issues:,}",
        "fullest slots": ", ".join(f"{name} {share:.0%}" for name, share in fullest),
        "spills": f"{schedule.hot_spills:,} of {schedule.spills:,}",
        "grid steps": "-" if schedule.grid_steps is None else f"{schedule.grid_steps:,}",
    }


def chosen[T](cases: Mapping[str, T], only: str) -> dict[str, T]:
    """Returns the cases with a text in their name.

    Raises:
      ExperimentError: if there is none.
    """
    found = {name: case for name, case in cases.items() if only in name}
    if not found:
        raise ExperimentError(
            f"only: {only!r} is in the name of no case; there are {', '.join(cases)}"
        )
    return found


def load_cases(path: Path) -> dict[str, Case | str]:
    """Returns what `cases()` of a Python file returns: cases, or why there is none.

    Raises:
      ExperimentError: if the file cannot be read or has no such function.
    """
    spec = importlib.util.spec_from_file_location("compile_report_cases", path)
    if spec is None or not path.is_file():
        raise ExperimentError(f"cases: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "cases"):
        raise ExperimentError(f"cases: {path} must have a function cases(); it has none")
    return module.cases()


def check_compiler(*topologies: str) -> None:
    """Raises an ExperimentError if there is no TPU compiler, or a topology is of no known TPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise ExperimentError(
            "libtpu, the TPU compiler, is not installed; on Linux x86-64 "
            "`python -m pip install -e '.[dev]'` installs it"
        )
    for topology in topologies:
        if chip_of(topology) not in WEIGHTS:
            raise ExperimentError(
                f"topology: {topology!r}; must be one of {', '.join(WEIGHTS)} and a shape, as in "
                "v5e:2x2"
            )


def chip_of(topology: str) -> str:
    """Returns the name of the TPU of a topology."""
    return topology.partition(":")[0]


def compile_case(cases: Path, name: str, topology: str, *, schedules: bool = True) -> Compiled:
    """Compiles a case in a process of its own, as the compiler takes its options once.

    Args:
      cases: the file that defines it.
      name: its name there.
      topology: the TPU to compile for.
      schedules: whether to read schedules; writing them takes time too.

    Raises:
      NotSupported: if its implementation refuses it.
      ExperimentError: if it does not compile, or there is no compiler.
    """
    check_compiler(topology)
    with tempfile.TemporaryDirectory() as folder:
        dump, log = Path(folder), Path(folder, LOG)
        log.touch()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as child:
            try:
                compiled, calls, works = child.submit(
                    _compile, cases, name, topology, dump, schedules
                ).result()
            except BrokenProcessPool:
                said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                raise ExperimentError(f"{name}: the compiler died: {said[-1]}") from None
        found = read_schedules(dump, calls) if schedules else []
    if works is not None:
        found = [
            with_scores(schedule, works[schedule.kernel], WEIGHTS[chip_of(topology)])
            for schedule in found
            if schedule.kernel in works
        ]
    missing = set(calls if works is None else works) - {schedule.kernel for schedule in found}
    if schedules and (missing or not found):
        listed = ", ".join(sorted(missing)) or "of any name"
        raise ExperimentError(f"{name}: the compiler reports no kernel {listed}")
    return Compiled(**compiled, schedules=tuple(found))


def _compile(
    cases: Path, name: str, topology: str, dump: Path, schedules: bool
) -> tuple[dict[str, Any], dict[str, Call], dict[str, Work] | None]:
    """Runs in the child: compiles, with the compiler's reports written to `dump`."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    os.environ.update(_ENVIRONMENT)
    if schedules:
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
    jax.config.update("jax_platforms", "cpu")
    # What comes out of the cache leaves no reports.
    jax.config.update("jax_enable_compilation_cache", False)
    with open(dump / LOG, "w") as log:
        os.dup2(log.fileno(), 2)
    case = load_cases(cases)[name]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh = Mesh(np.array(devices[:1]), ("device",))
        sharding = NamedSharding(mesh, PartitionSpec())
        arguments = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in case.arguments
        ]
        began = time.perf_counter()
        # Some rules of lowering ask which TPU it is.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            try:
                traced = jax.jit(case.function).trace(*arguments)
            except NotImplementedError as error:
                raise NotSupported(f"{name} is not supported: {error}") from None
            tpu = pltpu.get_tpu_info()
            lowered = traced.lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        seconds = time.perf_counter() - began
    except NotSupported:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 400) or type(error).__name__
        raise ExperimentError(f"{name} does not compile for {topology}: {reason}") from None
    bundles_per_second = tpu.bf16_ops_per_second / (2 * tpu.num_mxus * tpu.mxu_column_size**2)
    found = {
        "seconds": seconds,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes_per_bundle": tpu.mem_bw_bytes_per_second / bundles_per_second,
    }
    works = None if case.kernels is None else dict(case.kernels)
    # XLA drops what no result needs.
    program = compiled.as_text()
    calls = {name: x for name, x in pallas_calls(traced.jaxpr).items() if name in program}
    # A primitive that becomes a kernel when it is lowered hides it: then the case names it.
    calls = dict.fromkeys(works or (), Call(None, None)) | calls
    return found, calls, works


def pallas_calls(jaxpr: Any, function: str = "") -> dict[str, Call]:
    """Returns every `pallas_call` in a jaxpr, by its name, or that of the function it is in."""
    calls = {}
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = str(equation.params.get("name") or function)
        if equation.primitive.name == "pallas_call":
            grid = equation.params["grid_mapping"].grid
            static = all(isinstance(size, int) for size in grid)
            avals = [x.aval for x in (*equation.invars, *equation.outvars)]
            size = sum(aval.size * aval.dtype.itemsize for aval in avals)
            calls[name] = Call(math.prod(grid) if static else None, size)
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_has_equations):
            if _has_equations(inner):
                calls |= pallas_calls(inner, name)
    return calls


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def read_schedules(dump: Path, calls: Mapping[str, Call]) -> list[Schedule]:
    """Reads the compiler's reports on kernels that are given by name."""
    found = []
    for path in sorted(dump.glob("*-final_bundles.txt")):
        # A kernel's only result may be named after the operand that it is next.
        pattern = r"(\d+-(.+?)(?:\.\d+)?(?:\.ins_\w*)?)-\d+-final_bundles"
        named = re.fullmatch(pattern, path.stem)
        if named is None or named[2] not in calls:
            continue
        (table,) = dump.glob(
            f"{glob.escape(named[1])}-*-final_hlo-static-per-bundle-utilization.txt"
        )
        with path.open(errors="replace") as bundles, table.open() as issues:
            found.append(read_schedule(named[2], bundles, issues, calls[named[2]]))
    return found


def read_schedule(
    kernel: str, bundles: Iterable[str], issues: Iterable[str], call: Call
) -> Schedule:
    """Reads the schedule of one kernel.

    Args:
      kernel: its name.
      bundles: lines of the report of its bundles.
      issues: lines of the report of how many slots each bundle fills.
      call: its `pallas_call`.
    """
    columns, capacity, rows = _read_issues(issues)
    code = read_code(bundles)
    bundles = code.blocks[-1].stop
    if bundles != len(rows):
        raise ExperimentError(
            f"{kernel}: the compiler's reports do not agree: {bundles} bundles, of "
            f"{len(rows)} of which the slots are known"
        )
    filled = {name: rows[:, i] for i, name in enumerate(columns)}

    def count(name: str, block: range) -> int:
        return int(filled[name][block.start : block.stop].sum())

    def spilled(block: range) -> int:
        return count("VSTORE:SPILL", block) + count("VLOAD:FILL", block)

    blocks = [b for b in code.blocks if b.start not in code.apart]
    # Tiles that need the mask and tiles that do not have a block each, with the same products.
    most = max(count("MATMUL", block) for block in blocks)
    if most:
        alike = [block for block in blocks if count("MATMUL", block) >= 0.9 * most]
        hot, *twins = sorted(alike, key=len)
    else:
        hot, twins = max(blocks, key=len), []
    runs = code.runs(call.grid_steps)
    return Schedule(
        kernel=kernel,
        bundles=len(rows),
        hot_bundles=len(hot),
        twins=tuple(map(len, twins)),
        matrix_issues=count("MATMUL", hot),
        matrix_slots=capacity[columns.index("MATMUL")],
        slots={
            name: count(name, hot) / (size * len(hot))
            for name, size in zip(columns, capacity, strict=True)
            if size
        },
        hot_spills=spilled(hot),
        spills=spilled(range(len(rows))),
        grid_steps=call.grid_steps,
        hot_runs=None if runs is None else float(runs[hot.start]),
        step_bundles=None if runs is None else float(runs.sum()),
        apart=len(code.apart),
        operand_bytes=call.operand_bytes,
    )


def _read_issues(lines: Iterable[str]) -> tuple[list[str], list[int], np.ndarray]:
    """Returns kinds of slots, how many there are of each, and how many each bundle fills."""
    lines = [line.strip() for line in lines]
    numbers = [line for line in lines if line[:1].isdigit()]
    columns = [name.strip() for name in next(line for line in lines if "," in line).split(",")]
    rows = np.array([line.split() for line in numbers], int)
    return columns, rows[0].tolist(), rows[1:]


def with_scores(schedule: Schedule, work: Work, weights: int) -> Schedule:
    """Returns the schedule with the number of scores of a pass through its hot block."""
    scores = work.scores
    if scores is None:
        done = schedule.matrix_issues * weights / (work.products * work.features)
        scores = 2 ** round(math.log2(max(done, 1)))
    return replace(schedule, scores=scores)


if __name__ == "__main__":
    run_command(main)
