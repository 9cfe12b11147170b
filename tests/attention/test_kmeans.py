"""k-means on the sphere, step by step, against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import kmeans
from tests.numerics import assert_close
from tests.oracles.routing_attention import updated_centroids

HEADS, T, C, H = 2, 40, 5, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.standard_normal((HEADS, T, H)), dtype)
    return tokens, kmeans.unit(jnp.asarray(rng.standard_normal((HEADS, C, H)), dtype))


@pytest.mark.parametrize("decay", (0.0, 0.9))
def test_a_step_against_loops(decay, x64):
    tokens, centroids = _arrays(jnp.float64)
    centroids = centroids.at[1, 2].set(-kmeans.unit(tokens[1].sum(0)))  # nearest to few, or none
    sums = jax.jit(kmeans.cluster_sums)(tokens, centroids)
    after = kmeans.updated(centroids, sums, decay)
    assert_close(after, updated_centroids(centroids, tokens, decay), jnp.float64)


def test_empty_clusters_stay_and_norms_are_one():
    tokens = jnp.abs(_arrays()[0])
    centroids = kmeans.unit(_arrays()[1]).at[:, 3].set(-jnp.ones(H) / np.sqrt(H))
    step = jax.jit(lambda x, mu: kmeans.updated(mu, kmeans.cluster_sums(x, mu), 0.5))
    after = step(tokens, centroids)
    assert (after[:, 3] == centroids[:, 3]).all()
    assert (after[:, :3] != centroids[:, :3]).any()
    assert_close(np.linalg.norm(after, axis=-1), np.ones((HEADS, C)))
    # What cancels is no direction to move to.
    opposite = kmeans.updated(centroids, -centroids, 0.5)
    assert (opposite == centroids).all()


def test_initial_centroids():
    tokens, _ = _arrays()
    run = jax.jit(kmeans.initial, static_argnums=(2, 3))
    first, units = run(jax.random.key(0), tokens, C, 0), np.asarray(kmeans.unit(tokens))
    for h in range(HEADS):
        found = np.isclose(first[h][:, None], units[h]).all(-1)
        assert (found.sum(1) == 1).all() and found.any(0).sum() == C  # C different tokens
    after = run(jax.random.key(0), tokens, C, 10)

    def spread(centroids):
        return np.mean(np.einsum("hcd,htd->hct", centroids, units).max(axis=1))

    assert spread(after) > spread(first) + 0.01
    assert_close(np.linalg.norm(after, axis=-1), np.ones((HEADS, C)))
    few = jax.eval_shape(lambda x: kmeans.initial(jax.random.key(0), x, C), tokens[:, :3])
    assert few.shape == (HEADS, C, H)


def test_gradients():
    """Sums pass gradients to tokens, an update none; zeros have one of zero."""
    tokens, centroids = _arrays()
    tokens = tokens.at[0, 0].set(0)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((HEADS, C, H)), jnp.float32)

    def total(x):
        return jnp.sum(weights * kmeans.cluster_sums(x, centroids))

    sums = np.asarray(jax.jit(jax.grad(total))(tokens))
    assert np.isfinite(sums).all() and (sums[0, 0] == 0).all() and (sums[0, 1:] != 0).any(-1).all()

    def moved(x, centroids):
        return jnp.sum(kmeans.updated(centroids, kmeans.cluster_sums(x, centroids), 0.5))

    assert not any(map(np.any, jax.jit(jax.grad(moved, (0, 1)))(tokens, centroids)))
