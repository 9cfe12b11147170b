"""`shifted_sparse_attention`: its definition, limits and cost, and the leak it does not have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import shifted_sparse_attention, softmax_attention
from attention.sparse import shifted_sparse_attention as module
from pallas_kernels.masks import Shape
from pallas_kernels.tiled.schedule import Grid, schedule
from tests.numerics import assert_close
from tests.oracles import shifted_sparse_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H, V = 2, 21, 4, 2, 8, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, batch=B, heads=N, kv_heads=K):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, heads, H), (batch, tokens, kv_heads, H), (batch, tokens, kv_heads, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _run(arrays, **options):
    return jax.jit(functools.partial(shifted_sparse_attention, **options))(*arrays)


# Documents end within groups and at their ends; some are shorter than half a group, or one token.
IDS = np.array([[0] * 8 + [1] * 13, [3] * 1 + [4] * 10 + [3] * 2 + [5] * 8])
CASES = {
    "groups": (4, 2, dict(group_size=6)),
    "sinks": (4, 2, dict(group_size=6, num_sinks=2, scale=1.0)),
    "documents": (4, 1, dict(group_size=5, num_sinks=3, segment_ids=IDS)),
    "odd heads, sinks beyond half a group": (
        3,
        3,
        dict(group_size=4, num_sinks=3, segment_ids=IDS),
    ),
    "groups of one": (2, 1, dict(group_size=1, num_sinks=1, segment_ids=IDS)),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    heads, kv_heads, options = CASES[case]
    arrays = _arrays(jnp.float64, heads=heads, kv_heads=kv_heads)
    expected = oracle.shifted_sparse_attention(*arrays, **options)
    assert_close(_run(arrays, **options), expected, jnp.float64)


def test_gradients():
    options = CASES["documents"][2]

    def loss(implementation, *arrays):
        out = shifted_sparse_attention(*arrays, **options, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    arrays = _arrays(kv_heads=1)
    assert_close(run("xla", *arrays), run("reference", *arrays), factor=4)


def test_limits():
    """A group for all tokens, and for them and half a group, is causal attention."""
    arrays, half = _arrays(), T // 2
    causal = jax.jit(functools.partial(softmax_attention, is_causal=True))
    whole, halves = (
        causal(*arrays, segment_ids=np.tile(np.arange(T) >= first, (B, 1)).astype(int))
        for first in (T, half)
    )
    one = _run(arrays, group_size=T)
    assert_close(one[:, :, : N // 2], whole[:, :, : N // 2])
    assert_close(one[:, :, N // 2 :], halves[:, :, N // 2 :])
    assert_close(_run(arrays, group_size=2 * T), whole)
    assert_close(_run(arrays, group_size=3, num_sinks=T), whole)


def test_a_quarter_by_default():
    arrays = _arrays()
    assert_close(_run(arrays), oracle.shifted_sparse_attention(*arrays, 6))
    query, key, value = (x[:, :1] for x in arrays)
    assert_close(_run((query, key, value)), jnp.repeat(value, N // K, axis=2))


def _rolled(query, key, value, group_size):
    """The form that rolls the tokens of shifted heads, in NumPy."""
    half = group_size // 2
    query, key, value = (np.roll(np.asarray(x, np.float64), -half, axis=1) for x in
                         (query, key, value))  # fmt: skip
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for first in range(0, query.shape[1], group_size):
        for t in range(first, min(first + group_size, query.shape[1])):
            scores = np.einsum("bnh,bjnh->bnj", query[:, t], key[:, first : t + 1])
            w = np.exp(scores * query.shape[3] ** -0.5)
            w /= w.sum(axis=-1, keepdims=True)
            out[:, t] = np.einsum("bnj,bjnv->bnv", w, value[:, first : t + 1])
    return np.roll(out, half, axis=1)


def test_no_token_sees_a_later_one():
    """As it would if shifted heads rolled their tokens."""
    size, tokens = 8, 24
    arrays = _arrays(tokens=tokens)
    run = jax.jit(functools.partial(shifted_sparse_attention, group_size=size))
    before = run(*arrays)
    rng = np.random.default_rng(1)
    for token in (0, 2, 4, 11, 13, 22, 23):
        noise = rng.standard_normal((3, 1, 1, 1))
        changed = [x.at[:, token].add(n) for x, n in zip(arrays, noise, strict=True)]
        differs = np.any(run(*changed) != before, axis=(0, 2, 3))
        assert differs[token] and not differs[:token].any()
    leaks = np.any(_rolled(*changed, size) != _rolled(*arrays, size), axis=(0, 2, 3))
    assert leaks[: size // 2].all()
    # Between the first and the last half group the two are the same.
    inner = slice(size // 2, tokens - size // 2)
    assert_close(before[:, inner, N // 2 :], _rolled(*arrays, size)[:, inner, N // 2 :])


def test_cost_is_that_of_the_groups(monkeypatch):
    """Kernels visit the tiles of the groups: 8 times as many for 8 times as many tokens."""

    def attend(query, key, value, *, mask, **options):
        del options
        sizes = query.shape[1], key.shape[1]
        mask = mask.resolve(Shape(*sizes, 1, 2, 1))
        visits = schedule(mask, Grid(*sizes, 16, 16))[..., 0].sum()
        if sizes[0] == sizes[1]:
            for row in range(0, sizes[0], 64):
                start, stop = mask.key_range(row, 64, sizes[1])
                assert stop - start <= 3 * 64
        else:
            assert sizes[1] == 4
        # The log-sum-exp brings out the number of visits.
        return jnp.zeros((*query.shape[:3], value.shape[3])), jnp.full(query.shape[:3], visits)

    monkeypatch.setattr(module, "tiled_attention", attend)
    visited = []
    monkeypatch.setattr(module, "merge_partials", lambda outs, lses: [lses[0]])
    for tokens in (256, 2048):
        arrays = (jnp.zeros((1, tokens, n, 4)) for n in (2, 1, 1))
        visited.append(int(_run(arrays, group_size=64, num_sinks=4)[0, 0, 0]))
    assert 0.9 * 8 <= visited[1] / visited[0] <= 1.1 * 8


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    options = dict(group_size=6, num_sinks=1)
    run = jax.jit(functools.partial(shifted_sparse_attention, **options)).lower(*placed).compile()
    assert_close(run(*placed), oracle.shifted_sparse_attention(*arrays, **options))
    assert not COLLECTIVE.findall(run.as_text())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(group_size=0), ValueError, "group_size: must be a positive integer"),
        (dict(group_size=2.0), ValueError, "group_size: .*2.0"),
        (dict(num_sinks=-1), ValueError, "num_sinks: must be an integer of at least 0; got -1"),
        (dict(segment_ids=np.zeros((B, 3), int)), ValueError, "segment_ids: must have shape"),
        (dict(segment_ids=np.zeros((B, T))), TypeError, "segment_ids: must be integers"),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        shifted_sparse_attention(*_arrays(), **options)
    query, key, value = _arrays()
    with pytest.raises(ValueError, match=r"key: .* tokens of query"):
        shifted_sparse_attention(query[:, :5], key, value)
