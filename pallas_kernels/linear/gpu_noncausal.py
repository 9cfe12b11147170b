"""Linear attention to all tokens on Hopper GPUs.

The memory is a sum that all spans of time are walked for at the same time, and so is its gradient;
what reads them is a product of matrices, which XLA has.
"""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_call import Call, product, transposed
from pallas_kernels.linear.gpu_walk import CHUNK, Walk, walk


def forward(call: Call, *, keep: bool) -> tuple[Array, Array, Array | None]:
    """Returns the outputs, the last state and, if asked for, that to keep."""
    memory = call.memory + _sum(call, call.key, call.value)
    kept = memory.astype(call.dtype)
    out = call.scale * _read(call.features("query"), kept)
    return out.astype(call.out_dtype), memory, kept[:, None] if keep else None


def backward(
    call: Call,
    names: Collection[str],
    kept: Float[Array, "B 1 M F V"],
    d_out: Float[Array, "B T M V"],
    d_memory: Float[Array, "B M F V"],
) -> dict[str, Array]:
    """Returns gradients by name, see `gpu_scalar.backward`."""
    d_memory = d_memory + _sum(call, call.query, d_out)
    narrow = d_memory.astype(call.dtype)
    gradients = {"memory": d_memory}
    if "query" in names:
        gradients["query"] = _read(d_out, transposed(kept[:, 0]))
    if "key" in names:
        gradients["key"] = _read(call.value, transposed(narrow))
    if "value" in names:
        gradients["value"] = _read(call.features("key"), narrow)
    return {name: gradients[name] for name in names}


def _sum(
    call: Call, writer: Float[Array, "B S K F"], value: Float[Array, "B S L V"]
) -> Float[Array, "B M F V"]:
    """Returns the sum of the products of what writes and of values."""
    batch, memories, *_ = call.memory.shape
    chunks = writer.shape[1] // CHUNK
    span = -(-chunks // max(gpu.processors() // (batch * memories), 1))
    shape = batch, -(-chunks // span), *call.memory.shape[1:]
    zeros = jnp.zeros_like(call.memory, shape=shape)
    given = Walk(
        *(writer, value, zeros),
        span=span,
        dtype=call.dtype,
        feature_map=call.feature_map,
        mapped=("writer",),
    )
    return jnp.sum(walk(given, "linear_sum").memory, axis=1)


def _read(
    reader: Float[Array, "B T N F"], memory: Float[Array, "B M F V"]
) -> Float[Array, "B T M V"]:
    """Returns what is read of memories, each of which has a reader or shares it."""
    batch, memories, rows, columns = memory.shape
    heads = reader.shape[2]
    memory = memory.reshape(batch, heads, memories // heads, rows, columns)
    out = product("btnf,bngfv->btngv", reader, memory)
    return out.reshape(batch, -1, memories, columns)
