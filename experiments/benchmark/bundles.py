"""The TPU compiler's report of a kernel's bundles: its blocks, and how often each bundle runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DELAY_SLOTS = 4
"""Bundles after a branch that are executed whether it is taken or not."""

# A bundle begins with a line with its address and what the address marks: loop header, body or
# exit, start or fallthrough of a predicated region, any other target of a jump.
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)(%\w+)\) )?target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_INSTRUCTION = re.compile(r"(%\w+) = ([\w.]+) ([^;]*)")
_SPILL = re.compile(r"(\[smem:\[#\w+\]\]) (%\w+)")
# Leaves the operands of an instruction, which may be predicated.
_ASIDE = re.compile(r"/\*.*?\*/|^\(!?%\w+\),")
_OPERAND = re.compile(r"%\w+|\[smem:\[#\w+\]\]|(?<![\w%])\d+\b")


class Loop(NamedTuple):
    """A loop of a kernel."""

    bundles: range
    passes: int | None
    """None if only the run knows."""


@dataclass(frozen=True)
class Code:
    """A kernel's bundles."""

    blocks: list[range]
    """Basic blocks."""
    loops: list[Loop]
    """The loop over grid steps, if there are several, and those of the kernel in it."""
    apart: list[int]
    """Bundles that run where an index of the grid has one value, such as in the first step."""

    def runs(self, grid_steps: int | None) -> np.ndarray | None:
        """Returns how often each bundle runs in a grid step, 0 for those that stand apart.

        All other branches are taken to run. None if it cannot be told.
        """
        if grid_steps is None:
            return None
        runs = np.full(self.blocks[-1].stop, 1 / grid_steps)
        for loop in self.loops:
            passes = loop.passes
            if passes is None:
                return None
            others = (other.bundles for other in self.loops if other is not loop)
            if grid_steps > 1 and not any(loop.bundles.start in other for other in others):
                # It is the grid's, and has passes more in which copies begin and end.
                passes = grid_steps
            runs[list(loop.bundles)] *= passes
        runs[self.apart] = 0
        return runs


def read_code(lines: Iterable[str]) -> Code:
    """Reads the lines of the report."""
    marks, texts = [], []
    for line in lines:
        bundle = _BUNDLE.match(line)
        if bundle:
            marks.append(bundle[1])
            texts.append(line)
        elif texts:
            texts[-1] += line
    values = _Values(texts)
    regions = {}
    for at, text in enumerate(texts):
        for region in _REGION.findall(text):
            regions.setdefault(region, at)

    starts = {0} | {at for at, mark in enumerate(marks) if mark}
    loops, apart = [], set()
    for at, text in enumerate(texts):
        for negated, predicate, region in _BRANCH.findall(text):
            after = at + DELAY_SLOTS + 1
            starts.add(after)
            target = regions.get(region, after)
            if target <= at:
                loops.append(Loop(range(target, after), values.passes(predicate)))
            elif values.pins(predicate, holds=bool(negated)):
                apart.update(range(after, target))
    ends = sorted(start for start in starts if start < len(texts))
    blocks = [range(*block) for block in itertools.pairwise([*ends, len(texts)])]
    return Code(blocks, loops, sorted(apart))


class _Value(NamedTuple):
    operation: str
    operands: list[str]
    is_index: bool
    """Whether it is an index of the grid, by the compiler's comment."""


class _Values:
    """What a kernel computes in scalar and predicate registers."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._values: dict[str, _Value] = {}
        self._spilled: dict[str, list[str]] = {}
        for text in texts:
            for name, operation, rest in _INSTRUCTION.findall(text):
                if name.startswith(("%s", "%p")):
                    operands = _OPERAND.findall(_ASIDE.sub("", rest))
                    index = "iteration index" in rest
                    self._values[name] = _Value(operation, operands, index)
                elif spill := operation == "sst" and _SPILL.match(rest):
                    self._spilled.setdefault(spill[1], []).append(spill[2])

    def passes(self, leave: str) -> int | None:
        """Returns the passes of a loop that ends where a predicate holds, if it says so."""
        test = self._values.get(leave)
        if test is None or not test.operation.startswith("scmp.ge.s32"):
            return None
        counts, stops = self._split(test.operands)
        for value in self._origins(*counts):
            if value.operation == "sadd.s32":
                counted, steps = self._split(value.operands)
                copied = (x.operands for x in self._origins(*counted) if x.operation == "smov.u32")
                starts = [int(start) for start, *_ in copied if start.isdigit()]
                if steps and starts and stops:
                    return math.ceil((stops[0] - starts[0]) / steps[0])
        return None

    def pins(self, predicate: str, *, holds: bool) -> bool:
        """Returns whether a predicate holds, or does not, for one value of a grid index only."""
        value = self._values.get(predicate)
        if value is None:
            return False
        operation, *kind = value.operation.split(".")
        if operation == "scmp" and kind[0] == ("eq" if holds else "ne"):
            tested, constants = self._split(value.operands)
            return bool(constants) and any(x.is_index for x in self._origins(*tested))
        if operation == "pnand":
            operation, holds = "pand", not holds
        if operation == ("pand" if holds else "por"):
            return any(self.pins(operand, holds=holds) for operand in value.operands)
        return False

    def _origins(self, *names: str) -> Iterator[_Value]:
        """Yields values, and what they are copies of, through loops and spills."""
        names = list(names)
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            yield value
            if value.operation in ("smov.u32", "sphi", "sld"):
                found = (self._spilled.get(operand, [operand]) for operand in value.operands)
                names += [name for name in itertools.chain(*found) if name not in names]

    @staticmethod
    def _split(operands: Iterable[str]) -> tuple[list[str], list[int]]:
        """Returns the registers of operands, and the numbers."""
        operands = list(operands)
        numbers = [int(operand) for operand in operands if operand.isdigit()]
        return [operand for operand in operands if operand.startswith("%")], numbers
