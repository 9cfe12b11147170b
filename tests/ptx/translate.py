"""PTX as Python: a generator that runs all threads of a warpgroup together."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx import arithmetic
from tests.ptx.block import Program
from tests.ptx.host import arguments_of
from tests.ptx.memory import LANES, PARAMETERS, SMEM, SMEM_WINDOW

_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"(\$L\w+):")
_NO_CODE = re.compile(r"//.*|^\s*\.loc.*$", re.MULTILINE)
# What Mosaic GPU writes as assembly of its own.
_WAIT = re.compile(
    r"\{\s*\.reg \.pred\s+P1;\s*LAB_WAIT:\s*mbarrier\.try_wait\.parity\.shared\.b64 P1, "
    r"(\[%\w+\], %\w+), %\w+;\s*@P1 bra\.uni DONE;\s*bra\.uni\s+LAB_WAIT;\s*DONE:\s*\}"
)
_PRODUCT = re.compile(
    r"\{ \.reg \.pred p; setp\.ne\.b32 p, (\w+), 0; wgmma\.mma_async\.([^;]*), p, ([^;]*); \}"
)
# They order, or prepare, what is in order here anyway.
_NOTHING_TO_DO = re.compile(r"setmaxnreg|prefetch|fence\.mbarrier_init|wgmma\.fence")

_BYTES = {"%rs": 2, "%r": 4, "%rd": 8}
_PAIRS = {"bf16x2": "bf16", "f16x2": "f16"}
# NumPy's names of types: registers are unsigned, and are seen as what an instruction takes.
_TYPES = {f"{a}{8 * n}": f"{b}{n}" for a, b in ("bu", "uu", "si") for n in (1, 2, 4, 8)}
_TYPES |= {"f32": "f4", "f64": "f8", "pred": "?"}

_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_ROUNDINGS = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
_SIMPLE = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "copysign": "np.copysign({1}, {0})",
    "ex2": "exp2({0})",
    "lg2": "log2({0})",
    "rcp": "divide(1, {0})",
    "sqrt": "sqrt({0})",
    "rsqrt": "divide(1, sqrt({0}))",
    "tanh": "tanh({0})",
    "sin": "sin({0})",
    "cos": "cos({0})",
    "popc": "np.bitwise_count({0}).astype(u4)",
    "shl": "left({0}, {1})",
    "shr": "right({0}, {1})",
    "prmt": "permuted({0}, {1}, {2})",
    "rem": "{0} - divided({0}, {1}) * {1}",
}
_NAMES = {name: getattr(arithmetic, name) for name in dir(arithmetic) if name[0] != "_"}
_NAMES |= {name: np.dtype(name).type for name in "u1 u2 u4 u8 i1 i2 i4 i8 f4 f8".split()}
_NAMES |= {name: arithmetic.in_float64(getattr(np, name)) for name in "exp2 log2 sqrt".split()}
_NAMES |= {name: arithmetic.in_float64(getattr(np, name)) for name in "tanh sin cos divide".split()}
_NAMES |= {"fma": arithmetic.in_float64(lambda a, b, c: a * b + c), "np": np, "LANES": LANES}


def translate(ptx: str) -> Program:
    """Returns the program of the one kernel in PTX.

    Raises:
      NotImplementedError: an instruction is not known.
    """
    code = _source(ptx)
    names = dict(_NAMES)
    exec(compile(code, "<PTX>", "exec"), names)
    return names["program"]


def _source(ptx: str) -> str:
    name = re.search(r"\.entry (\w+)\(", ptx)[1]
    text = ptx[ptx.index("{", ptx.index(".maxntid")) + 1 : ptx.rindex("}")]
    text = _NO_CODE.sub("", text)
    text = _WAIT.sub(r"WAIT \1;", text)
    text = _PRODUCT.sub(r"PRODUCT.\2, \1, \3;", text)
    blocks: list[list[Any]] = [[]]
    labels = {}
    for line in map(str.strip, re.split(r";|(?<=:)\n", text)):
        label = _LABEL.fullmatch(line)
        if label:
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif line and not line.startswith((".reg", ".shared", ".pragma")):
            match = _INSTRUCTION.fullmatch(line)
            if match is None:
                raise NotImplementedError(f"PTX: {line}")
            blocks[-1].append(match.groups())
            if match[3].startswith("bra"):
                blocks.append([])
    return _Writer(name, labels).program(blocks)


class _Writer:
    """Writes Python for PTX: m is the block, g the warpgroup, and registers are arrays."""

    def __init__(self, kernel: str, labels: dict[str, int]):
        self._kernel, self._labels = kernel, labels
        self._lines: list[str] = []
        self._guarded: set[str] = set()
        self._guard = ""

    def program(self, blocks: Sequence[Sequence[Any]]) -> str:
        """Returns the program of blocks of instructions, which are entered at their beginning."""
        for number, block in enumerate(blocks):
            self._lines.append(f"  if at == {number}:")
            for negated, predicate, operation, operands in block:
                self._guard = f"{'~' if negated else ''}{_name(predicate)}" if predicate else ""
                try:
                    self._instruction(operation, arguments_of(operands))
                except (KeyError, ValueError, IndexError, TypeError) as error:
                    raise NotImplementedError(f"PTX: {operation} {operands}") from error
            self._put(f"at = {number + 1}" if number + 1 < len(blocks) else "return")
        text = "\n".join(self._lines)
        head = [f" {name} = None" for name in sorted(self._guarded)]
        for name, size, bits in sorted(set(re.findall(r"\b(k(\d)_([0-9a-f]+))\b", text))):
            head.append(f" {name} = np.full(LANES, 0x{bits}, u{size})")
        return "\n".join(["def program(m, g):", " at = 0", *head, " while True:", text])

    def _put(self, line: str) -> None:
        self._lines.append("   " + line)

    def _let(self, register: str, value: str, kind: str) -> None:
        name = _name(register)
        if kind[0] in "if":
            value = f"({value}).view(u{kind[1:]})"
        if self._guard:
            self._guarded.add(name)
            value = f"{value} if {name} is None else np.where({self._guard}, {value}, {name})"
        self._put(f"{name} = {value}")

    def _call(self, method: str, *arguments: str) -> None:
        self._put(f"m.{method}({', '.join(('g', *arguments))})")

    @property
    def _active(self) -> str:
        return self._guard or "True"

    def _never_guarded(self) -> None:
        if self._guard:
            raise ValueError("not by some threads alone")

    def _instruction(self, operation: str, x: list[str]) -> None:
        if _NOTHING_TO_DO.match(operation):
            return
        parts = operation.split(".")
        method = getattr(self, f"_{parts[0].lower()}", None)
        if method:
            method(parts, x)
        elif parts[-1] in _PAIRS:
            self._pairs(parts, x)
        elif {"sat", "rm", "rp", "rz"} & {*parts}:
            raise KeyError(operation)
        else:
            kind = _TYPES[parts[-1]]
            kinds = [kind, "u4" if parts[0] in ("shl", "shr") else kind, kind]
            values = [_value(v, k) for v, k in zip(x[1:], kinds, strict=False)]
            self._let(x[0], _SIMPLE[parts[0]].format(*values), kind)

    # Arithmetic

    def _pairs(self, parts: list[str], x: list[str]) -> None:
        name = {"max": "maximum", "min": "minimum"}.get(parts[0])
        if name:
            form = f"np.{name}({{0}}, {{1}})" if "NaN" in parts else f"np.f{parts[0]}({{0}}, {{1}})"
        else:
            form = {"mul": "{0} * {1}", "fma": "{0} * {1} + {2}"} | _SIMPLE
            form = form[parts[0]]
        kind = repr(_PAIRS[parts[-1]])
        values = [f"of_pairs({_value(v, 'u4')}, {kind})" for v in x[1:]]
        self._let(x[0], f"pairs({form.format(*values)}, {kind})", "u4")

    def _mul(self, parts: list[str], x: list[str]) -> None:
        if parts[-1] in _PAIRS:
            self._pairs(parts, x)
            return
        kind, product = self._product_of(parts, x)
        self._let(x[0], product, kind)

    def _mad(self, parts: list[str], x: list[str]) -> None:
        kind, product = self._product_of(parts, x)
        self._let(x[0], f"{product} + {_value(x[3], kind)}", kind)

    def _product_of(self, parts: list[str], x: list[str]) -> tuple[str, str]:
        kind = _TYPES[parts[-1]]
        a, b = (_value(v, kind) for v in x[1:3])
        if not {"wide", "hi"} & {*parts}:
            return kind, f"{a} * {b}"
        if (kind, "hi" in parts) == ("u8", True):
            return kind, f"high({a}, {b})"
        wide = {"i2": "i4", "u2": "u4", "i4": "i8", "u4": "u8"}[kind]
        product = f"{a}.astype({wide}) * {b}.astype({wide})"
        if "hi" in parts:
            return kind, f"({product} >> {wide}({8 * int(kind[1:])})).astype({kind})"
        return wide, product

    def _fma(self, parts: list[str], x: list[str]) -> None:
        if parts[-1] in _PAIRS:
            self._pairs(parts, x)
            return
        name = {("fma", "rn", "f32"): "fma", ("fma", "rm", "f32"): "fma_down"}
        name = name[tuple(part for part in parts if part != "ftz")]
        self._let(x[0], f"{name}({', '.join(_value(v, 'f4') for v in x[1:])})", "f4")

    def _bfe(self, parts: list[str], x: list[str]) -> None:
        kind = _TYPES[parts[-1]]
        size = 8 * int(kind[1:])
        start, count = int(x[2]), int(x[3])
        # The bits that are wanted go to the upper end, and back with zeros or the sign.
        up, down = (_value(str(n), "u4") for n in (size - start - count, size - count))
        self._let(x[0], f"right(left({_value(x[1], kind)}, {up}), {down})", kind)

    def _div(self, parts: list[str], x: list[str]) -> None:
        kind = _TYPES[parts[-1]]
        function = "divide" if kind == "f4" else "divided"
        self._let(x[0], f"{function}({_value(x[1], kind)}, {_value(x[2], kind)})", kind)

    def _max(self, parts: list[str], x: list[str]) -> None:
        if parts[-1] in _PAIRS:
            self._pairs(parts, x)
            return
        kind = _TYPES[parts[-1]]
        ignores = kind[0] == "f" and "NaN" not in parts
        function = f"np.f{parts[0]}" if ignores else f"np.{parts[0]}imum"
        self._let(x[0], f"{function}({_value(x[1], kind)}, {_value(x[2], kind)})", kind)

    _min = _max

    def _selp(self, parts: list[str], x: list[str]) -> None:
        kind = _unsigned(_TYPES[parts[-1]])
        a, b = (_value(v, kind) for v in x[1:3])
        self._let(x[0], f"np.where({_name(x[3])}, {a}, {b})", kind)

    def _setp(self, parts: list[str], x: list[str]) -> None:
        pair = _PAIRS.get(parts[-1])
        if pair:
            kind = "f8"
            a, b = (f"of_pairs({_value(v, 'u4')}, {pair!r})" for v in x[1:3])
        else:
            kind = _TYPES[parts[-1]]
            a, b = (_value(v, kind) for v in x[1:3])
        numbers, name = f"({a} == {a}) & ({b} == {b})", parts[1]
        if name in ("num", "nan"):
            value = numbers if name == "num" else f"~({numbers})"
        elif name in _COMPARISONS:
            value = f"({a} {_COMPARISONS[name]} {b})"
            value = f"{value} & {numbers}" if (name, kind[0]) == ("ne", "f") else value
        else:  # true where there is no number, too
            value = f"({a} {_COMPARISONS[name[:-1]]} {b}) | ~({numbers})"
        if parts[2] in ("and", "or", "xor"):
            sign = {"and": "&", "or": "|", "xor": "^"}[parts[2]]
            other = f"~{_name(x[3][1:])}" if x[3][0] == "!" else _name(x[3])
            value = f"({value}) {sign} {other}"
        if not pair:
            self._let(x[0], value, "?")
            return
        self._put(f"both = {value}")
        for i, register in enumerate(x[0].split("|")):
            self._let(register, f"both[:, {i}]", "?")

    def _mov(self, parts: list[str], x: list[str]) -> None:
        kind = _TYPES[parts[-1]]
        target, of = x
        if of.startswith("{"):
            half = f"u{int(kind[1:]) // 2}"
            low, high = (f"{_value(v, half)}.astype({kind})" for v in arguments_of(of[1:-1]))
            self._let(target, f"{low} | {high} << {kind}({4 * int(kind[1:])})", kind)
        elif target.startswith("{"):
            half = int(kind[1:]) // 2
            for i, register in enumerate(arguments_of(target[1:-1])):
                if register != "_":
                    part = f"({_value(of, kind)} >> {kind}({8 * half * i})).astype(u{half})"
                    self._let(register, part, f"u{half}")
        elif of == "%tid.x":
            self._let(target, "g.tid", "u4")
        elif of.startswith(("%ctaid.", "%nctaid.")):
            self._let(target, f"m.{of[1:-2]}[{'xyz'.index(of[-1])}]", "u4")
        elif of.startswith(f"{self._kernel}_param_"):
            address = PARAMETERS + (int(of.rsplit("_", 1)[1]) << 20)
            self._let(target, _value(str(address), kind), kind)
        elif of.startswith("__dynamic_shmem"):
            self._let(target, _value(str(SMEM), kind), kind)
        else:
            # A copy, as registers of products change when these are waited for.
            self._let(target, f"{_value(of, _unsigned(kind))}.copy()", _unsigned(kind))

    def _cvt(self, parts: list[str], x: list[str]) -> None:
        to, of = parts[-2:]
        rounding = next((_ROUNDINGS[part] for part in parts if part in _ROUNDINGS), None)
        if to in _PAIRS:
            high, low = (_value(v, "f4") for v in x[1:])
            self._let(x[0], f"pairs(np.stack([{low}, {high}], 1), {_PAIRS[to]!r})", "u4")
        elif (to, of) in (("bf16", "f32"), ("f16", "f32")):
            self._let(x[0], f"{_value(x[1], 'f4')}.astype(HALVES[{to!r}]).view(u2)", "u2")
        elif (to, of) in (("f32", "bf16"), ("f32", "f16")):
            self._let(x[0], f"{_name(x[1])}.view(HALVES[{of!r}]).astype(f4)", "f4")
        else:
            to, of = _TYPES[to], _TYPES[of]
            # Registers may be wider than what they hold.
            value = f"{_value(x[1], f'u{_bytes(x[1])}')}.astype({_unsigned(of)}).view({of})"
            held = f"{to[0]}{_bytes(x[0])}"
            if "sat" in parts:
                _only([to, of], ["f4", "f4"])
                value = f"saturated({value})"
            elif rounding and to[0] == "f":
                value = f"{rounding}({value})"
            elif rounding:
                value = f"integers({value}, {to}, {rounding})"
            self._let(x[0], f"{value}.astype({to}).astype({held})", held)

    def _cvta(self, parts: list[str], x: list[str]) -> None:
        plus = SMEM_WINDOW if "shared" in parts else 0
        self._let(x[0], f"{_name(x[1])} {'-' if 'to' in parts else '+'} u8({plus})", "u8")

    # Threads

    def _bra(self, parts: list[str], x: list[str]) -> None:
        del parts
        if self._guard:
            self._put(f"if m.uniform({self._guard}):")
        self._put(f"{' ' if self._guard else ''}at = {self._labels[x[0]]}; continue")

    def _ret(self, parts: list[str], x: list[str]) -> None:
        del parts, x
        self._never_guarded()
        self._put("return")

    def _elect(self, parts: list[str], x: list[str]) -> None:
        del parts
        lane, predicate = x[0].split("|")
        self._let(lane, "np.zeros(LANES, u4)", "u4")
        self._let(predicate, "m.elected", "?")

    def _shfl(self, parts: list[str], x: list[str]) -> None:
        _only(x[3:], ["31", "-1"])
        by = _value(x[2], "u4")
        self._let(x[0], f"m.shuffle({parts[2]!r}, {_name(x[1])}, {by})", "u4")

    def _ld(self, parts: list[str], x: list[str]) -> None:
        kind = _TYPES[parts[-1]]
        if parts[1].startswith("param"):
            index = re.fullmatch(r"\[\w+_param_(\d+)\]", x[1])[1]
            self._let(x[0], f"np.full(LANES, m.launch.parameters[{index}], u8)", "u8")
            return
        registers = arguments_of(x[0][1:-1]) if x[0].startswith("{") else [x[0]]
        arguments = _address(x[1]), kind[1:], str(len(registers)), _space(parts), self._active
        self._put(f"loaded = m.load(g, {', '.join(arguments)})")
        for i, register in enumerate(registers):
            held = f"{kind[0]}{_bytes(register)}"
            self._let(register, f"loaded[{i}].view({kind}).astype({held})", held)

    def _st(self, parts: list[str], x: list[str]) -> None:
        kind = _unsigned(_TYPES[parts[-1]])
        values = arguments_of(x[1][1:-1]) if x[1].startswith("{") else [x[1]]
        values = f"[{', '.join(_stored(v, kind) for v in values)}]"
        self._call("store", _address(x[0]), values, kind[1:], _space(parts), self._active)

    def _stmatrix(self, parts: list[str], x: list[str]) -> None:
        self._never_guarded()
        self._call("store_matrices", _address(x[0]), _list(x[1]), str("trans" in parts))

    def _ldmatrix(self, parts: list[str], x: list[str]) -> None:
        self._never_guarded()
        registers = arguments_of(x[0][1:-1])
        arguments = _address(x[1]), str(len(registers)), str("trans" in parts)
        self._put(f"loaded = m.load_matrices(g, {', '.join(arguments)})")
        for i, register in enumerate(registers):
            self._let(register, f"loaded[{i}]", "u4")

    def _fence(self, parts: list[str], x: list[str]) -> None:
        del x
        _only(parts[:3], ["fence", "proxy", "async"])
        self._never_guarded()
        self._call("fence")
        self._put("yield None")

    # Barriers

    def _mbarrier(self, parts: list[str], x: list[str]) -> None:
        if parts[1] == "init":
            self._put(f"m.init_barrier({_address(x[0])}, {_value(x[1], 'u4')}, {self._active})")
            return
        _only([parts[1]], ["arrive"])
        if x[0] != "_":  # a state, which nobody waits for
            self._let(x[0], "np.zeros(LANES, u8)", "u8")
        number = _value(x[2], "u4") if len(x) > 2 else "1"
        counts = ("1", number) if "expect_tx" in parts else (number, "0")
        self._call("arrive", _address(x[1]), *counts, self._active)
        self._put("yield None")

    def _wait(self, parts: list[str], x: list[str]) -> None:
        del parts
        self._put(f"yield from m.wait(g, {_address(x[0])}, {_name(x[1])})")

    def _bar(self, parts: list[str], x: list[str]) -> None:
        _only(parts, ["bar", "sync"])
        self._never_guarded()
        threads = x[1] if len(x) > 1 else "m.launch.threads"
        self._put(f"yield from m.sync(g, {_value(x[0], 'u4')}, {threads})")

    # The engines

    def _cp(self, parts: list[str], x: list[str]) -> None:
        if "commit_group" in parts or "wait_group" in parts:
            self._never_guarded()
            method = "commit_stores" if "commit_group" in parts else "wait_stores"
            self._call(method, *x, *(["read=True"] if "read" in parts else []))
            return
        # cp[.reduce].async.bulk[.tensor.nd].to.from...
        reduces = parts[1] == "reduce"
        if reduces:
            parts = [part for part in parts if part not in ("reduce", "add", "tile")]
        tensor = parts[3] == "tensor"
        to, of = (name.split("::")[0] for name in parts[5 if tensor else 3 :][:2])
        inward = {("shared", "global"): True, ("global", "shared"): False}[to, of]
        if reduces and inward:
            raise KeyError(parts)
        inward_only = {"mbarrier::complete_tx::bytes"} if inward else {"bulk_group"}
        if {*parts[7 if tensor else 5 :]} != inward_only:
            raise KeyError(parts)
        if not tensor:
            at, others = [_address(x[0]), _address(x[1]), _value(x[2], "u4")], x[3:]
        else:
            place = arguments_of(x[1 if inward else 0][1:-1])
            corner = f"[{', '.join(_value(v, 'u4') for v in arguments_of(place[1][1:-1]))}]"
            at = [_name(place[0]), corner]
            at = [_address(x[0]), *at] if inward else [*at, _address(x[1])]
            others = x[2:]
        others = [_address(barrier) for barrier in others]
        if len(others) != inward:
            raise KeyError(x)
        method = f"copy_{'tile_' if tensor else ''}{'in' if inward else 'out'}"
        self._call(method, *at, *others, self._active, *(["adds=True"] if reduces else []))
        self._put("yield None")

    def _product(self, parts: list[str], x: list[str]) -> None:
        self._never_guarded()
        *_, shape, total, kind, same = parts
        _only([shape[:3], shape[-3:], total, same], ["m64", "k16", "f32", kind])
        registers, a, b, adds, *numbers = x
        signs, turned = numbers[:2], [number != "0" for number in numbers[2:]]
        turned = [False, *turned] if a.startswith("{") else turned
        arguments = [
            _list(registers),
            _list(a) if a.startswith("{") else _name(a),
            _name(b),
            f"kind={kind!r}",
            f"adds={bool(int(adds))}",
            f"sign={int(signs[0]) * int(signs[1])}",
            f"transposed={tuple(turned)}",
        ]
        self._put(f"{_list(registers)} = m.multiply(g, {', '.join(arguments)})")

    def _wgmma(self, parts: list[str], x: list[str]) -> None:
        self._never_guarded()
        method = {"commit_group": "commit_products", "wait_group": "wait_products"}[parts[1]]
        self._call(method, *x)
        self._put("yield None")


def _only(found: Sequence[str], known: Sequence[str]) -> None:
    if found != known:
        raise KeyError(found)


def _name(register: str) -> str:
    if not re.fullmatch(r"%(r|rs|rd|p)\d+", register):
        raise KeyError(register)
    return register[1:]


def _bytes(register: str) -> int:
    return _BYTES[re.match(r"%[a-z]+", register)[0]]


def _unsigned(kind: str) -> str:
    return kind if kind == "?" else f"u{kind[1:]}"


def _value(operand: str, kind: str) -> str:
    """Returns an operand as an array of a kind."""
    if operand.startswith("%"):
        name = _name(operand)
        return f"{name}.view({kind})" if kind[0] in "if" else name
    if kind == "?":
        return f"np.full(LANES, {bool(int(operand))})"
    size = int(kind[1:])
    if operand[:2] in ("0f", "0d"):
        bits = operand[2:]
        if kind[0] == "f" and len(bits) != 2 * size:
            raise KeyError(operand)
    else:
        bits = f"{int(operand, 0) % (1 << 64):016x}"[-2 * size :]
        if kind[0] == "f":
            raise KeyError(operand)
    return _constant(int(bits, 16), kind)


def _stored(operand: str, kind: str) -> str:
    """Returns an operand that may be wider than what is stored of it."""
    return _name(operand) if operand.startswith("%") else _value(operand, kind)


def _constant(bits: int, kind: str) -> str:
    value = f"k{kind[1:]}_{bits:x}"  # see `program`
    return f"{value}.view({kind})" if kind[0] in "if" else value


def _list(operands: str) -> str:
    """Returns registers in braces as a list."""
    return f"[{', '.join(map(_name, arguments_of(operands[1:-1])))}]"


def _address(operand: str) -> str:
    match = re.fullmatch(r"\[(%\w+|__dynamic_shmem\w*)(?:\+(-?\d+))?\]", operand)
    base, plus = match[1], int(match[2] or 0)
    if not base.startswith("%"):
        return _value(str(SMEM + plus), "u4")
    kind = f"u{_bytes(base)}"
    return f"({_name(base)} + {_value(str(plus), kind)})" if plus else _name(base)


def _space(parts: Sequence[str]) -> str:
    found = [part for part in ("shared", "global") if any(x.startswith(part) for x in parts)]
    return repr(found[0] if found else "")
