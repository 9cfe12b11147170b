"""The reports that need a GPU, with clocks that are made up, and cases compiled for one."""

import contextlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import (
    gpu,
    linear,
    linear_gpu,
    linear_hopper,
    linear_variants,
    tiled_gpu,
    tiled_tune,
)
from experiments.benchmark.linear_variants import VARIANTS, arrays_of
from experiments.benchmark.table import Report
from experiments.compile_report import load_cases
from experiments.errors import ExperimentError
from pallas_kernels.linear import linear_attention
from pallas_kernels.tiled import gpu_tuned


def _is_h200(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [device])


def test_report_of_tiled_attention(monkeypatch):
    """What a peer cannot do is in the record, and the others go on."""
    tokens, seconds = 256, 1e-3

    def measured(function, arrays, repeats):
        assert jax.eval_shape(function, *arrays) is not None and repeats == 20
        return {"seconds": seconds, "bytes": 0}

    def refused(implementation, *arrays, **_):
        raise RuntimeError("no such library")

    _is_h200(monkeypatch)
    monkeypatch.setattr(gpu, "cost", measured)
    monkeypatch.setattr(tiled_gpu, "_mosaic", refused)
    monkeypatch.setattr(tiled_gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: q)
    config = tiled_gpu.GpuConfig(
        features=(64,), tokens=(tokens,), total=2 * tokens, sparse_tokens=512, repeats=20
    )
    report = Report()
    config.measure(report)
    rows = {row["pass"]: row for row in report.rows}
    assert len(rows) == len(report.rows) == 4 + 10
    # Two sequences, 32 heads of 64 features: 4 T^2 operations for each, and half of it if causal.
    full = 4 * 2 * tokens**2 * 32 * 64 / seconds / 1e12
    for name, expected in (
        ("forward, full, 64 features", full),
        ("gradient, causal, 64 features", full * 3.5 / 2),
    ):
        assert rows[name]["ours TFLOP/s"] == f"{expected:.0f} ({expected / 989:.0%})"
        assert rows[name]["JAX's Mosaic GPU TFLOP/s"] == "-"
    assert "no such library" in report.records[0]["JAX's Mosaic GPU error"]
    sparse = rows["forward, random lists of 64 x 64, an eighth, 64 features"]
    assert sparse["times as fast as full"] == "1.00"
    assert report.records[-1]["ours seconds"] == seconds


def test_configurations_are_tuned(monkeypatch):
    """The fastest of each kernel are written; one that fails is not, and is in the record."""
    kernels = iter(3 * gpu_tuned.KERNELS)
    seconds = {
        ("forward", gpu_tuned.Config(64, True)): 1e-3,
        ("backward_queries", gpu_tuned.Config(128, False)): 2e-3,
    }

    def measured(function, arrays, repeats):
        kernel, config = gpu_tuned._tried.get()
        gradients = function(*arrays)
        assert repeats == 7 and isinstance(gradients, tuple) == (kernel != "forward")
        if kernel == "backward_keys":
            raise RuntimeError("too many registers")
        return {"seconds": seconds.get((kernel, config), 3e-3)}

    def attention(query, key, value, *, mask, implementation):
        assert implementation == "pallas_gpu"
        return query + key + value

    written, cleared = {}, []
    _is_h200(monkeypatch)
    monkeypatch.setattr(gpu, "cost", measured)
    monkeypatch.setattr(tiled_tune, "tiled_attention", attention)
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(None))
    monkeypatch.setattr(
        gpu_tuned, "write", lambda device, found: written.setdefault(device, {}).update(found)
    )
    options = dict(features=(64,), tokens=256, total=512, repeats=7)
    report = Report()
    tiled_tune.TuneConfig(**options, write=True).measure(report)
    assert written == {
        "NVIDIA H200": {
            f"{kernel}, {mask}, bfloat16, 64 features": config
            for mask in ("full", "masked", "lists")
            for kernel, config in seconds
        }
    }
    assert [row["kernel"].split(",")[0] for row in report.rows] == [*kernels]
    # What was traced with one configuration does not serve another.
    assert len(cleared) == len(report.rows) * len(tiled_tune.CONFIGS) + 3
    assert [row.get("one pass, ms") for row in report.rows[:3]] == [None, None, "-"]
    assert report.rows[0]["64 columns, persistent, ms"] == "1.000"
    assert report.rows[2]["64 columns, ms"] == "-"
    assert "too many registers" in report.records[2]["64 columns error"]

    written.clear()
    report = Report()
    tiled_tune.TuneConfig(**options, only="forward, lists").measure(report)
    assert len(report.rows) == 1 and not written


def test_random_lists_are_an_eighth():
    mask = tiled_gpu.random_lists(1024, 64)
    assert np.asarray(mask.to_dense(1024, 1024)).mean() == 1 / 8


def test_cost_of_a_call(monkeypatch):
    """Quick calls are timed several at a time; memory is that of results and beside them."""
    began = []

    def fastest(function, arrays, repeats):
        assert jnp.array_equal(function(*arrays), arrays[0] @ arrays[0])
        began.append(repeats)
        return 2e-3 if repeats == 1 else 12e-3

    monkeypatch.setattr(gpu, "fastest", fastest)
    found = gpu.cost(lambda x: x @ x, (jnp.ones((64, 64)),), 5)
    assert began == [1, 5] and found["seconds"] == 12e-3 / 10
    assert found["bytes"] >= 4 * 64**2
    assert [gpu.calls_of(seconds) for seconds in (1e-9, 9e-3, 1.0)] == [gpu.MOST, 2, 1]


def test_share_of_a_device(monkeypatch):
    assert gpu.share(1e12, "bandwidth") == ""
    _is_h200(monkeypatch)
    assert gpu.share(2.4e12, "bandwidth") == " (50%)"
    assert gpu.share(98.9e12, "operations") == " (10%)"


def test_report_of_linear_attention(monkeypatch, tmp_path):
    """Each length has a row, and all of a pass one for their spread."""
    # So many tokens a second at either length.
    rates = {64: 4e6, 128: 5e6}

    def measured(function, arrays, repeats):
        assert repeats == 3
        batch, tokens, heads, features = arrays[0].shape
        assert (batch, heads, features) == (256 // tokens, 16, 128)
        if len(arrays) == 5:
            raise RuntimeError("no delta rule")
        return {"seconds": 256 / rates[tokens], "bytes": 3 * 2**20}

    _is_h200(monkeypatch)
    monkeypatch.setattr(gpu, "cost", measured)
    monkeypatch.setitem(sys.modules, "fla", None)
    plot = tmp_path / "rates.png"
    options = dict(tokens=(64, 128), total=256, repeats=3)
    report = Report()
    linear_gpu.GpuConfig(**options, plot=plot).measure(report)
    rows = {(row["pass"], row["tokens"]): row for row in report.rows}
    # The delta rule, of which nothing runs, has no spread.
    assert len(rows) == len(report.rows) == 2 * (7 * 3 - 3)
    row = rows["gradient, gate per channel (GLA)", "64"]
    columns = {"ours Mtoken/s": "4", "ours MiB": "3", "XLA Mtoken/s": "4", "XLA MiB": "3"}
    assert {name: row[name] for name in columns} == columns
    assert row["fla Mtoken/s"] == row["fla MiB"] == "-" and "cuDNN MiB" not in row
    # Four arrays of 256 tokens x 2,048 features x 2 bytes, of a forward at 5 million tokens/s.
    moved = 4 * 2048 * 2 * 5e6 / 4.8e12
    cell = rows["forward, lightning", "128"]["ours Mtoken/s"]
    assert cell == f"5 ({moved:.0%})"
    assert rows["forward, lightning", "spread"]["XLA Mtoken/s"] == "80%"
    assert rows["forward, softmax attention", "64"]["cuDNN Mtoken/s"] == "4"
    record = next(x for x in report.records if x["pass"] == "gradient, lightning")
    assert record["ours tokens/s"] == 4e6 and record["device"] == "NVIDIA H200"
    assert "ModuleNotFoundError" in record["fla error"]
    record = next(x for x in report.records if "KDA" in x["pass"])
    assert record["ours error"] == record["XLA error"] == "RuntimeError: no delta rule"
    json.dumps(report.records)
    assert plot.read_bytes().startswith(b"\x89PNG") and not report.failures

    # One length has no spread, and what cannot be drawn is in the table.
    options = dict(tokens=(64,), total=256, repeats=3, only="gradient")
    for peer, count, wrong in (("cuDNN", 1, "none/rates.png"), ("XLA", 6, "rates.jpx")):
        report = Report()
        linear_gpu.GpuConfig(**options, peers=(peer,), plot=tmp_path / wrong).measure(report)
        columns = {"pass", "tokens", f"{peer} Mtoken/s", f"{peer} MiB"}
        assert [row.keys() for row in report.rows] == [columns] * count
        assert report.failures[0].startswith(f"plot: cannot write {tmp_path / wrong}: ")


def test_options_of_the_reports(monkeypatch):
    for name, value in (("tokens", (64, 0)), ("total", 0), ("repeats", 0), ("most_seconds", 0.0)):
        for config in (linear_gpu.GpuConfig, tiled_gpu.GpuConfig, tiled_tune.TuneConfig):
            with pytest.raises(ExperimentError, match=rf"{name}: .*0\)?; it must be at least 1"):
                config(**{name: value}).fill(Report())
    _is_h200(monkeypatch)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # which is set otherwise
    for config in (tiled_gpu.GpuConfig, tiled_tune.TuneConfig):
        with pytest.raises(ExperimentError, match="only: 'forwards' is in the name of nothing"):
            gpu._measure(config(only="forwards"), Report())
    with pytest.raises(ExperimentError, match="only: 'KDB' is in the name of no case"):
        linear_gpu.GpuConfig(only="KDB").measure(Report())


def test_implementations_of_the_linear_report(monkeypatch):
    called = []

    def attention(query, key, value, *, implementation, **_):
        called.append(implementation)
        return value

    monkeypatch.setattr(linear_variants.linear, "linear_attention", attention)
    monkeypatch.setattr(gpu, "cost", lambda function, arrays, _: function(*arrays))
    for name in linear_gpu.FLA:
        inputs = VARIANTS[name].inputs(8, 2, 4, jnp.bfloat16)
        arrays = [*arrays_of(inputs).values()]
        found = linear_gpu.costs("forward", name, [*inputs], 2)
        assert [*found] == ["ours", "XLA", "fla"]
        assert found["ours"](arrays, 1) is found["XLA"](arrays, 1) is arrays[2]
    assert called == ["pallas_gpu", "xla"] * 6


class _Tensor:
    """An array of a library that is not there."""

    def __init__(self, array):
        self.array = array

    def requires_grad_(self, wanted):
        self.requires_grad = wanted

    def transpose(self, a, b):
        return _Tensor(jnp.swapaxes(self.array, a, b))


class _Torch(types.ModuleType):
    """What is called of PyTorch; an operation takes 1 ms and 100 bytes, its gradient as much."""

    __version__ = "2.0"

    def __init__(self):
        super().__init__("torch")
        self.now, self.allocated, self.most, self.gradients = 0.0, 1000, 5000, []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def synchronize(self):
                assert self.at == clock.now

            def elapsed_time(self, other):
                return other.at - self.at

        self.autograd = types.SimpleNamespace(grad=self._grad)
        self.cuda = types.SimpleNamespace(
            Event=Event,
            empty_cache=lambda: None,
            reset_peak_memory_stats=lambda: setattr(self, "most", self.allocated),
            memory_allocated=lambda: self.allocated,
            max_memory_allocated=lambda: self.most,
        )

    def work(self, size):
        self.now += 1
        self.most = max(self.most, self.allocated + size)

    def from_dlpack(self, array):
        return _Tensor(array)

    def ones_like(self, tensor):
        return _Tensor(jnp.ones_like(tensor.array))

    def _grad(self, out, leaves, cotangent):
        assert all(leaf.requires_grad for leaf in leaves)
        assert cotangent.array.shape == out.array.shape
        self.gradients.append(len(leaves))
        self.work(200)


@pytest.mark.parametrize("direction", ("forward", "gradient"))
@pytest.mark.parametrize("name", linear_gpu.FLA)
def test_flash_linear_attention_is_asked_for_the_same(name, direction, monkeypatch):
    """Its functions, by their definitions, give what ours do, and are timed by the device."""
    torch, outs, options = _Torch(), [], {}

    def attend(q, k, v, g, beta, scale):
        def of(x):
            return None if x is None else x.array

        torch.work(100)
        out = linear_attention(
            q.array,
            k.array,
            v.array,
            log_decay=of(g),
            beta=of(beta),
            scale=scale,
            implementation="reference",
        )
        outs.append(_Tensor(out))
        return outs[-1], None

    # With the arguments that theirs have.
    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        assert (g is None) != (g_gamma is None)
        return attend(q, k, v, g_gamma if g is None else g, None, scale)

    def chunk_gla(q, k, v, g, scale=None):
        return attend(q, k, v, g, None, scale)

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None):
        return attend(q, k, v, g, beta, scale)

    def chunk_kda(q, k, v, g, beta, scale=None, safe_gate=False, lower_bound=None):
        options.update(safe_gate=safe_gate, lower_bound=lower_bound)
        return attend(q, k, v, g, beta, scale)

    for module in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(sys.modules["fla"], "__version__", "1.0", raising=False)
    for function in (chunk_simple_gla, chunk_gla, chunk_gated_delta_rule, chunk_kda):
        operation = function.__name__.removeprefix("chunk_")
        module = types.ModuleType(f"fla.ops.{operation}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "torch", torch)

    inputs = VARIANTS[name].inputs(8, 2, 4, jnp.float32, 2)
    arrays = [*arrays_of(inputs).values()]
    found = linear_gpu.costs(direction, name, [*inputs], 2)["fla"](arrays, 3)
    backward = direction == "gradient"
    assert found == {
        "seconds": pytest.approx(2e-3 if backward else 1e-3),
        "bytes": 200 if backward else 100,
        "version": "1.0, PyTorch 2.0",
    }
    # One call to warm up, one to know how many make a round, and three rounds.
    count = 2 + 3 * (10 if backward else gpu.MOST)
    assert len(outs) == count and torch.gradients == [len(arrays)] * (count if backward else 0)
    expected = VARIANTS[name].function("forward", [*inputs], 2, "reference")(*arrays)
    assert jnp.allclose(outs[-1].array, expected, atol=1e-6)
    if "bound" in name:
        assert options == {"safe_gate": True, "lower_bound": linear_variants.BOUND}


def test_linear_cases_for_hopper(monkeypatch):
    called = []

    def attention(query, *_, implementation, **__):
        called.append((str(query.dtype), query.shape[-1], implementation))
        return query

    found = load_cases(linear.HopperConfig().cases)
    monkeypatch.setattr(
        linear_variants.linear, "linear_attention", lambda **x: attention(x.pop("query"), **x)
    )
    sizes = linear_hopper.KERNELS
    assert [*found] == [
        f"{name}, {dtype}, {features} features" for name in sizes for dtype, features in sizes[name]
    ]
    for name, case in found.items():
        gradients = jax.eval_shape(case.function, *case.arguments)
        prepared = any(name.startswith(variant) for variant in linear_hopper.PREPARED)
        expected = case.arguments[:3:2] if prepared else case.arguments
        assert [x.shape for x in gradients] == [x.shape for x in expected]
    assert called == [(*size, "pallas_gpu") for of in sizes.values() for size in of]


@pytest.mark.parametrize("direction", ("forward", "gradient"))
@pytest.mark.parametrize("package", tiled_gpu.FLASH)
def test_flash_attention_is_asked_for_the_same(package, direction, monkeypatch):
    """Whichever version there is; the newer one first."""
    torch, outs = _Torch(), []

    def flash_attn_func(q, k, v, causal=False):
        torch.work(100)
        out = jax.nn.dot_product_attention(q.array, k.array, v.array, is_causal=causal)
        outs.append(_Tensor(out))
        return (outs[-1], None) if package == "flash_attn_interface" else outs[-1]

    module = types.ModuleType(package)
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setitem(sys.modules, "torch", torch)
    there = {"flash_attn", package}
    monkeypatch.setattr(tiled_gpu.importlib.util, "find_spec", lambda name: name in there)
    arrays = tuple(jax.random.normal(jax.random.key(0), (3, 2, 8, 2, 4)))
    found = tiled_gpu.costs("causal", direction, 64)["FlashAttention"](arrays, 3)
    assert found == {
        "seconds": pytest.approx(1e-3 if direction == "forward" else 2e-3),
        "bytes": 100 if direction == "forward" else 200,
        "version": f"{package}, PyTorch 2.0",
    }
    assert jnp.allclose(outs[-1].array, jax.nn.dot_product_attention(*arrays, is_causal=True))


@pytest.mark.parametrize("direction", ("forward", "gradient"))
def test_pytorchs_own_flash_attention_is_asked_for_the_same(direction, monkeypatch):
    """Where there is no package of it."""
    torch, outs, backends = _Torch(), [], []

    def scaled_dot_product_attention(q, k, v, is_causal=False):
        torch.work(100)
        arrays = (jnp.swapaxes(x.array, 1, 2) for x in (q, k, v))
        out = jax.nn.dot_product_attention(*arrays, is_causal=is_causal)
        outs.append((_Tensor(jnp.swapaxes(out, 1, 2)), backends[-1]))
        return outs[-1][0]

    @contextlib.contextmanager
    def sdpa_kernel(backend):
        backends.append(backend)
        yield
        backends.append(None)

    nn, attention, functional = (
        types.ModuleType(f"torch.nn{name}") for name in ("", ".attention", ".functional")
    )
    functional.scaled_dot_product_attention = scaled_dot_product_attention
    attention.sdpa_kernel = sdpa_kernel
    attention.SDPBackend = types.SimpleNamespace(FLASH_ATTENTION="flash")
    nn.attention, nn.functional = attention, functional
    for module in (torch, nn, attention, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        tiled_gpu.importlib.util, "find_spec", lambda name: True if name == "torch" else None
    )
    arrays = tuple(jax.random.normal(jax.random.key(0), (3, 2, 8, 2, 4)))
    found = tiled_gpu.costs("causal", direction, 64)["PyTorch's FlashAttention"](arrays, 3)
    assert found == {
        "seconds": pytest.approx(1e-3 if direction == "forward" else 2e-3),
        "bytes": 100 if direction == "forward" else 200,
        "version": "built in, PyTorch 2.0",
    }
    out, backend = outs[-1]
    expected = jax.nn.dot_product_attention(*arrays, is_causal=True)
    assert backend == "flash" and jnp.allclose(jnp.swapaxes(out.array, 1, 2), expected)
