"""Routing attention: tokens attend within clusters that online k-means finds."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from attention import groups, kmeans
from attention.catalogue import Mechanism
from pallas_kernels.checks import check_arrays

WINDOW_STEP = 128
"""What the default size of clusters is a multiple of, so that they fill a kernel's tiles."""


def routing_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    is_causal: bool = False,
    centroids: Float[ArrayLike, "N|K C H"] | None = None,
    num_clusters: int | None = None,
    window: int | None = None,
    shared_qk: bool = False,
    attend_self: bool = True,
    memory_key: Float[ArrayLike, "N|K C m H"] | None = None,
    memory_value: Float[ArrayLike, "N|K C m V"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Attention within clusters of equal size, each of the w tokens nearest to its centroid.

    Each head has centroids mu_c of unit norm. With x' = x / |x|,

        Q_c = the w tokens of largest mu_c . q'_i,    K_c = the w tokens of largest mu_c . k'_j
        o_ic = attention of q_i to (k_j, v_j),  j in K_c,  j <= i where causal,    for i in Q_c
        o_i = mean over c with i in Q_c of o_ic

    so a token may be in several clusters or in none, in which case its output is 0, as is o_ic of a
    query that sees no key. With `shared_qk`, as in the published language models, k is q', `key` is
    not read and K_c = Q_c: then no query that is in a cluster is without a key. Causal attention to
    keys of their own is published with a few learned keys of each cluster, `memory_key`. Half of
    the heads of a published layer are routed, the others attend locally.

    Which tokens are nearest depends on all tokens, later ones included: what is causal, as
    published, is what a token takes values from. Selection has no gradient: centroids are a buffer
    that `init_routing_attention_centroids` makes and `update_routing_attention_centroids` moves in
    training, and `routing_attention_commitment_loss` draws tokens to them. Packed documents are not
    taken: clusters of one size for all would mix them.

    O(T C H + C w^2 H) time and O(T + C w) memory: with the defaults O(T^1.5) and O(T). Scores and
    sums are float32, or float64 for float64 queries. First derivatives exist in reverse mode; the
    implementation "reference" has all.

    The first released code compares ranks within a cluster, not positions, which leaks where
    queries and keys are not shared, and adds 1e-2 to the number of a token's clusters: neither is
    done here. Its queries are normalised to sqrt(H) and its products are not scaled: in the shared
    form that is `scale=sqrt(H)` for queries of that norm.

    Source: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers (2020).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      is_causal: whether a token sees itself and those before it only.
      centroids: of unit norm, for each query head or each key head; None for fixed random
        directions of each key head.
      num_clusters: C; None for the number of centroids, or T / w.
      window: w, of which at most T count; None for T / C, or if C is not known either for sqrt(T),
        as published, rounded up to a multiple of 128.
      shared_qk: whether keys are the normalised queries.
      attend_self: whether a query sees its own token's key where it sees others; False takes
        `shared_qk`.
      memory_key: further keys of each cluster, in as many heads as the centroids.
      memory_value: their values.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 8))
      >>> centroids = init_routing_attention_centroids(jax.random.key(1), query, num_clusters=10)
      >>> out = routing_attention(
      ...     query, key, value, centroids=centroids, shared_qk=True, is_causal=True
      ... )
      >>> out.shape
      (2, 100, 4, 8)
      >>> centroids = update_routing_attention_centroids(centroids, query)
      >>> centroids.shape
      (4, 10, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    tokens, heads = query.shape[1:3]
    if not attend_self and not shared_qk:
        raise ValueError("attend_self: False takes shared_qk=True: else no key is the query's own")
    centroids, window = _clusters(query, key, centroids, num_clusters, window)
    memory = _memory(memory_key, memory_value, centroids, value, heads if shared_qk else None)

    query_groups = _nearest(query, centroids, window)
    key_groups = None
    if shared_qk:
        key = kmeans.unit(query).astype(query.dtype)
    else:
        key_groups = _nearest(key, centroids, window)
    out, lse = groups.attend(
        query,
        key,
        value,
        query_groups,
        key_groups,
        is_causal=is_causal,
        attend_self=attend_self,
        full=True,
        memory=memory,
        scale=scale,
        implementation=implementation,
        function="routing_attention",
    )
    if not attend_self:
        # A token that sees no other sees itself.
        own = groups.gathered(value, query_groups).astype(out.dtype)
        out = jnp.where(jnp.isneginf(lse)[..., None], own, out)
    return groups.averaged(out, query_groups, tokens)


def _clusters(
    query: Array,
    key: Array,
    centroids: ArrayLike | None,
    num_clusters: int | None,
    window: int | None,
) -> tuple[Float[Array, "N|K C H"], int]:
    """Returns the centroids, in float32 or better, and the number of tokens of a cluster."""
    (_, tokens, heads, features), kv_heads = query.shape, key.shape[2]
    for name, number in (("num_clusters", num_clusters), ("window", window)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}: must be a positive integer or None; got {number!r}")
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if centroids is not None:
        centroids = _checked_centroids(centroids, (heads, kv_heads), features)
        if num_clusters not in (None, centroids.shape[1]):
            raise ValueError(
                f"num_clusters: {num_clusters}, but there are {centroids.shape[1]} centroids"
            )
        num_clusters = centroids.shape[1]
    if num_clusters is None:
        if window is None:
            window = -(-(math.isqrt(tokens - 1) + 1) // WINDOW_STEP) * WINDOW_STEP
        num_clusters = -(-tokens // window)
    elif window is None:
        window = -(-tokens // num_clusters)
    if centroids is None:
        shape = kv_heads, num_clusters, features
        centroids = kmeans.unit(jax.random.normal(jax.random.key(0), shape, dtype))
    return jax.lax.stop_gradient(centroids.astype(dtype)), min(window, tokens)


def _checked_centroids(
    centroids: ArrayLike, heads: tuple[int, ...], features: int
) -> Float[Array, "heads C H"]:
    centroids = jnp.asarray(centroids)
    if not jnp.issubdtype(centroids.dtype, jnp.floating):
        raise TypeError(f"centroids: must be floating point; got {centroids.dtype}")
    if (
        centroids.ndim != 3
        or centroids.shape[0] not in heads
        or not centroids.shape[1]
        or centroids.shape[2] != features
    ):
        wanted = " or ".join(dict.fromkeys(map(str, heads)))
        raise ValueError(
            f"centroids: must be [{wanted}, clusters, {features}]; got {centroids.shape}"
        )
    return centroids


def _memory(
    memory_key: ArrayLike | None,
    memory_value: ArrayLike | None,
    centroids: Array,
    value: Array,
    heads: int | None,
) -> tuple[Array, Array] | None:
    """Returns keys and values of clusters as [C, m, heads, H] and [C, m, heads, V]."""
    if (memory_key is None) != (memory_value is None):
        raise ValueError("memory_key and memory_value: give both or neither")
    if memory_key is None:
        return None
    memory = []
    for name, x, width in (
        ("memory_key", memory_key, centroids.shape[2]),
        ("memory_value", memory_value, value.shape[3]),
    ):
        x = jnp.asarray(x)
        many = x.shape[2] if x.ndim == 4 else "m"
        wanted = (*centroids.shape[:2], many, width)
        if x.shape != wanted or not many:
            raise ValueError(f"{name}: must be {wanted}, as the centroids; got {x.shape}")
        x = x if heads is None else jnp.repeat(x, heads // x.shape[0], axis=0)
        memory.append(jnp.transpose(x, (1, 2, 0, 3)).astype(value.dtype))
    if memory[0].shape[1] != memory[1].shape[1]:
        raise ValueError(
            f"memory_value: {memory[1].shape[1]} for {memory[0].shape[1]} of memory_key"
        )
    return tuple(memory)


def _nearest(
    x: Float[Array, "B T M H"], centroids: Float[Array, "heads C H"], window: int
) -> Int[Array, "B max(M,heads) C w"]:
    """Returns the tokens that are nearest to each centroid, in their order."""
    x = kmeans.unit(jax.lax.stop_gradient(_by_head(x, centroids.shape[0])))

    def nearest(centroid: Float[Array, "heads H"]) -> Array:
        scores = kmeans.similarity(x, centroid[:, None, None])[..., 0, :]  # [B, heads, group, T]
        # XLA partitions a sort over batch and heads, but not `top_k`.
        return jnp.sort(jnp.argsort(scores, axis=-1, descending=True)[..., :window], axis=-1)

    # One centroid at a time takes O(T) memory.
    index = jax.lax.map(nearest, jnp.moveaxis(centroids, 1, 0))
    index = jnp.moveaxis(index, 0, 3)
    return index.reshape(index.shape[0], -1, *index.shape[3:])


def _by_head(x: Float[Array, "B T M H"], heads: int) -> Float[Array, "B heads group T H"]:
    """Returns tokens by head of the centroids; heads that fewer tokens' heads serve repeat them."""
    x = jnp.repeat(x, max(heads // x.shape[2], 1), axis=2)
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1, x.shape[3]), 1, 3)


def _flat(x: Float[Array, "B T M H"], heads: int) -> Float[Array, "heads tokens H"]:
    """Returns all tokens of a batch, for each head of the centroids."""
    return jnp.moveaxis(_by_head(x, heads), 1, 0).reshape(heads, -1, x.shape[3])


def _checked_tokens(
    query: ArrayLike, key: ArrayLike | None, centroids: ArrayLike
) -> tuple[list[Array], Array]:
    tokens = [jnp.asarray(x) for x in (query, key) if x is not None]
    check_arrays(tokens[0], tokens[-1], tokens[-1])
    heads = tokens[0].shape[2], tokens[-1].shape[2]
    return tokens, _checked_centroids(centroids, heads, tokens[0].shape[3])


def init_routing_attention_centroids(
    rng: Array,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"] | None = None,
    *,
    num_clusters: int,
    steps: int = 10,
) -> Float[Array, "N|K C H"]:
    """Returns centroids for `routing_attention`, from a first batch.

    They begin as random tokens, queries and keys alike, and take steps of k-means.

    Args:
      rng: a key.
      query: queries of the batch.
      key: its keys, for whose heads the centroids are then; None where they are shared.
      num_clusters: C.
      steps: number of steps, 10 by default as published.

    Returns:
      Centroids of unit norm, in float32 or better.

    Example:
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 2, 100, 4, 8))
      >>> init_routing_attention_centroids(jax.random.key(1), query, key, num_clusters=5).shape
      (4, 5, 8)
    """
    tokens = [jnp.asarray(x) for x in (query, key) if x is not None]
    check_arrays(tokens[0], tokens[-1], tokens[-1])
    for name, number in (("num_clusters", num_clusters), ("steps", steps)):
        if not isinstance(number, int) or number < (name == "num_clusters"):
            raise ValueError(f"{name}: must be a positive integer; got {number!r}")
    heads = tokens[-1].shape[2]
    tokens = jnp.concatenate([_flat(x, heads) for x in tokens], axis=1)
    return kmeans.initial(rng, tokens, num_clusters, steps)


def update_routing_attention_centroids(
    centroids: Float[ArrayLike, "N|K C H"],
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"] | None = None,
    *,
    decay: float = 0.999,
) -> Float[Array, "N|K C H"]:
    """Returns centroids moved towards the tokens of a batch that are nearest to them.

        mu_c <- m / |m|,    m = decay mu_c + (1 - decay) s / |s|,    s = sum of the x' nearest to c

    Centroids that are nearest to no token stay as they are. There is no gradient. The released
    codes keep running means that are not normalised again and so shrink.

    Args:
      centroids: of unit norm.
      query: queries of the batch.
      key: its keys; None where they are shared.
      decay: 0.999 by default as published.

    Returns:
      The centroids, of unit norm.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
    """
    tokens, centroids = _checked_tokens(query, key, centroids)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: must be 0 to 1; got {decay!r}")
    heads = centroids.shape[0]
    sums = sum(kmeans.cluster_sums(_flat(x, heads), centroids) for x in tokens)
    return kmeans.updated(centroids, sums, decay)


def routing_attention_commitment_loss(
    centroids: Float[ArrayLike, "N|K C H"],
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"] | None = None,
    *,
    weight: float = 1e-4,
) -> Float[Array, ""]:
    """Returns an auxiliary loss that draws tokens to the centroid nearest to them.

        weight * mean((x' - mu_c(x))^2)

    over all tokens, heads and channels, queries and keys alike. The gradient is of the tokens only.
    It is of a reimplementation of the paper.

    Args:
      centroids: of unit norm.
      query: queries of a batch.
      key: its keys; None where they are shared.
      weight: factor of the loss, 1e-4 by default.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.
    """
    tokens, centroids = _checked_tokens(query, key, centroids)
    centroids = jax.lax.stop_gradient(centroids)
    tokens = jnp.concatenate([_flat(x, centroids.shape[0]) for x in tokens], axis=1)
    nearest = kmeans.assigned(tokens, centroids)[..., None]
    return weight * jnp.mean(
        (kmeans.unit(tokens) - jnp.take_along_axis(centroids, nearest, 1)) ** 2
    )


RECORD = Mechanism(
    slug="routing_attention",
    title="Efficient Content-Based Sparse Attention with Routing Transformers",
    year=2020,
    family="sparse",
    patterns=frozenset({"self causal", "self non-causal"}),
    time="O(T^1.5)",
    memory="O(T)",
    kernel="tiled",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=routing_attention,
    extras=(
        init_routing_attention_centroids,
        update_routing_attention_centroids,
        routing_attention_commitment_loss,
    ),
    selects_ahead=True,
    small={"num_clusters": 3, "window": 6},
)
