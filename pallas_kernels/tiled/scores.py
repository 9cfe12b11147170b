"""What the Pallas kernels of tiled attention compute of a tile of scores, and from which arrays.

Scores are kept in a unit in which a weight is as few operations away as can be: for a softmax the
products themselves, if they are only to be scaled, and otherwise scores in base 2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import masks
from pallas_kernels.masks import Mask
from pallas_kernels.tiled.inputs import LEAST_EXCESS, Inputs, Options, as_divisor
from pallas_kernels.tiled.schedule import split
from pallas_kernels.tiled.table import Table
from pallas_kernels.tiled.tiles import Operand, Tiling

LOG2E = math.log2(math.e)

ADDED = ("bias", "slopes", "table")
"""The inputs that are added to scores."""


class Functions(NamedTuple):
    """What is computed in its own way on each kind of hardware."""

    reciprocal: Callable[[Array, bool], Array]
    """1 / x, x of 1 and more. The second argument is whether an approximation is too coarse, as in
    the next one."""
    log1p: Callable[[Array, bool], Array]
    """log(1 + x), x of 0 to 1."""


TPU = Functions(
    lambda x, exact: pltpu.reciprocal(x, approx=not exact),
    lambda x, exact: jnp.log1p(x) if exact else jnp.log(1 + x),
)


class Scores(NamedTuple):
    """How weights come of products: the static part of a call that kernels close over.

    A score is `scale` times a product, capped, plus what is added; `unit` is what the kernels hold
    for a score of 1. A softmax's weight is 2 ** (factor * held).
    """

    options: Options
    unit: float
    factor: float
    functions: Functions = TPU

    @classmethod
    def of(cls, options: Options, x: Inputs, functions: Functions = TPU) -> "Scores":
        """Chooses the unit for a call."""
        added = options.logit_bias or any(getattr(x, name) is not None for name in ADDED)
        plain = options.logits_soft_cap is None and not added and options.scale > 0
        unit, factor = LOG2E, 1.0
        if options.weights in ("softplus", "relu"):
            unit = 1.0
        elif options.weights == "softmax" and plain and options.reweight is None:
            unit, factor = 1 / options.scale, options.scale * LOG2E
        return cls(options, unit, factor, functions)

    @property
    def online(self) -> bool:
        """Whether the weights of a row are summed relative to the maximum so far."""
        options = self.options
        unbounded = options.weights == "softmax" and not options.bounded
        return options.normalise and (unbounded or options.reweight is not None)

    @property
    def least(self) -> float:
        """Returns the maximum below which a reweighted row is empty."""
        return self.options.reweight[0] * LOG2E * math.log(LEAST_EXCESS)

    def held(
        self, products: Array, here: dict[str, Any], queries: Array | None, keys: Array | None
    ) -> tuple[Array, Array | float]:
        """Returns scores in the kernels' unit, and the derivative of the soft cap.

        Args:
          products: of queries and keys.
          here: the values of the operands; "mask" is missing where all pairs are allowed.
          queries: numbers of the queries, if there are slopes or a mask.
          keys: numbers of the keys.
        """
        scale, cap, slope = self.options.scale * self.unit, self.options.logits_soft_cap, 1.0
        if cap is not None:
            bounded = jnp.tanh(products * (self.options.scale / cap))
            scores, slope = bounded * (cap * self.unit), 1 - bounded * bounded
        else:
            scores = products if scale == 1 else products * scale
        if self.options.logit_bias:
            scores += self.options.logit_bias * self.unit
        if "bias" in here:
            scores += here["bias"].astype(jnp.float32) * self.unit
        if "slopes" in here:
            scores -= here["slopes"] * self.unit * distance(here, queries, keys)
        if "table" in here:
            scores += here["table"]  # in the kernels' unit
        if "mask" in here:
            scores = jnp.where(here["mask"].allowed(queries, keys), scores, -jnp.inf)
        return scores, slope

    def exp(self, scores: Array) -> Array:
        """Returns the exponential of scores, of a softmax."""
        return jnp.exp2(scores if self.factor == 1 else scores * self.factor)

    def divisor(self, log_sum: Array) -> Array:
        """Returns what `divided` takes for the logarithm of what weights are divided by."""
        log_sum = as_divisor(log_sum).astype(jnp.float32)
        return log_sum * LOG2E if self.options.weights == "softmax" else jnp.exp(-log_sum)

    def divided(self, scores: Array, divisor: Array | None, exact: bool) -> tuple[Array, Array]:
        """Returns weights with no maximum subtracted, and their derivatives by the scores.

        Args:
          scores: in the kernels' unit.
          divisor: what `divisor` makes of what the weights are divided by; None for 1.
          exact: whether approximations of the hardware are too coarse.
        """
        match self.options.weights:
            case "softmax":
                scores = scores if self.factor == 1 else scores * self.factor
                weights = jnp.exp2(scores if divisor is None else scores - divisor)
                return weights, weights
            case "sigmoid":
                weights = self.functions.reciprocal(1 + jnp.exp2(-scores), exact)
                derivative = weights * (1 - weights)
            case "softplus":
                small = jnp.exp(-jnp.abs(scores))
                weights = jnp.maximum(scores, 0) + self.functions.log1p(small, exact)
                derivative = self.functions.reciprocal(1 + jnp.exp(-scores), exact)
            case _:
                weights = jnp.maximum(scores, 0)
                derivative = (scores > 0).astype(jnp.float32)
        if divisor is None:
            return weights, derivative
        return weights * divisor, derivative * divisor

    def log_reweighted(self, weights: Array) -> Array:
        """Returns logarithms, in base 2, of reweighted weights before their normalisation."""
        power, offset = self.options.reweight
        return jnp.log(jnp.maximum(weights - offset, 0)) * (power * LOG2E)

    def reweighted(self, weights: Array, log_sum: Array) -> tuple[Array, Array]:
        """Returns reweighted weights and their derivatives by the weights, as `xla` does."""
        power, offset = self.options.reweight
        results = jnp.exp2(self.log_reweighted(weights) - log_sum)
        excess = jnp.maximum(weights - offset, jnp.finfo(jnp.float32).tiny)
        return results, power * (results / excess)

    def differentiated(
        self, scores: Array, here: dict[str, Any], exact: bool
    ) -> tuple[Array, Array, Array]:
        """Returns weights, and their derivatives by the scores and by the row statistic.

        Args:
          scores: in the kernels' unit.
          here: the values of the operands, "divisor" and "log_sum" among them.
          exact: see `divided`.
        """
        weights, derivative = self.divided(scores, here.get("divisor"), exact)
        by_statistic = weights  # but for its sign
        if self.options.reweight is not None:
            weights, by_weights = self.reweighted(weights, here["log_sum"])
            derivative, by_statistic = derivative * by_weights, by_statistic * by_weights
        return weights, derivative, by_statistic


def distance(here: dict[str, Any], queries: Array, keys: Array) -> Array:
    """Returns the distances of queries and keys."""
    return jnp.abs(queries + here["offset"] - keys).astype(jnp.float32)


class Operands:
    """The arrays of a call, apart from queries, keys and values, as a kernel gets them.

    Attributes:
      specs, arrays, scratch: arguments of pallas_call, by name.
      mask: the mask as it is evaluated on tiles that are not full.
      table: the operand of the table, or None.
    """

    def __init__(
        self, call: Scores, x: Inputs, tiling: Tiling, transposed: bool = False, **more: Array
    ):
        """Prepares the inputs of a call, and more arrays [B, N, T] with a value for every query."""
        queries, keys = x.query.shape[1], x.key.shape[1]
        rows, columns = tiling.row_tiles * tiling.rows, tiling.column_tiles * tiling.columns
        # Tokens that fill the last tile up are no keys, and pieces that fill a step up are nothing.
        fills = tiling.pieces > 1
        ends = masks.lengths(
            queries if transposed and fills else None,
            keys if (rows if transposed else columns) != keys or fills else None,
        )
        self.mask, named = named_operands(x, ends, **more)
        if transposed:
            named.pop("sink", None)
        self._operands = {
            name: Operand(array, dims, tiling, transposed) for name, (array, dims) in named.items()
        }
        self.table = None if x.table is None else Table(x, tiling, transposed, call.unit)
        if self.table is not None:
            self._operands["table"] = self.table
        self.specs = {name: operand.spec for name, operand in self._operands.items()}
        self.arrays = {name: operand.array for name, operand in self._operands.items()}
        self.scratch = {
            name: operand.scratch
            for name, operand in self._operands.items()
            if operand.scratch is not None
        }

    def bound(self, refs: dict[str, Any], scratch: dict[str, Any]) -> "BoundOperands":
        """Returns the operands in a kernel, prepared for its tile of rows."""
        for name, operand in self._operands.items():
            operand.prepare(refs[name], scratch.get(name))
        return BoundOperands(self._operands, self.mask, refs, scratch)


class BoundOperands(NamedTuple):
    """The operands in a kernel."""

    operands: dict[str, Operand]
    mask: Mask | None
    refs: dict[str, Any]
    scratch: dict[str, Any]

    def copies(self, row: Array, number: Array, piece: int, slot: Array) -> list:
        """Returns (source, target) of what a row of tiles needs for one piece of columns."""
        return [
            copy
            for name, operand in self.operands.items()
            for copy in operand.copies(
                self.refs[name], self.scratch.get(name), row, number, piece, slot
            )
        ]

    def filled(self, slot: Array) -> list:
        """Returns the targets of all copies to a slot."""
        return [
            target
            for name, operand in self.operands.items()
            for target in operand.filled(self.scratch.get(name), slot)
        ]

    def arrive(self, slot: Array) -> None:
        """Prepares what was copied to a slot."""
        for name, operand in self.operands.items():
            operand.arrive(self.refs[name], self.scratch.get(name), slot)

    def value(self, name: str, slot: Array | int, row: int, start: int) -> Array:
        """Returns the value of one operand for a part of a tile."""
        operand = self.operands[name]
        return operand.value(self.refs[name], self.scratch.get(name), slot, row, start)

    def values(self, slot: Array, row: int, start: int, masked: bool) -> dict[str, Any]:
        """Returns the values for a part of a tile by name, "mask" with its leaves."""
        names = [n for n in self.operands if n != "sink" and not n.startswith("mask")]
        values = {name: self.value(name, slot, row, start) for name in names}
        if masked:
            tree = jax.tree.structure(self.mask)
            leaves = [self.value(f"mask{k}", slot, row, start) for k in range(tree.num_leaves)]
            values["mask"] = tree.unflatten(leaves)
        return values


def named_operands(
    x: Inputs, ends: Mask, **more: Array
) -> tuple[Mask | None, dict[str, tuple[Array, str]]]:
    """Returns the arrays of a call, apart from queries, keys and values, and their dimensions.

    Those of the mask are named in the order of its leaves.

    Args:
      x: the call.
      ends: what hides tokens that fill tiles up.
      **more: arrays [B, N, T].

    Returns:
      The mask as it is evaluated on tiles, without block lists, and the arrays by name.
    """
    rest = split(x.mask)[1]
    mask = masks.all_of([m for m in (rest, ends) if not _allows_all(m)])
    leaves = jax.tree.leaves(mask)
    dims = () if mask is None else mask.dims()
    named = {f"mask{k}": pair for k, pair in enumerate(zip(leaves, dims, strict=True))}
    own = dict(zip(Inputs._fields, x.dims, strict=True))
    for name in ("bias", "slopes", "sink", "offset"):
        if getattr(x, name) is not None:
            named[name] = getattr(x, name), own[name]
    return mask, named | {name: (array, "bnt") for name, array in more.items()}


def row_operands(
    call: Scores, x: Inputs, lse: Array, delta: Array, tokens: int
) -> dict[str, Array]:
    """Returns what the backward needs of rows as arrays [B, N, tokens], by name.

    Args:
      call: the call.
      x: its inputs.
      lse: [B, T, N], as the next one what `inputs.of_rows` returns.
      delta: [B, T, N].
      tokens: of queries, with those that fill the last tile up.
    """
    batch, queries, heads, _ = x.query.shape
    padding = ((0, 0), (0, 0), (0, tokens - queries))
    lse = jnp.pad(jnp.swapaxes(lse, 1, 2), padding, constant_values=jnp.inf)
    arrays = {}
    if call.options.normalise:
        arrays["delta"] = jnp.pad(jnp.swapaxes(delta, 1, 2), padding)
    if call.options.reweight is not None:
        arrays["log_sum"] = lse * LOG2E
        statistic = jnp.broadcast_to(x.statistic, (batch, heads, queries))
        arrays["divisor"] = call.divisor(jnp.pad(statistic, padding, constant_values=jnp.inf))
    elif call.options.normalise or x.statistic is not None:
        arrays["divisor"] = call.divisor(lse)
    return arrays


def _allows_all(mask: Mask | None) -> bool:
    return mask is None or (isinstance(mask, masks.Lengths) and mask.query is mask.key is None)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Multiplies matrices over these axes, float32 in full, into float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def parts(tiling: Tiling) -> Sequence[tuple[int, int]]:
    """Returns the first rows and columns of the parts of a tile."""
    return [
        (row, start)
        for start in range(0, tiling.width, tiling.column_part)
        for row in range(0, tiling.rows, tiling.row_part)
    ]
