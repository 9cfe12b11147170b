"""Arithmetic of PTX that NumPy has not, on arrays with a number for each thread."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def in_float64(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Returns a function of float32 that is rounded once."""

    def compute(*arguments: np.ndarray) -> np.ndarray:
        return function(*(np.asarray(x, np.float64) for x in arguments)).astype(np.float32)

    return compute


def fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a * b + c, rounded towards minus infinity."""
    exact = np.float64(a) * np.float64(b) + np.float64(c)
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def saturated(x: np.ndarray) -> np.ndarray:
    """Returns what is nearest from 0 to 1; 0 for NaN."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1))


def integers(x: np.ndarray, kind: Any, round_: Callable[..., Any]) -> np.ndarray:
    """Returns rounded numbers as integers of a kind, the nearest that there are; 0 for NaN."""
    limits = np.iinfo(kind)
    x = np.clip(round_(np.float64(x)), limits.min, limits.max)
    return np.where(np.isnan(x), 0, x).astype(kind)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a / b of integers of at most 32 bits, rounded towards zero."""
    return np.trunc(np.float64(a) / np.float64(b)).astype(a.dtype)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the upper half of products of 64 bits."""
    return (a.astype(object) * b.astype(object) >> 64).astype(np.uint64)


def left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Returns a << by; 0 where all bits leave."""
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Returns a >> by; 0 or the sign where all bits leave."""
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "u":
        a, by = np.where(by < bits, a, 0).astype(a.dtype), by
    return a >> np.minimum(by, bits - 1).astype(a.dtype)


def permuted(a: np.ndarray, b: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Returns four bytes of b and a, chosen by the digits of `control` (prmt)."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    if (control & 0x8888).any():
        raise NotImplementedError("PTX: prmt with signs")
    found = np.zeros(both.shape, np.uint64)
    for i in range(4):
        byte = both >> (control.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(7)) * np.uint64(8)
        found |= (byte & np.uint64(255)) << np.uint64(8 * i)
    return found.astype(np.uint32)


def pairs(x: np.ndarray, kind: str) -> np.ndarray:
    """Returns numbers [threads, 2] as registers with two of 16 bits."""
    halves = x.astype(np.float32).astype(HALVES[kind])
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


def of_pairs(x: np.ndarray, kind: str) -> np.ndarray:
    """Returns the two numbers of registers: [threads, 2], float64."""
    return x.view(HALVES[kind]).reshape(-1, 2).astype(np.float64)
