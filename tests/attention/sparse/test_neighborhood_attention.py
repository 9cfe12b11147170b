"""`neighborhood_attention`: its definition, what each token sees, and its limits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import neighborhood_attention, neighborhood_bounds
from attention.grid import Grid
from attention.sparse.neighborhood_attention import _neighbourhoods
from pallas_kernels import masks
from tests.numerics import assert_close
from tests.oracles import neighborhood_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, N, K, H, V, E = 2, 4, 2, 8, 6, 3

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(tokens, dtype=jnp.float32, batch=B, extra=False):
    rng = np.random.default_rng(0)
    sizes = [(tokens, N, H), (tokens, K, H), (tokens, K, V)]
    sizes += [(E, K, H), (E, K, V)] if extra else []
    return [jnp.asarray(rng.standard_normal((batch, *size)), dtype) for size in sizes]


def _call(query, key, value, extra_key=None, extra_value=None, **options):
    return neighborhood_attention(
        query, key, value, extra_key=extra_key, extra_value=extra_value, **options
    )


def _defined(function, **options):
    """Returns a function by its definition: the limits are of what is seen, not of the kernels."""
    return jax.jit(functools.partial(function, **options, implementation="reference"))


# Lengths that tiles and dilations do not divide, several tiles on an axis, extra tokens.
CASES = {
    "series": (dict(window=4, dilation=3, stride=2), (80,), False),
    "causal series": (dict(window=5, stride=3, is_causal=True), (70,), True),
    "image": (
        dict(window=(5, 3), dilation=(2, 3), stride=(2, 1), is_causal=(True, False), scale=0.5),
        (11, 14),
        True,
    ),
    "video": (dict(window=(2, 3, 3), dilation=(1, 1, 2)), (3, 5, 6), False),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    options, shape, extra = CASES[case]
    arrays = _arrays(np.prod(shape), jnp.float64, extra=extra)
    out = jax.jit(functools.partial(_call, shape=shape, **options))(*arrays)
    more = dict(zip(("extra_key", "extra_value"), arrays[3:], strict=False))
    expected = oracle.neighborhood_attention(*arrays[:3], shape=shape, **options, **more)
    assert_close(out, expected, jnp.float64)


def test_bounds():
    """The tokens of an axis, of the numbers of tokens, windows and steps that may be."""
    start, stop = neighborhood_bounds(10, 5)
    assert start.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5] and (stop - start == 5).all()
    assert neighborhood_bounds(10, 4)[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 6]
    start, stop = neighborhood_bounds(10, 4, is_causal=True)
    assert (stop - start).tolist() == [min(i + 1, 4) for i in range(10)]
    rng = np.random.default_rng(0)
    for _ in range(100):
        length, step = rng.integers(1, 40), rng.integers(1, 5)
        is_causal = bool(rng.integers(2) or length < step)
        window = rng.integers(1, 50 if is_causal else length // step + 1)
        axis = int(length), int(window), int(step), int(rng.integers(1, window + 1)), is_causal
        start, stop = neighborhood_bounds(*axis)
        assert start.dtype == stop.dtype == np.int32
        for i in range(length):
            seen = [j for j in range(i % step, length, step) if start[i] <= j // step < stop[i]]
            assert seen == oracle.seen_on_axis(i, *axis)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_token_sees(seed):
    """Equal scores show it in the weights: causal axes see no later token, whatever the shape."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 4))
    shape = tuple(int(n) for n in rng.integers(1, (90, 13, 6)[count - 1], count))
    causal = tuple(bool(x) for x in rng.integers(0, 2, count))
    dilation = tuple(int(rng.integers(1, min(n, 3) + 1)) for n in shape)
    most = [9 if c else n // d for n, d, c in zip(shape, dilation, causal, strict=True)]
    window = tuple(int(rng.integers(1, n + 1)) for n in most)
    stride = tuple(int(rng.integers(1, n + 1)) for n in window)
    tokens = int(np.prod(shape))
    zeros = jnp.zeros((1, tokens, 1, 1))
    options = dict(shape=shape, window=window, dilation=dilation, stride=stride, is_causal=causal)
    run = _defined(neighborhood_attention, **options)
    weights = run(zeros, zeros, jnp.eye(tokens)[None, :, None])[0, :, 0]
    weights = np.asarray(weights)
    number = np.arange(tokens).reshape(shape)
    for token in itertools.product(*map(range, shape)):
        axes = zip(token, shape, window, dilation, stride, causal, strict=True)
        seen = number[np.ix_(*(oracle.seen_on_axis(*axis) for axis in axes))].ravel()
        assert np.flatnonzero(weights[number[token]]).tolist() == seen.tolist()


def test_tiles_that_nobody_sees_are_skipped():
    """A list has the tiles of a tile's neighbourhoods and no others, also in padding."""
    shape, axes = (40, 20), [(7, 1, 1, False)] * 2
    mask = _neighbourhoods(Grid(shape, (8, 8), (1, 1)), axes, B)
    lists, rule = masks.parts(mask)
    assert lists.counts.reshape(5, 3).tolist() == [[4, 6, 4], *[[6, 9, 6]] * 3, [4, 6, 4]]
    seen, listed = (np.asarray(x.to_dense(960, 960)[0, 0]) for x in (rule, lists))
    seen, listed = (x.reshape(15, 64, 15, 64).any(axis=(1, 3)) for x in (seen, listed))
    assert (seen == listed).all()
    # Of 17 tokens in groups of 2, one group has 9 and one 8: its second tile is all padding.
    grid = Grid((17,), (8,), (2,))
    lists, _ = masks.parts(_neighbourhoods(grid, [(3, 2, 1, False)], 1))
    assert lists.counts.tolist() == [[[2, 2]], [[1, 0]]]


def test_gradients():
    options, shape, _ = CASES["image"]

    def loss(implementation, *arrays):
        out = _call(*arrays, shape=shape, **options, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    run = jax.jit(jax.grad(loss, tuple(range(1, 6)), has_aux=True), static_argnums=0)
    arrays = _arrays(np.prod(shape), extra=True)
    assert_close(run("xla", *arrays), run("reference", *arrays), factor=4)


def test_a_window_of_all_is_full_attention():
    arrays = _arrays(35)
    out = _defined(neighborhood_attention, shape=(5, 7), window=(5, 7))(*arrays)
    assert_close(out, _defined(attention.softmax_attention)(*arrays))


def test_a_window_of_one_is_the_value():
    for tokens in (1, 20):
        query, key, value = _arrays(tokens)
        out = _defined(neighborhood_attention, window=1)(query, key, value)
        assert_close(out, np.repeat(value, N // K, axis=2))


def test_a_stride_of_the_window_is_attention_in_blocks():
    arrays = _arrays(40)
    for is_causal in (False, True):
        out = _defined(neighborhood_attention, window=5, stride=5, is_causal=is_causal)(*arrays)
        blocks = _defined(attention.diag_attention, block_size=5, is_causal=is_causal)
        assert_close(out, blocks(*arrays))


def test_a_dilation_is_several_problems():
    arrays = [np.asarray(x) for x in _arrays(30)]
    whole = _defined(neighborhood_attention, window=5, dilation=3)(*arrays)
    run = _defined(neighborhood_attention, window=5)
    for first in range(3):
        assert_close(run(*(x[:, first::3] for x in arrays)), np.asarray(whole)[:, first::3])


def test_an_image_is_a_product_of_axes():
    shape, window, arrays = (6, 9), (3, 5), _arrays(54)
    allowed = np.ones((1, 1), bool)
    for axis in zip(shape, window, strict=True):
        start, stop = (x[:, None] for x in neighborhood_bounds(*axis))
        allowed = np.kron(allowed, (start <= np.arange(axis[0])) & (np.arange(axis[0]) < stop))
    assert (allowed.sum(axis=1) == 15).all()
    out = _defined(neighborhood_attention, shape=shape, window=window)(*arrays)
    assert_close(out, _defined(attention.softmax_attention, mask=allowed[None, None])(*arrays))


def test_causal_on_one_axis_is_a_local_window():
    arrays = _arrays(40)
    out = _defined(neighborhood_attention, window=9, is_causal=True)(*arrays)
    local = dict(is_causal=True, local_window_size=(8, 0))
    assert_close(out, _defined(attention.softmax_attention, **local)(*arrays))


def test_sharded():
    """With groups of unequal lengths, which are in a row of the batch."""
    arrays, devices = _arrays(50, batch=4, extra=True), mesh(AxisType.Explicit)
    run = jax.jit(functools.partial(_call, shape=(5, 10), window=2, dilation=(2, 3)))
    expected = run(*arrays)
    with jax.set_mesh(devices):
        placed = [place(devices, x, "data", None, "tensor") for x in arrays]
        program = run.lower(*placed).compile()
    assert_close(program(*placed), expected)
    assert not COLLECTIVE.findall(program.as_text())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(shape=(3, 5)), ValueError, r"shape: \(3, 5\) has 15 tokens; query has 12"),
        (dict(window=0), ValueError, "window: must be a positive integer, .*; got 0"),
        (dict(window=(3, 3)), ValueError, r"window: .* one for each axis of \(12,\)"),
        (dict(window=13), ValueError, "window: 13 tokens in steps of 1 .* axis of 12"),
        (dict(window=5, dilation=3), ValueError, "window: 5 tokens in steps of 3 .*of 12"),
        (dict(dilation=1.5), ValueError, "dilation: .*1.5"),
        (dict(window=3, stride=4), ValueError, "stride: must be at most the window, 3; got 4"),
        (dict(is_causal=1), ValueError, "is_causal: must be a bool, or one for each axis.*; got 1"),
        (dict(is_causal=(True, False)), ValueError, r"is_causal: .*\(12,\)"),
        (dict(extra_key=jnp.ones((B, E, K, H))), ValueError, "extra_key and extra_value: give bo"),
        (
            dict(extra_key=jnp.ones((1, E, K, H)), extra_value=jnp.ones((B, E, K, V))),
            ValueError,
            r"extra_key: must be .*\(2, 3, 2, 8\); got \(1, 3, 2, 8\)",
        ),
        (
            dict(extra_key=jnp.ones((B, E, K, H)), extra_value=jnp.ones((B, 2, K, V))),
            ValueError,
            r"extra_value: must be .*\(2, 3, 2, 6\); got \(2, 2, 2, 6\)",
        ),
        (
            dict(extra_key=jnp.ones((B, E, K, H)), extra_value=jnp.ones((B, E, K, V), int)),
            TypeError,
            "extra_value: must be floating point; got int32",
        ),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        neighborhood_attention(*_arrays(12), **options)


def test_wrong_bounds():
    with pytest.raises(ValueError, match="length: must be a positive integer; got 0"):
        neighborhood_bounds(0, 1)
    with pytest.raises(ValueError, match="window: 7 tokens"):
        neighborhood_bounds(6, 7)
