"""What the TPU kernels of linear attention compute: the chunks of a tile, one memory at a time.

The equations are those of `gates` and `delta`. All is on matrices of one head, [C, features], and
differentiable, see `tpu_matrix`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.linear import features, tpu_inverse
from pallas_kernels.linear.inputs import LOWEST, Inputs, Options
from pallas_kernels.linear.tpu_channels import channel_gate
from pallas_kernels.linear.tpu_gates import (
    Features,
    Gate,
    Memories,
    momentum_gates,
    step_gates,
)
from pallas_kernels.linear.tpu_tiles import Tiling, filled
from pallas_kernels.tpu_matrix import dot, iota, turned

Chunk = dict[str, Any]
"""Tokens by name: of each head of the step [C, features], and numbers as rows [memories, C]."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call. Widths are those of whole registers."""

    gate: str
    """Of "constant", "step" and "channel"."""
    tokens: tuple[str, ...]
    """Names of the inputs that are of tokens."""
    heads: tuple[int, int, int]
    """Numbers of heads of queries, keys and values."""
    dtype: Any
    size: int
    """Features of a query before it is filled up."""
    features: int
    mapped: int
    """Features of the memory."""
    width: int
    scale: float
    epsilon: float | None
    feature_map: str | None
    ragged: bool
    """Whether the last chunk has fewer tokens."""
    bound: float | None
    """What no logarithm is below."""

    @classmethod
    def of(cls, options: Options, x: Inputs, *, ragged: bool) -> "Call":
        """Returns that of the inputs; `ragged` is whether the last chunk has fewer tokens."""
        size, width = x.query.shape[3], x.value.shape[3]
        kinds = {2: "constant", 3: "step", 4: "channel"}
        gate = "constant" if x.log_decay is None else kinds[x.log_decay.ndim]
        if gate == "constant" and (x.runs is not None or ragged):
            gate = "step"
        numbers = ("beta", "log_momentum")
        return cls(
            gate=gate,
            tokens=(
                *("query", "key", "value"),
                *(() if gate == "constant" else ("log_decay",)),
                *(name for name in numbers if getattr(x, name) is not None),
            ),
            heads=tuple(array.shape[2] for array in x[:3]),
            dtype=x.precision,
            size=size,
            features=filled(size),
            mapped=filled(features.count(options.feature_map, size)),
            width=filled(width),
            scale=options.scale,
            epsilon=options.epsilon,
            feature_map=options.feature_map,
            ragged=ragged,
            # The first token of a segment has a decay of 0.
            bound=None if x.runs is not None else options.min_log_decay,
        )

    @property
    def needs_real(self) -> bool:
        """Returns whether what fills up the last chunk must be told from tokens."""
        known = "log_momentum" not in self.tokens and self.feature_map is None
        return self.ragged and not (known and self.epsilon != 0)

    @property
    def exact(self) -> bool:
        """Returns whether products are float32's."""
        return self.dtype == jnp.float32

    def shape(self, name: str, memories: int) -> tuple[int, int] | None:
        """Returns the heads and the width of tokens, or None for numbers of a memory."""
        shapes = dict(zip(("query", "key", "value"), self.heads, strict=True))
        if name in shapes:
            return shapes[name], self.width if name == "value" else self.features
        return (memories, self.features) if (name, self.gate) == ("log_decay", "channel") else None


def attend_to(
    call: Call,
    tiling: Tiling,
    fixed: dict[str, Any],
    states: Sequence[Memories],
    chunks: Sequence[Chunk],
) -> tuple[list[list[Float[Array, "C V"]]], list[list[Memories]], list[Memories]]:
    """Returns outputs of consecutive chunks, states before each, and states after all of them.

    Args:
      call: the static part.
      tiling: how many memories there are, and which heads they have.
      fixed: the gates of constant decays, if they are, and what Taylor features are made with.
      states: of each memory the memory itself, and as a row the sum of keys, or the momentum.
      chunks: the tokens.
    """
    # What waits for long chains of others is done for all memories and chunks before what comes
    # next, as the compiler overlaps what is close together.
    prepared = [_prepared(call, tiling, fixed, chunk) for chunk in chunks]
    if "beta" in call.tokens:
        systems = jnp.stack([x.below for of_chunk in prepared for x in of_chunk])
        inverses = tpu_inverse.inverse(jax.lax.stop_gradient(systems), call.exact)
        inverses = [tuple(part[i] for part in inverses) for i in range(len(systems))]
    results, befores = [], []
    for of_chunk in prepared:
        befores.append(list(states))
        memories = states if call.epsilon is None else [state[:1] for state in states]
        values = [x.value for x in of_chunk]
        if "beta" in call.tokens:
            wrong = [
                x.step * (x.value.astype(jnp.float32) - x.gate.before().read(x.key, memory))
                for x, memory in zip(of_chunk, memories, strict=True)
            ]
            values = [
                tpu_inverse.solved(inverses.pop(0), x.below, y)
                for x, y in zip(of_chunk, wrong, strict=True)
            ]
        tuples = list(zip(of_chunk, values, memories, strict=True))
        outs = [dot(x.scores, v, 1, 0, call.dtype) + x.gate.read(x.query, m) for x, v, m in tuples]
        after = [x.gate.after(m, x.key, v) for x, v, m in tuples]
        if call.epsilon is not None:
            totals = [total for _, total in states]
            outs = [
                normalised(call, out, _weights(x, total), x.real)
                for out, x, total in zip(outs, of_chunk, totals, strict=True)
            ]
            after = [
                (*memory, x.gate.after_sum(total, x.key))
                for memory, x, total in zip(after, of_chunk, totals, strict=True)
            ]
        results.append(outs if call.scale == 1 else [call.scale * out for out in outs])
        states = after
    return results, befores, list(states)


class _Prepared(NamedTuple):
    """What of a chunk and a memory does not depend on the state."""

    gate: Gate
    query: Features
    key: Features
    value: Float[Array, "C V"]
    scores: Float[Array, "C C"]
    step: Float[Array, "C 1"] | None
    below: Float[Array, "C C"] | None
    """The system of the delta rule, as the step."""
    real: Float[Array, "C 1"] | None
    """0 for what is no token."""


def _prepared(call: Call, tiling: Tiling, fixed: dict[str, Any], chunk: Chunk) -> list[_Prepared]:
    taylor, real = fixed.get("taylor"), column_of(chunk, "real")
    query = [mapped_features(call, taylor, x, None) for x in chunk["query"]]
    key = [mapped_features(call, taylor, x, real) for x in chunk["key"]]
    gates = fixed["gates"] if call.gate == "constant" else _gates(call, chunk)
    steps = column_of(chunk, "beta")
    results = []
    for memory, gate in enumerate(gates):
        q, k, v = (
            x[tiling.head(count, memory)]
            for x, count in zip((query, key, chunk["value"]), call.heads, strict=True)
        )
        if steps is None:
            results.append(_Prepared(gate, q, k, v, *gate.scores((q,), k), None, None, real))
            continue
        step, before = steps[:, memory : memory + 1], gate.before()
        if before is gate:
            scores, of_keys = gate.scores((q, k), k)
        else:
            (scores,), (of_keys,) = gate.scores((q,), k), before.scores((k,), k)
        results.append(_Prepared(gate, q, k, v, scores, step, step * of_keys, real))
    return results


def _weights(x: _Prepared, total: Float[Array, "1 F"]) -> Float[Array, "C 1"]:
    """Returns the sums of the weights of values."""
    return jnp.sum(x.scores, axis=1, keepdims=True) + x.gate.read_sum(x.query, total)


def _gates(call: Call, chunk: Chunk) -> Sequence[Gate]:
    begins = column_of(chunk, "begins")
    if call.gate == "channel":
        gates = []
        for log_decay in chunk["log_decay"]:
            log_decay = jnp.maximum(log_decay.astype(jnp.float32), LOWEST)
            if begins is not None:
                log_decay = jnp.where(begins > 0, LOWEST, log_decay)
            gates.append(channel_gate(log_decay, call.bound))
        return gates
    gates = step_gates(chunk["log_decay"])
    if "log_momentum" not in chunk:
        return gates
    momentums = step_gates(chunk["log_momentum"])
    return momentum_gates(gates, momentums, begins, column_of(chunk, "real"))


def normalised(
    call: Call,
    out: Float[Array, "C V"],
    weights: Float[Array, "C 1"],
    real: Float[Array, "C 1"] | None,
) -> Float[Array, "C V"]:
    """Divides by the sums of weights; there is none of what is no token."""
    weights += call.epsilon
    return out / (weights if real is None else jnp.where(real > 0, weights, 1))


def column_of(chunk: Chunk, name: str) -> Float[Array, "C 1"] | None:
    """Returns numbers of tokens, if there are any, as a column."""
    return turned(chunk[name]) if name in chunk else None


def mapped_features(
    call: Call, taylor: Any, x: Float[Array, "C H"], real: Float[Array, "C 1"] | None
) -> Features:
    """Returns the features of queries or keys, in their dtype: zeros for what is not real."""
    if call.feature_map is None:
        return Features(x)
    source = None
    if call.feature_map == "taylor":
        (first, second), rows = taylor
        mapped = (dot(x, first, 1, 0) + rows[:1]) * (dot(x, second, 1, 0) + rows[1:2]) * rows[2:]
        source = x, rows[2:, 1:2]
    else:
        mapped = features.mapped(call.feature_map, x.astype(jnp.float32))
        if call.size < call.features:
            mapped = jnp.where(iota(x.shape, 1) < call.size, mapped, 0)
    if real is not None:
        mapped = jnp.where(real > 0, mapped, 0)
    return Features(mapped.astype(x.dtype), source)


def taylor_matrices(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Returns what makes Taylor features of x as (x A + a) * (x B + b) * c.

    Matrix units choose columns exactly.

    Returns:
      A and B, [2, H, F], and the rows a, b and c, [3, F].
    """
    chosen = np.zeros((2, call.features, call.mapped), np.float32)
    rows = np.zeros((3, call.mapped), np.float32)
    pairs, scales = features.taylor_products(call.size)
    rows[2, : len(scales)] = scales
    for column, pair in enumerate(pairs):
        for side, i in enumerate(pair):
            if i < call.size:
                chosen[side, i, column] = 1
            else:
                rows[side, column] = 1
    return chosen, rows
