"""What the GPU kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import PROCESSORS, Work


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 44, 1), (7, 5, 9), (16, 33, 2)])
def test_persistent_blocks_do_every_item_once(sizes):
    work = Work(dict(zip(("head", "block", "batch"), sizes, strict=True)), persistent=True)
    (blocks,) = work.grid.values()
    assert blocks == min(PROCESSORS, np.prod(sizes))

    def items_of(block):
        done = jnp.zeros(sizes, jnp.int32)

        def visit(item, done):
            return done.at[item["head"], item["block"], item["batch"]].add(1)

        return work.each({"processor": block}, visit, done)

    done = jax.vmap(items_of)(jnp.arange(blocks))
    np.testing.assert_array_equal(done.sum(axis=0), 1)
    of_blocks = done.sum(axis=(1, 2, 3))
    assert of_blocks.max() - of_blocks.min() <= 1


def test_what_is_not_persistent_has_a_block_for_every_item():
    work = Work({"head": 2, "batch": 3}, persistent=False)
    place = {"head": 1, "batch": 2}
    assert work.grid == {"head": 2, "batch": 3}
    assert work.each(place, lambda item, carry: (item, carry), 5) == (place, 5)
