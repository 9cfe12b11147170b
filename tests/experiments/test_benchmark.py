"""The benchmark command and the reports on static TPU schedules."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import signal
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import compile_report
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import (
    hopper,
    linear,
    linear_cases,
    linear_variants,
    measure,
    tiled,
    tiled_cases,
    tiled_features,
)
from experiments.benchmark.bundles import Loop, read_code
from experiments.benchmark.table import Report, markdown, show
from experiments.compile_report import Call, NotSupported, Work, read_schedule
from experiments.errors import ExperimentError
from pallas_kernels.linear import linear_attention

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is for Linux x86-64"
)

# A product of 256 x 128 x 128 in two grid steps, with a loop after it and something that only the
# first step does, beside a case that is not there, one that its
# implementation refuses, one that does not compile, and one without a kernel of ours.
CASES = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from experiments.compile_report import Case, Work

X, Y = (jax.ShapeDtypeStruct((n, 128), jnp.bfloat16) for n in (256, 128))


def refused(x):
    raise NotImplementedError("it has no such feature")


def kernel(x, y, out, scratch):
    @pl.when(pl.program_id(0) == 0)
    def _():
        scratch[...] = y[...] * y[...]

    out[...] = jnp.dot(x[...], scratch[...], preferred_element_type=jnp.float32)

    def row(i, carry):
        out[pl.ds(i, 1)] = jnp.exp(out[pl.ds(i, 1)]) + carry
        return carry + 1

    jax.lax.fori_loop(0, 128, row, 0.0)


@jax.jit
def product(x, y):
    block = pl.BlockSpec((128, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[block, pl.BlockSpec((128, 128), lambda i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.bfloat16)],
        name="product",
    )(x, y)


def cases():
    return {
        "product": Case(product, (X, Y), {"product": Work(1, 128)}),
        "missing": "not available",
        "refused": Case(refused, (X,), {"product": Work(1, 128)}),
        "wrong": Case(jnp.matmul, (Y, X)),
        "plain": Case(jnp.matmul, (X, Y), {"product": Work(1, 128)}),
    }
"""

# Bundles with their marks; a branch at 0x2 is followed by four bundles that run either way.
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %1 = smov.u32 0 }
   0x1 LB: > { %2 = vmatmul.bf16.gmra.mxu0 %v1
     of a bundle on two lines }
   0x2   : > { %3 = sbr.rel (%p1) target = $region3 }
   0x3   : > { %4 = nop }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   : > { %5 = vmatmul.bf16.gmra.mxu0 %v2 }
   0x8   : > { %6 = vmatmul.bf16.gmra.mxu0 %v2 }
   0x9 PF: > { %7 = nop }
"""
# Matrix issues, spills stored and filled, and a slot that this TPU does not have.
ISSUES = """\
== CAPACITY:
MATMUL, VLOAD:FILL, VSTORE:SPILL, VALU
  4 3 1 0
== UTILIZATION:
0 0 0 0
3 1 0 0
2 0 1 0
0 0 0 0
0 0 0 0
0 0 0 0
0 0 0 0
4 0 1 0
1 2 0 0
0 0 1 0
"""


# The bundles of a loop in the one over grid steps, and of three branches, with an index that is
# spilled; {} stands for the four after a branch.
LOOPS = """\
: { %s1_s1 = smov.u32 0 /* copy for cssa */ }
LB: > { %s2_s2 = sphi %s1_s1, %s3_s3 /* iteration index, stage = 1 */ } /* Start region 5 */
: > { %9 = sst [smem:[#allocation7_spill]] %s2_s2 ;; %p9_p9 = scmp.ne.s32.totalorder %s8_s8, 1 }
: > { %s3_s3 = sadd.s32 1, %s2_s2 ;; %p1_p1 = scmp.ge.s32.totalorder %s3_s3, 6 /* exit test */ }
: > { %10 = sbr.rel (%p7_p7) target = $region8 ;; %p7_p7 = scmp.eq.s32.totalorder %s2_s2, 0 }
{}
LB: >> { %s5_s5 = sphi %s4_s4, %s6_s6 ;; %s4_s4 = smov.u32 2 } /* Start region 6 */
: >> { %s6_s6 = sadd.s32 4, %s5_s5 ;; %p2_p2 = scmp.ge.s32.totalorder (%p1_p1), %s6_s6, 10 }
: >> { %11 = sbr.rel (!%p2_p2) target = $region6 }
{}
: > { %s7_s7 = sld [smem:[#allocation7_spill]] ;; %p3_p3 = scmp.ne.s32.totalorder %s7_s7, 0 }
: > { %12 = sbr.rel (%p4_p4) target = $region7 ;; %p4_p4 = por %p9_p9, %p3_p3 }
{}
: > { %v1_v1 = vld [vmem:[%s7_s7] sm:$0xff] }
PF: > { %13 = sbr.rel (%p9_p9) target = $region8 } /* Start/End empty region 7 */
{}
: > { %v2_v2 = vld [vmem:[%s7_s7] sm:$0xff] }
PF: > { %14 = sbr.rel (!%p1_p1) target = $region5 } /* Start region 8 */
{}
: { %15 = vsyncpa [#allocation5], 1 }
""".replace("\n{}", "\n: {}" * 4)


# A kernel with a loop that copies, in which another one waits, and two that multiply, the latter of
# two blocks of which one stands behind the end; it waits for a barrier outside of them.
ASSEMBLY = """\
//
// Generated by LLVM NVPTX Back-End
//
.visible .entry product_mosaic_gpu_kernel(
\t@%p13 cp.async.bulk.tensor.4d.shared::cta [%r28], [%rd12];
\t@%p9 bra \t$L__BB0_2;
$L__BB0_1:
\tLAB_WAIT:
\t@P1 bra.uni DONE;
\tbra.uni     LAB_WAIT;
\tDONE:
\t@%p13 cp.async.bulk.tensor.4d.shared::cta [%r35], [%rd13];
\t@%p14 bra \t$L__BB0_1;
\tbra.uni \t$L__BB0_5;
$L__BB0_2:
\t{ wgmma.mma_async.sync.aligned.m64n64k16 {%r88}; }
\t@!%p15 bra \t$L__BB0_2;
$L__BB0_3:
\t@%p16 bra \t$L__BB0_6;
$L__BB0_4:
\t{ wgmma.mma_async.sync.aligned.m64n64k16 {%r88}; }
\t@%p17 bra \t$L__BB0_3;
$L__BB0_5:
\tLAB_WAIT:
\tbra.uni     LAB_WAIT;
\tret;
$L__BB0_6:
\t{ wgmma.mma_async.sync.aligned.m64n64k16 {%r99}; }
\tbra.uni \t$L__BB0_4;

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'product_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for product_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


@pytest.fixture(scope="module")
def cases_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases.py"
    path.write_text(CASES)
    return path


def test_schedule_of_a_dump():
    lines = BUNDLES.splitlines()
    assert read_code(lines).blocks == [range(0, 1), range(1, 7), range(7, 9), range(9, 10)]
    schedule = read_schedule("product", lines, ISSUES.splitlines(), Call(2, 100))
    assert (schedule.bundles, schedule.hot_bundles, schedule.twins) == (10, 2, (6,))
    assert (schedule.matrix_issues, schedule.matrix_slots) == (5, 4)
    assert (schedule.hot_spills, schedule.spills, schedule.grid_steps) == (3, 6, 2)
    assert schedule.slots == {"MATMUL": 5 / 8, "VLOAD:FILL": 2 / 6, "VSTORE:SPILL": 1 / 2}


def test_how_often_bundles_run():
    def code(text):
        return read_code(f"{at:#x} {line}" for at, line in enumerate(text.splitlines()))

    found = code(LOOPS)
    # The kernel's goes from 2 to 10 by 4; the grid's has two passes more than there are steps.
    assert found.loops == [Loop(range(9, 16), 2), Loop(range(1, 34), 6)]
    # Neither what the first step skips stands apart, nor what other values decide.
    assert found.apart == [22]
    runs = [0.25] + [1.0] * 8 + [2.0] * 7 + [1.0] * 6 + [0.0] + [1.0] * 11 + [0.25]
    assert found.runs(4).tolist() == runs
    assert found.runs(1)[[0, 1, 9, 22, 34]].tolist() == [1, 6, 12, 0, 1]
    assert found.runs(None) is None
    unknown = code(LOOPS.replace("%s6_s6, 10", "%s6_s6, %s8_s8"))
    assert unknown.loops[0].passes is None and unknown.runs(4) is None


def test_reports_that_do_not_agree():
    with pytest.raises(ExperimentError, match=r"product: .* 9 bundles, of 10 of which the slots"):
        read_schedule("product", BUNDLES.splitlines()[:-1], ISSUES.splitlines(), Call(2, 100))


def test_a_kernel_without_products_has_its_longest_block_as_the_hot_one():
    issues = [line[:1].replace("3", "0") + line[1:] for line in ISSUES.splitlines()]
    issues = issues[:4] + ["0 0 0 0"] * 10
    schedule = read_schedule("copy", BUNDLES.splitlines(), issues, Call(None, None))
    assert (schedule.hot_bundles, schedule.matrix_issues, schedule.twins) == (6, 0, ())


def test_scores_are_given_or_taken_from_the_matrix_issues():
    schedule = read_schedule("product", BUNDLES.splitlines(), ISSUES.splitlines(), Call(2, 100))
    given = compile_report.with_scores(schedule, Work(2, 128, scores=100), 128**2)
    assert given.scores == 100 and given.per_scores(given.hot_bundles, 1000) == 20
    # 5 issues of 128 x 128 multiplications make 320 scores by two products of 128 features.
    assert compile_report.with_scores(schedule, Work(2, 128), 128**2).scores == 256
    assert schedule.per_scores(5, 1000) is None


@pytest.mark.slow
@needs_compiler
def test_a_kernel_compiled_for_tpu(cases_file):
    compiled = compile_report.compile_case(cases_file, "product", "v5e:2x2")
    (schedule,) = compiled.schedules
    assert schedule.kernel == "product" and schedule.grid_steps == 2
    assert 0 < schedule.hot_bundles < schedule.bundles < 1000
    assert schedule.matrix_slots == 4 and 0 < schedule.matrix_issues <= 4 * schedule.hot_bundles
    assert schedule.slots["MATMUL"] == schedule.matrix_issues / (4 * schedule.hot_bundles)
    assert schedule.spills == 0 and schedule.scores > 0
    # The product runs once in a grid step, and the loop, of a few bundles, 128 times.
    assert schedule.hot_runs == 1 and 5 * 128 < schedule.step_bundles < 50 * 128
    assert 0 < schedule.apart < schedule.bundles / 2
    assert schedule.operand_bytes == 2 * (256 + 128) * 128 + 4 * 256 * 128
    assert compiled.bytes_per_bundle == pytest.approx(820 / 1.5, rel=0.01)
    assert 0 < compiled.seconds < 60
    with pytest.raises(ExperimentError, match="plain: the compiler reports no kernel product"):
        compile_report.compile_case(cases_file, "plain", "v5e:2x2")


@pytest.mark.slow
@needs_compiler
def test_report_with_cases_that_fail(cases_file, tmp_path, run_command):
    output = tmp_path / "report.json"
    options = ("--cases", cases_file, "--only", "r", "--topologies", "v6e:2x2", "--output", output)
    code, out, err = run_command("experiments.benchmark", "tiled", "compile_time", *options)
    assert code == 1 and "Traceback" not in err, err
    assert "wrong does not compile for v6e:2x2: dot_general requires contracting dim" in err
    header, _, product, refused, wrong, longest = out.splitlines()
    assert header == "| kernel | v6e seconds |"
    assert refused == "| refused | not supported |"
    assert wrong == "| wrong | does not compile |"
    found = json.loads(output.read_text())
    assert found["command"] == f"benchmark tiled compile_time {' '.join(map(str, options))}"
    assert found["versions"]["jax"] == jax.__version__
    records = {record["kernel"]: record for record in found["records"]}
    assert product == f"| product | {records['product']['seconds']:.1f} |"
    assert longest == f"| longest | {records['product']['seconds']:.1f} |"
    assert "dot_general" in records["wrong"]["error"]
    assert records["refused"]["missing"] == "refused is not supported: it has no such feature"


def test_schedule_report(monkeypatch, cases_file):
    schedule = read_schedule("product", BUNDLES.splitlines(), ISSUES.splitlines(), Call(2, 100))
    schedule = compile_report.with_scores(schedule, Work(2, 128, scores=256**2), 128**2)
    parts = {"product": (schedule, schedule), "plain": (schedule,)}

    def compile_case(path, name, topology, schedules):
        assert path == cases_file and schedules and topology.endswith(":2x2")
        if name == "refused":
            raise NotSupported("it has no such feature")
        return compile_report.Compiled(1.0, 0, 500.0, parts[name])

    monkeypatch.setattr(measure, "compile_case", compile_case)
    monkeypatch.setattr(measure, "check_compiler", lambda *_: None)
    report = Report()
    tiled.ScheduleConfig(cases=cases_file).fill(report)
    product, missing, refused, wrong, plain = report.rows
    chips = [f"{chip} {name}" for chip in ("v5e", "v6e") for name in tiled.SCHEDULE_COLUMNS]
    assert [*product] == [*missing] == [*wrong] == ["kernel", *chips]
    # Two kernels of a case count together.
    assert [*product.values()] == ["product", *("16", "40", "62%", "6") * 2]
    assert [*plain.values()] == ["plain", *("8", "20", "62%", "3") * 2]
    assert [*missing.values()] == ["missing", *("not available", "-", "-", "-") * 2]
    assert [*refused.values()] == ["refused", *("not supported", "-", "-", "-") * 2]
    assert wrong["v5e bundles"] == "does not compile"
    assert (
        report.failures == ["cases: wrong must say what its kernels compute"] * 2
        and len(report.records) == 10
    )
    json.dumps(report.records)


LINEAR_CASES = """
from experiments.benchmark.linear_variants import LinearCase
from experiments.compile_report import Case


def cases():
    options = dict(units=100, forward="_forward")
    return {
        "forward, a": LinearCase(None, (), **options),
        "backward, a": LinearCase(None, (), **options),
        "backward, missing": "not available",
        "backward, tiled": Case(None, ()),
    }
"""


def test_linear_schedule_report(monkeypatch, tmp_path):
    path = tmp_path / "cases.py"
    path.write_text(LINEAR_CASES)
    schedule = read_schedule("a_forward", BUNDLES.splitlines(), ISSUES.splitlines(), Call(4, 1000))
    # Two passes through the hot block, of 2 bundles, among 10.
    schedule = dataclasses.replace(schedule, hot_runs=2.0, step_bundles=10.0, apart=3)
    backward = dataclasses.replace(schedule, kernel="a_backward", step_bundles=20.0)
    unknown = dataclasses.replace(backward, hot_runs=None, step_bundles=None)

    def compile_case(path, name, topology, schedules):
        ours = backward if topology == "v5e:2x2" else unknown
        parts = (schedule,) if name == "forward, a" else (schedule, ours)
        return compile_report.Compiled(1.0, 0, 5.0, parts)

    monkeypatch.setattr(measure, "compile_case", compile_case)
    monkeypatch.setattr(measure, "check_compiler", lambda *_: None)
    report = Report()
    linear.ScheduleConfig(cases=path).fill(report)
    rows = {row["kernel"]: [*row.values()][1:] for row in report.rows}
    # Bundles and bytes of four grid steps and one call for 100 units; 5 bytes take a bundle.
    forward = ["0.16", "0.40", "2.00", "3", "6"]
    assert rows == {
        "forward, a": forward * 2,
        "backward, a": ["0.16", "0.80", "2.00", "3", "6", "-", "-", "2.00", "3", "6"],
        "forward + backward, a": ["0.32", "1.20", "4.00", "6", "12", "-", "-", "4.00", "6", "12"],
        "backward, missing": ["not available", *"----"] * 2,
        "backward, tiled": ["does not compile", *"----"] * 2,
        "forward + backward, tiled": ["does not compile", *"----"] * 2,
    }
    assert (
        report.failures
        == ["cases: backward, tiled must be a LinearCase, which says what it counts by"] * 2
    )
    json.dumps(report.records)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for config in (tiled.ScheduleConfig(), tiled.CompileTimeConfig()):
        with pytest.raises(ExperimentError, match=r"libtpu, .* is not installed; .* '\.\[dev\]'"):
            config.fill(Report())


def test_kernels_of_an_assembly():
    found = hopper.Kernel("product", 168, 20, 3, 2, "copies, wgmma, wgmma", serialized=False)
    assert hopper.read_kernels(f"before\n{ASSEMBLY}") == [found]
    warned = f"{ASSEMBLY}wgmma.mma_async instructions are serialized due to ..."
    other = warned.replace("product", "a_product").replace("{%r88}; }", "", 1)
    first, last = hopper.read_kernels(ASSEMBLY + other)
    assert (first.kernel, first.serialized, last) == ("a_product", True, found)
    # A loop must do either.
    idle = ASSEMBLY.replace(hopper.COPY, "ld.global").replace(f"{{ {hopper.MULTIPLY}", "{", 1)
    assert hopper.loops(idle) == ["neither", "neither", "wgmma"]
    with pytest.raises(ExperimentError, match="not as it was: a part of it is missing"):
        hopper.read_kernels(ASSEMBLY.replace("spill", "spilt"))


@pytest.mark.parametrize("config", (tiled.HopperConfig, linear.HopperConfig))
def test_hopper_report(config, monkeypatch, tmp_path):
    def compile_kernels(function, arguments):
        try:
            function(*arguments)
        except NotImplementedError as error:
            raise NotSupported(str(error)) from None
        except TypeError:
            raise ExperimentError("it does not compile") from None
        return hopper.read_kernels(ASSEMBLY)

    path = tmp_path / "cases.py"
    path.write_text(
        "from experiments.compile_report import Case\n"
        "def refused(): raise NotImplementedError('it has no such feature')\n"
        "def cases():\n"
        "    return {'a': Case(int, ()), 'b': Case(refused, ()), 'c': Case(len, ())}\n"
    )
    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    monkeypatch.setattr(hopper, "check_compiler", lambda: None)
    monkeypatch.setattr(hopper, "compile_kernels", compile_kernels)
    report = Report()
    config(cases=path).fill(report)
    assert updated == {"jax_platforms": "cpu", "jax_enable_compilation_cache": False}
    cells = [*report.rows[0].values()]
    assert cells == ["a", "product", "168", "20", "3", "2", "copies, wgmma, wgmma"]
    assert [row["kernel"] for row in report.rows[1:]] == ["not supported", "does not compile"]
    assert report.records[1] == {"case": "b", "missing": "it has no such feature"}
    assert report.failures == ["it does not compile"]
    json.dumps(report.records)


def test_no_gpu_compiler(monkeypatch):
    def version(name):
        if name.startswith("nvidia"):
            raise hopper.importlib.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(hopper.importlib.metadata, "version", version)
    with pytest.raises(
        ExperimentError, match=r"nvidia-cuda-nvcc, nvidia-nvvm, .* not installed; .* '\.\[dev\]'"
    ):
        tiled.HopperConfig().fill(Report())


def test_topology_of_no_tpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ExperimentError, match="topology: 'h100:1'; must be one of v4, v5e"):
        tiled.ScheduleConfig(topologies=("v5e:2x2", "h100:1")).fill(Report())


@pytest.mark.parametrize("implemented", (False, True))
def test_cases_of_ours_and_of_peers(implemented, monkeypatch):
    available = ["pallas_tpu"] if implemented else ["xla"]
    monkeypatch.setattr(tiled_cases, "IMPLEMENTATIONS", available)
    found = tiled_cases.cases()
    ours = {name: case for name, case in found.items() if ", ours " in name}
    assert len(ours) == 2 * 2 * 3
    assert any("JAX splash" in name for name in found)
    assert any("tokamax splash" in name for name in found)
    features = tiled_features.cases()
    assert {"forward, sigmoid", "backward, ALiBi", "backward, window"} <= features.keys()
    mine = {**ours, **{name: case for name, case in features.items() if "splash" not in name}}
    for name, case in mine.items():
        if implemented:
            (kernel,) = case.kernels
            assert kernel == f"tiled_{name.partition(',')[0]}"
        else:
            assert case == "not available"
    peers = {name: case for name, case in found.items() if "JAX" in name}
    assert all(work.scores for case in peers.values() for work in case.kernels.values())
    if importlib.util.find_spec("tokamax") is None:
        assert "'.[peers]'" in found["forward, full, tokamax splash"]


@pytest.mark.parametrize("implemented", (False, True))
def test_linear_cases_of_ours_and_of_peers(implemented, monkeypatch):
    available = ["pallas_tpu"] if implemented else ["xla"]
    monkeypatch.setattr(linear_cases.linear, "IMPLEMENTATIONS", available)
    found = linear_cases.cases()
    for direction in ("forward", "backward"):
        for name in (*linear_variants.VARIANTS, linear_cases.LONG):
            case = found[f"{direction}, {name}"]
            if not implemented:
                assert case == "not available"
                continue
            *_, memories, features = case.arguments[2].shape
            assert case.units in (8 * 4096, 16384) and features == 128
            assert memories == (1 if name == linear_cases.LONG else 2 if "2 key" in name else 8)
        scans = [case for name, case in found.items() if f"{direction}," in name and "scan" in name]
        assert [case.units for case in scans] == [4096 * 2048 // 128] * 2 + [4096 * 8]
        peer = found[f"{direction}, tokamax Kimi Delta Attention"]
        if importlib.util.find_spec("tokamax") is None:
            assert "'.[peers]'" in peer
    assert len({*found}) == 2 * (len(linear_variants.VARIANTS) + 5)


def test_linear_variants_fit_linear_attention():
    known = inspect.signature(linear_attention).parameters
    for name, variant in linear_variants.VARIANTS.items():
        if not variant.options.keys() <= known.keys():
            continue
        inputs = variant.inputs(16, 8, 4, jnp.float32)
        function = variant.function("forward", [*inputs], 8, "xla")
        assert jax.eval_shape(function, *inputs.values()).shape == (1, 16, 8, 4), name
        assert jax.eval_shape(lambda kinds=inputs: linear_variants.arrays_of(kinds)) == inputs
    variant = linear_variants.VARIANTS["constant decay, segments"]
    inputs = variant.inputs(16, 8, 4, jnp.float32)
    function = variant.function("backward", [*inputs], 8, "xla")
    # Of query, key and value, and not of the numbers of segments.
    assert len(jax.eval_shape(function, *inputs.values())) == 3 == len(inputs) - 1


@pytest.mark.usefixtures("quick_compilation")
def test_linear_cpu_report():
    options = dict(heads=2, features=8, repeats=1, work=128, tokens=(128, 64), peer_tokens=64)
    report = Report()
    linear.CpuConfig(**options, only="gradient, lightning").fill(report)
    linear.CpuConfig(**options, only="forward, jax.nn").fill(report)
    assert [(row["pass"], row["tokens"]) for row in report.rows] == [
        *(("gradient, lightning", tokens) for tokens in ("64", "128", "spread")),
        *(("forward, jax.nn", tokens) for tokens in ("64", "spread")),
    ]
    short, long, spread = report.records[:3]
    times = [record["seconds"] / record["tokens"] for record in (short, long)]
    assert spread["spread"] == max(times) / min(times) > 1
    assert report.rows[1]["growth"] == f"{long['bytes'] / short['bytes']:.2f}"
    assert report.rows[0]["us per token"] == f"{1e6 * times[0]:.2f}"
    assert report.records[-1]["spread"] == 1


def test_a_linear_pass_is_the_attention_that_it_is_named_for():
    shape = (1, 20, 2, 8)
    ours, arrays = linear._called("lightning", "forward", shape, jnp.float32, "reference")
    decays = 2.0 ** -np.array([1, 8])
    expected = linear_attention(*arrays, log_decay=tuple(-decays), implementation="reference")
    assert jnp.allclose(ours(*arrays), expected, atol=1e-6)
    theirs, arrays = linear._called("jax.nn", "forward", shape, jnp.float32, "xla")
    assert jnp.allclose(theirs(*arrays), jax.nn.dot_product_attention(*arrays, is_causal=True))


@pytest.mark.usefixtures("quick_compilation")
def test_cpu_report():
    config = tiled.CpuConfig(
        tokens=(64,), compiled_tokens=(512, 1024), heads=2, features=8, repeats=1, only="t, causal"
    )
    report = Report()
    config.fill(report)
    assert [(row["pass"], row["tokens"]) for row in report.rows] == [
        ("gradient, causal", tokens) for tokens in ("64", "512", "1,024")
    ]
    for row, record in zip(report.rows, report.records, strict=True):
        timed = record["tokens"] == 64
        assert ("ours seconds" in record) == ("jax.nn seconds" in record) == timed
        assert (row["ours ms"] == "-") == (row["jax.nn ms"] == "-") == (not timed)
        assert (row["ours growth"] == "-") == timed
    # Ours grows as the length, the peer, which holds all scores, as its square.
    last = report.rows[-1]
    assert float(last["ours growth"]) < 2.2 < 3.5 < float(last["jax.nn growth"])


@pytest.mark.usefixtures("quick_compilation")
def test_both_attentions_of_the_cpu_report_are_the_same_function():
    arrays = jax.random.normal(jax.random.key(0), (3, 1, 20, 2, 8))
    for mask in ("causal", "full"):
        ours, theirs = (
            jax.jit(functools.partial(attention, "xla", mask))(*arrays)
            for attention in (tiled._ours, tiled._jax_nn)
        )
        assert jnp.allclose(ours, theirs, atol=1e-5)


def test_table_and_json(tmp_path, capsys):
    report = Report()
    report.add({"kernel": "a", "bundles": "12"}, {"kernel": "a", "bundles": 12.5})
    report.add({"kernel": "b", "spills": "3"})
    output = tmp_path / "out.json"
    show(report, output, "a command")
    assert capsys.readouterr().out == textwrap.dedent(
        """\
        | kernel | bundles | spills |
        | --- | ---: | ---: |
        | a | 12 | - |
        | b | - | 3 |
        """
    )
    found = json.loads(output.read_text())
    assert found["records"] == [{"kernel": "a", "bundles": 12.5}, {"kernel": "b", "spills": "3"}]
    assert found["command"] == "a command" and found["versions"].keys() >= {"jax", "libtpu"}
    with pytest.raises(ExperimentError, match=r"output: cannot write .*: No such file"):
        show(report, tmp_path / "none" / "out.json", "a command")
    assert markdown([{"a": ""}]) == "| a |\n| --- |\n| - |"


def test_what_was_measured_before_a_stop_is_shown(monkeypatch, capsys):
    class Config:
        output = None

        def fill(self, report):
            report.add({"kernel": "a", "bundles": "12"})
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", lambda *_, **__: Config())
    monkeypatch.setattr(sys, "argv", ["benchmark", "tiled", "cpu"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            benchmark.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "| a | 12 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no kernels given"),
        (["decoding"], 2, "kernels: 'decoding' is unknown"),
        (["tiled", "shedule"], 2, "shedule"),
        (["tiled", "gpu"], 1, "JAX finds no CUDA device here; `make EXTRA=cuda env` installs"),
        (["linear", "gpu"], 1, "JAX finds no CUDA device here; `make EXTRA=cuda env` installs"),
        (["linear", "gpu", "--peers", "flash"], 2, "--peers"),
        (["linear", "cpu", "--tokens", "0"], 1, "tokens: (0,); all must be at least 1"),
        (["linear", "schedule", "--only", "xx"], 1, "only: 'xx' is in the name of no case"),
        (["tiled", "cpu", "--only", "x"], 1, "only: 'x' is in the name of no case; there are fo"),
        (["tiled", "cpu", "--repeats", "0"], 1, "repeats: 0; it must be at least 1"),
        (["tiled", "schedule", "--cases", "none.py"], 1, "cases: none.py is no Python file"),
    ],
)
def test_wrong_input_is_one_message(arguments, code, message, monkeypatch, capsys):
    from experiments.benchmark.__main__ import main
    from experiments.errors import run_command

    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    monkeypatch.setattr(measure, "check_compiler", lambda *_: None)
    monkeypatch.setattr("experiments.errors.quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    printed = capsys.readouterr()
    assert caught.value.code == code and message in printed.err + printed.out


def test_cases_file_without_cases(tmp_path):
    path = Path(tmp_path / "cases.py")
    path.write_text("")
    with pytest.raises(ExperimentError, match=r"must have a function cases\(\); it has none"):
        compile_report.load_cases(path)
