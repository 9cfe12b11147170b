"""Checks of constructor arguments, shared by layers and models."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Any, Literal

from jaxtyping import Array


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: {value!r} must be one of {', '.join(map(repr, choices))}")


def check_inputs(x: Array, features: int) -> None:
    """Raises ValueError unless a layer's inputs are [batch, tokens, features]."""
    if x.ndim != 3 or x.shape[-1] != features:
        raise ValueError(f"x: shape {x.shape} must be [batch, tokens, {features}]")


def check_literals(config: Any) -> None:
    """Raises ValueError unless every field of a `Literal` type holds one of its choices."""
    for name, hint in typing.get_type_hints(type(config)).items():
        parts = (hint,) if typing.get_origin(hint) is Literal else typing.get_args(hint)
        literals = [part for part in parts if typing.get_origin(part) is Literal]
        if literals:
            choices = [choice for part in literals for choice in typing.get_args(part)]
            choices += [None] if type(None) in parts else []
            check_choice(name, getattr(config, name), choices)


def check_positive(**sizes: int) -> None:
    """Raises TypeError or ValueError unless every named size is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: {size!r} must be an int")
        if size < 1:
            raise ValueError(f"{name}: {size} must be at least 1")
