"""The catalogue: one record per mechanism, and the table made of all of them.

Each mechanism's module declares `RECORD = Mechanism(...)` beside its function. Records are found by
walking the family packages, so a new mechanism is one new file and is registered nowhere else.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.choose import IMPLEMENTATIONS

Family = Literal["dense", "linear", "sparse", "cache", "heads", "cross", "reduce", "parallel"]
Pattern = Literal["self causal", "self non-causal", "cross causal", "cross non-causal"]
Kernel = Literal["tiled", "linear", "decode", "scan"]

FAMILIES: tuple[Family, ...] = get_args(Family)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What an attention mechanism is and what it claims; the tests hold every record to it.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a field's value is not one of those allowed, or a function's name does not follow
        from the slug.
    """

    slug: str
    """Name in the catalogue and in `attention`: lower case words joined by underscores."""
    title: str
    """Title of the paper."""
    year: int
    """Year in which the paper first appeared."""
    family: Family
    """Family package that holds the module."""
    patterns: frozenset[Pattern]
    """Which of self/cross x causal/non-causal it supports; the others are refused."""
    time: str
    """Time of a whole pass in the number of tokens T, such as "O(T)"."""
    memory: str
    """Memory of a whole pass, forward and backward, in T."""
    kernel: Kernel | None
    """Kernel family it stands on; None for plain JAX."""
    has_weights: bool
    """Whether it has weights of its own: it takes `params`, made by `init_<slug>` beside it."""
    one_query: bool = False
    """Whether there is one query for all tokens, [B or 1, 1, N, H], which a layer learns."""
    function: Callable
    """The mechanism, `function(query, key, value, ...)`; its name is the slug."""
    arguments: Callable[..., Mapping[str, Any]] | None = None
    """Of a mechanism that takes other arrays than query, key and value: arrays to call it with,
    `arguments(rng, batch, tokens, dtype, ...)`, by name and in order. The first is the sequence of
    tokens, [B, T, D], as its output is; others of three dimensions or more begin with [B, T] too.
    What follows are sizes with defaults; `init_state` takes those of them that it needs, between
    `max_length` and `dtype`. None for query, key and value."""
    step: Callable | None = None
    """Recurrent form `<slug>_step(state, query, key, value, ...) -> (output, state)`."""
    init_state: Callable | None = None
    """First state of `step`: `init_<slug>_state(batch, max_length, num_heads, num_kv_heads,
    head_dim, value_dim, dtype)`."""
    implementations: tuple[str, ...] = ("reference", "xla")
    """Names that `implementation=` takes."""
    extras: tuple[Callable, ...] = ()
    """Further public functions or types of the module that `attention` exports."""
    selects_ahead: bool = False
    """Whether later tokens may decide, as published, which keys a token sees of those that it may
    see: changing them then changes earlier outputs of a causal call, unless only values change."""
    small: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options with which a dozen tokens use all that it does, such as small blocks; tests call it
    with these."""

    def __post_init__(self) -> None:
        """Checks every field."""
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.slug):
            raise ValueError(f"slug: {self.slug!r} is not lower case words joined by underscores")
        if not self.title or self.title != self.title.strip():
            raise ValueError(f"{self.slug}: title: {self.title!r} is empty or has spaces around it")
        if not isinstance(self.year, int) or not 1950 <= self.year <= 2100:
            raise ValueError(f"{self.slug}: year: {self.year!r} is no year")
        self._check_member("family", self.family, FAMILIES)
        self._check_member("kernel", self.kernel, (*KERNELS, None))
        self._check_members("patterns", self.patterns, PATTERNS, frozenset)
        self._check_members("implementations", self.implementations, IMPLEMENTATIONS, tuple)
        for name in ("time", "memory"):
            if not re.fullmatch(r"O\(.+\)", getattr(self, name)):
                raise ValueError(
                    f"{self.slug}: {name}: {getattr(self, name)!r} must look like 'O(T)'"
                )
        for name in ("has_weights", "one_query", "selects_ahead"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{self.slug}: {name}: {getattr(self, name)!r} must be a bool")
        self._check_function("function", self.slug)
        self._check_arguments()
        if (self.step is None) != (self.init_state is None):
            raise ValueError(f"{self.slug}: step and init_state: give both or neither")
        if self.step is not None:
            self._check_function("step", f"{self.slug}_step")
            self._check_function("init_state", f"init_{self.slug}_state")
        for name in self.small:
            if name not in self.options:
                raise ValueError(f"{self.slug}: small: {name!r} is not an option of the function")
        for extra in self.extras:
            if not callable(extra):
                raise TypeError(f"{self.slug}: extras: {extra!r} is not a function or a type")

    def _check_member(self, field: str, value: object, allowed: tuple) -> None:
        if value not in allowed:
            raise ValueError(f"{self.slug}: {field}: {value!r} must be one of {allowed}")

    def _check_members(self, field: str, values: object, allowed: tuple, kind: type) -> None:
        if not isinstance(values, kind):
            raise TypeError(f"{self.slug}: {field}: {values!r} must be a {kind.__name__}")
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{self.slug}: {field}: {values!r} must be unique and at least one")
        for value in values:
            self._check_member(field, value, allowed)

    def _check_function(self, field: str, name: str) -> None:
        value = getattr(self, field)
        if not callable(value):
            raise TypeError(f"{self.slug}: {field}: {value!r} is not a function")
        if value.__name__ != name:
            raise ValueError(f"{self.slug}: {field}: {value.__name__!r} must be named {name!r}")

    def _check_arguments(self) -> None:
        if self.arguments is None:
            return
        if not callable(self.arguments):
            raise TypeError(f"{self.slug}: arguments: {self.arguments!r} is not a function")
        given, inputs = tuple(self.example_arguments(1, 2)), self.inputs
        if given != inputs:
            raise ValueError(f"{self.slug}: arguments: {given} must be those of a call, {inputs}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays that the function is called with, in order."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(
            p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
        )

    def example_arguments(
        self, batch: int, tokens: int, dtype: DTypeLike = np.float32, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Random arrays to call the function with, where it takes no query, key and value."""
        return dict(self.arguments(np.random.default_rng(seed), batch, tokens, dtype))

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the function's keyword arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def takes_segments(self) -> bool:
        """Whether it takes `segment_ids`: images and series are not packed into rows."""
        return "segment_ids" in self.options

    @property
    def init(self) -> Callable | None:
        """`init_<slug>`, which makes the weights; None for a mechanism without any."""
        if not self.has_weights:
            return None
        return getattr(sys.modules[self.function.__module__], f"init_{self.slug}")

    @property
    def exports(self) -> dict[str, Callable]:
        """Everything that `attention` exports for this mechanism, by name."""
        members = (self.function, self.step, self.init_state, self.init, *self.extras)
        return {member.__name__: member for member in members if member is not None}

    @property
    def citation(self) -> str:
        """Title and year."""
        return f"{self.title} ({self.year})"

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


def discover() -> list[Mechanism]:
    """Imports every module of the family packages and returns their records.

    Raises:
      ValueError: a record names another family than the package of its module.
    """
    records = []
    for family in FAMILIES:
        spec = importlib.util.find_spec(f"attention.{family}")
        if spec is None or spec.submodule_search_locations is None:
            continue
        for name in sorted(
            info.name for info in pkgutil.iter_modules(spec.submodule_search_locations)
        ):
            record = getattr(importlib.import_module(f"attention.{family}.{name}"), "RECORD", None)
            if record is None:
                continue
            if record.family != family:
                raise ValueError(
                    f"{record.slug}: family: {record.family!r}, but its module lies in {family!r}"
                )
            records.append(record)
    return records


def collect(records: list[Mechanism]) -> dict[str, Mechanism]:
    """Table of `records` by slug, in their order.

    Raises:
      ValueError: two records have the same slug, or export different things under one name.
      TypeError: a record is not a `Mechanism`.
    """
    table: dict[str, Mechanism] = {}
    owners: dict[str, Mechanism] = {}
    for record in records:
        if not isinstance(record, Mechanism):
            raise TypeError(f"RECORD: {record!r} must be a Mechanism")
        if record.slug in table:
            raise ValueError(f"slug: {record.slug!r} is declared twice")
        table[record.slug] = record
        for name, member in record.exports.items():
            owner = owners.setdefault(name, record)
            if owner.exports[name] is not member:
                raise ValueError(f"{record.slug}: {name!r} is also, differently, in {owner.slug}")
    return table


@functools.cache
def mechanisms() -> MappingProxyType[str, Mechanism]:
    """All mechanisms by slug, families in the order of `FAMILIES`, read-only."""
    return MappingProxyType(collect(discover()))


def get(slug: str) -> Mechanism:
    """The record of one mechanism.

    Raises:
      ValueError: there is no such mechanism; the message names near matches and all that are known.
    """
    table = mechanisms()
    if slug not in table:
        near = difflib.get_close_matches(slug, table, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"mechanism: {slug!r} is not in the catalogue; {hint}known: {', '.join(table)}"
        )
    return table[slug]


def _pattern_cell(record: Mechanism, kind: str) -> str:
    found = [
        p.removeprefix(f"{kind} ")
        for p in PATTERNS
        if p in record.patterns and p.startswith(f"{kind} ")
    ]
    return ", ".join(found) or "-"


HEADER = (
    "mechanism",
    "paper",
    "family",
    "self",
    "cross",
    "time",
    "memory",
    "kernel",
    "weights",
    "step",
)


def row(record: Mechanism) -> tuple[str, ...]:
    """The record as table cells, in the order of `HEADER`."""
    return (
        record.slug,
        record.citation,
        record.family,
        _pattern_cell(record, "self"),
        _pattern_cell(record, "cross"),
        record.time,
        record.memory,
        record.kernel or "-",
        "yes" if record.has_weights else "-",
        "yes" if record.step else "-",
    )


def markdown_table() -> str:
    """The catalogue as a Markdown table, one mechanism a line; ends without a newline."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [(f"`{cells[0]}`", *cells[1:]) for cells in map(row, mechanisms().values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
