"""Tokens a second of linear attention on a CUDA device, beside flash-linear-attention's."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmark import gpu
from experiments.benchmark.linear_variants import BOUND, VARIANTS, arrays_of, constant_decays
from experiments.benchmark.measure import directed
from experiments.benchmark.table import Report
from experiments.compile_report import chosen

LIGHTNING = "lightning"
"""The variant whose share of the memory's bandwidth is shown: it computes least."""

FLA: dict[str, tuple[str, dict[str, Any]]] = {
    LIGHTNING: ("simple_gla", {}),
    "gate per step": ("simple_gla", {}),
    "gate per channel (GLA)": ("gla", {}),
    "gated delta rule (gated DeltaNet)": ("gated_delta_rule", {}),
    "gated delta rule per channel (KDA)": ("kda", {}),
    # A faster kernel, for those who promise the bound.
    f"gated delta rule per channel, bound {BOUND:g}": (
        "kda",
        {"safe_gate": True, "lower_bound": BOUND},
    ),
}
"""Variants that run, with the operation of flash-linear-attention that does the same, and its
options."""

ARGUMENTS = {"query": "q", "key": "k", "value": "v", "log_decay": "g", "beta": "beta"}
"""What it calls our arguments, of the same layouts."""

SOFTMAX = "softmax attention"

MOVED = {"forward": 4, "gradient": 11}
"""Arrays of the size of the query that memory has to move, by pass: q, k, v and o; and for a
backward q, k, v again, the gradient of o, and the gradients of q, k and v."""

STYLES = {"ours": "o-", "XLA": "x:", "fla": "s--", "cuDNN": "^-."}
"""Lines in a plot, by peer."""


@dataclass(frozen=True)
class GpuConfig(gpu.DeviceConfig):
    """Tokens a second, by length, on a CUDA device."""

    shared = ("total", "features")

    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    """Lengths."""
    total: int = 131072
    """Tokens of all sequences together."""
    features: int = 128
    """Head dimension."""
    peers: tuple[Literal["ours", "XLA", "fla", "cuDNN"], ...] = ("ours", "XLA", "fla", "cuDNN")
    """What is measured: our GPU kernels, our XLA implementation, flash-linear-attention, cuDNN."""
    repeats: int = 10
    """Rounds of calls, of which the fastest counts."""
    plot: Path | None = None
    """Picture of the rates to draw."""

    def measure(self, report: Report) -> None:
        """Runs all lengths of each pass; its last row is the slowest over the fastest of them."""
        for label, (direction, name) in chosen(_passes(self.peers), self.only).items():
            rates: dict[str, list[float]] = {}
            for tokens in self.tokens:
                for peer, rate in self._add(report, label, direction, name, tokens).items():
                    rates.setdefault(peer, []).append(rate)
            spread = {peer: min(x) / max(x) for peer, x in rates.items() if len(x) > 1}
            if spread:
                row = {f"{peer} Mtoken/s": f"{share:.0%}" for peer, share in spread.items()}
                record = {f"{peer} spread": share for peer, share in spread.items()}
                report.add({"pass": label, "tokens": "spread"} | row, {"pass": label} | record)
        if self.plot is not None and report.whole:
            try:
                draw(self.plot, report.records)
            except (OSError, ValueError) as error:  # such as a kind of file that is not known
                # The table is shown all the same.
                report.failures.append(f"plot: cannot write {self.plot}: {error}")

    def _add(
        self, report: Report, label: str, direction: str, name: str, tokens: int
    ) -> dict[str, float]:
        """Adds a row; returns tokens a second by peer."""
        shape = gpu.shape_of(self.total, tokens, self.features)
        batch, _, heads, features = shape
        variant = VARIANTS["no decay" if name == SOFTMAX else name]
        inputs = variant.inputs(tokens, heads, features, jnp.bfloat16, batch)
        arrays = functools.cache(lambda: tuple(arrays_of(inputs).values()))
        row = {"pass": label, "tokens": f"{tokens:,}"}
        record: dict[str, Any] = {"pass": label, "direction": direction, "variant": name}
        record |= {"shape": shape, "tokens": tokens, "device": jax.devices()[0].device_kind}
        rates = {}
        for peer, cost in costs(direction, name, [*inputs], heads).items():
            if peer not in self.peers:
                continue
            row |= {f"{peer} Mtoken/s": "-", f"{peer} MiB": "-"}
            place = f"{label}, {tokens:,} tokens"
            found = gpu.measured(report, record, place, peer, cost, arrays, self.repeats)
            if found is None:
                continue
            seconds = found["seconds"]
            record[f"{peer} tokens/s"] = rates[peer] = rate = batch * tokens / seconds
            cell = f"{rate / 1e6:.3g}"
            if name == LIGHTNING:
                moved = MOVED[direction] * math.prod(shape) * inputs["query"].dtype.itemsize
                cell += gpu.share(moved / seconds, "bandwidth")
            row |= {f"{peer} Mtoken/s": cell, f"{peer} MiB": f"{found['bytes'] / 2**20:,.0f}"}
        report.add(row, record)
        return rates


def _passes(peers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns, by name, the directions and variants that some of the peers have."""
    names = [*(FLA if {*peers} - {"cuDNN"} else ()), *((SOFTMAX,) if "cuDNN" in peers else ())]
    return {f"{direction}, {name}": (direction, name) for direction in MOVED for name in names}


def costs(direction: str, name: str, inputs: Sequence[str], heads: int) -> dict[str, gpu.Cost]:
    """Returns what measures the peers that have a variant, on arrays in the order of its inputs."""
    if name == SOFTMAX:
        attention = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
        return {"cuDNN": functools.partial(gpu.cost, directed(direction, attention, range(3)))}
    found: dict[str, gpu.Cost] = {}
    for peer, implementation in (("ours", "pallas_gpu"), ("XLA", "xla")):
        function = VARIANTS[name].function(direction, inputs, heads, implementation)
        found[peer] = functools.partial(gpu.cost, function)
    return found | {"fla": functools.partial(fla_cost, direction, name, inputs)}


def fla_cost(
    direction: str, name: str, inputs: Sequence[str], arrays: Sequence[Array], repeats: int
) -> dict[str, Any]:
    """Measures flash-linear-attention on the same arrays, as `gpu.cost` measures ours."""
    import fla
    import torch

    operation, options = FLA[name]
    function = getattr(importlib.import_module(f"fla.ops.{operation}"), f"chunk_{operation}")
    names = [ARGUMENTS[of] for of in inputs]
    if VARIANTS[name].constant_decay:
        decays = torch.from_dlpack(jnp.asarray(constant_decays(arrays[0].shape[2])))
        options = options | {"g_gamma": decays}

    def attend(*leaves: Any) -> Any:
        return function(**dict(zip(names, leaves, strict=True)), **options, scale=1.0)[0]

    return gpu.torch_cost(attend, fla.__version__, direction, arrays, repeats)


def draw(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Draws tokens a second over the length, a panel for each pass.

    Raises:
      OSError: if the file cannot be written.
      ValueError: if there are no files of its kind.
    """
    # Half a second to import, which only a command that draws should wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    panels = dict(zip(MOVED, figure.subplots(1, len(MOVED), sharey=True), strict=True))
    colors = {name: f"C{i}" for i, name in enumerate((*FLA, SOFTMAX))}
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for record, peer in itertools.product(records, STYLES):
        if f"{peer} tokens/s" in record:
            line = lines.setdefault((record["direction"], record["variant"], peer), [])
            line.append((record["tokens"], record[f"{peer} tokens/s"]))
    for (direction, name, peer), points in lines.items():
        label = f"{name}, {peer}"
        panels[direction].plot(
            *np.asarray(sorted(points)).T, STYLES[peer], color=colors[name], label=label
        )
    for direction, axes in panels.items():
        axes.set_title(direction)
        axes.set_xlabel("tokens of a sequence")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels["forward"].set_ylabel("tokens per second")
    # Each line once, whichever panels it is in.
    legend = {line.get_label(): line for axes in panels.values() for line in axes.get_lines()}
    figure.legend(handles=[*legend.values()], loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
