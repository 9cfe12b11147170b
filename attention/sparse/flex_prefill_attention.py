"""FlexPrefill: the blocks of a head are columns and diagonals, or chosen for every query block."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import rel_entr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from attention.blocks import Lists, choose_lists, lists_from_mask, top_mask
from attention.catalogue import Mechanism
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.tiled import tiled_attention


def flex_prefill_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    block_size: int = 128,
    min_budget: int = 512,
    max_budget: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Causal attention to blocks of keys that a probe by the last queries chooses for each head.

    With b the block size, n = ceil(T / b) blocks, q_i and k_j the mean queries and keys of blocks,
    and P the weights of the last b queries in causal attention, each head

    1. adds P up by keys and by offsets back from the query, c_j and d_o, of mass 1 each;
    2. counts the largest c that are needed for more than a mass gamma, and takes floor(count / b)
       + 1 columns; from the d likewise that many diagonals; at least min_budget and at most
       max_budget tokens, rounded up to blocks;
    3. compares the sums C_j of c over blocks with p_j = softmax(scale mean(last queries) . k_j): it
       is query-aware if the root of their Jensen-Shannon divergence (natural logarithm) is below
       tau, as then means tell where mass is, and takes only min_budget columns and diagonals;
    4. keeps, in every row of blocks, the columns of the largest C_j, block 0 among them, and the
       diagonals of the largest sums of d over b offsets, the main one among them;
    5. if query-aware, keeps also the largest of all n^2 weights softmax_j(scale q_i . k_j), j <= i,
       that are needed for more than a mass gamma n.

    All queries then attend by softmax, exactly and causally, to the keys in the blocks of their
    row. Whole blocks are kept, so a diagonal may miss what an offset that b does not divide sees
    across the end of a block. As published, the last queries decide for all: this reads a prompt,
    and is not for training on next tokens. What is chosen has no gradient.

    Up to max(2 b, min_budget) tokens this is causal attention. O(T b + (T / b)^2 log T) time and
    O(T b + (T / b)^2) memory for the choice, and O(T^2) time at worst for the attention. A row is
    one document, whose end is the probe, so `segment_ids` are not taken. Scores and sums are
    float32, or float64 for float64 queries. First derivatives exist in reverse mode; the
    implementation "reference" has all.

    In the released code blocks of b = 128 only are counted right in step 2, and step 5 drops the
    weight that reaches the mass. Where b does not divide T, diagonals there take their offsets from
    the far end, the last having less than b; here the nearest b offsets are the main diagonal.

    Source: Lai et al., FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
    Long-Sequence Inference (2025).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      gamma: mass of attention to be kept; from 1 on about all of it.
      tau: threshold of step 3; with 0 no head is query-aware.
      block_size: b, a multiple of 16 for the TPU kernel.
      min_budget: fewest tokens in columns, and in diagonals.
      max_budget: most of them; None for all.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 300, 4, 8))
      >>> out = flex_prefill_attention(query, key, value, block_size=32, min_budget=64)
      >>> out.shape
      (1, 300, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    check_positive(block_size=block_size, min_budget=min_budget)
    if max_budget is not None:
        check_positive(max_budget=max_budget)
        if max_budget < min_budget:
            raise ValueError(
                f"max_budget: must be at least min_budget, {min_budget}; got {max_budget}"
            )
    if not isinstance(gamma, int | float) or not gamma > 0:
        raise ValueError(f"gamma: must be a positive number; got {gamma!r}")
    if not isinstance(tau, int | float) or not tau >= 0:
        raise ValueError(f"tau: must be a number and not negative; got {tau!r}")
    tokens = query.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    blocks, fewest = -(-tokens // block_size), -(-min_budget // block_size)
    mask = masks.causal()
    if blocks > max(2, fewest):
        most = blocks if max_budget is None else min(-(-max_budget // block_size), blocks)
        choice = functools.partial(
            _lists, gamma=gamma, tau=tau, block_size=block_size, budget=(fewest, most), scale=scale
        )
        mask &= masks.blocks(*choose_lists(choice, query, key), block_size, block_size)
    return tiled_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        implementation=implementation,
        function="flex_prefill_attention",
    )


def _lists(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    *,
    gamma: float,
    tau: float,
    block_size: int,
    budget: tuple[int, int],
    scale: float,
) -> Lists:
    """Returns lists of the blocks that are kept; the budget is in blocks."""
    batch, tokens, heads, features = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, tokens, key.shape[2], -1, features)
    last = query[:, -block_size:]
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", last, key, preferred_element_type=dtype)
    offset = jnp.arange(tokens) - jnp.arange(tokens - block_size, tokens)[:, None]
    weights = jax.nn.softmax(jnp.where(offset <= 0, scores, -jnp.inf), axis=-1)
    vertical = weights.mean(axis=3).reshape(batch, heads, tokens)
    slash = _sums_by_offset(weights).reshape(batch, heads, tokens) / block_size
    counts = (jnp.clip(_cover(x, gamma) // block_size + 1, *budget) for x in (vertical, slash))

    vertical, slash = (_block_sums(x, block_size, 2) for x in (vertical, slash))
    queries, keys = (_block_means(x.astype(dtype), block_size) for x in (query, key))
    pooled = jnp.einsum("bkgh,bskh->bkgs", last.astype(dtype).mean(axis=1), keys)
    pooled = jax.nn.softmax(scale * pooled, axis=-1).reshape(vertical.shape)
    middle = (pooled + vertical) / 2
    divergence = jnp.sum(rel_entr(pooled, middle) + rel_entr(vertical, middle), axis=-1) / 2
    aware = jnp.sqrt(jnp.maximum(divergence, 0)) < tau

    blocks = vertical.shape[2]
    number = jnp.arange(blocks)
    columns, diagonals = (
        top_mask(x, jnp.where(aware, budget[0], count), forced=number == 0)
        for x, count in zip((vertical, slash), counts, strict=True)
    )
    behind = number[:, None] - number
    kept = columns[:, :, None] | jnp.take(diagonals, jnp.maximum(behind, 0), axis=2)
    means = scale * jnp.einsum("btkgh,bskh->bkgts", queries, keys)
    means = jax.nn.softmax(jnp.where(behind >= 0, means, -jnp.inf), axis=-1)
    means = means.reshape(batch, heads, blocks * blocks)
    best = top_mask(means, _cover(means, gamma * blocks)).reshape(kept.shape)
    kept |= aware[:, :, None, None] & best
    return lists_from_mask(kept & (behind >= 0))


def _cover(x: Float[Array, "*rows C"], mass: float) -> Int[Array, "*rows"]:
    """Returns how many of the largest numbers are needed for more than a mass, or C + 1."""
    sums = jnp.cumsum(jnp.sort(x, axis=-1, descending=True), axis=-1)
    return 1 + jnp.sum(sums <= mass, axis=-1)


def _sums_by_offset(weights: Float[Array, "*rows R T"]) -> Float[Array, "*rows T"]:
    """Returns the sums over all pairs in which the key is 0, 1, ... tokens before the query.

    The queries are the last R. Written end to end and cut into rows of one number more, each row is
    shifted by one against the row before, so that an offset is a column: no gather.
    """
    *rows, queries, tokens = weights.shape
    none = ((0, 0),) * len(rows)
    # From the last query and key back; 0 where a row ends.
    back = jnp.pad(weights[..., ::-1, ::-1], (*none, (0, 0), (0, queries)))
    length = tokens + queries
    back = jnp.pad(back.reshape(*rows, queries * length), (*none, (0, queries)))
    return back.reshape(*rows, queries, length + 1).sum(axis=-2)[..., :tokens]


def _block_sums(x: Array, block_size: int, axis: int) -> Array:
    """Returns sums over blocks of an axis, the last of which may be short."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block_size)
    x = jnp.pad(x, widths)
    return x.reshape(*x.shape[:axis], -1, block_size, *x.shape[axis + 1 :]).sum(axis=axis + 1)


def _block_means(x: Float[Array, "B T ..."], block_size: int) -> Float[Array, "B blocks ..."]:
    """Returns means over blocks of tokens, the last of which may be short."""
    sums = _block_sums(x, block_size, 1)
    lengths = jnp.minimum(block_size, x.shape[1] - block_size * jnp.arange(sums.shape[1]))
    return sums / lengths.reshape(-1, *(1,) * (x.ndim - 2)).astype(x.dtype)


RECORD = Mechanism(
    slug="flex_prefill_attention",
    title=(
        "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence "
        "Inference"
    ),
    year=2025,
    family="sparse",
    patterns=frozenset({"self causal"}),
    time="O(T^2)",
    memory="O(T^2)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=flex_prefill_attention,
    selects_ahead=True,
    small={"block_size": 2, "min_budget": 4, "gamma": 0.6, "tau": 0.07},
)
