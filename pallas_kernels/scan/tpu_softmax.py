"""The softmax scan as Pallas kernels for TPU.

Within 128 tokens it is attention by a constant query: weights exp(s_j - m_i) of the tokens j up to
each token i, with m_i the largest score so far, so that none is above 1; then a matrix product with
the values. The state before is one more token. What there is one number of for a token and head,
the largest score and the sum of weights, is scanned along the lanes, eight heads in a register.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.scan.inputs import Inputs, Options, Parameters, Softmax, SoftmaxState
from pallas_kernels.scan.tiles import ROWS, Tiling
from pallas_kernels.tpu import LANES, compiler_params, padded, result
from pallas_kernels.tpu_matrix import dot, iota, rolled, turned


class _Heads:
    """How the heads of a call are cut: `step` of scores and `shared` of values in a grid step."""

    def __init__(self, x: Inputs, chunk_size: int, *, reverse: bool = False) -> None:
        batch, tokens, heads, self.features = x.out.shape
        self.value_heads = x.tokens.value.shape[2]
        group = heads // self.value_heads
        self.step = next(
            n
            for n in range(min(ROWS, heads), 0, -1)
            if heads % n == 0 and (n % group == 0 or group % n == 0)
        )
        self.shared = max(self.step // group, 1)
        self.group = min(group, self.step)
        """Heads of scores of a grid step that have the same values."""
        self.steps = heads // self.step
        self.width = -(-self.features // LANES) * LANES
        lanes = self.step * self.width
        self.tiling = Tiling(batch, tokens, heads * self.width, chunk_size, lanes, reverse)

    @property
    def time(self) -> int:
        """Returns the number of tokens of all tiles."""
        return self.tiling.grid[2] * self.tiling.rows

    def values(self, own: bool = False) -> pl.BlockSpec:
        """Is the block of values; of their gradients, `own`, each grid step has one."""
        tiling, lanes = self.tiling, self.shared * self.width
        times = 1 if own else self.steps * self.shared // self.value_heads

        def block(b: Any, c: Any, i: Any) -> tuple[Any, ...]:
            return b, tiling.time(i), c // times

        return pl.BlockSpec((None, tiling.rows, lanes), block)

    def scores(self) -> pl.BlockSpec:
        """Is the block of [B, steps, 8, T]."""
        tiling = self.tiling
        shape = (None, None, ROWS, tiling.rows)
        return pl.BlockSpec(shape, lambda b, c, i: (b, c, 0, tiling.time(i)))

    def begins(self) -> pl.BlockSpec:
        """Is the block of [B, 8, T]."""
        tiling = self.tiling
        return pl.BlockSpec((None, ROWS, tiling.rows), lambda b, c, i: (b, 0, tiling.time(i)))

    def lanes(self, head: int) -> Any:
        """Returns the columns of a head in a block."""
        return pl.ds(head * self.width, self.width)

    def laid_out(self, array: Float[Array, "B T N V"]) -> Float[Array, "B time _"]:
        """Returns heads side by side, with whole registers and whole tiles of tokens."""
        array = padded(padded(array, 3, self.width), 1, self.time)
        return array.reshape(*array.shape[:2], -1)

    def state(self, state: SoftmaxState) -> dict[str, Array]:
        """Returns states as kernels take them: [..., steps, 16, 128] numbers, [..., 1, N V]."""
        numbers = jnp.stack([state.maximum, state.total], axis=-2)
        numbers = numbers.reshape(*numbers.shape[:-1], self.steps, self.step)
        numbers = padded(jnp.swapaxes(numbers, -3, -2), numbers.ndim - 1, ROWS)
        numbers = numbers.reshape(*numbers.shape[:-2], 2 * ROWS, 1)
        weighted = padded(state.weighted, state.weighted.ndim - 1, self.width)
        return {
            "numbers": jnp.broadcast_to(numbers, (*numbers.shape[:-1], LANES)),
            "weighted": weighted.reshape(*weighted.shape[:-2], 1, -1),
        }

    def states(self, state: dict[str, Array]) -> SoftmaxState:
        """Is the inverse of `state`."""
        numbers = state["numbers"][..., 0]
        numbers = numbers.reshape(*numbers.shape[:-1], 2, ROWS)[..., : self.step]
        maximum, total = (numbers[..., i, :] for i in (0, 1))
        maximum, total = (x.reshape(*x.shape[:-2], -1) for x in (maximum, total))
        weighted = state["weighted"][..., 0, :]
        weighted = weighted.reshape(*weighted.shape[:-1], -1, self.width)
        return SoftmaxState(maximum, total, weighted[..., : self.features])

    def state_blocks(self, chunks: bool = False) -> dict[str, pl.BlockSpec]:
        """Are the blocks of one state, or of those before all chunks."""
        tiling, shape = self.tiling, (2 * ROWS, LANES)
        if chunks:
            numbers = pl.BlockSpec(
                (None, None, None, *shape), lambda b, c, i: (b, tiling.time(i), c, 0, 0)
            )
            return {"numbers": numbers, "weighted": tiling.by_chunk(1)}
        numbers = pl.BlockSpec((None, None, *shape), lambda b, c, i: (b, c, 0, 0))
        return {"numbers": numbers, "weighted": tiling.by_row(1)}

    def state_types(self, like: Array, chunks: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the types of one state, or of those before all chunks."""
        lead = (self.tiling.batch, *((self.tiling.grid[2],) if chunks else ()))
        shapes = {
            "numbers": (*lead, self.steps, 2 * ROWS, LANES),
            "weighted": (*lead, 1, self.tiling.channels),
        }
        return {name: result(shape, jnp.float32, like) for name, shape in shapes.items()}

    def scratch(self) -> dict[str, Any]:
        """Returns memory for a state."""
        return {
            "numbers": pltpu.VMEM((2 * ROWS, LANES), jnp.float32),
            "weighted": pltpu.VMEM((1, self.tiling.lanes), jnp.float32),
        }


def _operands(x: Inputs, heads: _Heads) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of both kernels by name, with their blocks."""
    batch, tokens, _ = x.tokens.score.shape
    score = jnp.swapaxes(x.tokens.score.astype(jnp.float32), 1, 2)
    score = score.reshape(batch, heads.steps, heads.step, tokens)
    # What fills up heads and tokens is left out.
    ends = ((0, 0), (0, 0), (0, ROWS - heads.step), (0, heads.time - tokens))
    arrays = {
        "score": jnp.pad(score, ends, constant_values=-jnp.inf),
        "value": heads.laid_out(x.tokens.value),
    }
    specs = {"score": heads.scores(), "value": heads.values()}
    if x.begins is not None:
        begins = padded(jnp.float32(x.begins)[:, None], 2, heads.time)
        arrays["begins"] = jnp.broadcast_to(begins, (batch, ROWS, heads.time))
        specs["begins"] = heads.begins()
    return arrays, specs


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    heads = _Heads(x, options.chunk_size)
    tiling = heads.tiling
    arrays, specs = _operands(x, heads)
    arrays["initial"], specs["initial"] = heads.state(x.state), heads.state_blocks()
    like = arrays["value"]
    outs = {
        "out": result((tiling.batch, heads.time, tiling.channels), x.out.dtype, like),
        "last": heads.state_types(like),
    }
    out_specs = {"out": tiling.by_token(), "last": heads.state_blocks()}
    if keep:
        outs["kept"] = heads.state_types(like, chunks=True)
        out_specs["kept"] = heads.state_blocks(chunks=True)
    results = pl.pallas_call(
        functools.partial(_forward_kernel, heads),
        name="softmax_scan_forward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[out_specs],
        out_shape=[outs],
        scratch_shapes=[heads.scratch()],
        compiler_params=compiler_params(),
    )(arrays)[0]
    out = results["out"].reshape(tiling.batch, heads.time, -1, heads.width)
    states = [heads.states(results[name]) for name in ("last", "kept") if name in results]
    return out[:, : tiling.tokens, :, : heads.features], *states


def _forward_kernel(heads: _Heads, refs: dict, outs: dict, state: dict) -> None:
    @pl.when(heads.tiling.first)
    def _() -> None:
        _copy(refs["initial"], state)

    if "kept" in outs:
        _copy(state, outs["kept"])
    for rows in _slices(heads.tiling):
        tokens = _tokens(refs, rows, state["numbers"][...])
        for head in range(heads.step):
            lanes = heads.lanes(head)
            value = refs["value"][rows, heads.lanes(head // heads.group)]
            weights = tokens.weights(head)
            weighted = dot(weights, value, 1, 0) + tokens.kept(head) * state["weighted"][:, lanes]
            out = weighted * tokens.inverse(head)
            outs["out"][rows, lanes] = out.astype(outs["out"].dtype)
            state["weighted"][:, lanes] = weighted[LANES - 1 :]
        state["numbers"][...] = tokens.after

    @pl.when(heads.tiling.last)
    def _() -> None:
        _copy(state, outs["last"])


def _copy(source: dict, target: dict) -> None:
    for name, ref in source.items():
        target[name][...] = ref[...]


def _slices(tiling: Tiling) -> list[Any]:
    """Returns the rows that are done at a time."""
    return [pl.ds(start, LANES) for start in range(0, tiling.rows, LANES)]


class _Tokens(NamedTuple):
    """What 128 tokens and eight heads have before the values come in."""

    score: Float[Array, "8 C"]
    columns: Float[Array, "C 24"]
    """Of each head the maximum, how much the state before counts, and 1 / total."""
    seen: Bool[Array, "C C"]
    after: Float[Array, "16 C"]
    """Maximum and total after the last token."""

    def weights(self, head: int) -> Float[Array, "C C"]:
        """Returns exp(s_j - m_i) of the tokens that each sees."""
        weights = jnp.exp(self.score[head : head + 1] - self.columns[:, head : head + 1])
        return jnp.where(self.seen, weights, 0)

    def kept(self, head: int) -> Float[Array, "C 1"]:
        """Returns exp(m - m_i), with m the maximum before."""
        return self.columns[:, ROWS + head : ROWS + head + 1]

    def inverse(self, head: int) -> Float[Array, "C 1"]:
        """Returns 1 / total, 0 where no token has been seen."""
        return self.columns[:, 2 * ROWS + head : 2 * ROWS + head + 1]


def _tokens(refs: dict, rows: Any, before: Float[Array, "16 C"]) -> _Tokens:
    score = refs["score"][:, rows]
    lane = iota(score.shape, 1)
    seen = iota((LANES, LANES), 1) <= iota((LANES, LANES), 0)
    begins = refs["begins"][:, rows] if "begins" in refs else None
    # Of each token the first of its segment, and whether that is here.
    first = None if begins is None else jnp.where(begins > 0, lane, -1).astype(jnp.float32)
    maximum, total = score, jnp.where(score > -jnp.inf, 1.0, 0.0)
    if first is not None:
        for shift in _shifts():
            first = jnp.maximum(first, jnp.where(lane >= shift, rolled(first, shift, 1), -1))
        seen &= iota((LANES, LANES), 1).astype(jnp.float32) >= turned(first)[:, :1]
    for shift in _shifts():
        inside = lane >= shift
        if first is not None:
            # The tokens that are added end where those that are here begin.
            inside &= (lane - shift).astype(jnp.float32) >= first
        other = jnp.where(inside, rolled(maximum, shift, 1), -jnp.inf)
        maximum, total, _ = _joined(
            maximum, total, other, jnp.where(inside, rolled(total, shift, 1), 0)
        )
    was, sums = before[:ROWS], before[ROWS:]
    if first is not None:
        was = jnp.where(first < 0, was, -jnp.inf)
    maximum, total, kept = _joined(maximum, total, was, sums)
    finite = jnp.where(maximum == -jnp.inf, 0, maximum)
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    last = jnp.concatenate([maximum, total])[:, LANES - 1 :]
    columns = turned(jnp.concatenate([finite, kept, inverse]))
    after = jnp.broadcast_to(last, (2 * ROWS, LANES))
    return _Tokens(score, columns, seen, after)


def _shifts() -> list[int]:
    return [2**i for i in range(LANES.bit_length() - 1)]


def _joined(
    maximum: Array, total: Array, other: Array, other_total: Array
) -> tuple[Array, Array, Array]:
    """Returns maximum and total of both, and how much the other counts in them."""
    joined = jnp.maximum(maximum, other)
    finite = jnp.where(joined == -jnp.inf, 0, joined)
    counts = jnp.exp(other - finite)
    return joined, jnp.exp(maximum - finite) * total + counts * other_total, counts


def backward(
    options: Options, x: Inputs, kept: SoftmaxState, d_out: Array, d_state: SoftmaxState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    heads = _Heads(x, options.chunk_size, reverse=True)
    tiling, value = heads.tiling, x.tokens.value
    arrays, specs = _operands(x, heads)
    like = arrays["value"]
    arrays |= {
        "d_out": heads.laid_out(d_out),
        "kept": heads.state(kept),
        "d_last": heads.state(d_state),
    }
    specs |= {
        "d_out": tiling.by_token(),
        "kept": heads.state_blocks(chunks=True),
        "d_last": heads.state_blocks(),
    }
    of_value = heads.steps * heads.shared * heads.width
    alone = heads.value_heads * heads.width == tiling.channels
    dtype = value.dtype if alone else jnp.float32
    results = pl.pallas_call(
        functools.partial(_backward_kernel, heads),
        name="softmax_scan_backward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[
            {
                "score": heads.scores(),
                "value": heads.values(own=True),
                "initial": heads.state_blocks(),
            }
        ],
        out_shape=[
            {
                "score": result(arrays["score"].shape, jnp.float32, like),
                "value": result((tiling.batch, heads.time, of_value), dtype, like),
                "initial": heads.state_types(like),
            }
        ],
        scratch_shapes=[heads.scratch()],
        compiler_params=compiler_params(),
    )(arrays)[0]
    d_score = results["score"][:, :, : heads.step, : tiling.tokens]
    d_score = jnp.swapaxes(d_score.reshape(tiling.batch, -1, tiling.tokens), 1, 2)
    d_value = results["value"][:, : tiling.tokens]
    d_value = d_value.reshape(*d_value.shape[:2], heads.value_heads, -1, heads.width).sum(3)
    tokens = Softmax(
        d_score.astype(x.tokens.score.dtype), d_value[..., : heads.features].astype(value.dtype)
    )
    return tokens, Parameters(), heads.states(results["initial"])


def _backward_kernel(heads: _Heads, refs: dict, outs: dict, d_state: dict) -> None:
    @pl.when(heads.tiling.first)
    def _() -> None:
        _copy(refs["d_last"], d_state)

    slices, tokens = _slices(heads.tiling), []
    befores = [refs["kept"]["numbers"][...]]
    for rows in slices:
        tokens.append(_tokens(refs, rows, befores[-1]))
        befores.append(tokens[-1].after)
    outs["score"][...] = jnp.zeros(outs["score"].shape, jnp.float32)
    d_before = []
    for head in range(heads.step):
        lanes, of_value = heads.lanes(head), heads.lanes(head // heads.group)
        weighted, parts = refs["kept"]["weighted"][:, lanes], []
        for rows, these in zip(slices, tokens, strict=True):
            value, weights = refs["value"][rows, of_value], these.weights(head)
            parts.append((weights, value, weighted))
            sums = dot(weights, value, 1, 0) + these.kept(head) * weighted
            parts[-1] += (sums * these.inverse(head),)
            weighted = sums[LANES - 1 :]
        d_total = d_state["numbers"][ROWS + head : ROWS + head + 1]
        d_maximum = jnp.zeros_like(d_total)
        d_weighted = d_state["weighted"][:, lanes]
        for i in reversed(range(len(slices))):
            rows, before = slices[i], befores[i]
            d_out = refs["d_out"][rows, lanes].astype(jnp.float32)
            d_score, d_value, d_maximum, d_total, d_weighted = _gradients(
                tokens[i], head, *parts[i], before, d_out, d_total, d_weighted
            )
            outs["score"][head : head + 1, rows] = d_score
            if head % heads.group:
                d_value += outs["value"][rows, of_value].astype(jnp.float32)
            outs["value"][rows, of_value] = d_value.astype(outs["value"].dtype)
        d_state["weighted"][:, lanes] = d_weighted
        d_before.append((d_maximum, d_total))
    for head, numbers in enumerate(d_before):
        for of, number in zip((0, ROWS), numbers, strict=True):
            d_state["numbers"][of + head : of + head + 1] = number

    @pl.when(heads.tiling.last)
    def _() -> None:
        _copy(d_state, outs["initial"])


def _gradients(
    tokens: _Tokens,
    head: int,
    weights: Float[Array, "C C"],
    value: Float[Array, "C V"],
    weighted: Float[Array, "1 V"],
    out: Float[Array, "C V"],
    numbers: Float[Array, "16 C"],
    d_out: Float[Array, "C V"],
    after_total: Float[Array, "1 C"],
    after_weighted: Float[Array, "1 V"],
) -> tuple[Array, ...]:
    """Returns the gradients of scores [1, C], values [C, V] and of the state before.

    Args:
      tokens: the tokens.
      head: the head.
      weights: of the tokens, among themselves.
      value: the values.
      weighted: of the state before.
      out: the output.
      numbers: maximum and total before.
      d_out: gradient of the output.
      after_total: gradient of the total after; that of the maximum after is nothing.
      after_weighted: gradient of the weighted sum after.
    """
    d_weighted = d_out * tokens.inverse(head)
    d_total = -_row_sums(d_weighted * out, value.dtype)
    last = iota((LANES, 1), 0) == LANES - 1
    d_weighted += jnp.where(last, after_weighted, 0)
    d_total += jnp.where(last, after_total, 0)
    d_score = jnp.sum(weights * (dot(d_weighted, value, 1, 1) + d_total), axis=0, keepdims=True)
    d_value = dot(weights, d_weighted.astype(value.dtype), 0, 0)
    kept = tokens.kept(head)
    before_weighted = jnp.sum(kept * d_weighted, axis=0, keepdims=True)
    before_total = jnp.sum(kept * d_total, axis=0, keepdims=True)
    before = jnp.sum(before_weighted * weighted, axis=1, keepdims=True)
    before = before + before_total * numbers[ROWS + head : ROWS + head + 1]
    return d_score, d_value, before, before_total, before_weighted


def _row_sums(x: Float[Array, "C V"], dtype: Any) -> Float[Array, "C C"]:
    """Returns the sums of rows in all columns, by matrix units; to 16 bits for 16-bit inputs."""
    ones = jnp.ones((x.shape[1], LANES), dtype)
    if dtype == jnp.float32:
        return dot(x, ones, 1, 0)
    high = x.astype(dtype)
    return dot(high, ones, 1, 0) + dot((x - high.astype(jnp.float32)).astype(dtype), ones, 1, 0)
