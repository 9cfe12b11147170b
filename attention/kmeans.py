"""Online k-means on the sphere: tokens gather around centroids of unit norm, for every head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def unit(x: Float[Array, "*dims H"]) -> Float[Array, "*dims H"]:
    """Returns x / |x| in float32 or better. Zeros stay zeros, with a gradient of zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def similarity(
    tokens: Float[Array, "*dims T H"], centroids: Float[Array, "*dims C H"]
) -> Float[Array, "*dims C T"]:
    """Returns the cosine of every token with every centroid, of unit norm; dimensions broadcast."""
    tokens = unit(tokens)
    return jnp.einsum("...th,...ch->...ct", tokens, centroids.astype(tokens.dtype))


def assigned(
    tokens: Float[Array, "*dims T H"], centroids: Float[Array, "*dims C H"]
) -> Int[Array, "*dims T"]:
    """Returns the number of the centroid that is nearest to each token."""
    return jnp.argmax(similarity(tokens, centroids), axis=-2)


def cluster_sums(
    tokens: Float[Array, "*dims T H"], centroids: Float[Array, "*dims C H"]
) -> Float[Array, "*dims C H"]:
    """Returns for each centroid the sum of the normalised tokens that are nearest to it.

    It is differentiable in the tokens, whose assignment is taken as given.
    """
    count = centroids.shape[-2]
    tokens = unit(tokens)
    one_hot = jax.nn.one_hot(assigned(tokens, centroids), count, axis=-2, dtype=tokens.dtype)
    return jnp.einsum("...ct,...th->...ch", one_hot, tokens)


def updated(
    centroids: Float[Array, "*dims C H"], sums: Float[Array, "*dims C H"], decay: float
) -> Float[Array, "*dims C H"]:
    """Returns centroids mu moved towards the directions s / |s| of sums s, with no gradient.

        mu <- m / |m|,    m = decay mu + (1 - decay) s / |s|

    They stay as they are where the sum is zero, such as that of no tokens.

    Args:
      centroids: of unit norm.
      sums: of `cluster_sums`, added up over whatever is one batch.
      decay: share of the old ones; 0 for a step of plain k-means.
    """
    mixed = decay * centroids + (1 - decay) * unit(sums).astype(centroids.dtype)
    moves = jnp.any(sums != 0, axis=-1, keepdims=True) & jnp.any(mixed != 0, -1, keepdims=True)
    moved = unit(mixed).astype(centroids.dtype)
    return jax.lax.stop_gradient(jnp.where(moves, moved, centroids))


def initial(
    rng: Array, tokens: Float[Array, "heads T H"], count: int, steps: int = 10
) -> Float[Array, "heads C H"]:
    """Returns centroids that start as random tokens of each head and take steps of k-means.

    Args:
      rng: a key.
      tokens: all that there are; taken once each if they are enough.
      count: number of centroids, C.
      steps: number of steps.
    """
    heads, available = tokens.shape[:2]

    def chosen(rng: Array) -> Array:
        return jax.random.choice(rng, available, (count,), replace=available < count)

    tokens = jax.lax.stop_gradient(unit(tokens))
    index = jax.vmap(chosen)(jax.random.split(rng, heads))
    centroids = jnp.take_along_axis(tokens, index[..., None], axis=1)

    def step(_: int, centroids: Array) -> Array:
        return updated(centroids, cluster_sums(tokens, centroids), decay=0.0)

    return jax.lax.fori_loop(0, steps, step, centroids)
