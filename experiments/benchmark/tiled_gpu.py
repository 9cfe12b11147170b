"""Time of tiled attention on a CUDA device, beside cuDNN, tokamax, FlashAttention and JAX's own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmark import gpu
from experiments.benchmark.measure import directed
from experiments.benchmark.table import Report
from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention

DIRECTIONS = {"forward": 1.0, "gradient": 3.5}
"""Matrix products, with the forward's, in forwards: two, and five of the backward."""

Peer = Callable[..., Array]


@dataclass(frozen=True)
class GpuConfig(gpu.DeviceConfig):
    """Rates of dense attention beside its peers, and what sparse attention saves of it."""

    shared = ("total",)

    features: tuple[int, ...] = (64, 128, 256)
    """Head dimensions."""
    tokens: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Lengths."""
    total: int = 32768
    """Tokens of all sequences together."""
    sparse_tokens: int = 32768
    """Length at which windows, block lists and other weights are compared."""
    repeats: int = 20
    """Rounds of calls, of which the fastest counts."""

    def measure(self, report: Report) -> None:
        """Runs all of them in turn, on the same arrays."""
        for features in self.features:
            for mask in ("causal", "full"):
                for direction in DIRECTIONS:
                    for tokens in self.tokens:
                        self._dense(report, features, mask, direction, tokens)
        for features in self.features:
            self._sparse(report, features)

    def _dense(self, report: Report, features: int, mask: str, direction: str, tokens: int) -> None:
        """Adds a row of rates, in TFLOP/s and as shares of the device's peak."""
        label = f"{direction}, {mask}, {features} features"
        if self.only not in label:
            return
        arrays = gpu.normal(self.total, tokens, features)
        batch, _, heads, _ = gpu.shape_of(self.total, tokens, features)
        products = 4 * batch * heads * features * tokens**2 * DIRECTIONS[direction]
        products /= 2 if mask == "causal" else 1
        row = {"pass": label, "tokens": f"{tokens:,}"}
        record: dict[str, Any] = dict(row, device=jax.devices()[0].device_kind)
        for name, cost in costs(mask, direction, features).items():
            place = f"{label}, {tokens:,} tokens"
            seconds = self._seconds(report, record, place, name, cost, arrays)
            row[f"{name} TFLOP/s"] = "-" if seconds is None else rate(products / seconds)
        report.add(row, record)

    def _sparse(self, report: Report, features: int) -> None:
        """Adds rows of the time that something takes, and of how many times it goes into full."""
        tokens = self.sparse_tokens
        arrays = gpu.normal(tokens, tokens, features)
        for direction in DIRECTIONS:
            full = None
            for name, options in variants(tokens).items():
                label = f"{direction}, {name}, {features} features"
                if self.only not in label:
                    continue
                row = {"pass": label, "tokens": f"{tokens:,}"}
                record: dict[str, Any] = dict(row, device=jax.devices()[0].device_kind)
                ours = directed(direction, functools.partial(_ours, **options), range(3))
                cost = functools.partial(gpu.cost, ours)
                place = f"{label}, {tokens:,} tokens"
                seconds = self._seconds(report, record, place, "ours", cost, arrays)
                full = seconds if name == FULL else full
                if seconds is not None:
                    row["ours ms"] = f"{1e3 * seconds:.3f}"
                    row["times as fast as full"] = f"{full / seconds:.2f}" if full else "-"
                report.add(row, record)

    def _seconds(
        self,
        report: Report,
        record: dict[str, Any],
        label: str,
        name: str,
        cost: gpu.Cost,
        arrays: gpu.Arrays,
    ) -> float | None:
        found = gpu.measured(report, record, label, name, cost, arrays, self.repeats)
        return None if found is None else found["seconds"]


FULL = "softmax"


def variants(tokens: int) -> dict[str, dict[str, Any]]:
    """Returns what is compared with full attention to so many tokens, and that."""
    return {
        FULL: {},
        "sigmoid": {"weights": "sigmoid", "logit_bias": -float(np.log(tokens))},
        "window of 1,024": {"mask": masks.causal() & masks.window(1023, 0)},
        "random lists of 128 x 128, an eighth": {"mask": random_lists(tokens, 128)},
        "random lists of 64 x 64, an eighth": {"mask": random_lists(tokens, 64)},
    }


def random_lists(tokens: int, block: int) -> masks.Mask:
    """Returns lists of an eighth of all blocks, drawn at random for every block of queries."""
    rng, count = np.random.default_rng(0), -(-tokens // block)
    kept = max(count // 8, 1)
    indices = np.stack([np.sort(rng.permutation(count)[:kept]) for _ in range(count)])
    counts = np.full((1, 1, count), kept, np.int32)
    return masks.blocks(indices[None, None].astype(np.int32), counts, block, block)


FLASH = ("flash_attn_interface", "flash_attn")
"""Packages of FlashAttention for PyTorch: version 3, and 2."""


def costs(mask: str, direction: str, features: int) -> dict[str, gpu.Cost]:
    """Returns what measures those that a row compares."""
    causal = masks.causal() if mask == "causal" else None
    functions: dict[str, Peer] = {
        "ours": functools.partial(_ours, mask=causal),
        "cuDNN": functools.partial(
            jax.nn.dot_product_attention, is_causal=causal is not None, implementation="cudnn"
        ),
        "JAX's Mosaic GPU": functools.partial(_mosaic, mask == "causal", features),
    }
    if importlib.util.find_spec("tokamax"):
        functions["tokamax"] = functools.partial(_tokamax, causal is not None)
    found: dict[str, gpu.Cost] = {
        name: functools.partial(gpu.cost, directed(direction, function, range(3)))
        for name, function in functions.items()
    }
    for package in filter(importlib.util.find_spec, FLASH):
        cost = functools.partial(flash_cost, package, causal is not None, direction)
        return found | {"FlashAttention": cost}
    if importlib.util.find_spec("torch"):  # which has version 2 built in
        cost = functools.partial(built_in_cost, causal is not None, direction)
        found["PyTorch's FlashAttention"] = cost
    return found


def flash_cost(
    package: str, causal: bool, direction: str, arrays: Sequence[Array], repeats: int
) -> dict[str, Any]:
    """Measures FlashAttention on the same arrays, as `gpu.cost` measures ours."""
    function = importlib.import_module(package).flash_attn_func

    def attend(*leaves: Any) -> Any:
        out = function(*leaves, causal=causal)
        return out[0] if isinstance(out, tuple) else out  # some return the log-sum-exp as well

    return gpu.torch_cost(attend, package, direction, arrays, repeats)


def built_in_cost(
    causal: bool, direction: str, arrays: Sequence[Array], repeats: int
) -> dict[str, Any]:
    """Measures PyTorch's own FlashAttention on the same arrays, as `gpu.cost` measures ours."""
    from torch.nn import attention, functional

    def attend(*leaves: Any) -> Any:
        # Its heads come before tokens.
        heads = (leaf.transpose(1, 2) for leaf in leaves)
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            out = functional.scaled_dot_product_attention(*heads, is_causal=causal)
        return out.transpose(1, 2)

    return gpu.torch_cost(attend, "built in", direction, arrays, repeats)


def rate(operations: float) -> str:
    """Returns operations a second in TFLOP/s, and as a share of the device's peak."""
    return f"{operations / 1e12:.0f}{gpu.share(operations, 'operations')}"


def _ours(*arrays: Array, **options: Any) -> Array:
    return tiled_attention(*arrays, implementation="pallas_gpu", **options)


def _mosaic(causal: bool, features: int, *arrays: Array) -> Array:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # float16, as it copies to memory of that type whatever it gets; 64 tokens fit at any width.
    tile = 128 if features <= 128 else 64
    backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    config = attention_mgpu.TuningConfig(64, tile, 2, causal=causal, **backward)
    return attention_mgpu.attention(*(x.astype(jnp.float16) for x in arrays), config)


def _tokamax(causal: bool, *arrays: Array) -> Array:
    import tokamax

    return tokamax.dot_product_attention(*arrays, is_causal=causal, implementation="mosaic")
