"""`routing_attention`: its definition, its limits, what leaks from later tokens, and centroids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import (
    init_routing_attention_centroids,
    kmeans,
    routing_attention,
    routing_attention_commitment_loss,
    update_routing_attention_centroids,
)
from tests.numerics import assert_close
from tests.oracles import routing_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H, V, C = 2, 19, 4, 2, 8, 6, 3

pytestmark = pytest.mark.usefixtures("quick_compilation", "x64")


def _arrays(dtype=jnp.float64, tokens=T, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, tokens, K, H), (batch, tokens, K, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _centroids(heads, count=C):
    x = np.random.default_rng(1).standard_normal((heads, count, H))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _memory(heads):
    rng = np.random.default_rng(2)
    return {f"memory_{name}": rng.standard_normal((heads, C, 2, d)) for name, d in MEMORY.items()}


MEMORY = {"key": H, "value": V}
CASES = {
    "plain": dict(centroids=_centroids(K), window=7),
    "causal": dict(centroids=_centroids(N), window=5, is_causal=True, scale=0.7, **_memory(N)),
    "shared": dict(centroids=_centroids(N), window=8, is_causal=True, shared_qk=True, scale=3.0),
    "others": dict(
        centroids=_centroids(K), window=4, is_causal=True, shared_qk=True, attend_self=False
    ),
}


@functools.cache
def _run(case):
    return jax.jit(functools.partial(routing_attention, **CASES[case]))


@pytest.mark.parametrize("case", ("plain", "shared"))
def test_against_the_oracle(case):
    expected = oracle.routing_attention(*_arrays(), **CASES[case])
    assert_close(_run(case)(*_arrays()), expected, jnp.float64)
    assert (expected == 0).all(axis=-1).any()  # tokens of no cluster are among them


@pytest.mark.parametrize("case", ("causal", "others"))
def test_gradients_against_the_oracle(case):
    """Along a random direction, by central differences; the selection stays as it is."""
    arrays, options = _arrays(), dict(CASES[case])
    memory = [options.pop(name) for name in list(options) if name.startswith("memory")]
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((B, T, N, V))

    def call(function, arrays, options=options):
        pair = dict(zip(("memory_key", "memory_value"), arrays[3:], strict=False))
        return function(*arrays[:3], **options, **pair)

    def loss(arrays):
        out = call(routing_attention, arrays)
        return jnp.sum(weights * out), out

    arrays = [*map(np.asarray, arrays), *memory]
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    assert_close(out, call(oracle.routing_attention, arrays), jnp.float64)
    unselected = (np.asarray(out) == 0).all(axis=-1)
    assert unselected.any() and not np.asarray(gradients[0])[unselected].any()
    for i, x in enumerate(arrays):
        if i == 1 and "shared_qk" in options:
            assert not np.any(gradients[1])
            continue
        step = 1e-5 * rng.standard_normal(x.shape)
        ends = (
            np.sum(weights * call(oracle.routing_attention, [*arrays[:i], y, *arrays[i + 1 :]]))
            for y in (x + step, x - step)
        )
        assert_close(2 * np.sum(gradients[i] * step), next(ends) - next(ends))


def test_one_cluster_is_full_attention():
    query, key, value = (np.asarray(x) for x in _arrays())
    run = jax.jit(functools.partial(routing_attention, num_clusters=1))
    key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
    weights = np.exp(np.einsum("btnh,bsnh->bnts", query, key) * H**-0.5)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bnts,bsnv->btnv", weights, value)
    assert_close(run(*_arrays()), expected, jnp.float64)


def test_one_token_is_its_value():
    arrays = _arrays(tokens=1)
    run = jax.jit(functools.partial(routing_attention, is_causal=True, shared_qk=True))
    assert_close(run(*arrays), np.repeat(arrays[2], N // K, axis=2), jnp.float64)


def test_order_of_tokens_does_not_matter():
    arrays, order = _arrays(), np.random.default_rng(3).permutation(T)
    run = _run("plain")
    assert_close(run(*(x[:, order] for x in arrays)), run(*arrays)[:, order], jnp.float64)


@pytest.mark.parametrize("case", ("causal", "shared"))
def test_values_are_causal_and_selection_looks_ahead(case):
    query, key, value = (np.asarray(x) for x in _arrays())
    run, token = _run(case), np.arange(T)[:, None, None]
    before = np.asarray(run(query, key, value))
    for changed in range(T):
        after = run(query, key, value + (token == changed))
        differs = np.any(before != after, axis=(0, 2, 3))
        assert not differs[:changed].any()
        assert differs[changed] or case == "causal"  # there its own key may be elsewhere
    late = 2.0 * (token >= T - 4)
    assert np.any(before != run(query + late, key + late, value), (0, 2, 3))[: T - 4].any()
    if case == "shared":
        assert (before == run(query, np.full_like(key, np.nan), value)).all()


def test_sharded_with_default_centroids():
    """Directions that are always the same."""
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    run = jax.jit(functools.partial(routing_attention, num_clusters=4))
    run = run.lower(*placed).compile()
    centroids = kmeans.unit(jax.random.normal(jax.random.key(0), (K, 4, H), jnp.float64))
    expected = oracle.routing_attention(*arrays, centroids, 5)
    assert_close(run(*placed), expected, jnp.float64)
    assert not COLLECTIVE.findall(run.as_text())


def test_low_precision_is_near():
    arrays = _arrays(jnp.bfloat16)
    out = _run("shared")(*arrays)
    assert out.dtype == jnp.bfloat16
    expected = oracle.routing_attention(*arrays, **CASES["shared"])
    assert_close(out, expected, jnp.bfloat16)


def test_centroids_in_training():
    query, key, _ = _arrays()
    rng, centroids = jax.random.key(0), jnp.asarray(_centroids(K))
    for key_or_none, heads in ((key, K), (None, N)):
        first = functools.partial(init_routing_attention_centroids, num_clusters=C)
        assert jax.eval_shape(first, rng, query, key_or_none).shape == (heads, C, H)
    by_head = [x.reshape(B, T, K, -1, H) for x in (query, key)]
    tokens = np.concatenate(
        [np.moveaxis(x, 2, 0).reshape(K, -1, H) for x in by_head], axis=1
    )  # of each head of the centroids
    after = jax.jit(functools.partial(update_routing_attention_centroids, decay=0.9))(
        centroids, query, key
    )
    assert_close(after, oracle.updated_centroids(centroids, tokens, 0.9), jnp.float64)
    assert_close(jnp.linalg.norm(after, axis=-1), jnp.ones((K, C)), jnp.float64)
    # For query heads, each key counts in every head of its group.
    after = jax.eval_shape(
        update_routing_attention_centroids, jnp.asarray(_centroids(N)), query, key
    )
    assert after.shape == (N, C, H)

    def loss(centroids, query, key):
        return routing_attention_commitment_loss(centroids, query, key, weight=2.0)

    loss = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    value, gradients = loss(centroids, query, key)
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    nearest = np.einsum("kth,kch->ktc", units, centroids).max(axis=-1)
    assert_close(value, np.mean(2 - 2 * nearest) / H * 2, jnp.float64)
    assert not gradients[0].any() and all(np.any(x) for x in gradients[1:])
    step = [x - 5 * d for x, d in zip((query, key), gradients[1:], strict=True)]
    assert loss(centroids, *step)[0] < value


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(window=0), ValueError, "window: must be a positive integer or None; got 0"),
        (dict(num_clusters=2.0), ValueError, r"num_clusters: must be a positive .*2\.0"),
        (dict(centroids=_centroids(K), num_clusters=2), ValueError, r"num_clusters: 2, .* 3 cent"),
        (dict(centroids=_centroids(3)), ValueError, r"centroids: must be \[4 or 2, clusters, 8\]"),
        (dict(centroids=jnp.ones((K, C, H), int)), TypeError, "centroids: must be floating"),
        (dict(attend_self=False), ValueError, "attend_self: False takes shared_qk=True"),
        (dict(memory_key=jnp.ones((K, 4, 1, H))), ValueError, "memory_key and memory_value: give"),
        (
            dict(centroids=_centroids(K)) | _memory(N),
            ValueError,
            r"memory_key: must be \(2, 3, 2, 8\), as the centroids; got \(4, 3, 2, 8\)",
        ),
        (
            dict(_memory(K), centroids=_centroids(K), memory_value=jnp.ones((K, C, 3, V))),
            ValueError,
            "memory_value: 3 for 2 of memory_key",
        ),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        routing_attention(*_arrays(), **options)


def test_wrong_input_of_centroids():
    query, key, _ = _arrays()
    init = functools.partial(init_routing_attention_centroids, jax.random.key(0), query)
    with pytest.raises(ValueError, match="num_clusters: must be a positive integer; got 0"):
        init(num_clusters=0)
    with pytest.raises(ValueError, match=r"steps: .* got -1"):
        init(num_clusters=2, steps=-1)
    for function in (update_routing_attention_centroids, routing_attention_commitment_loss):
        with pytest.raises(ValueError, match=r"centroids: must be \[4, clusters, 8\]"):
            function(_centroids(K), query)
    with pytest.raises(ValueError, match="decay: must be 0 to 1; got 2"):
        update_routing_attention_centroids(_centroids(K), query, key, decay=2)
