"""Linear attention as Pallas kernels for TPU: see docs/kernels.md.

What a chunk does is in `tpu_gates` and below. The backward takes the derivative of a tile by JAX
inside of the kernel, from the last tile to the first.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.linear import tpu_chunk, tpu_noncausal, tpu_tiles
from pallas_kernels.linear.inputs import LOWEST, Inputs, Options
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
from pallas_kernels.linear.tpu_gates import constant_gate, gate_of
from pallas_kernels.linear.tpu_tiles import Tiling, filled
from pallas_kernels.tpu import FEWEST_TOKENS, LANES, compiler_params, result


def supports(*, options: Options, inputs: Inputs) -> str | None:
    """Returns why the kernels do not serve a call, or None."""
    if not options.causal and inputs.runs is not None:
        return "it has no segments if causal is False"
    if inputs.query.dtype == jnp.float64:
        return "it does not compute in float64"
    if inputs.query.shape[1] < FEWEST_TOKENS:
        return f"it takes {FEWEST_TOKENS} tokens or more; got {inputs.query.shape[1]}"
    if options.kept % (2 * LANES):
        return f"chunk_size must divide {2 * LANES}; got {options.chunk_size}"
    return None


def forward(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns the output in the dtype of the query, and the state after the last token."""
    forward = _forward if options.causal else tpu_noncausal.forward
    return forward(options, Inputs(*inputs), keep=False)


def forward_keeping(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns, too, what the backward needs: the states before each span of `options.kept`."""
    forward = _forward if options.causal else tpu_noncausal.forward
    return forward(options, Inputs(*inputs), keep=True)


def _forward(options: Options, x: Inputs, *, keep: bool) -> tuple[Array, ...]:
    call, tiling = _cut_up(options, x, reverse=False)
    operands, specs = _operands(options, x, call, tiling)
    width = x.value.shape[3]
    shapes = state_shapes(options, x)
    like = functools.partial(result, like=operands["query"])
    tokens = tiling.tiles * tiling.rows
    out = {
        "out": like((tiling.batch, tokens, x.heads * filled(width)), x.precision),
        "state": [like((tiling.batch, x.heads, *shape), jnp.float32) for shape in shapes],
    }
    out_specs = {
        "out": tiling.by_token(x.heads, filled(width)),
        "state": [tiling.by_memory(shape) for shape in shapes],
    }
    if keep:
        count = tokens // tiling.kept
        kept = [like((tiling.batch, count, x.heads, *shape), x.precision) for shape in shapes]
        out["kept"], out_specs["kept"] = kept, [tiling.kept_states(shape) for shape in shapes]
    results = pl.pallas_call(
        functools.partial(_forward_kernel, call, tiling),
        name="linear_forward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=out,
        scratch_shapes=[
            [pltpu.VMEM((tiling.step, *shape), jnp.float32) for shape in shapes],
            _fixed_scratch(call, tiling),
        ],
        compiler_params=compiler_params(),
    )(operands)
    out = results["out"].reshape(tiling.batch, tokens, x.heads, -1)
    out = out[:, : x.query.shape[1], :, :width].astype(x.query.dtype)
    state = cut_states(options, x, results["state"], 2)
    kept = cut_states(options, x, results.get("kept", ()), 3)
    return out, *state, *kept


def _forward_kernel(
    call: tpu_chunk.Call, tiling: Tiling, ins: Any, outs: Any, states: Any, fixed: Any
) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        copy_states(ins["state"], states)
        _fix(call, tiling, ins, fixed)

    chunks = chunks_of(call, tiling, ins)
    before = loaded_states(tiling, states)
    results, befores, after = tpu_chunk.attend_to(call, tiling, _values(ins, fixed), before, chunks)
    store(tiling, outs["out"], results)
    for span, before in enumerate(befores[:: tiling.kept // tiling.chunk]):
        for i, ref in enumerate(outs.get("kept", ())):
            for memory, state in enumerate(before):
                ref[span, memory] = state[i].astype(ref.dtype)
    store_states(states, after)

    @pl.when(pl.program_id(2) == tiling.tiles - 1)
    def _() -> None:
        copy_states(states, outs["state"])


def backward(options: Options, names: Sequence[str], *arguments: Array | None) -> tuple[Array, ...]:
    """Returns the gradients of the inputs with these names, see `xla.backward`."""
    count = len(Inputs._fields)
    x, rest = Inputs(*arguments[:count]), arguments[count:]
    if not options.causal:
        return tpu_noncausal.backward(options, names, x, *rest)
    constant = x.log_decay is not None and x.log_decay.ndim == 2 and "log_decay" in names
    given = x
    if constant:
        # Whatever all tokens have in common is the sum over them.
        shape = (x.query.shape[0], x.query.shape[1], x.heads)
        x = x._replace(log_decay=jnp.broadcast_to(x.log_decay[:, None], shape))
    call, tiling = _cut_up(options, x, reverse=True)
    operands, specs = _operands(options, x, call, tiling)
    shapes = state_shapes(options, x)
    states = len(shapes)
    kept, d_out, d_state = rest[:states], rest[states], rest[states + 1 :]
    padded = functools.partial(filled_states, shapes=shapes)
    operands |= {
        "kept": padded(kept, tokens=tiling.tiles * tiling.rows // tiling.kept),
        "d_out": tiling.laid_out(d_out.astype(x.precision)),
        "d_state": padded(d_state),
    }
    specs |= {
        "kept": [tiling.kept_states(shape) for shape in shapes],
        "d_out": tiling.by_token(x.heads, filled(x.value.shape[3])),
        "d_state": [tiling.by_memory(shape) for shape in shapes],
    }
    out, out_specs = {}, {}
    like = functools.partial(result, like=operands["query"])
    for name in call.tokens:
        if name not in names:
            continue
        if operands[name].ndim == 3:
            heads = getattr(x, name).shape[2]
            out[name], out_specs[name] = gradient_block(tiling, operands[name], heads)
        else:
            out[name], out_specs[name] = (
                like(operands[name].shape, operands[name].dtype),
                specs[name],
            )
    out["state"] = [like((tiling.batch, x.heads, *shape), jnp.float32) for shape in shapes]
    out_specs["state"] = specs["d_state"]
    results = pl.pallas_call(
        functools.partial(_backward_kernel, call, tiling),
        name="linear_backward",
        grid=tiling.grid,
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=out,
        scratch_shapes=[
            [pltpu.VMEM((tiling.step, *shape), jnp.float32) for shape in shapes],
            _fixed_scratch(call, tiling),
        ],
        compiler_params=compiler_params(),
    )(operands)
    gradients = dict(
        zip(x.state_shapes(options), cut_states(options, x, results["state"], 2), strict=True)
    )
    for name in set(out) - {"state"}:
        gradients[name] = gradient_of(results[name], getattr(x, name))
    if constant:
        gradient = jnp.sum(gradients["log_decay"], axis=1)
        alone = given.log_decay.shape[0] == 1 < gradient.shape[0]
        gradients["log_decay"] = gradient.sum(0, keepdims=True) if alone else gradient
    return tuple(gradients[name].astype(getattr(given, name).dtype) for name in names)


def _backward_kernel(
    call: tpu_chunk.Call, tiling: Tiling, ins: Any, outs: Any, d_states: Any, fixed: Any
) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        copy_states(ins["d_state"], d_states)
        _fix(call, tiling, ins, fixed)

    def attend(before: Any, chunks: Any) -> Any:
        results, _, after = tpu_chunk.attend_to(call, tiling, _values(ins, fixed), before, chunks)
        return results, after

    before = [
        tuple(ref[0, memory].astype(jnp.float32) for ref in ins["kept"])
        for memory in range(tiling.step)
    ]
    _, transpose = jax.vjp(attend, before, chunks_of(call, tiling, ins))
    d_results = heads_of(tiling, ins["d_out"], call.width, jnp.float32)
    d_before, d_chunks = transpose((d_results, loaded_states(tiling, d_states)))
    for name in call.tokens:
        if name in outs:
            store(tiling, outs[name], [chunk[name] for chunk in d_chunks])
    store_states(d_states, d_before)

    @pl.when(pl.program_id(2) == tiling.tiles - 1)
    def _() -> None:
        copy_states(d_states, outs["state"])


def _cut_up(options: Options, x: Inputs, *, reverse: bool) -> tuple[tpu_chunk.Call, Tiling]:
    """Returns the static part of a call, and how it is cut into chunks and tiles."""
    others = x.beta is not None or x.log_momentum is not None
    others = others or (x.log_decay is not None and x.log_decay.ndim == 4)
    chunk, step, most = tpu_tiles.sizes(options, x, "others" if others else "scalar")
    spans = pl.cdiv(x.query.shape[1], options.kept)
    longest = max(most // options.kept, 1)
    rows = options.kept * max(n for n in range(1, longest + 1) if spans % n == 0)
    tiling = Tiling(
        batch=x.query.shape[0],
        memories=x.heads,
        step=step,
        tiles=pl.cdiv(x.query.shape[1], rows),
        rows=rows,
        chunk=chunk,
        kept=options.kept,
        reverse=reverse,
    )
    return tpu_chunk.Call.of(options, x, ragged=x.query.shape[1] % rows != 0), tiling


def _operands(
    options: Options, x: Inputs, call: tpu_chunk.Call, tiling: Tiling
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a kernel by name, and their blocks."""
    operands, specs = {}, {}
    begins = x.begins
    for name in call.tokens:
        array, shape = getattr(x, name), call.shape(name, x.heads)
        if shape is not None:
            dtype = x.precision if name in ("query", "key", "value") else array.dtype
            operands[name] = tiling.laid_out(array.astype(dtype))
            specs[name] = tiling.by_token(*shape)
            continue
        if name == "log_decay":
            if array is None or array.ndim == 2:
                zero = jnp.zeros((1, x.heads), jnp.float32)
                array = (zero if array is None else array)[:, None]
                array = jnp.broadcast_to(array, (*x.query.shape[:2], x.heads))
        if begins is not None and name != "beta":
            array = jnp.where(begins[..., None], LOWEST, array)
        operands[name] = tiling.rows_of(array)
        specs[name] = tiling.numbers()
    if begins is not None and (call.gate == "channel" or x.log_momentum is not None):
        operands["begins"] = tiling.row_of(begins)
        specs["begins"] = tiling.numbers(heads=1)
    if call.needs_real:
        operands["real"] = tiling.row_of(jnp.ones_like(x.query, shape=x.query.shape[:2]))
        specs["real"] = tiling.numbers(heads=1)
    if call.feature_map == "taylor":
        operands["taylor"], specs["taylor"] = taylor_operand(call)
    if call.gate == "constant":
        log_decay = jnp.zeros((1, x.heads)) if x.log_decay is None else x.log_decay
        operands["slopes"] = jnp.maximum(log_decay.astype(jnp.float32), LOWEST)
        specs["slopes"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    shapes = state_shapes(options, x)
    initial = x.initial_state(options).values()
    operands["state"] = filled_states(tuple(initial), shapes=shapes)
    specs["state"] = [tiling.by_memory(shape) for shape in shapes]
    return operands, specs


def _fixed_scratch(call: tpu_chunk.Call, tiling: Tiling) -> list[Any]:
    """Returns memory for the gates of constant decays."""
    if call.gate != "constant":
        return []
    shapes = ((tiling.chunk, tiling.chunk), *((tiling.chunk, LANES),) * 2)
    return [pltpu.VMEM((tiling.step, *shape), jnp.float32) for shape in shapes]


def _fix(call: tpu_chunk.Call, tiling: Tiling, ins: Any, fixed: Any) -> None:
    if not fixed:
        return
    slopes = ins["slopes"]
    row = pl.program_id(0) if slopes.shape[0] > 1 else 0
    for memory in range(tiling.step):
        slope = slopes[row, pl.program_id(1) * tiling.step + memory]
        for ref, value in zip(fixed, constant_gate(slope, tiling.chunk), strict=True):
            ref[memory] = value


def _values(ins: Any, fixed: Any) -> dict[str, Any]:
    """Returns what is the same for all chunks."""
    values = {}
    if fixed:
        memories = range(fixed[0].shape[0])
        values["gates"] = [gate_of(*(ref[memory] for ref in fixed)) for memory in memories]
    return values | fixed_values(ins)
