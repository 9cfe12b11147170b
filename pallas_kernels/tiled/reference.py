"""The definition of tiled attention: the whole matrix of scores, in float32 or better.

It is differentiated by JAX, to any order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.masks import Tile
from pallas_kernels.tiled.inputs import LEAST_EXCESS, WEIGHTS, Inputs, Options, without_hidden


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
    scores += options.logit_bias
    if x.offset is not None:
        positions = jnp.arange(queries)[:, None] + jnp.reshape(x.offset, (-1, 1, 1, 1))
        distance = jnp.arange(keys) - positions
    if x.slopes is not None:
        scores -= x.slopes[:, :, None, None] * jnp.abs(distance).astype(dtype)
    if x.table is not None:
        reach = x.table.shape[-1] // 2
        entries = jnp.clip(distance, -reach, reach) + reach
        scores += jnp.take_along_axis(x.table[:, :, None], entries, axis=-1)
    if x.mask is not None:
        allowed = x.mask.prepared(queries, keys).tile(Tile(0, queries, 0, keys))
        if allowed.shape[1] not in (1, heads):
            allowed = jnp.repeat(allowed, heads // allowed.shape[1], axis=1)
        scores = jnp.where(allowed, scores, -jnp.inf)
    if options.group_size is not None:
        scores, shares = _by_landmarks(scores, options.group_size)

    def weigh(log_sum: Array) -> Array:
        """Returns weights divided by a row sum: of a softmax, so that neither overflows."""
        if options.weights == "softmax":
            weights = jnp.exp(scores - log_sum)
            return weights if options.group_size is None else weights * shares
        return WEIGHTS[options.weights](scores) * jnp.exp(-log_sum)

    if options.reweight is not None or not options.normalise:
        given = jnp.zeros((), dtype) if x.statistic is None else x.statistic.astype(dtype)
        given = jnp.broadcast_to(given, scores.shape[:-1])[..., None]
        weights = weigh(jnp.where(jnp.isneginf(given), jnp.inf, given))
    if not options.normalise:
        out = jnp.einsum("bnts,bsnv->btnv", weights, value)
        return out.astype(x.query.dtype), jnp.swapaxes(given[..., 0], 1, 2)

    # Weights are made as multiples of exp(maximum), so that neither they nor the sink overflow.
    if options.reweight is not None:
        power, offset = options.reweight
        excess = jax.nn.relu(weights - offset)
        largest = jax.lax.stop_gradient(jnp.max(excess, axis=-1, keepdims=True))
        largest = jnp.where(largest < LEAST_EXCESS, jnp.inf, largest)
        maximum = power * jnp.log(largest)
        weights = (excess / largest) ** power
    else:
        softmax = options.weights == "softmax"
        maximum = jnp.max(scores, axis=-1) if softmax else jnp.zeros(scores.shape[:-1], dtype)
        if x.sink is not None:
            maximum = jnp.maximum(maximum, x.sink)
        maximum = jax.lax.stop_gradient(jnp.where(jnp.isneginf(maximum), 0, maximum))[..., None]
        weights = weigh(maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if x.sink is not None:
        total += jnp.exp(x.sink[..., None] - maximum)
    empty = total < jnp.finfo(dtype).tiny
    total = jnp.where(empty, 1, total)
    out = jnp.einsum("bnts,bsnv->btnv", jnp.where(empty, 0, weights / total), value)
    lse = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))
    return out.astype(x.query.dtype), jnp.swapaxes(lse[..., 0], 1, 2)


def _by_landmarks(
    scores: Float[Array, "B N T S"], size: int
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T S"]]:
    """Returns for the keys of groups the scores of their landmarks, and their shares in groups."""
    groups = scores.reshape(*scores.shape[:3], -1, size)
    landmark, last = groups[..., -1:], jnp.arange(size) == size - 1
    groups = jnp.where(last, -jnp.inf, groups)
    empty = jnp.isneginf(jnp.max(groups, axis=-1, keepdims=True))
    shares = jax.nn.softmax(jnp.where(empty, 0, groups), axis=-1)
    landmark = jnp.where(empty | last, -jnp.inf, landmark)
    return landmark.reshape(scores.shape), shares.reshape(scores.shape)
