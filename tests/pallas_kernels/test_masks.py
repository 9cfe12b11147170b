"""The mask algebra: every mask against its definition pair by pair, its ranges, and its errors."""

import doctest
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from pallas_kernels import masks
from pallas_kernels.masks import Shape, Tile, Tiles
from pallas_kernels.tiled import tiled_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, S = 7, 11


def _dense(rule, queries=T, keys=S):
    return np.array([[rule(i, j) for j in range(keys)] for i in range(queries)])


@pytest.mark.parametrize("offset", [0, 3, -2])
def test_causal(offset):
    expected = _dense(lambda i, j: j <= i + offset)
    np.testing.assert_array_equal(masks.causal(offset).to_dense(T, S), expected[None, None])
    traced = jax.jit(lambda o: masks.causal(o).to_dense(T, S))(offset)
    np.testing.assert_array_equal(traced, expected[None, None])


def test_causal_with_an_offset_for_each_row():
    dense = masks.causal(jnp.array([0, 4])).to_dense(T, S)
    assert dense.shape == (2, 1, T, S)
    for row, offset in zip(dense, (0, 4), strict=True):
        np.testing.assert_array_equal(row[0], _dense(lambda i, j: j <= i + offset))  # noqa: B023


@pytest.mark.parametrize(("left", "right"), [(2, 1), (0, 0), (None, 2), (3, None), (None, None)])
@pytest.mark.parametrize("offset", [0, 4])
def test_window(left, right, offset):
    def rule(i, j):
        return (left is None or j >= i + offset - left) and (
            right is None or j <= i + offset + right
        )

    dense = masks.window(left, right, offset).to_dense(T, S)
    np.testing.assert_array_equal(dense[0, 0], _dense(rule))


def test_prefix():
    dense = masks.prefix(jnp.array([0, 5]), 2).to_dense(T, S)
    for row, length in zip(dense, (0, 5), strict=True):
        np.testing.assert_array_equal(
            row[0],
            _dense(lambda i, j: j < length or j <= i + 2),  # noqa: B023
        )


def test_segments_of_one_sequence_are_equal_ids():
    ids = np.array([[0, 0, 1, 1, 1, -1, -1]])
    dense = masks.segments(ids).to_dense(T, T)
    np.testing.assert_array_equal(dense[0, 0], ids[0][:, None] == ids[0][None])


def test_segments_of_keys_with_id_minus_one_are_seen_by_all():
    queries, keys = (
        np.array([[0, 0, 1, 1, 1, 2, -1]]),
        np.array([[-1, 0, 0, 1, 2, 2, 3, 3, -1, 1, 4]]),
    )
    dense = masks.segments(queries, keys).to_dense(T, S)
    expected = _dense(lambda i, j: queries[0, i] == keys[0, j] or keys[0, j] == -1)
    np.testing.assert_array_equal(dense[0, 0], expected)


def test_segments_per_head():
    ids = np.random.default_rng(0).integers(0, 3, (2, 4, T))
    dense = masks.segments(ids).to_dense(T, T)
    np.testing.assert_array_equal(dense, ids[..., :, None] == ids[..., None, :])


def test_lengths():
    dense = masks.lengths(jnp.array([7, 2]), jnp.array([3, 11])).to_dense(T, S)
    for row, (query, key) in zip(dense, ((7, 3), (2, 11)), strict=True):
        np.testing.assert_array_equal(row[0], _dense(lambda i, j: i < query and j < key))  # noqa: B023
    np.testing.assert_array_equal(
        masks.lengths(key=4).to_dense(T, S)[0, 0], _dense(lambda i, j: j < 4)
    )
    assert masks.lengths().to_dense(T, S).all()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_dilated(step):
    expected = _dense(lambda i, j: (i + 1 - j) % step == 0)
    np.testing.assert_array_equal(masks.dilated(step, 1).to_dense(T, S)[0, 0], expected)


@pytest.mark.parametrize("shape", [(2, 3, T, S), (1, 3, 1, S), (2, 1, T, 1), (T, S), (S,)])
def test_dense_broadcasts(shape):
    array = np.random.default_rng(0).random(shape) < 0.5
    dense = masks.dense(array).to_dense(T, S)
    np.testing.assert_array_equal(dense, np.broadcast_to(array, dense.shape))


def test_blocks():
    block_q, block_k = 3, 4
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, (2, 2, 3))
    kept = np.zeros((2, 2, 3, 3), bool)
    indices = np.full((2, 2, 3, 3), 2**30)  # what stands behind the counts is not read
    for place in np.ndindex(counts.shape):
        listed = np.sort(rng.permutation(3)[: counts[place]])
        indices[place][: counts[place]] = listed
        kept[place][listed] = True
    dense = masks.blocks(indices, counts, block_q, block_k).to_dense(T, S)
    expected = kept.repeat(block_q, axis=2).repeat(block_k, axis=3)[:, :, :T, :S]
    np.testing.assert_array_equal(dense, expected)


def test_rule_sees_the_values_of_its_pairs():
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.integers(0, S, (2, 2, T)), axis=0)
    places = np.arange(S)
    mask = masks.rule(
        lambda q, k: (q["low"] <= k) & (k < q["high"]), {"low": low, "high": high}, places
    )
    for b in range(2):
        np.testing.assert_array_equal(
            mask.to_dense(T, S)[b, 0],
            _dense(lambda i, j: low[b, i] <= j < high[b, i]),  # noqa: B023
        )


def test_and_is_the_intersection():
    parts = [masks.causal(2), masks.window(3, 1), masks.lengths(key=jnp.array([4, 9]))]
    joined = functools.reduce(operator.and_, parts)
    expected = np.logical_and.reduce(
        [np.broadcast_to(m.to_dense(T, S), (2, 1, T, S)) for m in parts]
    )
    np.testing.assert_array_equal(joined.to_dense(T, S), expected)
    np.testing.assert_array_equal(masks.all_of(parts).to_dense(T, S), expected)
    assert masks.all_of([]) is None
    with pytest.raises(TypeError):
        masks.causal() & np.ones((T, S), bool)


def test_and_repeats_head_groups():
    rng = np.random.default_rng(0)
    heads, groups = rng.integers(0, 2, (1, 4, T)), rng.integers(0, 2, (1, 2, T))
    dense = (masks.segments(heads) & masks.segments(groups)).to_dense(T, T)
    groups = groups.repeat(2, axis=1)
    expected = (heads[..., :, None] == heads[..., None, :]) & (
        groups[..., :, None] == groups[..., None, :]
    )
    np.testing.assert_array_equal(dense, expected)


def _some_masks(lists=True):
    bound = st.integers(0, 12)
    rows = st.lists(st.integers(0, 12), min_size=2, max_size=2).map(
        lambda x: jnp.array(x, jnp.int32)
    )
    either = st.one_of(bound, rows)
    offset = st.one_of(st.integers(-4, 8), rows)
    side = st.one_of(st.none(), either)
    one = st.one_of(
        st.builds(masks.causal, offset),
        st.builds(masks.window, side, side, offset),
        st.builds(masks.prefix, either, offset),
        st.builds(masks.lengths, side, side),
        st.builds(masks.dilated, st.integers(1, 4), offset),
        st.integers(0, 99).map(_random_blocks if lists else _random_arrays),
    )
    return st.lists(one, min_size=1, max_size=3).map(masks.all_of)


def _random_blocks(seed):
    rng = np.random.default_rng(seed)
    indices = np.sort(np.stack([rng.permutation(6)[:3] for _ in range(8)]), axis=-1)
    return masks.blocks(indices.reshape(2, 1, 4, 3), rng.integers(0, 4, (2, 1, 4)), 2, 2)


def _random_arrays(seed):
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.integers(-1, 3, (2, 1, size)), axis=-1) for size in (T, S)]
    return masks.segments(*ids) & masks.dense(rng.random((2, 1, T, S)) < 0.8)


@settings(max_examples=40, deadline=None)
@given(
    mask=_some_masks(),
    tile=st.sampled_from([(0, T, 0, S), (2, 3, 5, 4), (4, 3, 0, 4), (T - 1, 1, S - 1, 1)]),
)
def test_tiles_and_ranges_agree_with_the_dense_mask(mask, tile):
    row, rows, column, columns = tile
    dense = np.broadcast_to(mask.to_dense(T, S), (2, 1, T, S))
    resolved = mask.resolve(Shape(T, S, 2, 4, 2)).prepared(T, S)

    tile = np.broadcast_to(resolved.tile(Tile(row, rows, column, columns)), (2, 1, rows, columns))
    np.testing.assert_array_equal(tile, dense[:, :, row : row + rows, column : column + columns])

    start, stop = (np.broadcast_to(x, 2) for x in resolved.key_range(row, rows, S))
    hidden = (np.arange(S) < start[:, None]) | (np.arange(S) >= stop[:, None])
    assert not (dense[:, 0, row : row + rows].any(axis=1) & hidden).any()

    start, stop = (np.broadcast_to(x, 2) for x in resolved.query_range(column, columns, T))
    hidden = (np.arange(T) < start[:, None]) | (np.arange(T) >= stop[:, None])
    assert not (dense[:, 0, :, column : column + columns].any(axis=2) & hidden).any()


@settings(max_examples=40, deadline=None)
@given(
    mask=_some_masks(lists=False),
    # Of few sizes, as every one compiles anew: tiles that divide their length, and that do not.
    rows=st.sampled_from([1, 3, T]),
    columns=st.sampled_from([1, 4, S]),
)
def test_occupancy_bounds_what_tiles_hold(mask, rows, columns):
    resolved = mask.resolve(Shape(T, S))
    grid = -(-T // rows), -(-S // columns)
    numbers = np.arange(grid[0])[:, None], np.arange(grid[1])[None]
    dense = np.asarray(mask.to_dense(T, S))
    expected = [
        np.stack(
            [
                monoid(dense[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns])
                for i, j in np.ndindex(grid)
            ],
            axis=-1,
        ).reshape(*dense.shape[:2], *grid)
        for monoid in (lambda x: x.any((2, 3)), lambda x: x.all((2, 3)))
    ]
    some, every = resolved.occupancy(Tiles(rows, T, numbers[0]), Tiles(columns, S, numbers[1]))
    assert (some >= expected[0]).all() and (every <= expected[1]).all()

    listed = np.random.default_rng(0).integers(0, grid[1], (1, 1, grid[0], 3))
    taken = resolved.occupancy(Tiles(rows, T, numbers[0]), Tiles(columns, S, listed))
    for whole, few in zip((some, every), taken, strict=True):
        whole = np.broadcast_to(whole, (*dense.shape[:2], *grid))
        expected = np.take_along_axis(whole, np.broadcast_to(listed, (*whole.shape[:3], 3)), 3)
        np.testing.assert_array_equal(np.broadcast_to(few, expected.shape), expected)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(2),
        masks.window(2, 1, 1),
        masks.window(None, None),
        masks.prefix(5),
        masks.lengths(5, 8),
        masks.dilated(3),
        masks.dilated(1),
        masks.dense(np.random.default_rng(0).random((1, 1, T, S)) < 0.5),
    ],
)
def test_occupancy_of_single_masks_is_exact(mask):
    rows, columns = 2, 3
    tiles = Tiles(rows, T, np.arange(4)[:, None]), Tiles(columns, S, np.arange(4)[None])
    some, every = mask.resolve(Shape(T, S)).occupancy(*tiles)
    dense = np.asarray(mask.to_dense(T, S))[0, 0]
    for i, j in np.ndindex(4, 4):
        tile = dense[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert np.broadcast_to(some, (1, 1, 4, 4))[0, 0, i, j] == tile.any()
        assert np.broadcast_to(every, (1, 1, 4, 4))[0, 0, i, j] == tile.all()


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(2),
        masks.window(2, 1, 1),
        masks.window(2, 0) & masks.causal(),
        masks.prefix(3),
        masks.lengths(5, 8),
        masks.blocks(
            np.array([[[[0, 1], [1, 2], [2, 0], [0, 0]]]]), np.array([[[2, 2, 1, 0]]]), 2, 4
        ),
    ],
)
@pytest.mark.parametrize("row", range(T))
def test_ranges_of_one_query_are_tight(mask, row):
    seen = np.flatnonzero(mask.to_dense(T, S)[0, 0, row])
    start, stop = mask.resolve(Shape(T, S)).prepared(T, S).key_range(row, 1, S)
    start, stop = max(int(np.max(start)), 0), min(int(np.max(stop)), S)
    if seen.size:
        assert (start, stop) == (seen[0], seen[-1] + 1)
    else:
        assert stop <= start


def test_static_masks_have_static_ranges():
    mask = masks.causal(1) & masks.window(2, None) & masks.lengths(key=9) & masks.dilated(2)
    resolved = mask.resolve(Shape(T, S))
    assert resolved.key_range(2, 3, S) == (0, 6)
    assert all(
        isinstance(x, int) for x in resolved.key_range(2, 3, S) + resolved.query_range(2, 3, T)
    )


def test_masks_pass_through_transformations():
    offsets = jnp.array([0, 2, 5])
    expected = np.stack([masks.causal(int(o)).to_dense(T, S) for o in offsets])
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def to_dense(mask):
        return mask.to_dense(T, S)

    for offset, dense in zip(offsets, expected, strict=True):
        np.testing.assert_array_equal(to_dense(masks.causal(offset) & masks.window(9, 9)), dense)

    batched = masks.causal(offsets)
    np.testing.assert_array_equal(jax.vmap(lambda m: m.to_dense(T, S))(batched), expected)
    _, scanned = jax.lax.scan(lambda _, m: (None, m.to_dense(T, S)), None, batched)
    np.testing.assert_array_equal(scanned, expected)


def test_static_parts_are_no_leaves():
    assert jax.tree.leaves(masks.causal(3) & masks.window(1, 2) & masks.dilated(2)) == []
    assert len(jax.tree.leaves(masks.causal(jnp.int32(3)) & masks.lengths(key=jnp.array([1])))) == 2
    a, b = (jax.tree.structure(masks.causal(offset)) for offset in (1, 2))
    assert a != b


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: masks.causal(1.5), TypeError, r"causal: offset must be integers; got float"),
        (lambda: masks.causal(True), TypeError, r"causal: offset must be integers; got bool"),
        (lambda: masks.causal(jnp.zeros((2, 2), int)), ValueError, r"causal: offset.*\(2, 2\)"),
        (lambda: masks.window(-1, 0), ValueError, r"window: left must not be negative; got -1"),
        (lambda: masks.prefix("3"), TypeError, r"prefix: length must be integers"),
        (lambda: masks.lengths(key=-2), ValueError, r"lengths: key must not be negative; got -2"),
        (lambda: masks.dilated(0), ValueError, r"dilated: step must be a positive integer; got 0"),
        (lambda: masks.segments(jnp.ones((1, T))), TypeError, r"segments: query_ids.*float32"),
        (lambda: masks.dense(jnp.ones((T, S))), TypeError, r"mask: must be boolean.*float32"),
        (lambda: masks.dense(np.ones((1,) * 5, bool)), ValueError, r"mask: must have 1 to 4"),
        (lambda: masks.rule(None, (), ()), TypeError, r"rule: fn must be a function; got None"),
        (
            lambda: masks.blocks(np.zeros((1, 1, 2, 3), int), np.zeros((1, 1, 3), int), 4, 4),
            ValueError,
            r"blocks: indices must be .* got \(1, 1, 2, 3\) and \(1, 1, 3\)",
        ),
        (
            lambda: masks.blocks(np.zeros((1, 1, 2, 3), int), np.zeros((1, 1, 2), int), 0, 4),
            ValueError,
            r"blocks: block_q must be a positive integer; got 0",
        ),
    ],
)
def test_wrong_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (masks.causal(jnp.zeros(3, int)), ValueError, r"causal: offset: shape \(3,\).*\(2\)"),
        (masks.lengths(key=jnp.zeros(3, int)), ValueError, r"lengths: key: shape \(3,\)"),
        (
            masks.segments(np.zeros((2, T), int)),
            ValueError,
            r"segments: key_ids must be given.*7.*11",
        ),
        (
            masks.segments(np.zeros((2, T), int), np.zeros((2, T), int)),
            ValueError,
            r"segments: key_ids must be .* for 11 key tokens; got shape \(2, 1, 7\)",
        ),
        (masks.dense(np.ones((2, 3, T, S), bool)), ValueError, r"mask: shape \(2, 3, 7, 11\)"),
        (
            masks.blocks(np.zeros((2, 1, 2, 3), int), np.zeros((2, 1, 2), int), 2, 2),
            ValueError,
            r"blocks: indices: .* has 2 query blocks, but 7 queries in blocks of 2 are 4",
        ),
        (
            masks.blocks(np.zeros((2, 3, 4, 3), int), np.zeros((2, 3, 4), int), 2, 2),
            ValueError,
            r"blocks: indices: the heads of shape",
        ),
        (
            masks.rule(lambda q, k: q == k, np.zeros(T), np.zeros(T)),
            ValueError,
            r"rule: key_tokens",
        ),
    ],
)
def test_masks_that_do_not_fit_a_call(mask, error, match):
    with pytest.raises(error, match=match):
        mask.resolve(Shape(T, S, 2, 4, 2))


@pytest.mark.parametrize(
    ("indices", "counts", "match"),
    [
        ([[0, 1, 6], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [3, 0, 0, 0], "0 to 5.*got 6 at .*0, 2"),
        ([[0, 1, 2], [0, -1, 0], [0, 0, 0], [0, 0, 0]], [3, 2, 0, 0], "0 to 5.*got -1"),
        ([[0, 2, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [3, 0, 0, 0], "ascend.*got 1"),
        ([[1, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [2, 0, 0, 0], "ascend.*got 1"),
        (
            [[0, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
            [4, 0, 0, 0],
            "counts must be 0 to 3.*got 4",
        ),
    ],
)
def test_wrong_lists(indices, counts, match):
    indices, counts = jnp.array([[indices]]), jnp.array([[counts]])
    mask = masks.blocks(indices, counts, 2, 2)
    with pytest.raises(ValueError, match=match):
        mask.to_dense(T, S)

    def attend(indices, counts):
        x = jnp.ones((1, S, 1, 4))
        return tiled_attention(x[:, :T], x, x, mask=masks.blocks(indices, counts, 2, 2))

    error, _ = checkify.checkify(jax.jit(attend))(indices, counts)
    with pytest.raises(checkify.JaxRuntimeError, match=match.split(".*")[0]):
        error.throw()
    jax.jit(attend)(indices, counts)  # is not checked
    error, out = checkify.checkify(jax.jit(attend))(jnp.zeros_like(indices), counts.clip(0, 1))
    error.throw()
    chex.assert_tree_all_finite(out)


def test_a_rule_must_return_booleans():
    mask = masks.rule(lambda q, k: q * k, np.ones(T), np.ones(S))
    with pytest.raises(TypeError, match="rule: fn must return booleans; got float32"):
        mask.to_dense(T, S)


def test_examples_run():
    results = doctest.testmod(masks)
    assert results.attempted > 1 and results.failed == 0
