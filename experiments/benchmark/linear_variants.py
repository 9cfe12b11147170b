"""The variants of linear attention that are measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jaxtyping import Array

from experiments.benchmark.measure import directed
from experiments.compile_report import Case
from pallas_kernels import linear

DOCUMENT = 1000
"""Tokens of a segment."""
BOUND = -5.0
"""Of the logarithm of a step's decay, where a kernel is promised one; tokamax's needs it."""


@dataclass(frozen=True)
class Variant:
    """A use of linear attention; heads and sizes that are None are those of the call."""

    gates: Mapping[str, str] = field(default_factory=dict)
    """Arguments beside query, key and value, with their dimensions; all are differentiated."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that do not vary."""
    constant_decay: bool = False
    """Whether each head has a decay that is known before the program runs."""
    segments: bool = False
    key_features: int | None = None
    query_heads: int | None = None
    key_heads: int | None = None
    value_heads: int | None = None

    def inputs(
        self, tokens: int, heads: int, features: int, dtype: Any, batch: int = 1
    ) -> dict[str, ShapeDtypeStruct]:
        """Returns the types of the arguments by name; gates that are logarithms are float32."""
        size = self.key_features or features
        sizes = dict(b=batch, t=tokens, m=heads, h=size)

        def rows(heads_of: int | None, width: int) -> ShapeDtypeStruct:
            return ShapeDtypeStruct((batch, tokens, heads_of or heads, width), dtype)

        found = {
            "query": rows(self.query_heads, size),
            "key": rows(self.key_heads, size),
            "value": rows(self.value_heads, features),
        }
        for name, dims in self.gates.items():
            of = jnp.float32 if name.startswith("log_") else dtype
            found[name] = ShapeDtypeStruct(tuple(sizes[letter] for letter in dims), of)
        if self.segments:
            found["segment_ids"] = ShapeDtypeStruct((batch, tokens), jnp.int32)
        return found

    def function(
        self,
        direction: str,
        names: Sequence[str],
        heads: int,
        implementation: str | None,
        by: Collection[str] | None = None,
    ) -> Callable[..., Any]:
        """Returns the attention, or its gradients by some or all, as a function of arguments."""
        options = {**self.options, "implementation": implementation}
        if self.constant_decay:
            options["log_decay"] = constant_decays(heads)

        def attention(*arrays: Array) -> Array:
            return linear.linear_attention(**dict(zip(names, arrays, strict=True)), **options)

        by = set(names) - {"segment_ids"} if by is None else by
        varied = [i for i, name in enumerate(names) if name in by]
        return directed(direction, attention, varied)


SCALAR, CHANNEL = {"log_decay": "btm"}, {"log_decay": "btmh"}
DELTA = {"beta": "btm"}
VARIANTS = {
    "lightning": Variant(constant_decay=True),
    "no decay": Variant(),
    "constant decay, with its gradient": Variant({"log_decay": "m"}),
    "constant decay, segments": Variant(constant_decay=True, segments=True),
    "gate per step": Variant(SCALAR),
    "gate per channel (GLA)": Variant(CHANNEL),
    "delta rule": Variant(DELTA),
    "gated delta rule (gated DeltaNet)": Variant(SCALAR | DELTA),
    "gated delta rule per channel (KDA)": Variant(CHANNEL | DELTA),
    f"gated delta rule per channel, bound {BOUND:g}": Variant(
        CHANNEL | DELTA, {"min_log_decay": BOUND}
    ),
    "momentum and delta rule (Titans)": Variant(SCALAR | DELTA | {"log_momentum": "btm"}),
    "normalised elu + 1": Variant(options={"feature_map": "elu_plus_one", "normalize": True}),
    "normalised Taylor, keys of 16": Variant(
        options={"feature_map": "taylor", "normalize": True}, key_features=16
    ),
    "to all tokens": Variant(options={"causal": False}),
    "to all tokens, normalised elu + 1": Variant(
        options={"causal": False, "feature_map": "elu_plus_one", "normalize": True}
    ),
    "lightning, 8 query and 2 key heads": Variant(constant_decay=True, key_heads=2, value_heads=2),
    "gated DeltaNet, 2 query and 8 value heads": Variant(
        SCALAR | DELTA, query_heads=2, key_heads=2
    ),
}


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A case, and what its schedules are divided by."""

    units: int
    """Tokens times heads, or times channels / 128."""
    forward: str
    """Text in the names of those kernels that are the forward's."""


def arrays_of(inputs: Mapping[str, ShapeDtypeStruct]) -> dict[str, Array]:
    """Returns numbers of a size that is usual for arguments of linear attention."""
    found = {}
    for i, (name, kind) in enumerate(inputs.items()):
        key = jax.random.key(i)
        if name == "segment_ids":
            array = jnp.broadcast_to(jnp.arange(kind.shape[1]) // DOCUMENT, kind.shape)
        elif name in ("query", "key", "value"):
            array = jax.random.normal(key, kind.shape) / kind.shape[-1] ** 0.5
        else:
            array = jax.random.uniform(key, kind.shape)
            array = -0.1 * array if name.startswith("log_") else array
        found[name] = array.astype(kind.dtype)
    return found


def constant_decays(heads: int) -> np.ndarray:
    """Returns the logarithm of the decay of each head, where it is the same for all tokens."""
    return -(2.0 ** -np.linspace(1, 8, heads, dtype=np.float32))
