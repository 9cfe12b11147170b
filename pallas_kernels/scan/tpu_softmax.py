"""The softmax scan as Pallas kernels for TPU.

Within 128 tokens it is attention by a constant query: weights exp(s_j - m_i) of the tokens j up to
each token i, with m_i the largest score so far, so that none is above 1; then a matrix product with
the values. The state before is one more token, with its total for a weight.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.scan.inputs import Inputs, Options, Parameters, Softmax, SoftmaxState
from pallas_kernels.scan.tiles import Tiling
from pallas_kernels.tpu import LANES, compiler_params, padded, result
from pallas_kernels.tpu_matrix import dot, iota

HEADS = 8
"""Heads of a grid step, at most."""
PARTS = 3
"""Rows of a head's state: maximum and total, the same in all lanes, and the weighted sum."""


class _Heads:
    """How the heads of a call are cut: `step` of scores and `shared` of values in a grid step."""

    def __init__(self, x: Inputs, chunk_size: int, *, reverse: bool = False) -> None:
        batch, tokens, heads, features = x.out.shape
        self.value_heads = x.tokens.value.shape[2]
        group = heads // self.value_heads
        self.step = next(
            n
            for n in range(min(HEADS, heads), 0, -1)
            if heads % n == 0 and (n % group == 0 or group % n == 0)
        )
        self.shared = max(self.step // group, 1)
        self.group = min(group, self.step)
        """Heads of scores of a grid step that have the same values."""
        self.steps = heads // self.step
        self.width = -(-features // LANES) * LANES
        self.features = features
        lanes = self.step * self.width
        self.tiling = Tiling(batch, tokens, heads * self.width, chunk_size, lanes, reverse)

    def values(self, own: bool = False) -> pl.BlockSpec:
        """Is the block of values; of their gradients, `own`, each grid step has one."""
        tiling, lanes = self.tiling, self.shared * self.width
        times = 1 if own else self.steps * self.shared // self.value_heads

        def block(b: Any, c: Any, i: Any) -> tuple[Any, ...]:
            return b, tiling.time(i), c // times

        return pl.BlockSpec((None, tiling.rows, lanes), block)

    def scores(self) -> pl.BlockSpec:
        """Is the block of [B, steps, heads, T]."""
        tiling = self.tiling
        shape = (None, None, self.step, tiling.rows)
        return pl.BlockSpec(shape, lambda b, c, i: (b, c, 0, tiling.time(i)))

    def row(self) -> pl.BlockSpec:
        """Is the block of [B, 1, T]."""
        tiling = self.tiling
        return pl.BlockSpec((None, 1, tiling.rows), lambda b, c, i: (b, 0, tiling.time(i)))

    def lanes(self, head: int) -> Any:
        """Returns the columns of a head in a block."""
        return pl.ds(head * self.width, self.width)

    def laid_out(self, array: Float[Array, "B T N V"]) -> Float[Array, "B time _"]:
        """Returns heads side by side, with whole registers and whole tiles of tokens."""
        tiling = self.tiling
        array = padded(padded(array, 3, self.width), 1, tiling.grid[2] * tiling.rows)
        return array.reshape(*array.shape[:2], -1)

    def state(self, state: SoftmaxState) -> Float[Array, "... 3 _"]:
        """Returns states as three rows, heads side by side."""
        weighted = padded(state.weighted, state.weighted.ndim - 1, self.width)
        numbers = (state.maximum, state.total)
        parts = [*(jnp.broadcast_to(n[..., None], weighted.shape) for n in numbers), weighted]
        return jnp.stack([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-2)

    def states(self, rows: Float[Array, "... 3 _"]) -> SoftmaxState:
        """Is the inverse of `state`."""
        rows = rows.reshape(*rows.shape[:-1], -1, self.width)
        maximum, total, weighted = jnp.unstack(rows, axis=-3)
        return SoftmaxState(maximum[..., 0], total[..., 0], weighted[..., : self.features])


def _operands(x: Inputs, heads: _Heads) -> tuple[dict[str, Array], dict[str, Any]]:
    """Returns the arrays of both kernels by name, with their blocks."""
    tiling = heads.tiling
    score = jnp.swapaxes(x.tokens.score.astype(jnp.float32), 1, 2)
    batch, time = tiling.batch, tiling.grid[2] * tiling.rows
    # What stands behind the last token is left out.
    widths = ((0, 0), (0, 0), (0, time - tiling.tokens))
    score = jnp.pad(score, widths, constant_values=-jnp.inf)
    arrays = {
        "score": score.reshape(batch, heads.steps, heads.step, time),
        "value": heads.laid_out(x.tokens.value),
    }
    specs = {"score": heads.scores(), "value": heads.values()}
    if x.begins is not None:
        arrays["begins"] = padded(jnp.float32(x.begins)[:, None], 2, time)
        specs["begins"] = heads.row()
    return arrays, specs


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    heads = _Heads(x, options.chunk_size)
    tiling = heads.tiling
    arrays, specs = _operands(x, heads)
    arrays["initial"], specs["initial"] = heads.state(x.state), tiling.by_row(PARTS)
    batch, tiles, time = tiling.batch, tiling.grid[2], tiling.grid[2] * tiling.rows
    like = functools.partial(result, like=arrays["value"])
    outs = {
        "out": like((batch, time, tiling.channels), x.out.dtype),
        "last": like((batch, PARTS, tiling.channels), jnp.float32),
    }
    out_specs = {"out": tiling.by_token(), "last": tiling.by_row(PARTS)}
    if keep:
        outs["kept"] = like((batch, tiles, PARTS, tiling.channels), jnp.float32)
        out_specs["kept"] = tiling.by_chunk(PARTS)
    results = pl.pallas_call(
        functools.partial(_forward_kernel, heads),
        name="softmax_scan_forward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[out_specs],
        out_shape=[outs],
        scratch_shapes=[pltpu.VMEM((PARTS, tiling.lanes), jnp.float32)],
        compiler_params=compiler_params(),
    )(arrays)[0]
    out = results["out"].reshape(batch, time, -1, heads.width)
    states = [heads.states(results[name]) for name in ("last", "kept") if name in results]
    return out[:, : tiling.tokens, :, : heads.features], *states


def _forward_kernel(heads: _Heads, refs: dict, outs: dict, state: Any) -> None:
    tiling = heads.tiling

    @pl.when(tiling.first)
    def _() -> None:
        state[...] = refs["initial"][...]

    if "kept" in outs:
        outs["kept"][...] = state[...]
    for rows in _slices(tiling):
        masks = _masks(refs, rows)
        for head in range(heads.step):
            lanes = heads.lanes(head)
            value = refs["value"][rows, heads.lanes(head // heads.group)]
            found = _attend(masks, refs["score"][head : head + 1, rows], value, state[:, lanes])
            maximum, _, _, total, weighted, out = found
            outs["out"][rows, lanes] = out.astype(outs["out"].dtype)
            state[:, lanes] = _last(maximum, total, weighted)

    @pl.when(tiling.last)
    def _() -> None:
        outs["last"][...] = state[...]


def _slices(tiling: Tiling) -> list[Any]:
    """Returns the rows that are done at a time."""
    return [pl.ds(start, LANES) for start in range(0, tiling.rows, LANES)]


Masks = tuple[Bool[Array, "C C"], Bool[Array, "C 1"] | None]


def _masks(refs: dict, rows: Any) -> Masks:
    """Returns which tokens each attends to, and which do not see the state before."""
    row, column = (iota((LANES, LANES), axis) for axis in (0, 1))
    seen = column <= row
    if "begins" not in refs:
        return seen, None
    # The column of the token that began the segment of each; -1 where it began before.
    begins = jnp.where(seen & (refs["begins"][:, rows] > 0), column.astype(jnp.float32), -1)
    first = jnp.max(begins, axis=1, keepdims=True)
    return seen & (column.astype(jnp.float32) >= first), first >= 0


def _attend(masks: Masks, score: Array, value: Array, state: Array) -> tuple[Array, ...]:
    """Does 128 tokens of a head.

    Args:
      masks: of `_masks`.
      score: [1, C].
      value: [C, V].
      state: before them, [3, V].

    Returns:
      Maximum, weights [C, C], weight of what was before, total, weighted sum [C, V] and output
      [C, V] of each token; what is not said is [C, 1].
    """
    seen, dropped = masks
    before = jnp.broadcast_to(state[:1, :1], (LANES, 1))
    if dropped is not None:
        before = jnp.where(dropped, -jnp.inf, before)
    score = jnp.where(seen, score, -jnp.inf)
    maximum = jnp.maximum(jnp.max(score, axis=1, keepdims=True), before)
    finite = jnp.where(maximum == -jnp.inf, 0, maximum)
    weights, kept = jnp.exp(score - finite), jnp.exp(before - finite)
    total = jnp.sum(weights, axis=1, keepdims=True) + kept * state[1:2, :1]
    weighted = dot(weights, value, 1, 0) + kept * state[2:]
    return maximum, weights, kept, total, weighted, weighted * _inverse(total)


def _inverse(total: Array) -> Array:
    """Returns 1 / total, and 0 where there was no token."""
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def _last(maximum: Array, total: Array, weighted: Array) -> Float[Array, "3 V"]:
    """Returns the state after the last of some tokens."""
    last = weighted[LANES - 1 :]
    numbers = (jnp.broadcast_to(x[LANES - 1 :], last.shape) for x in (maximum, total))
    return jnp.concatenate([*numbers, last])


def backward(
    options: Options, x: Inputs, kept: SoftmaxState, d_out: Array, d_state: SoftmaxState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    heads = _Heads(x, options.chunk_size, reverse=True)
    tiling = heads.tiling
    arrays, specs = _operands(x, heads)
    arrays |= {
        "d_out": heads.laid_out(d_out),
        "kept": heads.state(kept),
        "d_last": heads.state(d_state),
    }
    by_row = tiling.by_row(PARTS)
    specs |= {"d_out": tiling.by_token(), "kept": tiling.by_chunk(PARTS), "d_last": by_row}
    batch, time = tiling.batch, tiling.grid[2] * tiling.rows
    value = x.tokens.value
    of_value = heads.steps * heads.shared  # gradients of heads of values
    like = functools.partial(result, like=arrays["value"])
    dtype = value.dtype if heads.value_heads == tiling.channels // heads.width else jnp.float32
    results = pl.pallas_call(
        functools.partial(_backward_kernel, heads),
        name="softmax_scan_backward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[{"score": heads.scores(), "value": heads.values(own=True), "initial": by_row}],
        out_shape=[
            {
                "score": like(arrays["score"].shape, jnp.float32),
                "value": like((batch, time, of_value * heads.width), dtype),
                "initial": like(arrays["d_last"].shape, jnp.float32),
            }
        ],
        scratch_shapes=[pltpu.VMEM((PARTS, tiling.lanes), jnp.float32)],
        compiler_params=compiler_params(),
    )(arrays)[0]
    d_score = results["score"].reshape(batch, -1, time)[..., : tiling.tokens]
    d_value = results["value"].reshape(batch, time, heads.value_heads, -1, heads.width)
    d_value = d_value[:, : tiling.tokens, ..., : heads.features].sum(3)
    tokens = Softmax(
        jnp.swapaxes(d_score, 1, 2).astype(x.tokens.score.dtype), d_value.astype(value.dtype)
    )
    return tokens, Parameters(), heads.states(results["initial"])


def _backward_kernel(heads: _Heads, refs: dict, outs: dict, d_state: Any) -> None:
    tiling = heads.tiling

    @pl.when(tiling.first)
    def _() -> None:
        d_state[...] = refs["d_last"][...]

    slices = _slices(tiling)
    masks = [_masks(refs, rows) for rows in slices]
    for head in range(heads.step):
        lanes, of_value = heads.lanes(head), heads.lanes(head // heads.group)
        score = slice(head, head + 1)
        before, parts = refs["kept"][:, lanes], []
        for rows, mask in zip(slices, masks, strict=True):
            value = refs["value"][rows, of_value]
            found = _attend(mask, refs["score"][score, rows], value, before)
            parts.append((rows, value, before, found))
            before = _last(found[0], *found[3:5])
        after = d_state[:, lanes]
        for rows, value, before, found in reversed(parts):
            d_out = refs["d_out"][rows, lanes].astype(jnp.float32)
            outs["score"][score, rows], d_value, after = _gradients(
                found, value, before, d_out, after
            )
            if head % heads.group:
                d_value += outs["value"][rows, of_value].astype(jnp.float32)
            outs["value"][rows, of_value] = d_value.astype(outs["value"].dtype)
        d_state[:, lanes] = after

    @pl.when(tiling.last)
    def _() -> None:
        outs["initial"][...] = d_state[...]


def _gradients(
    found: tuple[Array, ...], value: Array, before: Array, d_out: Array, after: Array
) -> tuple[Array, ...]:
    """Returns the gradients of scores [1, C], values [C, V] and the state before, [3, V].

    Args:
      found: what `_attend` returned.
      value: as for `_attend`.
      before: the state, as for `_attend`.
      d_out: gradient of the output.
      after: gradient of the state after; that of its maximum is nothing.
    """
    _, weights, kept, total, _, out = found
    d_weighted = d_out * _inverse(total)
    d_total = -jnp.sum(d_weighted * out, axis=1, keepdims=True)
    last = iota((LANES, 1), 0) == LANES - 1
    d_weighted += jnp.where(last, after[2:], 0)
    d_total += jnp.where(last, after[1:2, :1], 0)
    d_weights = dot(d_weighted, value, 1, 1) + d_total
    d_score = jnp.sum(weights * d_weights, axis=0, keepdims=True)
    d_value = dot(weights, d_weighted.astype(value.dtype), 0, 0)
    d_kept = jnp.sum(d_weighted * before[2:], axis=1, keepdims=True) + d_total * before[1:2, :1]
    numbers = (jnp.sum(kept * x, axis=0, keepdims=True) for x in (d_kept, d_total))
    d_before = jnp.sum(kept * d_weighted, axis=0, keepdims=True)
    numbers = (jnp.broadcast_to(x, d_before.shape) for x in numbers)
    return d_score, d_value, jnp.concatenate([*numbers, d_before])
