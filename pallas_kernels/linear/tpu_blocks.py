"""What the TPU kernels of linear attention read and write: tokens of a tile, and states."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.linear import tpu_chunk
from pallas_kernels.linear.inputs import Inputs, Options
from pallas_kernels.linear.tpu_chunk import Call, Chunk
from pallas_kernels.linear.tpu_tiles import Tiling, filled
from pallas_kernels.tpu import result


def state_shapes(options: Options, x: Inputs) -> list[tuple[int, int]]:
    """Returns the shapes of the parts of a memory's state, as matrices of whole registers."""
    shapes = (shape[2:] for shape in x.state_shapes(options).values())
    return [
        (filled(shape[0]), filled(shape[1])) if len(shape) == 2 else (1, filled(shape[0]))
        for shape in shapes
    ]


def filled_states(
    states: Sequence[Array], *, shapes: Sequence[tuple[int, int]], tokens: int | None = None
) -> list[Array]:
    """Fills parts of states up to these shapes; if they are of spans, to a number of them."""
    results = []
    for state, shape in zip(states, shapes, strict=True):
        lead = 2 if tokens is None else 3
        state = state[..., None, :] if state.ndim == lead + 1 else state
        ends = ((0, size - had) for size, had in zip(shape, state.shape[lead:], strict=True))
        spans = () if tokens is None else ((0, tokens - state.shape[1]),)
        results.append(jnp.pad(state, ((0, 0), *spans, (0, 0), *ends)))
    return results


def cut_states(options: Options, x: Inputs, states: Sequence[Array], lead: int) -> list[Array]:
    """Is the inverse of `filled_states`."""
    if not states:
        return []
    results = []
    for state, shape in zip(states, x.state_shapes(options).values(), strict=True):
        if lead == 3:
            state = state[:, : x.kept_shapes(options)[0][1]]
        state = state[..., : shape[2], :] if len(shape) == 4 else state[..., 0, :]
        results.append(state[..., : shape[-1]])
    return results


def taylor_operand(call: Call) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Returns what Taylor features are made with, and its blocks."""
    chosen, rows = tpu_chunk.taylor_matrices(call)
    specs = [
        pl.BlockSpec(array.shape, lambda b, n, i, zeros=(0,) * array.ndim: zeros)
        for array in (chosen, rows)
    ]
    return [jnp.asarray(chosen, call.dtype), jnp.asarray(rows)], specs


def fixed_values(ins: Any) -> dict[str, Any]:
    """Returns that in a kernel, by name."""
    if "taylor" not in ins:
        return {}
    chosen, rows = ins["taylor"]
    return {"taylor": ((chosen[0], chosen[1]), rows[...])}


def gradient_block(
    tiling: Tiling, array: Array, heads: int
) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """Returns the type and the block of the gradient of tokens, [B, T, heads x features].

    Where several grid steps share a head, each has a gradient of its own.
    """
    parts = tiling.grid[1] * tiling.heads(heads) // heads
    shape = (*array.shape[:2], parts * array.shape[2])
    dtype = array.dtype if parts == 1 else jnp.float32
    spec = tiling.by_token(heads * parts, array.shape[2] // heads)
    return result(shape, dtype, array), spec


def gradient_of(result: Array, array: Array) -> Array:
    """Returns the gradient of an array of tokens in its shape, from what a kernel wrote."""
    batch, tokens, heads = array.shape[:3]
    if result.ndim == 4 and array.ndim != 4:
        return jnp.swapaxes(result.reshape(batch, heads, -1), 1, 2)[:, :tokens]
    width = filled(array.shape[3])
    result = result[:, :tokens].reshape(batch, tokens, heads, -1, width)[..., : array.shape[3]]
    return result[:, :, :, 0] if result.shape[3] == 1 else result.sum(3)


def slices(tiling: Tiling) -> list[Any]:
    """Returns the rows of the chunks of a tile."""
    return [pl.ds(start, tiling.chunk) for start in range(0, tiling.rows, tiling.chunk)]


def chunks_of(call: Call, tiling: Tiling, ins: Any) -> list[Chunk]:
    """Returns the tokens of a tile."""
    chunks = [{} for _ in slices(tiling)]
    for name in (*call.tokens, "begins", "real"):
        if name not in ins:
            continue
        shape = call.shape(name, tiling.memories)
        if shape is None:
            values = [ins[name][:, rows] for rows in slices(tiling)]
        else:
            values = heads_of(tiling, ins[name], shape[1])
        for chunk, value in zip(chunks, values, strict=True):
            chunk[name] = value
    return chunks


def heads_of(tiling: Tiling, ref: Any, width: int, dtype: Any = None) -> list[list[Array]]:
    """Returns the heads of the chunks of a tile."""
    starts = range(0, ref.shape[1], width)
    return [
        [ref[rows, start : start + width].astype(dtype or ref.dtype) for start in starts]
        for rows in slices(tiling)
    ]


def store(tiling: Tiling, ref: Any, chunks: Sequence[Any]) -> None:
    """Writes what there is of each chunk: of each head, or numbers of all."""
    for rows, values in zip(slices(tiling), chunks, strict=True):
        if not isinstance(values, list):
            ref[:, rows] = values.astype(ref.dtype)
            continue
        for i, value in enumerate(values):
            width = value.shape[1]
            ref[rows, i * width : (i + 1) * width] = value.astype(ref.dtype)


def copy_states(sources: Sequence[Any], targets: Sequence[Any]) -> None:
    """Copies the parts of states from memory to memory."""
    for source, target in zip(sources, targets, strict=True):
        target[...] = source[...]


def store_states(refs: Any, states: Sequence[tuple[Array, ...]]) -> None:
    """Writes the states of memories."""
    for memory, state in enumerate(states):
        for ref, value in zip(refs, state, strict=True):
            ref[memory] = value


def loaded_states(tiling: Tiling, refs: Any) -> list[tuple[Array, ...]]:
    """Returns the states of memories."""
    return [tuple(ref[memory] for ref in refs) for memory in range(tiling.step)]
