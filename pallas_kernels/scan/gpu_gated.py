"""The gated scan as Pallas kernels for Hopper GPUs: see `gpu_rows`."""

import functools
import math
from operator import add
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.chunks import joined
from pallas_kernels.scan import gpu_rows
from pallas_kernels.scan.gpu_rows import Scan, State, channels, state_of
from pallas_kernels.scan.gpu_tiles import BEGINS, Columns, Tiling, rows_of, where
from pallas_kernels.scan.inputs import Gated, Inputs, Options, Parameters, ScanState

FEWEST_BLOCKS, FEWEST_CHUNKS = 66, 8
"""With fewer blocks than that, half of the multiprocessors of a Hopper GPU, chunks are computed
side by side, if there are at least so many of them."""


def cut(options: Options, x: Inputs, *, whole: bool = False) -> Tiling:
    """Returns how a call is cut; its last chunk is filled up if it is to be `whole`."""
    return gpu_rows.cut(options, x.out.shape, whole=whole)


def in_chunks(tiling: Tiling) -> bool:
    """Returns whether chunks are computed side by side, and their ends before that."""
    return math.prod(tiling.grid.values()) < FEWEST_BLOCKS and tiling.chunks >= FEWEST_CHUNKS


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Any, ...]:
    """Returns the output, the last state and, if asked for, the states before all chunks."""
    scan, split = _scan(x), in_chunks(cut(options, x))
    tiling, initial = cut(options, x, whole=split), channels(x.state.hidden)[:, None]
    tile = _tile(tiling, x)
    if split:
        sums, chunks, tile = _ends(x), *tiling.by_chunk(tile)
        ends = gpu_rows.forward(sums, chunks, tile, _nothing(chunks), None, keep=False)["last"]
        after = _joined(tiling, ends, initial)
        before = jnp.concatenate([initial[:, None], after[:, :-1]], axis=1)
        starts = before.reshape(chunks.batch, 1, chunks.channels)
        results = gpu_rows.forward(scan, chunks, tile, starts, x.out.dtype, keep=False)
        out = results["out"].reshape(tiling.batch, tiling.tokens, tiling.channels)
        results = {"out": out, "last": after[:, -1]} | ({"kept": before} if keep else {})
    else:
        results = gpu_rows.forward(scan, tiling, tile, initial, x.out.dtype, keep=keep)
    tokens, width = x.out.shape[1:]
    states = (ScanState(results[n][..., 0, :width]) for n in ("last", "kept") if n in results)
    return results["out"][:, :tokens, :width], *states


def backward(
    options: Options, x: Inputs, kept: ScanState, d_out: Array, d_state: ScanState
) -> tuple[Any, ...]:
    """Returns the gradients of tokens, parameters and initial state."""
    tiling, scan = cut(options, x, whole=True), _scan(x)
    kept, d_last = channels(kept.hidden)[:, :, None], channels(d_state.hidden)[:, None]
    dtypes = {name: array.dtype for name, array in x.tokens._asdict().items()}
    tile, d_out = _tile(tiling, x), tiling.by_token(channels(d_out))
    if in_chunks(tiling):
        before = gpu_rows.befores(scan, tiling, tile, kept)
        chunks, tile = tiling.by_chunk(tile | {"d_out": d_out, "before": before})
        parts = {name: array for name, array in tile.items() if name not in ("x", "before")}
        ends = gpu_rows.run_backward(_ends(x), chunks, parts, _nothing(chunks), {})["initial"]
        d_before = _joined(tiling, ends, d_last, reverse=True)
        d_after = jnp.concatenate([d_before[:, 1:], d_last[:, None]], axis=1)
        d_after = d_after.reshape(chunks.batch, 1, chunks.channels)
        results = gpu_rows.run_backward(scan, chunks, tile, d_after, dtypes)
        shape = tiling.batch, tiling.tokens, tiling.channels
        results = {name: results[name].reshape(shape) for name in dtypes}
        results["initial"] = d_before[:, 0]
    else:
        results = gpu_rows.backward(scan, tiling, tile, d_out, kept, d_last, dtypes)
    tokens, width = x.out.shape[1:]
    gradients = Gated(*(results[name][:, :tokens, :width] for name in Gated._fields))
    return gradients, Parameters(), ScanState(results["initial"][:, 0, :width])


def _nothing(chunks: Tiling) -> Array:
    """Returns the sums of no tokens: see `_ends`."""
    return jnp.zeros((chunks.batch, 2, chunks.channels), jnp.float32)


def _joined(tiling: Tiling, ends: Array, first: Array, *, reverse: bool = False) -> Array:
    """Returns the states after all chunks, [B, chunks, 1, D], or gradients before them.

    Args:
      tiling: how the call is cut.
      ends: the sums of chunks.
      first: the state before the first chunk, or the gradient after the last.
      reverse: whether to go backwards.
    """
    ends = ends.reshape(tiling.batch, tiling.chunks, 2, 1, tiling.channels)
    return joined(jnp.exp(ends[:, :, 1]), ends[:, :, 0], first, reverse=reverse)


def _ends(x: Inputs) -> Scan:
    """Returns a scan to the end of a chunk: its state, from zero, and the sum of log decays."""

    def forward(parts: dict[str, Any], columns: Columns, state: State) -> tuple[None, State]:
        logs, x = _logs(parts, columns), rows_of(parts["x"], columns.inside)
        return None, [_states(_exp(logs), x, state[0])[-1], functools.reduce(add, logs, state[1])]

    def backward(parts: dict[str, Any], columns: Columns, d_state: State) -> tuple[dict, State]:
        logs, carry = _logs(parts, columns), d_state[0]
        decays, d_out = _exp(logs), rows_of(parts["d_out"], columns.inside)
        for t in reversed(range(len(logs))):
            carry = decays[t] * (d_out[t] + carry)
        return {}, [carry, functools.reduce(add, logs, d_state[1])]

    return _scan(x)._replace(name="gated_scan_ends", forward=forward, backward=backward)


def _tile(tiling: Tiling, x: Inputs) -> dict[str, Array]:
    """Returns the arrays of tokens; a decay of 1 is that of tokens that are filled up."""
    arrays = {name: tiling.by_token(channels(a)) for name, a in x.tokens._asdict().items()}
    return arrays if x.begins is None else arrays | tiling.flags(x.begins, x.out.shape[1])


def _scan(x: Inputs) -> Scan:
    # A memory of many tokens is a product of as many decays.
    return Scan("gated_scan", x.tokens.log_decay.dtype == jnp.float32, _forward, _backward)


def _forward(parts: dict[str, Any], columns: Columns, state: State) -> tuple[list[Array], State]:
    states = _states(_exp(_logs(parts, columns)), rows_of(parts["x"], columns.inside), state[0])
    return states, states[-1:]


def _logs(parts: dict[str, Any], columns: Columns) -> list[Array]:
    """Returns the logarithms of what is left of the state before each token of a tile."""
    logs = rows_of(parts["log_decay"], columns.inside)
    if "flags" in parts:
        logs = [where(parts["flags"][t] == BEGINS, -jnp.inf, row) for t, row in enumerate(logs)]
    return logs


def _exp(rows: list[Array]) -> list[Array]:
    return [jnp.exp(row) for row in rows]


def _states(decays: list[Array], x: list[Array], state: Array) -> list[Array]:
    """Returns the states after some tokens."""
    states = []
    for decay, added in zip(decays, x, strict=True):
        state = decay * state + added
        states.append(state)
    return states


def _backward(
    parts: dict[str, Any], columns: Columns, d_state: State
) -> tuple[dict[str, list[Array]], State]:
    decays = _exp(_logs(parts, columns))
    x, d_out = (rows_of(parts[name], columns.inside) for name in ("x", "d_out"))
    [before] = state_of(parts["before"], columns.inside)
    befores = [before, *_states(decays[:-1], x[:-1], before)]
    [carry], d_x, d_log_decay = d_state, [], []
    for t in reversed(range(len(x))):
        d_hidden = d_out[t] + carry
        carry = decays[t] * d_hidden
        d_x.insert(0, d_hidden)
        d_log_decay.insert(0, carry * befores[t])
    return {"x": d_x, "log_decay": d_log_decay}, [carry]
