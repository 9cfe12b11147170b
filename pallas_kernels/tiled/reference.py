"""The definition of tiled attention: the whole matrix of scores, in float32 or better.

It is differentiated by JAX, to any order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.masks import Tile
from pallas_kernels.tiled.inputs import Inputs, Options, without_hidden


def supports(**call: object) -> str | None:
    """Returns None: the definition serves every call."""
    del call


def forward(
    options: Options, *inputs: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the output and the log-sum-exp."""
    x = without_hidden(Inputs(*inputs))
    queries, heads = x.query.shape[1:3]
    keys, kv_heads = x.key.shape[1:3]
    dtype = jnp.promote_types(x.query.dtype, jnp.float32)
    key, value = (jnp.repeat(y.astype(dtype), heads // kv_heads, axis=2) for y in (x.key, x.value))

    scores = options.scale * jnp.einsum("btnh,bsnh->bnts", x.query.astype(dtype), key)
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * jnp.tanh(scores / options.logits_soft_cap)
    if x.bias is not None:
        scores += x.bias
    if x.slopes is not None:
        positions = jnp.arange(queries)[:, None] + jnp.reshape(x.offset, (-1, 1, 1, 1))
        distance = jnp.abs(positions - jnp.arange(keys)).astype(dtype)
        scores -= x.slopes[:, :, None, None] * distance
    if x.mask is not None:
        allowed = x.mask.prepared(queries, keys).tile(Tile(0, queries, 0, keys))
        if allowed.shape[1] not in (1, heads):
            allowed = jnp.repeat(allowed, heads // allowed.shape[1], axis=1)
        scores = jnp.where(allowed, scores, -jnp.inf)

    maximum = jnp.max(scores, axis=-1)
    if x.sink is not None:
        maximum = jnp.maximum(maximum, x.sink[:, :, None])
    maximum = jax.lax.stop_gradient(jnp.where(jnp.isneginf(maximum), 0, maximum))
    weights = jnp.exp(scores - maximum[..., None])
    total = jnp.sum(weights, axis=-1)
    if x.sink is not None:
        total += jnp.exp(x.sink[:, :, None] - maximum)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.einsum("bnts,bsnv->btnv", weights / total[..., None], value)
    lse = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))
    return out.astype(x.query.dtype), jnp.swapaxes(lse, 1, 2)
