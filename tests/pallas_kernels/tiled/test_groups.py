"""Groups of keys that compete by their landmarks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.tiled import tiled_attention
from tests.numerics import assert_close
from tests.oracles import tiled_attention as oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, S, N, K, H, V, SIZE = 2, 13, 24, 4, 2, 8, 6, 4
RNG = np.random.default_rng(0)
ARRAYS = {
    "query": RNG.normal(size=(B, T, N, H)),
    "key": RNG.normal(size=(B, S, K, H)),
    "value": RNG.normal(size=(B, S, K, V)),
    "bias": RNG.normal(size=(B, N, T, S)),
    "alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0]),
    "sink": np.array([-1.0, 0.0, 1.0, 3.0]),
}
OFFSET = np.array([3, 11])
LISTS = masks.blocks(
    np.array([[[[0, 2], [1, 0], [0, 0]], [[1, 2], [0, 1], [2, 0]]]]),
    np.array([[[2, 1, 0], [2, 2, 1]]]),
    5,
    8,
)
# Some landmarks are masked, some groups but for their landmarks, and whole rows.
CASES = {
    "tiles": (("bias", "alibi_slopes", "sink"), masks.causal(OFFSET) & masks.window(9, 0, OFFSET)),
    "capped, dense": ((), masks.dense(RNG.random((B, N, T, S)) < 0.6)),
    "lists": (("alibi_slopes",), LISTS & masks.dense(RNG.random((1, 1, T, S)) < 0.6)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, x64):
    terms, mask = CASES[name]
    options = {"mask": mask, "query_offset": OFFSET, "group_size": SIZE}
    if name.startswith("capped"):
        options["logits_soft_cap"] = 2.0  # with a bound, so with no running maximum
    arrays = {x: jnp.asarray(ARRAYS[x]) for x in ("query", "key", "value", *terms)}
    out_weights, lse_weights = RNG.normal(size=(B, T, N, V)), RNG.normal(size=(B, T, N))

    def loss(implementation, arrays):
        results = tiled_attention(
            **arrays, **options, return_lse=True, implementation=implementation, tile_sizes=(5, 10)
        )
        finite = jnp.where(jnp.isneginf(results[1]), 0, results[1])
        return jnp.vdot(results[0], out_weights) + jnp.vdot(finite, lse_weights), results

    @jax.jit
    def run(arrays):
        return [
            jax.grad(functools.partial(loss, implementation), has_aux=True)(arrays)
            for implementation in ("xla", "reference")
        ]

    (gradients, results), (defined_gradients, defined) = run(arrays)
    allowed = np.asarray(mask.resolve(masks.Shape(T, S, B, N, K)).to_dense(T, S))
    if allowed.shape[1] == K:
        allowed = np.repeat(allowed, N // K, axis=1)
    of_oracle = {n: x for n, x in options.items() if n != "mask"}
    wanted = oracle.tiled_attention(**arrays, **of_oracle, allowed=allowed)
    assert "sink" in terms or np.isneginf(wanted[1]).any()
    assert_close(results, wanted, jnp.float64)
    assert_close(defined, wanted, jnp.float64)
    assert_close(gradients, defined_gradients, jnp.float64)


def test_scores_of_ten_thousand_and_low_precision():
    query, key, value = (jnp.asarray(ARRAYS[x], jnp.float32) for x in ("query", "key", "value"))

    @functools.partial(jax.jit, static_argnums=0)
    def run(scale, *arrays):
        def loss(implementation, *arrays):
            out = tiled_attention(
                *arrays, scale=scale, group_size=SIZE, implementation=implementation
            )
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return [
            jax.grad(functools.partial(loss, implementation), (0, 1, 2), has_aux=True)(*arrays)
            for implementation in ("xla", "reference")
        ]

    # Integers, so that scores are exact. Of weights, exp(score - lse), the backward can know no
    # more than lse holds: 24 bits of 1e4.
    large = jnp.round(4 * query), jnp.round(4 * key)
    scores = 256 * jnp.einsum("btnh,bsnh->bnts", large[0][:, :, ::2], large[1])
    assert jnp.abs(scores).max() > 1e4
    (gradients, out), (defined, expected) = run(256.0, *large, value)
    wanted = oracle.tiled_attention(*large, value, scale=256.0, group_size=SIZE)[0]
    assert_close((out, expected), (wanted, wanted))
    assert_close(gradients, defined, factor=float(jnp.abs(scores).max()) * 2**-24 / 2e-6)

    low = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    out = jax.jit(functools.partial(tiled_attention, group_size=SIZE))(*low)
    wanted = oracle.tiled_attention(*low, group_size=SIZE)[0]
    assert_close(out, wanted, jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(group_size=5), "group_size: .* at least 2 that divides the 24 keys; got 5"),
        (dict(group_size=1), "group_size: .* got 1"),
        (dict(group_size=3, mask=LISTS), "group_size: 3 does not divide block_k, 8"),
        (dict(group_size=4, weights="relu"), "group_size: is of softmax weights"),
        (dict(group_size=4, row_statistic=np.zeros(N)), "group_size: .* without a row_statistic"),
    ),
)
def test_wrong_arguments(options, message):
    arrays = [ARRAYS[x].astype(np.float32) for x in ("query", "key", "value")]
    with pytest.raises(ValueError, match=message):
        tiled_attention(*arrays, **options)
    with pytest.raises(
        NotImplementedError,
        match=r"'pallas_tpu' .*: groups of keys must have 8, .* 128 keys; got 4",
    ):
        tiled_attention(*arrays, group_size=4, implementation="pallas_tpu")
