"""Tiled attention as Pallas kernels for TPU: see docs/kernels.md.

Scores are computed in base 2, so that a weight is one multiplication and one exp2 away from a
product. The sum of a row's weights is kept in 128 parts, a lane each, until the row is done.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import masks
from pallas_kernels.masks import Mask
from pallas_kernels.tiled import tiles
from pallas_kernels.tiled.inputs import Inputs, Options, without_hidden
from pallas_kernels.tiled.schedule import Grid, divisor, schedule, split
from pallas_kernels.tiled.tiles import LANES, Operand, Tiling

LOG2E = math.log2(math.e)
LOWEST = -1e30
"""Where the running maximum starts: finite, so that no difference of maxima is NaN."""

VMEM_BYTES = 64 * 2**20


def supports(*, options: Options, inputs: Inputs) -> str | None:
    """Returns why the kernels do not serve a call, or None."""
    del options
    if inputs.query.dtype == jnp.float64:
        return "float64"
    lists, rest = split(inputs.mask)
    if len(lists) > 1:
        return "more than one block list"
    for blocks in lists:
        if divisor(blocks.block_q, 1024) is None or divisor(blocks.block_k, 1024) is None:
            return (
                f"blocks of {blocks.block_q} queries and {blocks.block_k} keys; both must be "
                "multiples of 16"
            )
        full = [] if inputs.bias is None else [inputs.bias]
        full += [x for x, d in zip(jax.tree.leaves(rest), _dims(rest), strict=True) if "ts" in d]
        if any(x.shape[-1] > 1 and x.shape[-2] > 1 for x in full):
            return "a bias or dense mask with both queries and keys, beside a block list"
    return None


def _dims(mask: Mask | None) -> tuple[str, ...]:
    return () if mask is None else mask.dims()


class _Scores(NamedTuple):
    """How scores are made: the static part of a call that kernels close over."""

    options: Options
    weights: str
    factor: float  # weights of a softmax are 2 ** (factor * (score - maximum))
    scale: float  # scores before bias are scale * products
    tree: Any  # of the operands

    @classmethod
    def of(cls, options: Options, tree: Any, additive: bool) -> "_Scores":
        base = LOG2E if options.weights in ("softmax", "sigmoid") else 1.0
        plain = options.weights == "softmax" and options.logits_soft_cap is None and not additive
        if plain and options.scale > 0:
            return cls(options, options.weights, options.scale * base, 1.0, tree)
        return cls(options, options.weights, 1.0, options.scale * base, tree)

    @property
    def unit(self) -> float:
        """Returns what a score of 1 is, as a number of the kernel."""
        return (LOG2E if self.weights in ("softmax", "sigmoid") else 1.0) / self.factor

    def logits(
        self, products: Array, operands: dict[str, Any], queries: Array, keys: Array, masked: bool
    ) -> tuple[Array, Array | None]:
        """Returns scores in the kernel's unit, and the derivative of the soft cap."""
        scores, slope, cap = products, None, self.options.logits_soft_cap
        if cap is not None:
            bounded = jnp.tanh(scores * (self.options.scale / cap))
            scores, slope = bounded * (cap * self.unit), 1 - bounded * bounded
        elif self.scale != 1:
            scores = scores * self.scale
        if self.options.logit_bias:
            scores = scores + self.options.logit_bias * self.unit
        if "bias" in operands:
            scores = scores + operands["bias"].astype(jnp.float32) * self.unit
        if "slopes" in operands:
            scores = scores - operands["slopes"] * self.unit * distance(operands, queries, keys)
        if masked:
            scores = jnp.where(operands["mask"].allowed(queries, keys), scores, -jnp.inf)
        return scores, slope

    def weight(self, scores: Array, exact: bool) -> Array:
        """Returns weights that need no maximum, from scores in the kernel's unit."""
        match self.weights:
            case "softmax":
                return jnp.exp2(scores if self.factor == 1 else scores * self.factor)
            case "sigmoid":
                return pl.reciprocal(1 + jnp.exp2(-scores), approx=not exact)
            case "softplus":
                return jnp.maximum(scores, 0) + jnp.log1p(jnp.exp(-jnp.abs(scores)))
            case _:
                return jnp.maximum(scores, 0)


def distance(operands: dict[str, Any], queries: Array, keys: Array) -> Array:
    """Returns the distances of queries and keys."""
    return jnp.abs(queries + operands["offset"] - keys).astype(jnp.float32)


def forward(
    options: Options, *inputs: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp."""
    x = without_hidden(Inputs(*inputs))
    batch, queries, heads, features = x.query.shape
    keys, kv_heads, width = x.value.shape[1:]
    dtype = jnp.float32 if x.query.dtype == jnp.float16 else x.query.dtype
    tiling, grid = _forward_tiles(x)
    rows = schedule(x.mask, grid)
    named, mask = _named(x, tiling)
    operands = {name: Operand(a, d, tiling) for name, (a, d) in named.items()}
    call = _Scores.of(options, jax.tree.structure(mask), bool({"bias", "slopes"} & {*named}))

    query, key, value = (jnp.swapaxes(y, 1, 2).astype(dtype) for y in x[:3])
    query = tiles.padded(query, 2, tiling.row_tiles * tiling.rows)
    key, value = (tiles.padded(y, 2, tiling.column_tiles * tiling.columns) for y in (key, value))
    online = options.weights == "softmax" and not options.bounded
    scratch = {
        "key": pltpu.VMEM((2, tiling.width, features), dtype),
        "value": pltpu.VMEM((2, tiling.width, width), dtype),
        "semaphores": pltpu.SemaphoreType.DMA((2,)),
        "sums": pltpu.VMEM((tiling.rows, width), jnp.float32),
        "operands": {n: o.scratch for n, o in operands.items() if o.scratch is not None},
    }
    if options.normalise:
        scratch["total"] = pltpu.VMEM((tiling.rows, LANES), jnp.float32)
    if online:
        scratch["maximum"] = pltpu.VMEM((tiling.rows, LANES), jnp.float32)
    branches = _branches(rows, mask)
    window, rows = _windows(rows, heads)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, call, tiling, operands, branches),
        name="tiled_forward",
        grid=(batch, heads, tiling.row_tiles),
        in_specs=[
            window,
            {name: operand.spec for name, operand in operands.items()},
            pl.BlockSpec((None, None, tiling.rows, features), lambda b, n, i: (b, n, i, 0)),
            hbm,
            hbm,
        ],
        out_specs=[
            pl.BlockSpec((None, None, tiling.rows, width), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec((None, None, None, 1, tiling.rows), lambda b, n, i: (b, n, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*query.shape[:3], width), dtype),
            jax.ShapeDtypeStruct((batch, heads, tiling.row_tiles, 1, tiling.rows), jnp.float32),
        ],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(rows, {name: operand.array for name, operand in operands.items()}, query, key, value)
    out = jnp.swapaxes(out[:, :, :queries], 1, 2).astype(x.query.dtype)
    lse = lse.reshape(batch, heads, -1)[:, :, :queries]
    return out, jnp.swapaxes(lse, 1, 2)


def _forward_kernel(
    call: _Scores,
    tiling: Tiling,
    operands: dict[str, Operand],
    branches: tuple[bool, bool],
    schedule: Any,
    refs: dict[str, Any],
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    scratch: dict[str, Any],
) -> None:
    """Computes one tile of rows, which are queries."""
    options = call.options
    b, n, i = (pl.program_id(axis) for axis in range(3))
    head = n // (tiling.heads // key.shape[1])
    maximum, total, sums = scratch.get("maximum"), scratch.get("total"), scratch["sums"]
    exact = query.dtype == jnp.float32
    own = functools.partial(scratch["operands"].get)
    for name, operand in operands.items():
        operand.prepare(refs[name], own(name))

    # The sink is a key with a value of zero, seen by every query before all others. It counts in
    # one lane of the sum.
    sink = None
    if "sink" in operands:
        sink = operands["sink"].value(refs["sink"], own("sink"), 0, 0)
        sink = jnp.broadcast_to(sink[:, :LANES] if jnp.ndim(sink) else sink, (tiling.rows, LANES))
        sink = sink * call.unit
    if maximum is not None:
        maximum[...] = jnp.full_like(maximum, LOWEST) if sink is None else sink
    if total is not None:
        total[...] = jnp.zeros_like(total)
        if sink is not None:
            first = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1) == 0
            weight = 1.0 if maximum is not None else jnp.exp2(sink * _to_base_2(call))
            total[...] = jnp.where(first, weight, 0.0)
    sums[...] = jnp.zeros_like(sums)

    def compute(slot: Array, numbers: Sequence[Array], masked: bool) -> None:
        for start in range(0, tiling.width, tiling.sub):
            part = pl.ds(start, tiling.sub)
            products = _dot(query[...], scratch["key"][slot, part], 1, 1)
            values = scratch["value"][slot, part]
            here = _values(call, operands, refs, scratch["operands"], slot, start, masked)
            shape = (tiling.rows, tiling.sub)
            queries = i * tiling.rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            keys = tiles.column_numbers(numbers, tiling, start)
            scores, _ = call.logits(products, here, queries, keys, masked)
            if maximum is None:
                weights = call.weight(scores, exact)
                if total is not None:
                    total[...] += _lane_sums(weights)
                sums[...] += _dot(weights.astype(values.dtype), values, 1, 0)
                continue
            before = maximum[...]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            decay = jnp.exp2((before - now) * call.factor)
            weights = jnp.exp2((scores - tiles.across(now, tiling.sub)) * call.factor)
            maximum[...] = now
            total[...] = total[...] * decay + _lane_sums(weights)
            product = _dot(weights.astype(values.dtype), values, 1, 0)
            sums[...] = sums[...] * tiles.across(decay, sums.shape[1]) + product

    buffers = ((key.at[b, head], scratch["key"]), (value.at[b, head], scratch["value"]))

    def copies(number: Array, piece: int, slot: Array) -> list:
        return [
            copy
            for name, operand in operands.items()
            for copy in operand.copies(refs[name], own(name), number, piece, slot)
        ]

    tiles.visit(schedule, tiling, buffers, copies, scratch["semaphores"], compute, branches)

    if total is None:
        out[...] = sums[...].astype(out.dtype)
        lse[...] = jnp.zeros_like(lse)
        return
    sum_ = jnp.sum(total[...], axis=1, keepdims=True)
    seen = sum_ != 0  # a NaN stays one
    sum_ = jnp.where(seen, sum_, 1)
    out[...] = jnp.where(seen, sums[...] / sum_, 0).astype(out.dtype)
    logs = jnp.log(sum_)
    if maximum is not None:
        logs += maximum[...] * (call.factor / LOG2E)
    lse[...] = tiles.row(jnp.broadcast_to(jnp.where(seen, logs, -jnp.inf), (tiling.rows, LANES)))


def _values(
    call: _Scores,
    operands: dict[str, Operand],
    refs: dict[str, Any],
    scratch: dict[str, Any],
    slot: Array,
    start: int,
    masked: bool,
) -> dict[str, Any]:
    """Returns the operands' values for a part of a tile, the mask with its leaves."""
    values = {
        name: operand.value(refs[name], scratch.get(name), slot, start)
        for name, operand in operands.items()
        if name != "sink" and (masked or not name.startswith("mask"))
    }
    if masked:
        leaves = [values[f"mask{k}"] for k in range(call.tree.num_leaves)]
        values["mask"] = jax.tree.unflatten(call.tree, leaves)
    return values


def _named(x: Inputs, tiling: Tiling, transposed: bool = False) -> tuple[dict, Mask | None]:
    """Returns the operands of a call by name, with their dimensions, and the mask as evaluated."""
    rest = split(x.mask)[1]
    columns, keys = tiling.column_tiles * tiling.columns, x.key.shape[1]
    if transposed:
        columns = tiling.row_tiles * tiling.rows
    if columns != keys or tiling.pieces > 1:
        rest = masks.all_of([*(() if rest is None else (rest,)), masks.lengths(None, keys)])
    named = {
        f"mask{k}": (leaf, dims)
        for k, (leaf, dims) in enumerate(zip(jax.tree.leaves(rest), _dims(rest), strict=True))
    }
    dims = dict(zip(Inputs._fields, x.dims, strict=True))
    for name in ("bias", "slopes", "sink", "offset"):
        if getattr(x, name) is not None:
            named[name] = getattr(x, name), dims[name]
    return named, rest


def _forward_tiles(x: Inputs) -> tuple[Tiling, Grid]:
    """Chooses the tiles of a forward."""
    queries, heads = x.query.shape[1:3]
    keys = x.key.shape[1]
    lists, rest = split(x.mask)
    if lists:
        rows, columns = divisor(lists[0].block_q, 1024), divisor(lists[0].block_k, 1024)
        pieces = max(512 // columns, 1)
        width = columns * pieces
        sub = 512 if width % 512 == 0 else width if width <= 512 else LANES
    else:
        # A tile of 8-bit values has at least 32 rows.
        rows = _even(queries, 1024, LANES if queries > LANES else 32)
        columns, pieces = _even(keys, 1024, 256 if keys > 256 else LANES), 1
        sub = 512 if columns % 512 == 0 else 256 if columns % 256 == 0 else LANES
    grid = Grid(queries, keys, rows, columns)
    return Tiling(rows, grid.shape[0], columns, grid.shape[1], pieces, sub, heads), grid


def _even(count: int, most: int, step: int) -> int:
    """Returns the size of tiles of about equal size, multiples of a step, that cover tokens."""
    number = -(-count // most)
    return -(-count // (number * step)) * step


def _windows(rows: Any, heads: int) -> tuple[pl.BlockSpec, Any]:
    """Returns how a kernel's grid step gets its window of a schedule, and the schedule for that."""
    batch, groups, count, entries = rows.shape
    size = -(-entries // LANES) * LANES
    rows = tiles.padded(jnp.asarray(rows), 3, size).reshape(batch * groups * count, 1, size)

    def index(b: Array, n: Array, i: Array) -> tuple[Array, int, int]:
        b = b if batch > 1 else 0
        n = n // (heads // groups) if groups > 1 else 0
        return (b * groups + n) * count + i, 0, 0

    return pl.BlockSpec((1, 1, size), index, memory_space=pltpu.SMEM), rows


def _branches(rows: Any, mask: Mask | None) -> tuple[bool, bool]:
    """Returns whether a schedule has, as far as is known, full tiles and partial ones."""
    if not isinstance(rows, np.ndarray):
        return True, mask is not None
    listed = np.arange(rows.shape[-1] - 1) < rows[..., :1]
    partial = rows[..., 1:] % 2 == 1
    full, some = (listed & ~partial).any(), (listed & partial).any()
    return bool(full or not some), bool(some)


def _to_base_2(call: _Scores) -> float:
    return call.factor if call.weights == "softmax" else LOG2E / call.unit


def _lane_sums(weights: Array) -> Array:
    """Sums the columns, in as many parts as there are lanes."""
    width = weights.shape[1]
    if width < LANES:
        weights, width = jnp.pad(weights, ((0, 0), (0, LANES - width))), LANES
    return functools.reduce(jnp.add, (weights[:, at : at + LANES] for at in range(0, width, LANES)))


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Multiplies matrices over these axes, float32 in full, into float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
