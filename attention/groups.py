"""Attention inside groups of tokens: gathered, attended to in one call, and put back.

Groups are an index [B|1, heads, G, M]: for every head the tokens that stand in the M places of each
of G groups. A place without a token holds the number of all tokens, which is none of them: what is
gathered there is 0, no query sees it as a key, and what comes out of it goes nowhere.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention


def cut(
    order: Int[Array, "*dims T"], size: int, count: int, nowhere: int
) -> Int[Array, "*dims G M"]:
    """Cuts tokens in an order into groups, the last of which may have places without one.

    Args:
      order: the tokens in their new order.
      size: number of places in a group, M.
      count: number of groups, G, with enough places.
      nowhere: what places without a token hold: the number of all tokens.
    """
    pad = [(0, 0)] * (order.ndim - 1) + [(0, count * size - order.shape[-1])]
    cut = jnp.pad(order, pad, constant_values=nowhere)
    return cut.reshape(*order.shape[:-1], count, size)


def gathered(
    x: Float[Array, "B T K D"], groups: Int[Array, "B|1 N|1 G M"]
) -> Float[Array, "B G M N|K D"]:
    """Returns the tokens of groups; K divides N, and each head serves N / K heads of the groups."""
    batch, _, heads, width = x.shape
    index_heads, count, size = groups.shape[1:]
    shared = max(index_heads // heads, 1)
    index = jnp.broadcast_to(groups, (batch, heads * shared, count, size))
    index = jnp.swapaxes(index.reshape(batch, heads, shared * count * size), 1, 2)[..., None]
    taken = jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)
    taken = taken.reshape(batch, shared, count, size, heads, width)
    return jnp.moveaxis(taken, 1, 4).reshape(batch, count, size, heads * shared, width)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    query_groups: Int[Array, "B|1 N|1 G M"],
    key_groups: Int[Array, "B|1 N|K|1 G L"] | None = None,
    *,
    is_causal: bool = False,
    attend_self: bool = True,
    full: bool = False,
    memory: tuple[Float[Array, "G m N|K H"], Float[Array, "G m N|K V"]] | None = None,
    bias: Float[ArrayLike, "G L"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    function: str,
) -> tuple[Float[Array, "B G M N V"], Float[Array, "B G M N"]]:
    """Attention of the queries of each group to the keys of the same group, in O(T + S) memory.

    Groups are rows of the batch of one `tiled_attention`. Tokens keep their positions: causal means
    that a key does not come from behind the query, wherever the two stand in their group.

    Args:
      query: float array.
      key: its heads divide those of `key_groups`, if these are not 1.
      value: likewise.
      query_groups: tokens of the groups' queries.
      key_groups: tokens of the groups' keys; None for those of the queries, which then must ascend
        in each group.
      is_causal: whether keys come from up to the query's own position only.
      attend_self: whether a query may see the key of its own token.
      full: whether every place of `key_groups` holds a token, which may spare a mask.
      memory: further keys and values of each group, which all of its queries see.
      bias: is added to the scores of the keys in each place; not together with memory.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: see `tiled_attention`.
      function: name in error messages.

    Returns:
      The output in the places of `query_groups`, and its log-sum-exp.
    """
    batch, keys = query.shape[0], key.shape[1]
    same = key_groups is None
    key_groups = query_groups if same else key_groups
    query, key, value = (
        _rows(gathered(x, groups))
        for x, groups in ((query, query_groups), (key, key_groups), (value, key_groups))
    )
    extra = 0
    if memory is not None:
        extra = memory[0].shape[1]
        key, value = (
            jnp.concatenate([_rows(jnp.broadcast_to(new, (batch, *new.shape))), x], axis=1)
            for new, x in zip(memory, (key, value), strict=True)
        )
    mask = None
    if same and is_causal:
        # Ranks tell what positions would, and a causal mask lets tiles be skipped.
        mask = masks.causal(extra if attend_self else extra - 1)
    elif is_causal or not attend_self or not full:
        position, of_key = (_positions(x, batch) for x in (query_groups, key_groups))
        last = position if is_causal else jnp.full_like(position, keys - 1)
        of_key = jnp.pad(of_key, ((0, 0), (0, 0), (extra, 0)), constant_values=-1)
        mask = masks.rule(_up_to if attend_self else _up_to_others, (last, position), of_key)
    if bias is not None:
        bias = jnp.tile(jnp.asarray(bias, jnp.promote_types(query.dtype, jnp.float32)), (batch, 1))[
            :, None, None
        ]
    out, lse = tiled_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        return_lse=True,
        implementation=implementation,
        function=function,
    )
    out, lse = (x.reshape(batch, -1, *x.shape[1:]) for x in (out, lse))
    return out, lse


def _rows(x: Array) -> Array:
    """Returns groups as rows of the batch."""
    return x.reshape(-1, *x.shape[2:])


def _positions(groups: Array, batch: int) -> Array:
    """Returns the tokens of groups, which are rows of the batch."""
    groups = jnp.moveaxis(groups, 2, 1)
    return _rows(jnp.broadcast_to(groups, (batch, *groups.shape[1:])))


def _up_to(query: tuple[Array, Array], key: Array) -> Bool[Array, "..."]:
    return key <= query[0]


def _up_to_others(query: tuple[Array, Array], key: Array) -> Bool[Array, "..."]:
    return (key <= query[0]) & (key != query[1])


def returned(
    x: Float[Array, "B G M N V"], place: Int[Array, "B|1 N|1 T"]
) -> Float[Array, "B T N V"]:
    """Returns to each token what stands in its place, counted through all groups."""
    batch, _, _, heads, width = x.shape
    place = jnp.broadcast_to(place, (batch, heads, place.shape[2]))
    x = x.reshape(batch, -1, heads, width)
    return jnp.take_along_axis(x, jnp.swapaxes(place, 1, 2)[..., None], axis=1)


def averaged(
    x: Float[Array, "B G M N V"], groups: Int[Array, "B|1 N|1 G M"], tokens: int
) -> Float[Array, "B T N V"]:
    """Returns for each token the mean of the results in its places; 0 for a token without any."""
    batch, _, _, heads, width = x.shape
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(batch, -1, heads, width)
    index = jnp.broadcast_to(groups, (batch, heads, *groups.shape[2:])).reshape(batch, heads, -1)

    def of_head(x: Array, index: Array) -> Array:
        sums = jnp.zeros((tokens, width), x.dtype).at[index].add(x, mode="drop")
        count = jnp.zeros((tokens, 1), x.dtype).at[index].add(1, mode="drop")
        return sums / jnp.maximum(count, 1)

    over_heads = jax.vmap(of_head, in_axes=(1, 0), out_axes=1)
    return jax.vmap(over_heads)(wide, index).astype(x.dtype)
