"""Block lists: what the builders list, against sets in Python, and what masks make of them."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from attention import blocks, masks
from attention.blocks import (
    lists_from_indices,
    lists_from_mask,
    lists_from_ranges,
    top_blocks,
    top_mask,
)

ROWS, C = (2, 3, 5), 7

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _listed(lists):
    """Returns rows of lists as Python lists, all rows in one; what they promise is checked."""
    indices, counts = map(np.asarray, lists)
    assert indices.dtype == counts.dtype == np.int32 and indices.shape[:-1] == counts.shape
    rows = []
    for row, count in zip(indices.reshape(-1, indices.shape[-1]), counts.ravel(), strict=True):
        assert (np.diff(row[:count]) > 0).all() and not row[count:].any()
        rows.append(row[:count].tolist())
    return rows


def _rows(array):
    return np.asarray(array).reshape(-1, np.shape(array)[-1])


rng = np.random.default_rng(0)
MASK = rng.random((*ROWS, C)) < 0.4
MASK[0, 0, 0], MASK[0, 0, 1] = False, True  # an empty row and a full one


def test_from_a_mask():
    lists = jax.jit(lists_from_mask)(MASK)
    assert _listed(lists) == [np.flatnonzero(row).tolist() for row in _rows(MASK)]
    assert lists[0].shape == (*ROWS, C)
    np.testing.assert_array_equal(masks.blocks(*lists, 1, 1).to_dense(ROWS[2], C), MASK)


def test_from_ranges():
    rng = np.random.default_rng(1)
    starts, stops = rng.integers(0, C, (2, *ROWS)).astype(np.int32)
    lists = jax.jit(lists_from_ranges, static_argnums=2)(starts, stops, C - 1)
    pairs = zip(starts.ravel(), stops.ravel(), strict=True)
    assert _listed(lists) == [list(range(*pair)) for pair in pairs]
    assert lists[0].shape == (*ROWS, C - 1)
    assert _listed(lists_from_ranges(0, [0, 3], 3)) == [[], [0, 1, 2]]


def test_from_indices():
    """Repeated, in any order, with anything at the places that do not count."""
    rng = np.random.default_rng(1)
    indices = rng.integers(0, C, (*ROWS, 9))
    listed = rng.random(indices.shape) < 0.6
    listed[1, 1, 1] = False
    expected = [sorted(set(row[of])) for row, of in zip(_rows(indices), _rows(listed), strict=True)]
    junk = np.where(listed, indices, rng.integers(-99, 99, indices.shape))
    assert _listed(jax.jit(lists_from_indices)(junk, listed)) == expected
    lists = lists_from_indices(junk, listed, C)
    assert lists[0].shape == (*ROWS, C) and _listed(lists) == expected


def _best(scores, count, forced, allowed):
    order = sorted(
        np.flatnonzero(allowed), key=lambda j: (0, j) if forced[j] else (1, -scores[j], j)
    )
    return sorted(int(j) for j in order[: max(count, 0)])


rng = np.random.default_rng(2)
SCORES = rng.integers(0, 4, (*ROWS, C)).astype(np.float32)  # many are equal
FORCED = rng.random((*ROWS, C)) < 0.3
ALLOWED = rng.random((*ROWS, C)) < 0.7
ALLOWED[0, 0, 0] = False


@pytest.mark.parametrize("count", (1, 3, 99))
def test_best_scores(count):
    arguments = [*map(_rows, (SCORES, FORCED, ALLOWED))]
    expected = [_best(s, count, f, a) for s, f, a in zip(*arguments, strict=True)]
    lists = top_blocks(SCORES, count, forced=FORCED, allowed=ALLOWED)
    assert lists[0].shape == (*ROWS, min(count, C))
    assert _listed(lists) == expected
    marked = top_mask(SCORES, count, forced=FORCED, allowed=ALLOWED)
    assert _listed(lists_from_mask(marked)) == expected
    hidden = np.where(ALLOWED, SCORES, -np.inf)
    assert _listed(top_blocks(hidden, count, forced=FORCED & ALLOWED)) == expected


def test_counts_of_rows():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, C + 2, ROWS)
    every = np.ones(C, bool)
    expected = [
        _best(s, count, f, every)
        for s, f, count in zip(_rows(SCORES), _rows(FORCED), counts.ravel(), strict=True)
    ]
    marked = jax.jit(top_mask)(SCORES, counts, forced=FORCED)
    assert _listed(lists_from_mask(marked)) == expected


def test_what_is_forced_comes_before_any_score():
    scores = np.array([3.4e38, np.inf, 0.0, -1e30], np.float32)
    forced = np.array([False, False, False, True])
    assert _listed(top_blocks(scores[None], 1, forced=forced)) == [[3]]


def test_choices_have_no_gradient():
    def loss(scores):
        indices, _ = top_blocks(scores, 2)
        return jnp.sum(jnp.take_along_axis(scores, indices, axis=-1))

    gradient = jax.grad(loss)(jnp.array([[1.0, 3.0, 2.0]]))
    assert gradient.tolist() == [[0, 1, 1]]  # of what is taken, not of taking it


def test_rows_that_are_too_long_show():
    """The first blocks stay, and the counts say that others are missing."""
    mask = np.array([[[[True, True, True], [False, True, True]]]])
    places = np.broadcast_to(np.arange(3), mask.shape)
    for lists in (
        lists_from_mask(mask, 2),
        lists_from_ranges([[[0, 1]]], [[[3, 3]]], 2),
        lists_from_indices(places, mask, 2),
    ):
        indices, counts = lists
        assert indices.tolist() == [[[[0, 1], [1, 2]]]] and counts.tolist() == [[[3, 2]]]
        with pytest.raises(ValueError, match=r"blocks: counts must be 0 to 2; got 3"):
            masks.blocks(*lists, 1, 1).to_dense(2, 3)

    def dense(mask):
        return masks.blocks(*lists_from_mask(mask, 2), 1, 1).to_dense(2, 3)

    error, out = jax.jit(checkify.checkify(dense))(mask)
    with pytest.raises(checkify.JaxRuntimeError, match="counts must be 0 to 2"):
        error.throw()
    assert out[0, 0].astype(int).tolist() == [[1, 1, 0], [0, 1, 1]]


def test_wrong_input():
    with pytest.raises(TypeError, match="mask: must be boolean; got int32"):
        lists_from_mask(np.ones((2, 3), np.int32))
    for longest in (0, 1.5):
        message = f"longest: must be a positive integer; got {longest}"
        with pytest.raises(ValueError, match=message):
            lists_from_mask(MASK, longest)
        with pytest.raises(ValueError, match=message):
            lists_from_ranges(0, 1, longest)
    with pytest.raises(ValueError, match="count: must be a positive integer; got 0"):
        top_blocks(SCORES, 0)


def test_examples():
    outcome = doctest.testmod(blocks)
    assert outcome.failed == 0 and outcome.attempted == 10
