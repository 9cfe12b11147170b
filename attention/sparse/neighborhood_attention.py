"""Neighbourhood attention (NA): every token sees the tokens around it, on one to three axes."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from attention.catalogue import Mechanism
from attention.grid import Grid, checked_shape, sizes_by_axis
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.tiled import tiled_attention
from pallas_kernels.tiled.merge import merge_partials

TILE = 64
"""Tokens in a tile, over all axes; fewer where there are fewer, but whole registers of them."""

LEAST_TILE = 16
"""What tiles must be multiples of for the kernels to skip them."""


def neighborhood_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    shape: tuple[int, ...] | None = None,
    window: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    extra_key: Float[ArrayLike, "B E K H"] | None = None,
    extra_value: Float[ArrayLike, "B E K V"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention of every token to its neighbourhood in a series, an image or a video.

    On an axis of L tokens with window W, dilation d and stride s, token i is number i' = floor(i/d)
    of the L' tokens with its remainder by d, and of these it sees

        g = min(s floor(i'/s) + floor(s/2), L' - 1),  j' from clip(g - floor(W/2), 0, L' - W), W
                                                      of them
        causal:  g = min(s floor(i'/s) + s - 1, L' - 1),  j' from max(g - W + 1, 0) to i'

    which `neighborhood_bounds` returns. Windows are moved at borders, not cut: every token has W
    keys, unless causal. On several axes it sees the product of what it sees on each. W = L is full
    attention, s = W is attention within blocks.

    Causal, on one axis and without dilation or stride it is the window (W - 1, 0) of
    `softmax_attention`, which has a step form.

    O(T W) time, W being the product of all windows, and O(T) memory: tokens are laid out in tiles
    of 64, 8 x 8 of an image, with each group of the dilation in a row of the batch, and tiles that
    no query of a tile sees are skipped. Scores and sums are float32, or float64 for float64
    queries. First derivatives exist in reverse mode; the implementation "reference" has all.

    The relative position bias of the first paper is left out, as in the fused kernels of the later
    ones. There are no documents: images are not packed into rows.

    Sources: Hassani et al., Neighborhood Attention Transformer (2022); Hassani and Shi, Dilated
    Neighborhood Attention Transformer (2022); Hassani et al., Faster Neighborhood Attention (2024);
    the stride by Hassani et al., Generalized Neighborhood Attention (2025).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      shape: lengths of one to three axes, such as (height, width), whose tokens in row-major order
        the T are; None for one axis.
      window: W, an integer, or one for each axis as all below. The product of window and dilation
        is at most the length of an axis that is not causal.
      dilation: d.
      stride: s, at most W. Tokens of the same floor(i'/s) share their neighbourhood.
      is_causal: whether a token sees, on an axis, no later ones.
      scale: factor of the scores; None for 1 / sqrt(H).
      extra_key: keys that every token sees besides, such as those of a class token or a text.
      extra_value: their values.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16 * 24, 4, 8))
      >>> out = neighborhood_attention(query, key, value, shape=(16, 24), window=(7, 9))
      >>> out.shape
      (2, 384, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    shape = checked_shape(shape, query.shape[1])
    axes = _axes(shape, window, dilation, stride, is_causal)
    extra = _checked_extra(key, value, extra_key, extra_value)
    attend = functools.partial(
        tiled_attention,
        scale=scale,
        return_lse=True,
        implementation=implementation,
        function="neighborhood_attention",
    )

    steps = tuple(axis[1] for axis in axes)
    grid = Grid(shape, _tile(shape, steps), steps)
    mask = _neighbourhoods(grid, axes, query.shape[0])
    partial = attend(*map(grid.laid_out, (query, key, value)), mask=mask)
    out, lse = map(grid.restored, partial)
    if extra is None:
        return out
    more, more_lse = attend(query, *extra)
    return merge_partials([out, more], [lse, more_lse])[0]


def neighborhood_bounds(
    length: int, window: int, dilation: int = 1, stride: int = 1, is_causal: bool = False
) -> tuple[Int[np.ndarray, "length"], Int[np.ndarray, "length"]]:
    """Returns which tokens of an axis each token sees in `neighborhood_attention`.

    Token i sees the tokens i mod d + d j' with start_i <= j' < stop_i, d being the dilation.

    Args:
      length: number of tokens on the axis.
      window: as for `neighborhood_attention`, as all below.
      dilation: likewise.
      stride: likewise.
      is_causal: likewise.

    Returns:
      start and stop, int32.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> neighborhood_bounds(8, 3)
      (array([0, 0, 1, 2, 3, 4, 5, 5], dtype=int32), array([3, 3, 4, 5, 6, 7, 8, 8], dtype=int32))
    """
    check_positive(length=length)
    ((window, dilation, stride, is_causal),) = _axes((length,), window, dilation, stride, is_causal)
    index = np.arange(length, dtype=np.int32)
    place, remainder = index // dilation, index % dilation
    members = (length - remainder + dilation - 1) // dilation
    begin = place // stride * stride
    if is_causal:
        start = np.maximum(np.minimum(begin + stride, members) - window, 0)
        return start, place + 1
    leader = np.minimum(begin + stride // 2, members - 1)
    start = np.clip(leader - window // 2, 0, members - window)
    return start, start + window


def _axes(
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    is_causal: bool | tuple[bool, ...],
) -> list[tuple[int, int, int, bool]]:
    """Returns window, dilation, stride and whether it is causal, of each axis."""
    causal = is_causal if isinstance(is_causal, tuple | list) else (is_causal,) * len(shape)
    if len(causal) != len(shape) or not all(isinstance(x, bool) for x in causal):
        raise ValueError(
            f"is_causal: must be a bool, or one for each axis of {shape}; got {is_causal!r}"
        )
    window = sizes_by_axis("window", window, shape)
    dilation = sizes_by_axis("dilation", dilation, shape)
    stride = sizes_by_axis("stride", stride, shape)
    axes = list(zip(window, dilation, stride, causal, strict=True))
    for length, (size, step, shift, one_way) in zip(shape, axes, strict=True):
        if shift > size:
            raise ValueError(f"stride: must be at most the window, {size}; got {shift}")
        if not one_way and size * step > length:
            raise ValueError(
                f"window: {size} tokens in steps of {step} (dilation) must fit into an axis of "
                f"{length} that is not causal"
            )
    return axes


def _checked_extra(
    key: Array, value: Array, extra_key: ArrayLike | None, extra_value: ArrayLike | None
) -> tuple[Array, Array] | None:
    """Returns the keys and values that every query sees, if there are any."""
    if (extra_key is None) != (extra_value is None):
        raise ValueError("extra_key and extra_value: give both or neither")
    if extra_key is None:
        return None
    extra = jnp.asarray(extra_key), jnp.asarray(extra_value)
    names = ("extra_key", "extra_value")
    for name, x, like in zip(names, extra, (key, value), strict=True):
        count = extra[0].shape[1] if extra[0].ndim == 4 else 0
        wanted = like.shape[0], max(count, 1), *like.shape[2:]
        if x.shape != wanted:
            raise ValueError(
                f"{name}: must be [batch, extra tokens, heads, channels], as {wanted}; got "
                f"{x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: must be floating point; got {x.dtype}")
    return extra


def _tile(shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sides of tiles, powers of two: even, but no longer than an axis needs."""
    lengths = [-(-length // step) for length, step in zip(shape, steps, strict=True)]
    tile = [1] * len(shape)
    while math.prod(tile) < TILE:
        growing = [i for i, length in enumerate(lengths) if tile[i] < length]
        if not growing and math.prod(tile) >= LEAST_TILE:
            break
        # The last of the shortest: neighbours on the last axis lie side by side in memory.
        i = min(reversed(growing or [len(tile) - 1]), key=lambda i: tile[i])
        tile[i] *= 2
    return tuple(tile)


def _neighbourhoods(grid: Grid, axes: list[tuple[int, int, int, bool]], batch: int) -> masks.Mask:
    """Returns the mask of tokens that are laid out by a grid, groups of the batch in a row.

    All of it is static: which tiles see which, and for the tokens where on each axis they are and
    what they see.
    """
    index = np.indices(grid.shape, np.int32).reshape(len(grid.shape), 1, -1)
    ranges, places = [], []
    for length, axis, i in zip(grid.shape, axes, index, strict=True):
        ranges.append(tuple(grid.laid_out(x[i]) for x in neighborhood_bounds(length, *axis)))
        # A token that fills up an axis is nowhere, and by its empty range it sees nothing.
        places.append(grid.laid_out(i // axis[1], fill=-1))
    known = _lists(grid, ranges), ranges, places
    if all(length % step == 0 for length, step in zip(grid.shape, grid.dilation, strict=True)):
        lists, ranges, places = jax.tree.map(lambda x: x[:1], known)  # groups do not differ
    else:
        lists, ranges, places = jax.tree.map(lambda x: jnp.concatenate([x] * batch), known)
    tokens = math.prod(grid.tile)
    return masks.blocks(*lists, tokens, tokens) & masks.rule(_inside, ranges, places)


def _lists(
    grid: Grid, ranges: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[Int[np.ndarray, "groups 1 tiles L"], Int[np.ndarray, "groups 1 tiles"]]:
    """Returns the tiles that some token of a tile sees: the product of their ranges on the axes."""
    shape = grid.groups, math.prod(grid.tiles)
    indices, listed = np.zeros((*shape, 1), np.int32), np.ones((*shape, 1), bool)
    for (start, stop), tile, tiles in zip(ranges, grid.tile, grid.tiles, strict=True):
        start, stop = (x.reshape(*shape, -1) for x in (start, stop))
        first = np.where(start < stop, start, tile * tiles).min(axis=2, keepdims=True) // tile
        last = (stop.max(axis=2, keepdims=True) - 1) // tile
        number = first + np.arange(np.max(last - first) + 1)
        indices = (indices[..., None] * tiles + number[:, :, None]).reshape(*shape, -1)
        listed = (listed[..., None] & (number <= last)[:, :, None]).reshape(*shape, -1)
    counts = listed.sum(axis=2, dtype=np.int32)
    indices = np.sort(np.where(listed, indices, math.prod(grid.tiles)))[..., : counts.max()]
    indices = np.where(np.arange(counts.max()) < counts[..., None], indices, 0)
    return indices[:, None].astype(np.int32), counts[:, None]


def _inside(ranges: list[tuple[Array, Array]], places: list[Array]) -> Array:
    pairs = zip(ranges, places, strict=True)
    axes = ((start <= place) & (place < stop) for (start, stop), place in pairs)
    return functools.reduce(operator.and_, axes)


RECORD = Mechanism(
    slug="neighborhood_attention",
    title=(
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
        "Threadblock Level"
    ),
    year=2024,
    family="sparse",
    patterns=frozenset({"self causal", "self non-causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu"),
    has_weights=False,
    function=neighborhood_attention,
    extras=(neighborhood_bounds,),
    small={"window": 5},
)
