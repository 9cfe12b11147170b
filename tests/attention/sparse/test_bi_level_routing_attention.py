"""`bi_level_routing_attention`: its definition, what regions choose, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import bi_level_routes, bi_level_routing_attention
from tests.numerics import assert_close
from tests.oracles import bi_level_routing_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, N, K, H, V = 2, 4, 2, 8, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(tokens, dtype=jnp.float32, batch=B):
    rng = np.random.default_rng(0)
    sizes = (tokens, N, H), (tokens, K, H), (tokens, K, V)
    return [jnp.asarray(rng.standard_normal((batch, *size)), dtype) for size in sizes]


def _defined(function, **options):
    """Returns a function by its definition: the limits are of what is seen, not of the kernels."""
    return jax.jit(functools.partial(function, **options, implementation="reference"))


# Regions of few tokens are copied, others listed; they divide the sides or do not.
CASES = {
    "copied": (dict(regions=(4, 3), top_k=3), (8, 9)),
    "copied, with shorter ones": (dict(regions=4, top_k=2, scale=0.2), (9, 14)),
    "listed": (dict(regions=(3, 2), top_k=2), (12, 8)),
    "listed, with shorter ones": (dict(regions=3, top_k=4), (13, 14)),
    "one axis": (dict(regions=5), (23,)),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    options, shape = CASES[case]
    arrays = _arrays(np.prod(shape), jnp.float64)
    out = jax.jit(functools.partial(bi_level_routing_attention, shape=shape, **options))(*arrays)
    expected = oracle.bi_level_routing_attention(*arrays, shape=shape, **options)
    assert_close(out, expected, jnp.float64)


def test_gradients():
    """Of regions that are listed; the catalogue's tests have those that are copied."""
    options, shape = CASES["listed, with shorter ones"]

    def loss(implementation, *arrays):
        out = bi_level_routing_attention(
            *arrays, shape=shape, **options, implementation=implementation
        )
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    arrays = _arrays(np.prod(shape))
    assert_close(run("xla", *arrays), run("reference", *arrays), factor=4)


def test_all_regions_are_full_attention():
    arrays = _arrays(63)
    options = dict(shape=(7, 9), regions=3, top_k=9)
    full = _defined(attention.softmax_attention)(*arrays)
    assert_close(_defined(bi_level_routing_attention, **options)(*arrays), full)
    # More than there are, too, and one region, and one token.
    assert_close(_defined(bi_level_routing_attention, regions=1)(*arrays), full)
    query, key, value = _arrays(1)
    out = _defined(bi_level_routing_attention)(query, key, value)
    assert_close(out, np.repeat(value, N // K, axis=2))


def test_regions_permute():
    """No region is special: outputs follow where regions are put."""
    arrays = [np.asarray(x) for x in _arrays(48)]
    run = _defined(bi_level_routing_attention, regions=6, top_k=2)
    order = np.random.default_rng(1).permutation(6)
    order = (order[:, None] * 8 + np.arange(8)).ravel()
    out = np.asarray(run(*arrays))
    assert_close(run(*(x[:, order] for x in arrays)), out[:, order])


def test_routes():
    """Unique, ascending, the oracle's, and of the first regions where all are equal."""
    options = dict(shape=(9, 14), regions=4, top_k=5)
    query, key, _ = _arrays(126)
    run = jax.jit(functools.partial(bi_level_routes, **options))
    chosen = np.asarray(run(query, key))
    assert chosen.shape == (B, 12, 5) and chosen.dtype == np.int32
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == oracle.routes(np.asarray(query), np.asarray(key), **options)
    assert run(0 * query, key).tolist() == [[[0, 1, 2, 3, 4]] * 12] * B


def test_a_region_need_not_choose_itself():
    sign = np.where(np.arange(24) < 12, 1.0, -1.0)[None, :, None, None]
    query, key, value = (np.broadcast_to(x * sign, (1, 24, 1, 4)) for x in (1, -1, 1))
    out = _defined(bi_level_routing_attention, regions=2, top_k=1)(query, key, value)
    assert_close(out, -value)


def test_a_key_head_counts_for_each_query_head_that_it_serves():
    query, key, value = _arrays(48)
    options = dict(shape=(6, 8), regions=(3, 4), top_k=2)
    run = _defined(bi_level_routing_attention, **options)
    repeated = (np.repeat(x, N // K, axis=2) for x in (key, value))
    assert_close(run(query, *repeated), run(query, key, value))


def test_no_gradient_goes_through_the_routes():
    """Gradients are those of attention to the regions that were chosen."""
    arrays, options = _arrays(48), dict(regions=6, top_k=2)
    allowed = np.zeros((B, 1, 6, 6), bool)
    np.put_along_axis(allowed, np.asarray(bi_level_routes(*arrays[:2], **options))[:, None], 1, 3)
    allowed = np.kron(allowed, np.ones((1, 1, 8, 8), bool))

    def loss(function, *arrays):
        out = function(*arrays, implementation="reference")
        return jnp.sum(jnp.sin(3 * out))

    routed = functools.partial(bi_level_routing_attention, **options)
    masked = functools.partial(attention.softmax_attention, mask=allowed)
    gradients = [jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2))) for f in (routed, masked)]
    assert_close(*(gradient(*arrays) for gradient in gradients))


def test_sharded():
    """Routes are the same for all heads: their sum over devices is all that is sent."""
    arrays, devices = _arrays(42, batch=4), mesh(AxisType.Explicit)
    run = jax.jit(functools.partial(bi_level_routing_attention, shape=(6, 7), regions=3, top_k=2))
    expected = run(*arrays)
    with jax.set_mesh(devices):
        placed = [place(devices, x, "data", None, "tensor") for x in arrays]
        program = run.lower(*placed).compile()
    assert_close(program(*placed), expected)
    assert COLLECTIVE.findall(program.as_text()) == ["all-reduce"]


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(shape=(3, 5)), r"shape: \(3, 5\) has 15 tokens; query has 12"),
        (dict(regions=0), "regions: must be a positive integer, .*; got 0"),
        (dict(shape=(3, 4), regions=(2, 2, 2)), r"regions: .* one for each axis of \(3, 4\)"),
        (dict(top_k=0), "top_k: must be a positive integer; got 0"),
        (dict(top_k=[2]), r"top_k: .*got \[2\]"),
    ),
)
def test_wrong_input(options, message):
    query, key, value = _arrays(12)
    with pytest.raises(ValueError, match=message):
        bi_level_routing_attention(query, key, value, **options)
    with pytest.raises(ValueError, match=message):
        bi_level_routes(query, key, **options)
