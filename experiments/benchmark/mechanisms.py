"""How time and memory of every mechanism grow with the length, beside exact attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attention import catalogue
from attention.catalogue import Mechanism
from experiments.benchmark.measure import ReportConfig, directed, fastest
from experiments.benchmark.table import Report, progress
from experiments.compile_report import chosen
from experiments.errors import ExperimentError

EXACT = "softmax_attention"
POWERS = {"O(T)": 1.0, "O(T log T)": 1.2, "O(T^1.5)": 1.5, "O(T^2)": 2.0}
"""Exponents that costs claim. What a logarithm adds depends on where it begins to count: 0.5 over
two doublings if that is a quarter of the first length, 0.1 if it is one token."""
SLACK = 0.3
"""By how much an exponent may exceed what is claimed: one doubling that leaves the caches adds that
much."""
SPAN = 8
"""Lengths from which an exponent is taken: the longest, and those of an eighth of it or more."""


@dataclass(frozen=True)
class MechanismsConfig(ReportConfig):
    """Time and memory of mechanisms by length, on the device at hand, lists of blocks included."""

    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    """Lengths to run, ascending."""
    heads: int = 2
    """Number of heads."""
    features: int = 64
    """Head dimension."""
    direction: Literal["forward", "gradient"] = "forward"
    """Whether the forward pass is timed, or forward and backward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the arrays."""
    repeats: int = 3
    """Runs, of which the fastest counts."""
    min_seconds: float = 0.5
    """A mechanism that is faster at the longest length runs at longer ones too, up to four times
    that, which count for its exponents: there what it keeps has left the caches."""
    max_seconds: float = 60.0
    """Longer lengths of a mechanism are left out where the next would take longer than this."""

    def fill(self, report: Report) -> None:
        """Runs every mechanism at every length; exponents are those of the last lengths.

        Raises:
          ExperimentError: lengths or repeats make no sense.
        """
        if len(self.tokens) < 2 or sorted(set(self.tokens)) != list(self.tokens):
            raise ExperimentError(f"tokens: {self.tokens}; give two lengths or more, ascending")
        if min(self.tokens) < 1 or self.repeats < 1:
            raise ExperimentError(
                f"tokens: {self.tokens}, repeats: {self.repeats}; both must be at least 1"
            )
        records = chosen(dict(catalogue.mechanisms()), self.only)
        exact = catalogue.get(EXACT)
        reference = self._measure(exact)
        for record in records.values():
            row = {"mechanism": record.slug, "claimed": record.time}
            try:
                found = reference if record is exact else self._measure(record)
            except (
                ValueError,
                TypeError,
                NotImplementedError,
                jax.errors.JaxRuntimeError,
            ) as error:
                report.fail(row, ExperimentError(f"{record.slug}: {error}"))
                continue
            seconds, sizes = found
            grown = exponent(seconds)
            row |= {f"{n} ms": _milliseconds(seconds.get(n)) for n in self.tokens}
            row["exponent"] = "-" if grown is None else f"{grown:.2f}"
            row["up to"] = f"{max(seconds):,}"
            row["agrees"] = "-" if grown is None else _agrees(grown, record.time)
            row["memory claimed"] = record.memory
            longest = self.tokens[-1]
            row[f"MiB at {longest}"] = f"{sizes[longest] / 2**20:.1f}"
            grown_memory = exponent(sizes)
            row["memory exponent"] = f"{grown_memory:.2f}"
            both = [n for n in self.tokens if n in seconds and n in reference[0]]
            row["of exact"] = f"{seconds[both[-1]] / reference[0][both[-1]]:.2f}" if both else "-"
            report.add(
                row,
                {
                    "mechanism": record.slug,
                    "device": jax.devices()[0].device_kind,
                    "seconds": seconds,
                    "bytes": sizes,
                    "exponent": grown,
                    "memory exponent": grown_memory,
                },
            )

    def _measure(self, record: Mechanism) -> tuple[dict[int, float], dict[int, int]]:
        """Returns seconds of the lengths that were run, and bytes of all, by length."""
        seconds: dict[int, float] = {}
        sizes: dict[int, int] = {}
        longest = self.tokens[-1]
        for tokens in (*self.tokens, 2 * longest, 4 * longest):
            last = max(seconds, default=None)
            if tokens > longest and (last != tokens // 2 or seconds[last] > self.min_seconds):
                break
            arrays = _arrays(record, tokens, self.heads, self.features, jnp.dtype(self.dtype))
            function = functools.partial(record.function, **_causal(record))
            function = directed(self.direction, function, range(len(arrays)))
            compiled = jax.jit(function).lower(*arrays).compile()
            sizes[tokens] = compiled.memory_analysis().temp_size_in_bytes
            if last is not None:
                power = max(POWERS.get(record.time, 2.0), 1.0)
                if seconds[last] * (tokens / last) ** power > self.max_seconds:
                    continue
            progress(f"{record.slug}, {tokens} tokens")
            seconds[tokens] = fastest(compiled, arrays, self.repeats)
        return seconds, sizes


def exponent(costs: Mapping[int, float]) -> float | None:
    """The power of the length with which a cost grew over the last lengths, by least squares.

    Args:
      costs: by length.

    Returns:
      The power, or None where there are fewer than two lengths.
    """
    if len(costs) < 2:
        return None
    lengths = sorted(costs)
    lengths = [n for n in lengths if SPAN * n >= lengths[-1]]
    lengths = lengths if len(lengths) > 1 else sorted(costs)[-2:]
    last = [costs[n] for n in lengths]
    if not min(last):
        return 0.0 if not max(last) else math.inf
    return float(np.polyfit(np.log(lengths), np.log(last), 1)[0])


def _agrees(grown: float, claimed: str) -> str:
    return "yes" if grown <= POWERS.get(claimed, 2.0) + SLACK else "no"


def _causal(record: Mechanism) -> dict[str, Any]:
    return {"is_causal": True} if "is_causal" in record.options else {}


def _arrays(
    record: Mechanism, tokens: int, heads: int, features: int, dtype: jnp.dtype
) -> Sequence[jax.Array]:
    if record.arguments:
        return tuple(map(jnp.asarray, record.example_arguments(1, tokens, dtype).values()))
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, tokens, heads, features), dtype)
    return (query[:, :1] if record.one_query else query), key, value


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.1f}"
