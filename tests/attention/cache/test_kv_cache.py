"""The contiguous cache: what it holds, and what happens where it is full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.cache.kv_cache import init_kv_cache


def _tokens(count, seed=0, width=4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, count, 3, width)), jnp.float32)


def test_tokens_lie_in_order():
    cache = init_kv_cache(2, 9, 3, 4, 5, jnp.bfloat16)
    assert cache.max_length == 9 and cache.key.dtype == cache.value.dtype == jnp.bfloat16
    parts = [(_tokens(n, n), _tokens(n, n + 10, width=5)) for n in (4, 1, 2)]
    append = jax.jit(lambda cache, key, value: cache.append(key, value))
    for key, value in parts:
        cache = append(cache, key, value)
    assert int(cache.length) == 7
    for stored, place in ((cache.key, 0), (cache.value, 1)):
        expected = jnp.concatenate([part[place] for part in parts], axis=1).astype(jnp.bfloat16)
        np.testing.assert_array_equal(stored[:, :7], expected)
        np.testing.assert_array_equal(stored[:, 7:], 0)


def test_a_cache_passes_through_scan_and_vmap():
    keys = _tokens(6)

    def body(cache, key):
        return cache.append(key[:, None], key[:, None]), cache.length

    cache, lengths = jax.lax.scan(body, init_kv_cache(2, 8, 3, 4, 4), jnp.swapaxes(keys, 0, 1))
    np.testing.assert_array_equal(lengths, np.arange(6))
    np.testing.assert_array_equal(cache.key[:, :6], keys)

    stack = jax.vmap(lambda key: init_kv_cache(2, 8, 3, 4, 4).append(key, key))(
        jnp.stack([keys, -keys])
    )
    np.testing.assert_array_equal(stack.value[1, :, :6], -keys)


def test_overflow_raises_where_the_length_is_known():
    cache = init_kv_cache(2, 5, 3, 4, 4)
    with pytest.raises(
        ValueError, match="key: 6 more tokens do not fit into a cache of 5 that holds 0"
    ):
        cache.append(_tokens(6), _tokens(6))
    cache = cache.append(_tokens(4), _tokens(4))
    with pytest.raises(
        ValueError, match="key: 2 more tokens do not fit into a cache of 5 that holds 4"
    ):
        cache.append(_tokens(2), _tokens(2))
    with pytest.raises(ValueError, match="key: 6 more tokens"):
        jax.jit(lambda cache: cache.append(_tokens(6), _tokens(6)))(cache)


def test_overflow_shows_as_nan_where_the_length_is_traced():
    append = jax.jit(lambda cache, tokens: cache.append(tokens, tokens))
    cache = append(init_kv_cache(2, 5, 3, 4, 4), _tokens(4))
    assert jnp.isfinite(append(cache, _tokens(1)).key).all()
    full = append(cache, _tokens(2))
    assert jnp.isnan(full.key[:, -2:]).all() and jnp.isnan(full.value[:, -2:]).all()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (
            _tokens(1)[0],
            _tokens(1),
            r"key: shape \(1, 3, 4\) does not fit the cache's, \(2, 'T', 3, 4\)",
        ),
        (_tokens(1)[:, :, :2], _tokens(1), r"key: shape \(2, 1, 2, 4\) does not fit"),
        (_tokens(1), _tokens(1, width=5), r"value: shape \(2, 1, 3, 5\) does not fit"),
        (_tokens(2), _tokens(1), r"value: 1 tokens must be as many as key's 2"),
    ],
)
def test_wrong_tokens(key, value, match):
    with pytest.raises(ValueError, match=match):
        init_kv_cache(2, 5, 3, 4, 4).append(key, value)
