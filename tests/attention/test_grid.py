"""Layouts of tokens in tiles."""

import jax.numpy as jnp
import numpy as np
import pytest

from attention.grid import Grid, checked_shape, pooled, sizes_by_axis


def test_order():
    """Rows of 5 in groups of every second column, in tiles of 2 x 2."""
    number = np.arange(10).reshape(1, 10)
    groups = Grid((2, 5), (2, 2), (1, 2)).laid_out(number, fill=-1)
    assert groups.tolist() == [
        [0, 2, 5, 7, 4, -1, 9, -1],
        [1, 3, 6, 8, -1, -1, -1, -1],
    ]


@pytest.mark.parametrize(
    "grid",
    (
        Grid((7,), (4,), (1,)),
        Grid((8,), (2,), (2,)),
        Grid((5, 7), (2, 3), (2, 1)),
        Grid((3, 4, 5), (2, 2, 4), (1, 2, 3)),
    ),
)
def test_restored(grid):
    tokens = int(np.prod(grid.shape))
    x = np.arange(2 * tokens * 6, dtype=np.float32).reshape(2, tokens, 2, 3) + 1
    there = grid.laid_out(x)
    sizes = np.prod(grid.tiles) * np.prod(grid.tile)
    assert isinstance(there, np.ndarray) and there.shape == (2 * grid.groups, sizes, 2, 3)
    assert (there == 0).sum() == there.size - x.size
    assert (grid.laid_out(jnp.asarray(x)) == there).all()
    assert (grid.restored(there) == x).all()


def test_tiles_hold_neighbours():
    """Group r of a row of the batch has the tokens with remainder r, in their order."""
    place = np.stack(np.indices((6, 9)), axis=-1).reshape(1, 54, 2)
    grid = Grid((6, 9), (3, 2), (2, 3))
    there = grid.laid_out(place, fill=-1).reshape(2, 3, *grid.tiles, 3, 2, 2)
    for remainder in np.ndindex(2, 3):
        for tile in np.ndindex(*grid.tiles):
            for within in np.ndindex(3, 2):
                group = [t * n + i for t, n, i in zip(tile, grid.tile, within, strict=True)]
                token = [g * d + r for g, d, r in zip(group, (2, 3), remainder, strict=True)]
                expected = token if token[1] < 9 else [-1, -1]
                assert there[(*remainder, *tile, *within)].tolist() == expected


def test_pooled():
    """Parts that share tokens, whole ones, and more than there are tokens."""
    x = np.random.default_rng(0).normal(size=(2, 5 * 6 * 2, 3)).astype(np.float32)
    found = pooled(x, (5, 6, 2), (3, 2, 3)).reshape(2, 3, 2, 3, 3)
    x = x.reshape(2, 5, 6, 2, 3)
    for i, rows in enumerate((slice(0, 2), slice(1, 4), slice(3, 5))):
        for j, columns in enumerate((slice(0, 3), slice(3, 6))):
            for k, last in enumerate((slice(0, 1), slice(0, 2), slice(1, 2))):
                expected = x[:, rows, columns, last].mean(axis=(1, 2, 3))
                np.testing.assert_allclose(found[:, i, j, k], expected, rtol=1e-5, atol=1e-7)
    assert pooled(x.astype(np.float16).reshape(2, 60, 3), (60,), (7,)).dtype == np.float16


def test_arguments():
    assert checked_shape(None, 12) == (12,)
    assert checked_shape([3, 4], 12) == (3, 4)
    assert sizes_by_axis("window", 3, (5, 6)) == (3, 3)
    assert sizes_by_axis("window", [3, 4], (5, 6)) == (3, 4)
    for shape in (12, (), (1, 1, 3, 4), (3, 4.0), (12, 0), "12"):
        with pytest.raises(ValueError, match="shape: must be one to three positive integers"):
            checked_shape(shape, 12)
    with pytest.raises(ValueError, match=r"shape: \(3, 5\) has 15 tokens; query has 12"):
        checked_shape((3, 5), 12)
    for value in (0, (3,), (3, -1), 2.5, True):
        message = r"window: must be a positive integer, or one for each axis of \(5, 6\); got"
        with pytest.raises(ValueError, match=message):
            sizes_by_axis("window", value, (5, 6))
