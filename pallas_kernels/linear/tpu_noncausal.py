"""Linear attention to all tokens as Pallas kernels for TPU.

One kernel adds up what the keys write, another reads it for every query, and each has one for its
gradients. Features are made on the chip.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.linear import tpu_tiles
from pallas_kernels.linear.inputs import Inputs, Options
from pallas_kernels.linear.tpu_blocks import (
    chunks_of,
    copy_states,
    cut_states,
    filled_states,
    fixed_values,
    gradient_block,
    gradient_of,
    heads_of,
    loaded_states,
    state_shapes,
    store,
    store_states,
    taylor_operand,
)
from pallas_kernels.linear.tpu_chunk import Call, Chunk, column_of, mapped_features, normalised
from pallas_kernels.linear.tpu_gates import Memories
from pallas_kernels.linear.tpu_tiles import Tiling, filled
from pallas_kernels.tpu import compiler_params, result
from pallas_kernels.tpu_matrix import dot

QUERIES, KEYS = ("query",), ("key", "value")


def forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Array, ...]:
    """Returns the output in the dtype of the query and the state; to keep, the state again."""
    call, tiling, operands, specs = _operands(options, x, KEYS)
    shapes = state_shapes(options, x)
    like = functools.partial(result, like=operands["key"])
    operands["state"] = filled_states([*x.initial_state(options).values()], shapes=shapes)
    states = specs["state"] = [tiling.by_memory(shape) for shape in shapes]
    types = [like((tiling.batch, x.heads, *shape), jnp.float32) for shape in shapes]
    state = pl.pallas_call(
        functools.partial(_sum_kernel, call, tiling),
        name="linear_sum_forward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=[states],
        out_shape=[types],
        compiler_params=compiler_params(),
    )(operands)[0]

    call, tiling, operands, specs = _operands(options, x, QUERIES)
    operands["state"], specs["state"] = state, [tiling.by_memory(shape) for shape in shapes]
    width = filled(x.value.shape[3])
    out = pl.pallas_call(
        functools.partial(_read_kernel, call, tiling),
        name="linear_read_forward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=tiling.by_token(x.heads, width),
        out_shape=like((*operands["query"].shape[:2], x.heads * width), x.precision),
        compiler_params=compiler_params(),
    )(operands)
    out = out.reshape(*out.shape[:2], x.heads, width)[..., : x.value.shape[3]]
    state = cut_states(options, x, state, 2)
    kept = [part[:, None] for part in state] if keep else []
    return out[:, : x.query.shape[1]].astype(x.query.dtype), *state, *kept


def _operands(
    options: Options, x: Inputs, names: Sequence[str]
) -> tuple[Call, Tiling, dict[str, Any], dict[str, Any]]:
    """Returns how the tokens of queries or of keys are cut, and the arrays with their blocks."""
    count = getattr(x, names[0]).shape[1]
    chunk, step, most = tpu_tiles.sizes(options, x, "scalar")
    rows = min(max(most, chunk), pl.cdiv(count, chunk) * chunk)
    tiling = Tiling(
        batch=x.query.shape[0],
        memories=x.heads,
        step=step,
        tiles=pl.cdiv(count, rows),
        rows=rows,
        chunk=chunk,
        kept=rows,
    )
    call = Call.of(options, x, ragged=count % rows != 0)
    operands, specs = {}, {}
    for name in names:
        operands[name] = tiling.laid_out(getattr(x, name).astype(x.precision))
        specs[name] = tiling.by_token(*call.shape(name, x.heads))
    if call.needs_real:
        operands["real"] = tiling.row_of(jnp.ones_like(x.query, shape=(tiling.batch, count)))
        specs["real"] = tiling.numbers(heads=1)
    if call.feature_map == "taylor":
        operands["taylor"], specs["taylor"] = taylor_operand(call)
    return call, tiling, operands, specs


def _sum_kernel(call: Call, tiling: Tiling, ins: Any, states: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        copy_states(ins["state"], states)

    chunks = chunks_of(call, tiling, ins)
    sums = _sums(call, tiling, fixed_values(ins), chunks)
    store_states(states, jax.tree.map(jnp.add, loaded_states(tiling, states), sums))


def _read_kernel(call: Call, tiling: Tiling, ins: Any, out: Any) -> None:
    states = loaded_states(tiling, ins["state"])
    chunks = chunks_of(call, tiling, ins)
    store(tiling, out, _read(call, tiling, fixed_values(ins), states, chunks))


def _sums(
    call: Call, tiling: Tiling, fixed: dict[str, Any], chunks: Sequence[Chunk]
) -> list[Memories]:
    """Returns, for each memory, the sum of products of keys and values, and if needed of keys."""
    sums = None
    for chunk in chunks:
        real = column_of(chunk, "real")
        keys = [mapped_features(call, fixed.get("taylor"), x, real).mapped for x in chunk["key"]]
        of_chunk = []
        for memory in range(tiling.step):
            key, value = (
                array[tiling.head(count, memory)]
                for array, count in zip((keys, chunk["value"]), call.heads[1:], strict=True)
            )
            parts = (dot(key, value, 0, 0),)
            if call.epsilon is not None:
                parts += (jnp.sum(key.astype(jnp.float32), axis=0, keepdims=True),)
            of_chunk.append(parts)
        sums = of_chunk if sums is None else jax.tree.map(jnp.add, sums, of_chunk)
    return sums


def _read(
    call: Call,
    tiling: Tiling,
    fixed: dict[str, Any],
    states: Sequence[Memories],
    chunks: Sequence[Chunk],
) -> list[list[Float[Array, "C V"]]]:
    """Returns the outputs of chunks, for each memory."""
    results = []
    for chunk in chunks:
        real = column_of(chunk, "real")
        taylor = fixed.get("taylor")
        queries = [mapped_features(call, taylor, x, None).mapped for x in chunk["query"]]
        outs = []
        for memory, state in enumerate(states):
            query = queries[tiling.head(call.heads[0], memory)]
            out = dot(query, state[0], 1, 0)
            if call.epsilon is not None:
                weights = jnp.sum(query * state[1], axis=1, keepdims=True)
                out = normalised(call, out, weights, real)
            outs.append(out if call.scale == 1 else call.scale * out)
        results.append(outs)
    return results


def backward(
    options: Options, names: Sequence[str], x: Inputs, *rest: Array | None
) -> tuple[Array, ...]:
    """Returns the gradients of the inputs with these names, see `xla.backward`."""
    shapes = state_shapes(options, x)
    states = len(shapes)
    kept, d_out, d_state = rest[:states], rest[states], rest[states + 1 :]
    filled_up = functools.partial(filled_states, shapes=shapes)
    call, tiling, operands, specs = _operands(options, x, QUERIES)
    blocks = [tiling.by_memory(shape) for shape in shapes]
    operands |= {
        "state": filled_up([part[:, 0] for part in kept]),
        "d_state": filled_up(d_state),
        "d_out": tiling.laid_out(d_out.astype(x.precision)),
    }
    d_out_block = tiling.by_token(x.heads, filled(x.value.shape[3]))
    specs |= {"state": blocks, "d_state": blocks, "d_out": d_out_block}
    like = functools.partial(result, like=operands["query"])
    types = [like((tiling.batch, x.heads, *shape), jnp.float32) for shape in shapes]
    out, out_specs = {"state": types}, {"state": blocks}
    if "query" in names:
        out["query"], out_specs["query"] = gradient_block(
            tiling, operands["query"], x.query.shape[2]
        )
    results = pl.pallas_call(
        functools.partial(_read_backward_kernel, call, tiling),
        name="linear_read_backward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=out,
        scratch_shapes=[[pltpu.VMEM((tiling.step, *shape), jnp.float32) for shape in shapes]],
        compiler_params=compiler_params(),
    )(operands)

    d_state = results.pop("state")
    if "key" in names or "value" in names:
        call, tiling, operands, specs = _operands(options, x, KEYS)
        operands["d_state"] = d_state
        specs["d_state"] = [tiling.by_memory(shape) for shape in shapes]
        wanted = [name for name in KEYS if name in names]
        found = [gradient_block(tiling, operands[n], getattr(x, n).shape[2]) for n in wanted]
        results |= pl.pallas_call(
            functools.partial(_sum_backward_kernel, call, tiling),
            name="linear_sum_backward",
            grid=tiling.grid,
            in_specs=[specs],
            out_specs=[{name: spec for name, (_, spec) in zip(wanted, found, strict=True)}],
            out_shape=[{name: kind for name, (kind, _) in zip(wanted, found, strict=True)}],
            compiler_params=compiler_params(),
        )(operands)[0]
    gradients = {name: gradient_of(array, getattr(x, name)) for name, array in results.items()}
    of_state = cut_states(options, x, d_state, 2)
    gradients |= zip(x.state_shapes(options), of_state, strict=True)
    return tuple(gradients[name].astype(getattr(x, name).dtype) for name in names)


def _read_backward_kernel(call: Call, tiling: Tiling, ins: Any, outs: Any, d_states: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        copy_states(ins["d_state"], d_states)

    read = functools.partial(_read, call, tiling, fixed_values(ins))
    states, chunks = loaded_states(tiling, ins["state"]), chunks_of(call, tiling, ins)
    _, transpose = jax.vjp(read, states, chunks)
    d_more, d_chunks = transpose(heads_of(tiling, ins["d_out"], call.width, jnp.float32))
    if "query" in outs:
        store(tiling, outs["query"], [chunk["query"] for chunk in d_chunks])
    store_states(d_states, jax.tree.map(jnp.add, loaded_states(tiling, d_states), d_more))

    @pl.when(pl.program_id(2) == tiling.tiles - 1)
    def _() -> None:
        copy_states(d_states, outs["state"])


def _sum_backward_kernel(call: Call, tiling: Tiling, ins: Any, outs: Any) -> None:
    sums = functools.partial(_sums, call, tiling, fixed_values(ins))
    _, transpose = jax.vjp(sums, chunks_of(call, tiling, ins))
    (d_chunks,) = transpose(loaded_states(tiling, ins["d_state"]))
    for name, ref in outs.items():
        store(tiling, ref, [chunk[name] for chunk in d_chunks])
