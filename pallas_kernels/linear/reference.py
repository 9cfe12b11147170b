"""Linear attention one token after another: the definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.inputs import Inputs, Options, finite


def supports(**call: object) -> str | None:
    """Returns None: the definition serves every call."""
    del call


def forward(
    options: Options, *inputs: Array | None
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """Returns the output in the dtype of the query, and the state after the last token."""
    x = Inputs(*inputs)
    dtype = x.accumulator
    batch, tokens, heads, features = x.query.shape
    group, width = heads // x.key.shape[2], x.value.shape[3]

    memory = x.memory
    if memory is None:
        memory = jnp.zeros_like(x.query, shape=(batch, heads, features, width), dtype=dtype)
    decay = jnp.ones((1, 1), dtype) if x.log_decay is None else jnp.exp(finite(x.log_decay))
    # By row, so that its gradient is summed over the batch once and not for each token.
    decay = jnp.broadcast_to(decay, (batch, heads))
    runs = jnp.zeros((batch, tokens), jnp.int32) if x.runs is None else x.runs
    continues = jnp.diff(runs, axis=1, prepend=0) == 0

    def step(
        memory: Float[Array, "B N H V"], token: tuple[Array, ...]
    ) -> tuple[Float[Array, "B N H V"], Float[Array, "B N V"]]:
        query, key, value, continues = token
        key, value = (jnp.repeat(a, group, axis=1).astype(dtype) for a in (key, value))
        kept = jnp.where(continues[:, None], decay, 0)
        memory = kept[..., None, None] * memory + key[..., :, None] * value[..., None, :]
        out = jnp.einsum("bnh,bnhv->bnv", query.astype(dtype), memory, precision="highest")
        return memory, options.scale * out

    by_token = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x.query, x.key, x.value, continues))
    memory, out = jax.lax.scan(step, memory, by_token)
    return jnp.moveaxis(out, 0, 1).astype(x.query.dtype), memory
