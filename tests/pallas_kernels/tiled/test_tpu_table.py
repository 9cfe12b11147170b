"""The table of relative positions in the TPU kernels of tiled attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention, tiles, tpu_backward
from tests.numerics import assert_close
from tests.tpu import compile_for_tpu, interpreted

pytestmark = pytest.mark.usefixtures("quick_compilation")

OFFSET = np.array([3, 50])
TILES = (128, 128)


def _blocks(size):
    indices = np.array([[[[0, 1], [1, 2], [0, 2]]]])
    return masks.blocks(indices, np.array([[[2, 2, 1]]]), size, size)


def _arrays(batch=1, queries=200, keys=300, heads=2, key_heads=1, tables=2, reach=20):
    """Returns the arrays that a call is differentiated by."""
    random = np.random.default_rng(0)
    shapes = {
        "query": (batch, queries, heads, 16),
        "key": (batch, keys, key_heads, 16),
        "value": (batch, keys, key_heads, 24),
        "relative_bias": (tables, 2 * reach + 1),
    }
    return {name: np.float32(random.normal(size=shape)) for name, shape in shapes.items()}


def _results(arrays, **options):
    """Returns results of a call and gradients by all arrays."""
    random = np.random.default_rng(1)
    shape = arrays["query"].shape[:3]
    cotangents = random.normal(size=(*shape, 24)), random.normal(size=shape)
    normalised = options.get("weights") != "sigmoid"

    @jax.jit
    def run(arrays):
        def loss(arrays):
            results = tiled_attention(**arrays, return_lse=normalised, **options)
            results = results if normalised else (results,)
            # Rows without keys have a log-sum-exp of -inf.
            finite = [jnp.where(jnp.isneginf(x), 0, x) for x in results]
            return sum(map(jnp.vdot, finite, cotangents)), results

        return jax.grad(loss, has_aux=True)(arrays)

    return jax.block_until_ready(run(arrays))


def _check(arrays, **options):
    """Compares the kernels, in TPU interpret mode, with the definition in float64."""
    with jax.enable_x64(True):
        wide = {name: np.float64(x) for name, x in arrays.items()}
        reference = jax.device_get(_results(wide, implementation="reference", **options))
    with interpreted():
        actual = _results(arrays, implementation="pallas_tpu", **options)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype("float32")}
    assert_close(actual, reference)


@pytest.fixture
def generation(request, monkeypatch):
    """Makes the kernels those of a generation of TPUs."""
    monkeypatch.setattr(tiles, "generation", lambda: request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


CALLS = {
    "tiles, offset of each row": (
        {"batch": 2, "heads": 4, "key_heads": 2, "tables": 4},
        {"query_offset": OFFSET, "mask": masks.causal(OFFSET), "tile_sizes": TILES},
    ),
    "reach beyond all, after all other terms": (
        {"reach": 900},
        {
            "query_offset": -7,
            "logits_soft_cap": 2.0,
            "logit_bias": 0.3,
            "alibi_slopes": np.float32([0.1, 0.02]),
            "sink": np.float32([0, 1]),
        },
    ),
    # Gradients of a softmax's scores add up to 0, up to rounding, where all get the same term.
    "queries before and after all keys": (
        {"batch": 2, "reach": 3},
        {"query_offset": np.array([-1000, 4000]), "weights": "sigmoid", "tile_sizes": (256, 128)},
    ),
    "one table, rows without keys": (
        {"batch": 2, "tables": 1, "reach": 100},
        {"query_offset": 60, "mask": masks.causal(-4), "tile_sizes": TILES},
    ),
    "tall tiles": ({"queries": 600, "keys": 140}, {"query_offset": -300}),
    "wide tiles, softplus": (
        {"reach": 64},
        {"weights": "softplus", "tile_sizes": (128, 256)},
    ),
    "one query, reach of 0": ({"queries": 1, "keys": 7, "reach": 0}, {"query_offset": 5}),
    "blocks": ({"queries": 300, "keys": 380}, {"mask": _blocks(128), "query_offset": 9}),
}


# What a generation has of its own does not depend on the table, so these show it.
GENERATION_6 = ("tiles, offset of each row", "tall tiles")


@pytest.mark.usefixtures("generation")
@pytest.mark.parametrize(
    ("generation", "call"),
    [(6 if call in GENERATION_6 else 5, call) for call in CALLS],
    indirect=["generation"],
)
def test_results_and_gradients(call):
    shapes, options = CALLS[call]
    _check(_arrays(**shapes), **options)


@pytest.mark.usefixtures("generation")
@pytest.mark.parametrize("generation", [6], indirect=True)
def test_spans_of_queries(monkeypatch):
    """The sums of several kernels, of some queries each, are added up."""
    monkeypatch.setattr(tpu_backward, "SPAN_BYTES", 1)
    _check(_arrays(), query_offset=20, tile_sizes=TILES)


def test_vmap_over_tables():
    arrays = _arrays(batch=2, queries=40, keys=150)
    table = np.stack([arrays["relative_bias"], 2 * arrays["relative_bias"][:, ::-1]])

    def gradients(table, implementation):
        def loss(table, query):
            out = tiled_attention(
                **(arrays | {"query": query, "relative_bias": table}), implementation=implementation
            )
            return jnp.sum(jnp.square(out))

        grad = jax.grad(loss, (0, 1))
        return jax.jit(jax.vmap(grad, (0, None)))(table, arrays["query"])

    with interpreted():
        actual = jax.block_until_ready(gradients(table, "pallas_tpu"))
    assert_close(actual, gradients(table, "xla"))


def test_blocks_that_are_too_small_are_refused():
    arrays = _arrays(queries=190, keys=190)
    with pytest.raises(NotImplementedError, match=r"relative_bias, .* 128 tokens; got block_q 64"):
        tiled_attention(**arrays, mask=_blocks(64), implementation="pallas_tpu")


COMPILED = {
    "long": (
        "bfloat16",
        {"queries": 3000, "keys": 4000, "reach": 500},
        {"mask": masks.causal(1000)},
    ),
    "short": ("float32", {"queries": 20, "keys": 10}, {}),
    "tiles": ("float32", {}, {"tile_sizes": TILES}),
    "blocks": ("float32", {"queries": 300, "keys": 380}, {"mask": _blocks(128)}),
}


# Tiles of the default size on the generation where they are larger, others on one or both.
@pytest.mark.parametrize(
    ("call", "topology"),
    [
        *((call, "v5e:2x2") for call in COMPILED if call != "long"),
        *((call, "v6e:2x2") for call in ("long", "tiles")),
    ],
)
def test_compiles(call, topology):
    dtype, shapes, options = COMPILED[call]
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype if name == "relative_bias" else dtype)
        for name, x in _arrays(**shapes).items()
    }

    def loss(arrays):
        out = tiled_attention(**arrays, **options, implementation="pallas_tpu")
        return jnp.sum(out.astype(jnp.float32))

    text = compile_for_tpu(jax.value_and_grad(loss), arrays, topology=topology).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
