"""`hyper_attention`: its definition, where it is exact, its estimate, and what is causal."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import hyper_attention
from tests.numerics import assert_close
from tests.oracles import hyper_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

module = importlib.import_module("attention.sparse.hyper_attention")

B, T, N, K, H, V = 2, 21, 4, 2, 8, 6
RNG = 7

pytestmark = pytest.mark.usefixtures("quick_compilation", "x64")


def _arrays(dtype=jnp.float64, tokens=T, keys=None, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, keys or tokens, K, H), (batch, keys or tokens, K, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _drawn(keys, num_samples, batch=B):
    """Returns what the function draws, for the oracle: samples by level and part."""
    rng = jax.random.key(RNG)
    samples = {}
    for level, count in enumerate(keys):
        shape = batch, K, 2**level, num_samples
        samples[level] = np.asarray(
            module._samples(jax.random.fold_in(rng, level + 1), shape, count)
        )
    return module._directions(rng, H, 7), samples


def _full(query, key, value, is_causal=False):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, N // x.shape[2], axis=2) for x in (key, value))
    weights = np.exp(np.einsum("btnh,bsnh->bnts", query, key) * H**-0.5)
    weights *= np.tri(*weights.shape[2:]) if is_causal else 1
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnv->btnv", weights, value)


# Keys of each level: 21 tokens, filled up to 24, are halves of 12, and quarters of 6.
CASES = {
    "cross": (dict(block_size=4, min_seq_len=1, bucket_order="released"), (18,)),
    "causal": (dict(block_size=3, min_seq_len=6, is_causal=True, scale=0.5), (12, 6)),
}


@functools.cache
def _run(case, num_samples=5):
    options = dict(CASES[case][0], num_samples=num_samples, rng=jax.random.key(RNG))
    return jax.jit(functools.partial(hyper_attention, **options))


def test_causal_against_the_oracle():
    options, levels = CASES["causal"]
    expected = oracle.hyper_attention(*_arrays(), *_drawn(levels, 5), **options)
    assert_close(_run("causal")(*_arrays()), expected, jnp.float64)


def test_gradients_against_the_oracle():
    """By central differences: blocks and samples stay as they are, and no part is detached."""
    options = dict(block_size=4, min_seq_len=8, is_causal=True)
    arrays, (directions, samples) = _arrays(tokens=15), _drawn((8,), 5)
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((B, 15, N, V))

    def loss(arrays):
        rng = jax.random.key(RNG)
        return jnp.sum(weights * hyper_attention(*arrays, num_samples=5, rng=rng, **options))

    gradients = jax.jit(jax.grad(loss))(arrays)
    arrays = [np.asarray(x) for x in arrays]
    for i, x in enumerate(arrays):
        step = 1e-5 * rng.standard_normal(x.shape)
        ends = (
            np.sum(
                weights
                * oracle.hyper_attention(
                    *arrays[:i], y, *arrays[i + 1 :], directions, samples, **options
                )
            )
            for y in (x + step, x - step)
        )
        assert_close(2 * np.sum(gradients[i] * step), next(ends) - next(ends))


def test_exact_for_few_tokens_or_one_block():
    run = jax.jit(hyper_attention, static_argnames=("is_causal", "min_seq_len", "block_size"))
    arrays = _arrays()
    assert_close(run(*arrays, min_seq_len=T + 1), _full(*arrays), jnp.float64)
    causal = run(*arrays, is_causal=True, min_seq_len=T)
    assert_close(causal, _full(*arrays, is_causal=True), jnp.float64)
    # Halves, of which the second would attend to one block that is not full.
    causal = run(*arrays, is_causal=True, min_seq_len=11, block_size=16)
    assert_close(causal, _full(*arrays, is_causal=True), jnp.float64)
    one = _arrays(tokens=1)
    assert_close(run(*one, is_causal=True, min_seq_len=1), _full(*one), jnp.float64)


def test_row_sums_are_unbiased():
    """Over seeds, among them projections: a block is exact, and what is sampled stands for others.

    With values that tell keys apart, weights over their exponentials are 1 / Z in the own block,
    and S / m of it or more elsewhere.
    """
    query, key, _ = _arrays(keys=18)
    values = jnp.broadcast_to(jnp.eye(18)[:, None], (B, 18, K, 18))

    def weights(rng):
        return hyper_attention(
            query, key, values, block_size=4, num_samples=6, min_seq_len=1, rng=rng
        )

    rngs = jax.random.split(jax.random.key(RNG), 200)
    found = np.asarray(jax.jit(functools.partial(jax.lax.map, weights))(rngs))
    exact = np.exp(H**-0.5 * np.einsum("btnh,bsnh->btns", query, np.repeat(key, N // K, axis=2)))
    ratios = np.where(found > 0, found, np.inf) / exact
    row_sums = 1 / ratios.min(axis=-1)
    relative = row_sums / exact.sum(axis=-1)
    assert relative.std() > 0.1
    assert abs(relative.mean() - 1) < 0.02


def test_many_samples_converge():
    arrays = _arrays(keys=18)
    few = oracle.hyper_attention(*arrays, *_drawn((18,), 5), **CASES["cross"][0])
    many = _run("cross", 500)(*arrays)
    few, many = (np.sqrt(np.mean((x - _full(*arrays)) ** 2)) for x in (few, many))
    assert many < 0.2 * few


def test_keys_and_values_are_causal_and_queries_are_sorted_with_later_ones():
    query, key, value = (np.asarray(x) for x in _arrays())
    run, token = _run("causal"), np.arange(T)[:, None, None]
    before = np.asarray(run(query, key, value))
    for changed in range(T):
        step = 1.0 * (token == changed)
        differs = np.any(before != run(query, key + step, value + step), axis=(0, 2, 3))
        assert differs[changed] and not differs[:changed].any()
        differs = np.any(before != run(query + step, key, value), axis=(0, 2, 3))
        # Runs of 6 are exact; the second half is sorted as one, and so is the second quarter.
        first = changed if changed < 6 else 6 if changed < 12 else 12
        assert differs[changed] == (changed > 0) and not differs[:first].any()
    late = np.any(before != run(query - 3.0 * (token >= T - 4), key, value), axis=(0, 2, 3))
    assert late[: T - 4].any()  # as published


def test_buckets_that_are_neighbours_differ_in_one_sign():
    signs = np.array([[code >> i & 1 for i in range(7)] for code in range(128)])
    x, directions = jnp.asarray(2.0 * signs - 1)[None, :, None], jnp.eye(7)
    for order, most in (("gray", 1), ("released", 4)):
        place = np.asarray(module._buckets(x, directions, order))[0, 0]
        assert sorted(place) == list(range(128))
        listed = signs[np.argsort(place)]
        assert np.sum(listed[1:] != listed[:-1], axis=1).max() == most


def test_sharded_cross_attention_against_the_oracle():
    arrays, devices = _arrays(batch=4, keys=18), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    options, rng = CASES["cross"][0], jax.random.key(RNG)
    run = jax.jit(functools.partial(hyper_attention, **options, num_samples=5, rng=rng))
    run = run.lower(*placed).compile()
    expected = oracle.hyper_attention(*arrays, *_drawn((18,), 5, batch=4), **options)
    assert_close(run(*placed), expected, jnp.float64)
    assert not COLLECTIVE.findall(run.as_text())


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(block_size=0), "block_size: must be an integer of at least 1; got 0"),
        (dict(num_samples=-1), "num_samples: must be an integer of at least 0; got -1"),
        (dict(num_projections=2.5), "num_projections: must be an integer"),
        (dict(num_projections=31), "num_projections: must be at most 30; got 31"),
        (dict(min_seq_len=0), "min_seq_len: must be an integer of at least 1; got 0"),
        (dict(bucket_order="grey"), "bucket_order: must be 'gray' or 'released'; got 'grey'"),
    ),
)
def test_wrong_input(options, message):
    with pytest.raises(ValueError, match=message):
        hyper_attention(*_arrays(), **options)
    with pytest.raises(TypeError, match=r"rng: must be a key of jax\.random\.key or None; got 3"):
        hyper_attention(*_arrays(), rng=3)
    with pytest.raises(ValueError, match=r"key: .* must have the 21 tokens of query"):
        hyper_attention(*_arrays(keys=18), is_causal=True)
