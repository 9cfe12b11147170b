"""Attention inside groups, against attention to the whole under a mask of the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import groups, masks
from pallas_kernels.tiled import tiled_attention
from tests.numerics import assert_close

B, T, N, K, H, V = 2, 13, 4, 2, 8, 6
SIZE, COUNT = 4, 4

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays():
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, V)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    orders = [
        jnp.asarray(rng.permuted(np.broadcast_to(np.arange(T), (B, heads, T)), axis=2))
        for heads in (N, K)
    ]
    return arrays, orders


def _number(order):
    """Returns the group of every token, for every query head."""
    number = np.argsort(order, axis=2) // SIZE
    return np.repeat(number, N // order.shape[1], axis=1)


def _inside(order_q, order_k, options, query, key, value):
    index = [groups.cut(order, SIZE, COUNT, T) for order in (order_q, order_k)]
    out, lse = groups.attend(query, key, value, *index, **options, function="test")
    return [groups.returned(x, jnp.argsort(order_q, axis=2)) for x in (out, lse[..., None])]


@pytest.mark.parametrize(("is_causal", "attend_self"), ((True, True), (False, False)))
def test_permuted_groups_are_a_mask(is_causal, attend_self):
    """With a last group that is not full, for which keys of no token are masked."""
    arrays, orders = _arrays()
    token = np.arange(T)
    dense = _number(orders[0])[..., :, None] == _number(orders[1])[..., None, :]
    dense &= (token <= token[:, None]) | (not is_causal)
    dense &= (token != token[:, None]) | attend_self

    def loss(function, *arrays):
        out, lse = function(*arrays)
        lse = jnp.where(jnp.isfinite(lse), lse, 0).reshape(B, T, N)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    options = dict(is_causal=is_causal, attend_self=attend_self)
    inside = functools.partial(_inside, *orders, options)
    whole = functools.partial(
        tiled_attention, mask=masks.dense(dense), return_lse=True, implementation="reference"
    )
    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    assert_close(run(inside, *arrays), run(whole, *arrays), factor=4)


@pytest.mark.parametrize("is_causal", (False, True))
def test_same_tokens_and_memory(is_causal):
    """Chosen sets of tokens, that overlap, with keys that all of a group see."""
    (query, key, value), _ = _arrays()
    rng = np.random.default_rng(1)
    index = np.sort([[rng.permutation(T)[:5] for _ in range(3)] for _ in range(N)], axis=-1)[None]
    memory = tuple(jnp.asarray(rng.standard_normal((3, 2, N, d)), jnp.float32) for d in (H, V))
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))

    @functools.partial(jax.jit, static_argnums=1)
    def run(key_groups, attend_self=True):
        return groups.attend(
            query,
            key,
            value,
            jnp.asarray(index),
            key_groups,
            is_causal=is_causal,
            attend_self=attend_self,
            full=True,
            memory=memory,
            function="test",
        )

    for attend_self in (True, False):
        same = run(None, attend_self)
        # By ranks and by positions.
        assert_close(same, run(jnp.asarray(index), attend_self))
    out, _ = run(None)
    for n, g in ((0, 1), (3, 2)):
        tokens = index[0, n, g]
        for m, t in enumerate(tokens):
            seen = tokens[tokens <= t] if is_causal else tokens
            keys = np.concatenate([memory[0][g, :, n], key[1, seen, n]])
            values = np.concatenate([memory[1][g, :, n], value[1, seen, n]])
            scores = H**-0.5 * keys @ query[1, t, n]
            expected = np.exp(scores) @ values / np.exp(scores).sum()
            assert_close(out[1, g, m, n], expected)


def test_put_back():
    rng = np.random.default_rng(2)
    order = _arrays()[1][0]
    x = jnp.asarray(rng.standard_normal((B, T, N, V)), jnp.float32)
    inside = jax.jit(lambda x: groups.gathered(x, groups.cut(order, SIZE, COUNT, T)))(x)
    assert inside.shape == (B, COUNT, SIZE, N, V)
    assert (inside[:, -1, T % SIZE :] == 0).all()
    assert (jax.jit(groups.returned)(inside, jnp.argsort(order, axis=2)) == x).all()

    # A token of several places has their mean, and one of none 0; token T is none.
    index = jnp.asarray([[[[0, 2, 5], [2, T, 7]]]])
    x = jnp.asarray(rng.standard_normal((B, 2, 3, N, V)), jnp.float32)
    out = jax.jit(groups.averaged, static_argnums=2)(x, index, T)
    expected = np.zeros((B, T, N, V), np.float32)
    expected[:, 0], expected[:, 5], expected[:, 7] = x[:, 0, 0], x[:, 0, 2], x[:, 1, 2]
    expected[:, 2] = (x[:, 0, 1] + x[:, 1, 0]) / 2
    assert_close(out, expected)
