"""The cache of a sliding window: what it keeps, and steps with it as one pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.cache.kv_cache import KVCache
from attention.cache.window_cache import WindowCache, init_window_cache
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENS, WINDOW = 13, 4


def _tokens(count, seed=0, width=4):
    return np.random.default_rng(seed).normal(size=(2, count, 3, width)).astype(np.float32)


@pytest.mark.parametrize("parts", [(1,) * 7, (3, 1, 2), (4, 3), (9, 2)])
@pytest.mark.parametrize("window", [0, 1, 4])
def test_keeps_the_last_tokens_in_order(parts, window):
    key, value = _tokens(sum(parts)), _tokens(sum(parts), 1, width=5)
    cache, end = init_window_cache(2, window, 3, 4, 5, jnp.bfloat16), 0
    for count in parts:
        new = slice(end, end + count)
        seen, cache = cache.extended(key[:, new], value[:, new])
        first, end = max(end - window, 0), end + count
        assert (int(seen.length), int(cache.length)) == (end - first, end)
        assert seen.max_length == window + count and cache.window == window
        for all_tokens, now, kept in ((key, seen.key, cache.key), (value, seen.value, cache.value)):
            cast = jnp.asarray(all_tokens[:, :end], jnp.bfloat16)
            np.testing.assert_array_equal(now[:, : end - first], cast[:, first:])
            last = cast[:, max(end - window, 0) :]
            np.testing.assert_array_equal(kept[:, : last.shape[1]], last)


def test_wrong_tokens():
    with pytest.raises(ValueError, match=r"key: shape \(2, 1, 3, 5\) does not fit the cache's"):
        init_window_cache(2, 3, 3, 4, 4).extended(_tokens(1, width=5), _tokens(1))


MECHANISMS = {
    "softmax_attention": {"alibi_slopes": np.float32([0.3, 0.1])},
    "softplus_attention": {},
}


def _heads():
    random = np.random.default_rng(0)
    return [random.normal(size=(2, TOKENS, n, 4)).astype(np.float32) for n in (2, 1, 1)]


@pytest.mark.parametrize("slug", MECHANISMS)
@pytest.mark.parametrize("window", [(WINDOW, 0), WINDOW, (0, 0)])
def test_steps_are_one_pass(slug, window):
    """A prompt beyond the window, then token after token, by a state that does not grow."""
    function, step, init = (
        getattr(attention, name) for name in (slug, f"{slug}_step", f"init_{slug}_state")
    )
    options, arrays, prompt = MECHANISMS[slug] | {"local_window_size": window}, _heads(), 6
    empty = init(2, 4096, 2, 1, 4, 4, local_window_size=window)
    assert isinstance(empty, WindowCache)
    assert empty.window == (window if isinstance(window, int) else window[0])

    def one(state, tokens):
        out, state = step(state, *(x[:, None] for x in tokens), **options)
        return state, out[:, 0]

    @jax.jit
    def stepped(*arrays):
        out, state = step(empty, *(x[:, :prompt] for x in arrays), **options)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, empty)
        rest = [jnp.moveaxis(x[:, prompt:], 1, 0) for x in arrays]
        _, outs = jax.lax.scan(one, state, rest)
        return jnp.concatenate([out, jnp.moveaxis(outs, 0, 1)], axis=1)

    expected = jax.jit(functools.partial(function, is_causal=True, **options))(*arrays)
    assert_close(stepped(*arrays), expected, factor=2)


def test_segments_of_kept_and_new_tokens():
    """Ids of keys are those of the kept and then the new tokens."""
    query, key, value = _heads()
    ids = np.repeat([[0, 1]], 2, axis=0).repeat([5, TOKENS - 5], axis=1)
    window, prompt = {"local_window_size": (WINDOW, 0)}, 7
    expected = attention.softmax_attention(
        query, key, value, is_causal=True, segment_ids=ids, **window
    )
    state = attention.init_softmax_attention_state(2, TOKENS, 2, 1, 4, 4, **window)
    room = np.full((2, WINDOW), -2)
    pairs = (
        (slice(0, prompt), np.concatenate([ids[:, :prompt], room], axis=1)),
        (slice(prompt, TOKENS), ids[:, prompt - WINDOW :]),
    )
    for new, seen in pairs:
        out, state = attention.softmax_attention_step(
            state,
            *(x[:, new] for x in (query, key, value)),
            segment_ids=(ids[:, new], seen),
            **window,
        )
        assert_close(out, expected[:, new])


def test_a_window_that_is_no_smaller_needs_the_whole_cache():
    for window in (None, 8, (9, 0)):
        state = attention.init_softmax_attention_state(1, 8, 2, 1, 4, 4, local_window_size=window)
        assert isinstance(state, KVCache) and state.max_length == 8


@pytest.mark.parametrize("window", [None, WINDOW + 1, (WINDOW + 1, 0)])
def test_steps_that_see_more_than_is_kept(window):
    state = attention.init_softmax_attention_state(2, 64, 2, 1, 4, 4, local_window_size=WINDOW)
    heads = [x[:, :1] for x in _heads()]
    with pytest.raises(ValueError, match=r"local_window_size: .* needs more than the 4 tokens"):
        attention.softmax_attention_step(state, *heads, local_window_size=window)


def test_wrong_window():
    with pytest.raises(ValueError, match=r"local_window_size: must be .*; got -1"):
        attention.init_softmax_attention_state(2, 64, 2, 1, 4, 4, local_window_size=-1)
