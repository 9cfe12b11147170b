"""Bi-level routing attention (BiFormer): regions choose regions, tokens attend to their tokens."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from attention.grid import Grid, checked_shape, merged, sizes_by_axis, split
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.tiled import tiled_attention

REGIONS = 7
"""Regions on an axis, of the released models."""

TOP_K = 4
"""Regions that a region chooses, in the second stage of the released models."""

LEAST_BLOCK = 16
"""Tokens of a region from which on the kernels read regions where they are."""


def bi_level_routing_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    shape: tuple[int, ...] | None = None,
    regions: int | tuple[int, ...] = REGIONS,
    top_k: int = TOP_K,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention of the tokens of a region to the tokens of the regions that it chooses.

    The axes of an image are cut into S parts each, and so the tokens into R = S^2 regions. With
    q_r and k_r the means of queries and keys of region r,

        A_rs = sum_n q_r^n . k_s^n,   n over all heads
        I_r  = the top_k regions s with the largest A_rs
        o_t  = softmax over the tokens j of the regions I_r of (scale q_t . k_j) v_j,  t in region r

    `bi_level_routes` returns I. It is the same for all heads, a region need not choose itself, and
    no gradient goes through it. A key head counts in A once for each query head that it serves.
    top_k = R is full attention. The depthwise convolution of the values that the published layer
    adds belongs to a layer.

    O(T^2 top_k / R + R^2) time, O(T) memory; regions of fewer than 16 tokens are copied for each
    region that chooses them, others are read where they are. A, scores and sums are float32, or
    float64 for float64 queries. First derivatives exist in reverse mode; the implementation
    "reference" has all. With heads on several devices A is summed over them.

    In the released code scores are divided by the root of all channels: scale=(N * H) ** -0.5 for
    its weights. Where S does not divide a side, regions are ceil(L / S) long here and the last one
    shorter, so that there may be fewer than S; means are over its tokens and there are no others to
    attend to. One version there counts zeros that fill it up in both, the other attends to them and
    cuts regions of floor(L / S). There are no documents: images are not packed into rows.

    Source: Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention (2023).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      shape: lengths of one to three axes, such as (height, width), whose tokens in row-major order
        the T are; None for one axis.
      regions: S, an integer, or one for each axis; 7 by default as in the released models.
      top_k: number of regions that a region chooses, all where there are fewer; in the stages of
        the released models 1, 4, 16 and all.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 28 * 28, 4, 8))
      >>> out = bi_level_routing_attention(query, key, value, shape=(28, 28), top_k=4)
      >>> out.shape
      (2, 784, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    grid = _grid(shape, regions, top_k, query.shape[1])
    chosen = _chosen(query, key, grid, top_k)
    attend = _attend_to_blocks if math.prod(grid.tile) >= LEAST_BLOCK else _attend_to_copies
    arrays = (_by_region(grid.laid_out(x), grid) for x in (query, key, value))
    out = attend(
        *arrays,
        chosen,
        grid,
        scale=scale,
        implementation=implementation,
        function="bi_level_routing_attention",
    )
    return grid.restored(merged(out, 1, 2))


def bi_level_routes(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    *,
    shape: tuple[int, ...] | None = None,
    regions: int | tuple[int, ...] = REGIONS,
    top_k: int = TOP_K,
) -> Int[Array, "B R top_k"]:
    """Returns the regions that each region chooses in `bi_level_routing_attention`, ascending.

    Regions are numbered in row-major order. Of equal ones the first is chosen; all are where there
    are fewer than top_k.

    Args:
      query: as for `bi_level_routing_attention`, as all below.
      key: likewise.
      shape: likewise.
      regions: likewise.
      top_k: likewise.

    Raises:
      TypeError, ValueError: as for `bi_level_routing_attention`.

    Example:
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 2, 28 * 28, 4, 8))
      >>> bi_level_routes(query, key, shape=(28, 28), top_k=4).shape
      (2, 49, 4)
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    check_arrays(query, key, key, same_tokens=True)
    return _chosen(query, key, _grid(shape, regions, top_k, query.shape[1]), top_k)


def _grid(
    shape: tuple[int, ...] | None, regions: int | tuple[int, ...], top_k: int, tokens: int
) -> Grid:
    """Returns the grid of which the tiles are the regions."""
    shape = checked_shape(shape, tokens)
    check_positive(top_k=top_k)
    counts = sizes_by_axis("regions", regions, shape)
    sides = tuple(-(-length // count) for length, count in zip(shape, counts, strict=True))
    return Grid(shape, sides, (1,) * len(shape))


def _by_region(x: Array, grid: Grid) -> Array:
    """Returns tokens that are laid out [B, R w, ...] as [B, R, w, ...]."""
    return split(x, 1, (math.prod(grid.tiles), math.prod(grid.tile)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _chosen(query: Array, key: Array, grid: Grid, top_k: int) -> Int[Array, "B R top_k"]:
    query, key = jax.lax.stop_gradient((query, key))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    count = _by_region(grid.laid_out(np.ones((1, query.shape[1]), np.int32)), grid).sum(axis=2)
    query, key = (
        jnp.sum(_by_region(grid.laid_out(x), grid), axis=2, dtype=wide) / count[..., None, None]
        for x in (query, key)
    )
    batch, number, heads, _ = key.shape
    query = query.reshape(batch, number, heads, -1, query.shape[3]).sum(axis=3)
    highest = jax.lax.Precision.HIGHEST
    affinity = jnp.einsum("brkh,bskh->bkrs", query, key, precision=highest).sum(axis=1)
    # A sort stays on its device where the batch is sharded; XLA gathers for `top_k`.
    return jnp.sort(jnp.argsort(-affinity, axis=2)[..., :top_k], axis=2).astype(jnp.int32)


def _attend_to_blocks(
    query: Float[Array, "B R w N H"],
    key: Float[Array, "B R w K H"],
    value: Float[Array, "B R w K V"],
    chosen: Int[Array, "B R top_k"],
    grid: Grid,
    **options: str | float | None,
) -> Float[Array, "B R w N V"]:
    """Attends by block lists, of which each region, filled up, is a block."""
    batch, number, width = query.shape[:3]
    # The kernels' tiles divide a block: wide ones, where that does not add much.
    multiple = 128 if width > 256 else 64 if width > 64 else LEAST_BLOCK
    block = -(-width // multiple) * multiple

    def filled(x: Array | np.ndarray) -> Array | np.ndarray:
        if block > width:
            pads = [(0, block - width) if i == 2 else (0, 0) for i in range(x.ndim)]
            x = np.pad(x, pads) if isinstance(x, np.ndarray) else jnp.pad(x, pads)
        return merged(x, 1, 2)

    counts = jnp.full((batch, 1, number), chosen.shape[2], jnp.int32)
    mask = masks.blocks(chosen[:, None], counts, block, block)
    present = filled(_by_region(grid.laid_out(np.ones((1, math.prod(grid.shape)), bool)), grid))
    if not present.all():
        mask &= masks.segments(np.ones(present.shape, np.int32), present.astype(np.int32))
    out = tiled_attention(*map(filled, (query, key, value)), mask=mask, **options)
    return split(out, 1, (number, block))[:, :, :width]


def _attend_to_copies(
    query: Float[Array, "B R w N H"],
    key: Float[Array, "B R w K H"],
    value: Float[Array, "B R w K V"],
    chosen: Int[Array, "B R top_k"],
    grid: Grid,
    **options: str | float | None,
) -> Float[Array, "B R w N V"]:
    """Attends in a batch of all regions, each with copies of the regions that it chooses."""
    width = query.shape[2]

    def by_batch(x: Array) -> Array:
        return merged(merged(x, 2, 2), 0, 2)

    def copied(x: Array) -> Array:
        taken = jnp.take_along_axis(x, merged(chosen, 1, 2)[..., None, None, None], axis=1)
        return by_batch(split(taken, 1, chosen.shape[1:]))

    mask = None
    if any(length % side for length, side in zip(grid.shape, grid.tile, strict=True)):
        regions = jnp.unravel_index(chosen[..., None], grid.tiles)
        slots = np.unravel_index(np.arange(width, dtype=np.int32), grid.tile)
        axes = zip(regions, slots, grid.tile, grid.shape, strict=True)
        inside = (region * side + slot < length for region, slot, side, length in axes)
        present = by_batch(functools.reduce(operator.and_, inside))
        mask = masks.segments(np.ones((1, width), np.int32), present.astype(jnp.int32))
    query = merged(query, 0, 2)
    out = tiled_attention(query, copied(key), copied(value), mask=mask, **options)
    return split(out, 0, chosen.shape[:2])


RECORD = Mechanism(
    slug="bi_level_routing_attention",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    year=2023,
    family="sparse",
    patterns=frozenset({"self non-causal"}),
    time="O(T^2)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=bi_level_routing_attention,
    extras=(bi_level_routes,),
    small={"regions": 3, "top_k": 2},
)
