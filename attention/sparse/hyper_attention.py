"""HyperAttention: attention within blocks of tokens of like hashes, and to sampled keys."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from attention import groups
from attention.catalogue import Mechanism
from pallas_kernels import masks
from pallas_kernels.checks import check_arrays
from pallas_kernels.tiled import merge_partials, tiled_attention

MOST_PROJECTIONS = 30
"""Bits that a bucket's number may have."""


def hyper_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    is_causal: bool = False,
    block_size: int = 256,
    num_samples: int = 256,
    num_projections: int = 7,
    min_seq_len: int = 4096,
    bucket_order: Literal["gray", "released"] = "gray",
    rng: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Attention estimated in near-linear time, from large entries and a sample of all others.

    Tokens are hashed by the signs of r random projections (angular LSH), and queries and keys are
    each sorted by their bucket, buckets in an order in which neighbours differ in one sign. The
    sorted keys are cut into S / b blocks, the sorted queries into as many. With l a log-sum-exp of
    scores,

        (o1, l1) = attention of the queries of block t to the keys of block t
        (o2, l2) = attention to those of m keys, drawn with replacement, that are not of block t
        l2' = l2 + log(S / m),    o = (exp(l1) o1 + exp(l2') o2) / (exp(l1) + exp(l2'))

    so that exp(l1) + exp(l2') is an unbiased estimate of the row sum. It is exact for fewer queries
    than `min_seq_len`, and for S <= b.

    Causal attention adds up exact attention within runs of tokens and estimates of attention to
    the runs before: the second half of all tokens attends to the first as above, and so on within
    each half, for as long as that is not exact. No output depends on later keys or values, but, as
    published, a query is sorted with later queries, which may decide in which block it stands.
    Packed documents are not taken: blocks of one size for all would mix them.

    O(T (b + m + r)) time and O(T (1 + m / b)) memory, both times log(T / min_seq_len) where causal.
    Scores and sums are float32, or float64 for float64 queries. First derivatives exist in reverse
    mode, through the log-sum-exps too; the implementation "reference" has all. Hashing has no
    gradient.

    In the released code keys that fill up the last block count with scores of zero, one code path
    counts samples of the own block twice, and another passes no gradient to the log-sum-exp; here
    they do not count, are masked and have theirs. Its buckets are in the order of their Gray codes,
    in which neighbours differ in up to four of seven signs: `bucket_order="released"`.

    Source: Han et al., HyperAttention: Long-context Attention in Near-Linear Time (2023).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      is_causal: whether a token sees itself and those before it only; then S is T.
      block_size: b, number of keys in a block.
      num_samples: m; 0 for blocks alone.
      num_projections: r, up to 30.
      min_seq_len: from how many tokens on attention is not exact, 4096 by default as released.
      bucket_order: "gray", in which neighbours differ in one sign, or that of the released code.
      rng: a key, by which projections and samples are drawn; None for a fixed one.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 200, 2, 8))
      >>> out = hyper_attention(
      ...     query, key, value, is_causal=True, min_seq_len=100, block_size=32, num_samples=32
      ... )
      >>> out.shape
      (1, 200, 2, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=is_causal)
    for name, number, least in (
        ("block_size", block_size, 1),
        ("num_samples", num_samples, 0),
        ("num_projections", num_projections, 1),
        ("min_seq_len", min_seq_len, 1),
    ):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: must be an integer of at least {least}; got {number!r}")
    if num_projections > MOST_PROJECTIONS:
        raise ValueError(
            f"num_projections: must be at most {MOST_PROJECTIONS}; got {num_projections}"
        )
    if bucket_order not in ("gray", "released"):
        raise ValueError(f"bucket_order: must be 'gray' or 'released'; got {bucket_order!r}")
    if rng is None:
        rng = jax.random.key(0)
    elif not isinstance(rng, jax.Array) or not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        raise TypeError(f"rng: must be a key of jax.random.key or None; got {rng!r}")
    directions = _directions(rng, query.shape[3], num_projections)
    batch, tokens = query.shape[:2]

    def exact(*arrays: Array) -> tuple[Array, Array]:
        return tiled_attention(
            *arrays,
            mask=masks.causal() if is_causal else None,
            scale=scale,
            return_lse=True,
            implementation=implementation,
            function="hyper_attention",
        )

    def estimated(
        spans: list[_Span], query: Array, key: Array, value: Array
    ) -> list[tuple[Array, Array]]:
        """Returns output and log-sum-exp, [B, queries, N, V] and [.., 1], of each span."""
        buckets = [_buckets(x, directions, bucket_order) for x in (query, key)]
        found = [
            _grouped(span, *buckets, block_size, num_samples, jax.random.fold_in(rng, level + 1))
            for level, span in enumerate(spans)
        ]
        # One call for all spans: what places they have too many hold no token.
        size = max(one.query_groups.shape[3] for one in found)
        pads = ((0, 0),) * 3
        query_groups = [
            jnp.pad(x, (*pads, (0, size - x.shape[3])), constant_values=query.shape[1])
            for x in (one.query_groups for one in found)
        ]
        out, lse = groups.attend(
            query,
            key,
            value,
            jnp.concatenate(query_groups, axis=2),
            jnp.concatenate([one.key_groups for one in found], axis=2),
            full=not num_samples and all(span.keys % block_size == 0 for span in spans),
            bias=np.concatenate([one.bias for one in found]),
            scale=scale,
            implementation=implementation,
            function="hyper_attention",
        )
        results, before = [], 0
        for one in found:
            place = (before + one.group) * size + one.place
            results.append(tuple(groups.returned(x, place) for x in (out, lse[..., None])))
            before += one.query_groups.shape[2]
        return results

    if not is_causal:
        keys = key.shape[1]
        if tokens < min_seq_len or keys <= block_size:
            return exact(query, key, value)[0]
        zero = np.zeros(1, np.int32)
        return estimated([_Span(zero, tokens, zero, keys)], query, key, value)[0][0]

    # Halves are halved for as long as attention of one to the other is not exact.
    levels, length = 0, tokens
    while (half := -(-length // 2)) >= min_seq_len and half > block_size and length > half:
        levels, length = levels + 1, half
    rows = 2**levels
    pad = (0, 0), (0, rows * length - tokens), (0, 0), (0, 0)
    query, key, value = (jnp.pad(x, pad) for x in (query, key, value))
    inner = exact(*(x.reshape(batch * rows, length, *x.shape[2:]) for x in (query, key, value)))
    parts = [[x.reshape(batch, rows * length, *x.shape[2:]) for x in inner]]
    halves = [rows * length // 2 ** (level + 1) for level in range(levels)]
    spans = [_Span.of_halves(half, rows * length) for half in halves]
    across = estimated(spans, query, key, value) if spans else []
    for half, (out, lse) in zip(halves, across, strict=True):
        parts.append([_second_halves(out, half, 0), _second_halves(lse, half, -jnp.inf)[..., 0]])
    return merge_partials(*zip(*parts, strict=True))[0][:, :tokens]


class _Span(NamedTuple):
    """Runs of queries, of one length, each of which attends to a run of keys."""

    first_query: Int[np.ndarray, " P"]
    queries: int
    first_key: Int[np.ndarray, " P"]
    keys: int

    @classmethod
    def of_halves(cls, half: int, tokens: int) -> "_Span":
        """Returns the span in which every second run of tokens attends to the one before it."""
        first = np.arange(0, tokens, 2 * half, dtype=np.int32)
        return cls(first + half, half, first, half)


class _Grouped(NamedTuple):
    """The groups of a span: blocks of queries, and blocks of keys with samples of the others."""

    query_groups: Int[Array, "B N G M"]
    key_groups: Int[Array, "B K G L"]
    bias: Float[np.ndarray, "G L"]
    group: Int[Array, "B N queries"]
    place: Int[Array, "B N queries"]


def _grouped(
    span: _Span,
    query_buckets: Int[Array, "B N T"],
    key_buckets: Int[Array, "B K S"],
    block_size: int,
    num_samples: int,
    rng: Array,
) -> _Grouped:
    """Sorts each run by buckets, cuts it into blocks and draws samples."""
    count = -(-span.keys // block_size)
    size = -(-span.queries // count)
    runs = len(span.first_key)

    def ordered(buckets: Array, first: np.ndarray, length: int) -> Array:
        of_runs = jnp.take(buckets, first[:, None] + np.arange(length), axis=2)
        return jnp.argsort(of_runs, axis=-1, stable=True)

    def flat(x: Array) -> Array:
        return x.reshape(*x.shape[:2], runs * count, x.shape[-1])

    query_order = ordered(query_buckets, span.first_query, span.queries)
    key_order = ordered(key_buckets, span.first_key, span.keys)
    nowhere = query_buckets.shape[2], key_buckets.shape[2]
    query_groups = groups.cut(query_order + span.first_query[:, None], size, count, nowhere[0])
    key_groups = groups.cut(key_order + span.first_key[:, None], block_size, count, nowhere[1])
    # Samples are of places among the sorted keys, by which their blocks are known.
    place = _samples(rng, (*key_order.shape[:3], num_samples), span.keys)
    token = jnp.take_along_axis(key_order, place, axis=3) + span.first_key[:, None]
    own = place[..., None, :] // block_size == np.arange(count)[:, None]
    others = jnp.where(own, nowhere[1], token[..., None, :])
    weight = math.log(span.keys / max(num_samples, 1))
    bias = np.repeat([0.0, weight], [block_size, num_samples])
    rank = jnp.argsort(query_order, axis=-1)
    group = rank // size + count * np.arange(runs)[:, None]
    return _Grouped(
        flat(query_groups),
        flat(jnp.concatenate([key_groups, others], axis=-1)),
        np.broadcast_to(bias, (runs * count, len(bias))),
        *(x.reshape(*x.shape[:2], -1) for x in (group, rank % size)),
    )


def _second_halves(x: Array, half: int, empty: float) -> Array:
    """Returns what is of every second run of tokens as of all tokens."""
    x = x.reshape(x.shape[0], -1, 1, half, *x.shape[2:])
    pad = ((0, 0), (0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 3)
    x = jnp.pad(x, pad, constant_values=empty)
    return x.reshape(x.shape[0], -1, *x.shape[4:])


def _directions(rng: Array, features: int, count: int) -> Float[Array, "H r"]:
    """Returns the projections: of all heads, rows and levels."""
    return jax.random.normal(jax.random.fold_in(rng, 0), (features, count), jnp.float32)


def _samples(rng: Array, shape: tuple[int, ...], keys: int) -> Int[Array, "B K P m"]:
    """Returns places of sampled keys, of each run of keys."""
    return jax.random.randint(rng, shape, 0, keys)


def _buckets(
    x: Float[Array, "B T N H"], directions: Float[Array, "H r"], order: str
) -> Int[Array, "B N T"]:
    """Returns the place of every token's bucket in the order of buckets."""
    x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    above = jnp.einsum("btnh,hr->bntr", x, directions.astype(x.dtype)) > 0
    code = jnp.sum(above << jnp.arange(above.shape[-1]), axis=-1, dtype=jnp.int32)
    if order == "released":
        return code ^ (code >> 1)
    # Code i ^ (i >> 1) stands in place i: to invert it, each bit is the parity of those above it.
    for shift in (1, 2, 4, 8, 16):
        code ^= code >> shift
    return code


RECORD = Mechanism(
    slug="hyper_attention",
    title="HyperAttention: Long-context Attention in Near-Linear Time",
    year=2023,
    family="sparse",
    patterns=frozenset({"self causal", "self non-causal", "cross non-causal"}),
    time="O(T log T)",
    memory="O(T log T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=hyper_attention,
    selects_ahead=True,
    small={"min_seq_len": 6, "block_size": 4, "num_samples": 3},
)
