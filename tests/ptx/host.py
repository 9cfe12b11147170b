"""Runs the host's part of a kernel: what it is launched with.

Mosaic GPU has it as LLVM IR: straight code that fills in descriptors of arrays for the copy engine
and a list of arguments.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from tests.ptx.memory import Fault

_STATEMENT = re.compile(r"\s*(?:(%\w+) = )?(\w+) (.*)")
_SIZES = {"ptr": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1}
_ITEM_BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 8: 4}
"""By Mosaic GPU's numbers of types."""
_ARGUMENTS, _FREE = 1 << 60, 1 << 61


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """An array in GMEM as the copy engine sees it; the innermost dimension comes first."""

    base: int
    item_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes."""
    box: tuple[int, ...]
    """Elements of a copy."""
    swizzle: int
    """Bytes; 16 is none."""

    def __post_init__(self):
        """Raises a Fault if CUDA would not encode it."""
        row = self.box[0] * self.item_bytes
        aligned = [self.base, row, *self.strides[1:]]
        if self.strides[0] != self.item_bytes or any(x % 16 for x in aligned):
            raise Fault(f"no multiple of 16 bytes: {self}")
        if len(self.sizes) > 5 or max(self.box) > 256 or min(*self.sizes, *self.box) < 1:
            raise Fault(f"too much, or nothing: {self}")
        if row > self.swizzle > 16:
            raise Fault(f"rows are longer than they can be: {self}")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a kernel is launched with."""

    grid: tuple[int, int, int]
    threads: int
    smem_bytes: int
    parameters: list[int | list[TensorMap]]
    """Addresses, and what is given by value: descriptors, one after the other."""


def launch(code: str, addresses: Sequence[int]) -> Launch:
    """Returns what a kernel is launched with.

    Args:
      code: LLVM IR of the host's function.
      addresses: of the kernel's arguments and results in GMEM.
    """
    memory: dict[int, Any] = {_ARGUMENTS + 8 * i: x for i, x in enumerate(addresses)}
    head, *lines = code.splitlines()
    *others, last = re.findall(r"%\d+", head)
    values: dict[str, Any] = dict.fromkeys(others, 0) | {last: _ARGUMENTS}
    free, maps, found = _FREE, {}, None

    def value(text: str) -> Any:
        text = text.split()[-1]
        if text in ("undef", "poison"):
            return {}
        return values[text] if text.startswith("%") else int(text)

    for line in lines:
        match = _STATEMENT.fullmatch(line)
        if not match:
            continue
        name, operation, rest = match.groups()
        arguments = arguments_of(rest)
        if operation == "ret":
            break
        if operation == "load":
            at = value(arguments[1])
            descriptors = range(at, at + _size(arguments[0]), 128)
            result = memory[at] if at in memory else [maps[x] for x in descriptors]
        elif operation == "store":
            memory[value(arguments[1])] = value(arguments[0])
            continue
        elif operation == "alloca":
            count = value(arguments[1]) if arguments[1].startswith("i64") else 1
            result, free = free, free + -(-_size(arguments[0]) * count // 64) * 64
        elif operation == "insertvalue":
            result = value(arguments[0]) | {tuple(map(int, arguments[2:])): value(arguments[1])}
        elif operation == "extractvalue":
            result = value(arguments[0])[tuple(map(int, arguments[1:]))]
        elif operation == "getelementptr":
            of = re.sub(r"^(inbounds |nuw |nusw )*", "", arguments[0])
            result = value(arguments[1]) + _size(of) * value(arguments[2])
            for index in map(value, arguments[3:]):
                inner = arguments_of(of[1:-1])
                result += sum(map(_size, inner[:index]))
                of = inner[index]
        elif operation in ("ptrtoint", "inttoptr"):
            result = value(rest.split(" to ")[0])
        elif operation in ("add", "mul"):
            left, right = map(value, arguments)
            result = left + right if operation == "add" else left * right
        elif operation == "call":
            function, given = re.fullmatch(r"\w+ @(\w+)\((.*)\)", rest).groups()
            given = [value(x) for x in arguments_of(given)]
            if function == "mosaic_gpu_init_tma_desc":
                target, base, kind, rank, sizes, strides, swizzle, box = given
                sizes, strides, box = (
                    tuple(memory[at + 8 * i] for i in reversed(range(rank)))
                    for at in (sizes, strides, box)
                )
                item = _ITEM_BYTES[kind]
                strides = tuple(item * x for x in strides)
                maps[target] = TensorMap(base, item, sizes, strides, box, swizzle)
            elif function == "mosaic_gpu_build_kernel_spec":
                _, *numbers, pointers, lengths = given
                parameters = []
                for i in range(numbers[11]):
                    at, size = memory[pointers + 8 * i], memory[lengths + 4 * i]
                    descriptors = range(at, at + size, 128)
                    parameters.append([maps[x] for x in descriptors] if size else memory[at])
                found = _launch(numbers, parameters)
            elif function == "mosaic_gpu_launch_kernel":  # JAX 0.11
                _, *numbers, _, pointers = given
                places = itertools.takewhile(memory.__contains__, itertools.count(pointers, 8))
                found = _launch(numbers, [memory[memory[at]] for at in places])
            else:
                raise NotImplementedError(f"the host's function {function}")
            continue
        else:
            raise NotImplementedError(f"the host's statement {line}")
        values[name] = result
    return found


def _launch(numbers: Sequence[int], parameters: list[Any]) -> Launch:
    grid, cluster, block = (tuple(numbers[i : i + 3]) for i in (0, 3, 6))
    if any(cluster) or block[1:] != (1, 1):
        raise NotImplementedError(f"clusters of {cluster} blocks of {block} threads")
    return Launch(grid, block[0], numbers[9], parameters)


def arguments_of(text: str) -> list[str]:
    """Splits text at the commas that are in no brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


def _size(kind: str) -> int:
    """Returns the bytes of a type."""
    if kind in _SIZES:
        return _SIZES[kind]
    if kind.startswith("["):
        count, of = kind[1:-1].split(" x ", 1)
        return int(count) * _size(of)
    return sum(map(_size, arguments_of(kind[1:-1])))
