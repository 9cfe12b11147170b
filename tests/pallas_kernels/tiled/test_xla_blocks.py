"""Block lists in plain JAX: only what is listed is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention, xla_blocks
from tests.numerics import assert_close
from tests.pallas_kernels.tiled.features import Call, block_list, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUPED = {"heads": 4, "key_heads": 2}
IDS = np.sort(np.random.default_rng(5).integers(0, 3, (1, 4, 200)), axis=-1)
CALLS = {
    "heads and batch, causal with offsets": block_list(
        32, 64, options={"mask": masks.causal(np.array([3, 60]))}, lists=4, batch=2, **GROUPED
    ),
    "key heads, segments of heads, rule": block_list(
        64,
        32,
        options={
            "mask": masks.segments(IDS[..., :150], IDS[:, 0] - 1)
            & masks.rule(jnp.less, normal(7, 1, 4, 150), 1 + normal(8, 1, 200))
        },
        lists=2,
        longest=4,
        **GROUPED,
    ),
    "all heads, terms": block_list(
        48,
        96,
        options={
            "alibi_slopes": np.float32([0.5, 0.1]),
            "sink": np.float32([-1, 3]),
            "query_offset": 40,
            "logits_soft_cap": 3.0,
        },
    ),
    "bias, dense": block_list(
        64, 64, options={"bias": normal(5, 1, 1, 150, 200), "mask": masks.dense(IDS[0, 0] > 0)}
    ),
    "two lists": block_list(
        64, 32, options={"mask": block_list(32, 64).options["mask"]}, lists=2, longest=4
    ),
    "reweighted, statistic of rows": block_list(
        32,
        32,
        options={
            "weights": "softplus",
            "row_statistic": normal(6, 1, 150, 2),
            "reweight": (1.0, 0.3),
        },
    ),
    "sigmoid, blocks longer than all": block_list(256, 256, options={"weights": "sigmoid"}),
}


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Makes some rows of a list and some of its blocks a step, not all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_blocks, "ROWS", 128)
        patch.setattr(xla_blocks, "COLUMNS", 64)
        patch.setattr(xla_blocks, "TILE_SCORES", 2**14)
        jax.clear_caches()
        yield
        jax.clear_caches()


def _run(call, arrays, implementation):
    def loss(arrays, mask):
        return call.loss(arrays, mask=mask, implementation=implementation)

    return jax.jit(jax.grad(loss, has_aux=True))(arrays, call.options["mask"])


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name):
    call = CALLS[name]
    assert_close(_run(call, call.arrays, "xla"), _run(call, call.arrays, "reference"))


def test_what_no_list_names_may_be_anything():
    indices = np.array([[[[1, 9], [3, 5]]]])
    mask = masks.blocks(indices, np.array([[[1, 2]]]), 16, 16)
    call = Call({"mask": mask}, queries=32, keys=100)
    unlisted = ~np.isin(np.arange(100) // 16, (1, 3, 5))[None, :, None, None]
    poisoned = call.arrays
    poisoned |= {name: jnp.where(unlisted, jnp.nan, poisoned[name]) for name in ("key", "value")}
    clean, result = (_run(call, arrays, "xla") for arrays in (call.arrays, poisoned))
    jax.tree.map(np.testing.assert_array_equal, result, clean)
    assert (np.asarray(clean[0]["key"])[:, unlisted[0, :, 0, 0]] == 0).all()


def test_memory_is_linear():
    def bytes_for(tokens, block):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
        indices = jax.ShapeDtypeStruct((1, 1, tokens // block, 4), jnp.int32)

        def loss(x, indices):
            mask = masks.blocks(indices, jnp.full(indices.shape[:-1], 4), block, block)
            return tiled_attention(x, x, x, mask=mask).sum()

        compiled = jax.jit(jax.grad(loss)).lower(x, indices).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for block in (lambda tokens: 32, lambda tokens: tokens // 4):
        assert bytes_for(8192, block(8192)) <= 2.1 * bytes_for(4096, block(4096))
