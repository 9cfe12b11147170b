"""`hip_attention`: its definition, what the search finds, and what it may miss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import hip_attention, softmax_attention
from tests.numerics import assert_close
from tests.oracles import hip_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H, V = 4, 53, 4, 2, 8, 6

# Blocks of queries are shorter and longer than those of keys, and do not divide them; the last one
# has one token, or several; windows begin within blocks of keys.
SMALL = dict(mask_k=8, block_q=4, block_k=1, group=2, window=4, sinks=3)
CASES = {
    "small": SMALL,
    "all": SMALL | dict(representative="all", block_q=9, window=11, mask_k=5, block_k=2),
    "one query": dict(
        mask_k=6,
        block_q=1,
        block_k=3,
        group=1,
        window=1,
        sinks=0,
        representative="middle",
        scale=1.0,
    ),
}
RUN = {
    case: jax.jit(functools.partial(hip_attention, **options)) for case, options in CASES.items()
}

pytestmark = pytest.mark.usefixtures("quick_compilation", "x64")


def _arrays(tokens=T):
    rng = np.random.default_rng(0)
    shapes = (B, tokens, N, H), (B, tokens, K, H), (B, tokens, K, V)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case):
    arrays = _arrays()
    out = RUN[case](*arrays)
    expected = oracle.hip_attention(*(x[:1] for x in arrays), **CASES[case])
    assert_close(out[:1], expected, jnp.float64)


def test_gradients():
    """Along random directions, against differences: choices do not change along short ones."""

    def loss(*arrays):
        return jnp.sum(jnp.sin(3 * RUN["small"](*arrays)))

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    arrays = [np.asarray(x) for x in _arrays()]
    for i, gradient in enumerate(run(*arrays)[1]):
        direction = np.random.default_rng(i).standard_normal(gradient.shape)
        after, before = (
            run(*arrays[:i], arrays[i] + step * direction, *arrays[i + 1 :])[0]
            for step in (1e-6, -1e-6)
        )
        assert_close(np.sum(gradient * direction), (after - before) / 2e-6)


def test_a_large_budget_is_causal_attention():
    for tokens, options in ((T, SMALL | dict(mask_k=60)), (1, {})):
        arrays = _arrays(tokens)
        expected = softmax_attention(*arrays, is_causal=True)
        assert_close(hip_attention(*arrays, **options), expected, jnp.float64)


def _with_a_needle(width, at):
    """Returns arrays with slowly varying keys, and one that all queries look for.

    The value of a token is its number, so that outputs say what was attended to.
    """
    tokens, channels = np.arange(float(T))[:, None], np.arange(H)
    keys = np.cos((tokens / 20 + channels) * (1 - 2 * (channels % 2)))
    like = np.exp(-(((tokens - at) / width) ** 2))
    keys = keys * (1 - like) + 8 * like
    query, value = np.full((B, T, N, H), 4.0), np.broadcast_to(tokens, (T, V))
    return query, *(np.broadcast_to(x[:, None], (B, T, K, x.shape[1])) for x in (keys, value))


def test_a_needle_among_like_keys_is_found():
    for at in (9, 26, 38):
        out = RUN["small"](*_with_a_needle(6.0, at))
        np.testing.assert_allclose(out[:, at + 9 :], at, atol=2)


def test_a_search_by_all_keys_misses_no_best_block():
    """A lone key is found wherever it lies; by the first keys of nodes some are overlooked."""
    found = {
        case: [
            np.allclose(RUN[case](*_with_a_needle(1e-3, at))[:, -1], at, atol=0.1)
            for at in range(4, 50, 3)
        ]
        for case in ("small", "all")
    }
    assert all(found["all"])
    assert not all(found["small"]) and any(found["small"])


def test_the_oracle_by_hand():
    """Two nodes of four blocks each are halved twice.

    The halves have by their first blocks 8, 2, 6, 1, so 0-1 and 4-5 stay, and then 0 and 5; by the
    middle ones 0, 9, 7, 3, so 2-3 and 4-5 stay; by the best ones 8, 9, 7, 3, so 0-1 and 2-3 stay.
    """
    key = np.array([8, 0, 2, 9, 6, 7, 1, 3.0])[:, None]
    options = dict(blocks=8, leaves=2, width=1, group=1)
    for representative, expected in (("first", [0, 5]), ("middle", [3, 5]), ("all", [0, 3])):
        found = oracle.found_blocks(np.ones((1, 1)), key, **options, representative=representative)
        assert found == expected


def test_only_every_second_query_searches():
    """Changes of the others change their own outputs only, but for one that is alone."""
    query, key, value = _arrays()
    before = RUN["small"](query, key, value)
    odd = (np.arange(T) % 2)[:, None, None]
    after = RUN["small"](jnp.where(odd, query, -query), key, value)
    np.testing.assert_array_equal(after[:, 1::2], before[:, 1::2])
    after = RUN["small"](jnp.where(odd, -query, query), key, value)
    same = (after == before).all(axis=(0, 2, 3))
    assert not same[20:-1].any() and same[-1]


def test_causal():
    """No output depends on later values, nor on anything of a later block of queries."""
    arrays = _arrays()
    before = RUN["small"](*arrays)
    for token in (0, 5, 18, 31, 52):
        query, key, value = (x + (np.arange(T) >= token)[:, None, None] for x in arrays)
        after = RUN["small"](*arrays[:2], value)
        np.testing.assert_array_equal(after[:, :token], before[:, :token])
        after, begin = RUN["small"](query, key, value), token // 4 * 4
        np.testing.assert_array_equal(after[:, :begin], before[:, :begin])


def test_sharded():
    """Without any collective, the search included."""
    arrays, devices = _arrays(), mesh(AxisType.Explicit)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    compiled = RUN["small"].lower(*placed).compile()
    assert_close(compiled(*placed), RUN["small"](*arrays), jnp.float64)
    assert not COLLECTIVE.findall(compiled.as_text())


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(mask_k=0), "mask_k: must be a positive integer; got 0"),
        (dict(block_q=2.0), "block_q: must be a positive integer; got 2.0"),
        (dict(block_k=-1), "block_k: must be a positive integer; got -1"),
        (dict(group=None), "group: must be a positive integer; got None"),
        (dict(window=31), "window: must be at least block_q, 32; got 31"),
        (dict(sinks=-1), "sinks: must be an integer and not negative; got -1"),
        (dict(representative="last"), "representative: must be .* 'all'; got 'last'"),
    ),
)
def test_wrong_input(options, message):
    with pytest.raises(ValueError, match=message):
        hip_attention(*_arrays(), **options)


def test_kernel_takes_the_default_blocks():
    arrays = [jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)] * 3
    named = functools.partial(hip_attention, implementation="pallas_tpu")
    with jax.enable_x64(False):
        assert jax.eval_shape(named, *arrays).shape == (1, 2048, 2, 64)
    message = "hip_attention: .* blocks of a list must be multiples of 16 tokens; .* block_k 8"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(named, block_k=1), *arrays)
