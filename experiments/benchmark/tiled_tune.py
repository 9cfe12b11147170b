"""Configurations of the GPU kernels of tiled attention, measured on the CUDA device at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmark import gpu
from experiments.benchmark.measure import directed
from experiments.benchmark.table import Report, progress
from experiments.benchmark.tiled_gpu import random_lists
from pallas_kernels import masks
from pallas_kernels.tiled import gpu_tuned, tiled_attention
from pallas_kernels.tiled.gpu_tuned import Config
from pallas_kernels.tiled.inputs import Inputs

CONFIGS = {
    f"{tile} columns{', persistent' if persistent else ''}": Config(tile, persistent)
    for tile in (128, 64)
    for persistent in (False, True)
}
ONE_PASS = {"one pass": Config(128, False, one_pass=True)}
"""More of the kernel with tiles of keys, whose time is that of the whole backward."""


@dataclass(frozen=True)
class TuneConfig(gpu.DeviceConfig):
    """Times of the GPU kernels' configurations; writes the fastest into the kernels' table."""

    shared = ("tokens", "total")

    features: tuple[int, ...] = (64, 128, 192, 256)
    """Head dimensions."""
    tokens: int = 8192
    """Of a sequence."""
    total: int = 32768
    """Tokens of all sequences together."""
    repeats: int = 10
    """Rounds of calls, of which the fastest counts."""
    write: bool = False
    """Add the fastest to the table of the installed package, for this device."""

    def measure(self, report: Report) -> None:
        """Measures every kernel with every configuration, the other kernels as they are."""
        device, count = jax.devices()[0].device_kind, 0
        for features in self.features:
            arrays = gpu.normal(self.total, self.tokens, features)
            shape = gpu.shape_of(self.total, self.tokens, features)
            types = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
            for mask in (None, masks.causal(), random_lists(self.tokens, 128)):
                x = Inputs(*types, *(None,) * (len(Inputs._fields) - 3))._replace(mask=mask)
                for kernel in gpu_tuned.KERNELS:
                    key = gpu_tuned.key(kernel, x)
                    if self.only not in key:
                        continue
                    found = self._measured(report, key, kernel, mask, arrays)
                    if self.write and report.whole and found is not None:
                        # At once: what follows may be stopped.
                        gpu_tuned.write(device, {key: found})
                        count += 1
        if count:
            progress(f"{count} configurations for {device} are in {gpu_tuned.file()}")

    def _measured(
        self, report: Report, key: str, kernel: str, mask: Any, arrays: gpu.Arrays
    ) -> Config | None:
        """Adds a row of times; returns what is fastest."""
        direction = "forward" if kernel == "forward" else "gradient"
        attention = functools.partial(tiled_attention, mask=mask, implementation="pallas_gpu")
        function = directed(direction, attention, range(3))
        row = {"kernel": key}
        record: dict[str, Any] = dict(row, device=jax.devices()[0].device_kind)
        times = {}
        for name, config in (CONFIGS | ONE_PASS).items():
            if name in ONE_PASS and kernel != "backward_keys":
                continue
            cost = functools.partial(_cost, kernel, config, function)
            found = gpu.measured(report, record, key, name, cost, arrays, self.repeats)
            row[f"{name}, ms"] = "-" if found is None else f"{1e3 * found['seconds']:.3f}"
            if found is not None:
                times[config] = found["seconds"]
        report.add(row, record)
        return min(times, key=times.get) if times else None


def _cost(
    kernel: str,
    config: Config,
    function: Callable[..., Any],
    arrays: Sequence[Array],
    repeats: int,
) -> dict[str, float]:
    """Is `gpu.cost` with a kernel configured in some way."""
    jax.clear_caches()  # of what was traced with another configuration
    with gpu_tuned.trying(kernel, config):
        return gpu.cost(function, arrays, repeats)
