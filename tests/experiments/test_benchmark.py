"""The benchmark command and the reports on static TPU schedules."""

import functools
import importlib.util
import json
import signal
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro

from experiments import compile_report
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import tiled, tiled_cases, tiled_features
from experiments.benchmark.table import Report, markdown, show
from experiments.compile_report import Work, basic_blocks, read_schedule
from experiments.errors import ExperimentError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is for Linux x86-64"
)

# A product of 256 x 128 x 128 in two grid steps, beside a case that is not there, one that does not
# compile, and one without a kernel of ours.
CASES = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from experiments.compile_report import Case, Work

X, Y = (jax.ShapeDtypeStruct((n, 128), jnp.bfloat16) for n in (256, 128))


def kernel(x, y, out):
    out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)


@jax.jit
def product(x, y):
    block = pl.BlockSpec((128, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[block, pl.BlockSpec((128, 128), lambda i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        name="product",
    )(x, y)


def cases():
    return {
        "product": Case(product, (X, Y), {"product": Work(1, 128)}),
        "missing": "not available",
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


@pytest.fixture(scope="module")
def cases_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases.py"
    path.write_text(CASES)
    return path


def test_schedule_of_a_dump():
    lines = BUNDLES.splitlines()
    assert basic_blocks(lines) == [range(0, 1), range(1, 7), range(7, 9), range(9, 10)]
    schedule = read_schedule("product", lines, ISSUES.splitlines(), steps=2)
    assert (schedule.bundles, schedule.hot_bundles, schedule.twins) == (10, 2, (6,))
    assert (schedule.matrix_issues, schedule.matrix_slots) == (5, 4)
    assert (schedule.hot_spills, schedule.spills, schedule.grid_steps) == (3, 6, 2)
    assert schedule.slots == {"MATMUL": 5 / 8, "VLOAD:FILL": 2 / 6, "VSTORE:SPILL": 1 / 2}


def test_reports_that_do_not_agree():
    with pytest.raises(ExperimentError, match=r"product: .* 9 bundles, of 10 of which the slots"):
        read_schedule("product", BUNDLES.splitlines()[:-1], ISSUES.splitlines(), steps=2)


def test_a_kernel_without_products_has_its_longest_block_as_the_hot_one():
    issues = [line[:1].replace("3", "0") + line[1:] for line in ISSUES.splitlines()]
    issues = issues[:4] + ["0 0 0 0"] * 10
    schedule = read_schedule("copy", BUNDLES.splitlines(), issues, steps=None)
    assert (schedule.hot_bundles, schedule.matrix_issues, schedule.twins) == (6, 0, ())


def test_scores_are_given_or_taken_from_the_matrix_issues():
    schedule = read_schedule("product", BUNDLES.splitlines(), ISSUES.splitlines(), steps=2)
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
    header, _, product, wrong, longest = out.splitlines()
    assert header == "| kernel | v6e seconds |"
    assert wrong == "| wrong | does not compile |"
    found = json.loads(output.read_text())
    assert found["command"] == f"benchmark tiled compile_time {' '.join(map(str, options))}"
    assert found["versions"]["jax"] == jax.__version__
    records = {record["kernel"]: record for record in found["records"]}
    assert product == f"| product | {records['product']['seconds']:.1f} |"
    assert longest == f"| longest | {records['product']['seconds']:.1f} |"
    assert "dot_general" in records["wrong"]["error"]


def test_schedule_report(monkeypatch, cases_file):
    schedule = read_schedule("product", BUNDLES.splitlines(), ISSUES.splitlines(), steps=2)
    schedule = compile_report.with_scores(schedule, Work(2, 128, scores=256**2), 128**2)
    parts = {"product": (schedule, schedule), "plain": (schedule,)}

    def compile_case(path, name, topology, schedules):
        assert path == cases_file and schedules and topology.endswith(":2x2")
        return compile_report.Compiled(1.0, 0, parts[name])

    monkeypatch.setattr(tiled, "compile_case", compile_case)
    monkeypatch.setattr(tiled, "check_compiler", lambda *_: None)
    report = Report()
    tiled.ScheduleConfig(cases=cases_file).fill(report)
    product, missing, wrong, plain = report.rows
    chips = [f"{chip} {name}" for chip in ("v5e", "v6e") for name in tiled.SCHEDULE_COLUMNS]
    assert [*product] == [*missing] == [*wrong] == ["kernel", *chips]
    # Two kernels of a case count together.
    assert [*product.values()] == ["product", *("16", "40", "62%", "6") * 2]
    assert [*plain.values()] == ["plain", *("8", "20", "62%", "3") * 2]
    assert [*missing.values()] == ["missing", *("not available", "-", "-", "-") * 2]
    assert wrong["v5e bundles"] == "does not compile"
    assert (
        report.failures == ["cases: wrong must say what its kernels compute"] * 2
        and len(report.records) == 8
    )
    json.dumps(report.records)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for config in (tiled.ScheduleConfig(), tiled.CompileTimeConfig()):
        with pytest.raises(ExperimentError, match=r"libtpu, .* is not installed; .* '\.\[dev\]'"):
            config.fill(Report())


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
        (["tiled", "cpu", "--only", "x"], 1, "only: 'x' is in the name of no case; there are fo"),
        (["tiled", "cpu", "--repeats", "0"], 1, "repeats: 0; it must be at least 1"),
        (["tiled", "schedule", "--cases", "none.py"], 1, "cases: none.py is no Python file"),
    ],
)
def test_wrong_input_is_one_message(arguments, code, message, monkeypatch, capsys):
    from experiments.benchmark.__main__ import main
    from experiments.errors import run_command

    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    monkeypatch.setattr(tiled, "check_compiler", lambda *_: None)
    monkeypatch.setattr("experiments.errors._quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    printed = capsys.readouterr()
    assert caught.value.code == code and message in printed.err + printed.out


def test_cases_file_without_cases(tmp_path):
    path = Path(tmp_path / "cases.py")
    path.write_text("")
    with pytest.raises(ExperimentError, match=r"must have a function cases\(\); it has none"):
        compile_report.load_cases(path)
