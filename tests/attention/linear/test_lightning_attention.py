"""Lightning attention: the paper's three forms, its limits, its slopes and its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import (
    LinearState,
    init_lightning_attention_state,
    lightning_attention,
    lightning_attention_step,
    transnormer_slopes,
)
from attention.positions import alibi_slopes, init_lrpe_theta, lrpe
from tests.numerics import assert_close
from tests.oracles.lightning_attention import lightning_attention as oracle

SLOPES = (0.9, 0.3, 0.05, 0.0)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def inputs(tokens=29, heads=4, kv_heads=4, dtype=jnp.float64, batch=2):
    rng = np.random.default_rng(0)
    shapes = (
        (batch, tokens, heads, 8),
        (batch, tokens, kv_heads, 8),
        (batch, tokens, kv_heads, 6),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("implementation", (None, "xla", "reference"))
@pytest.mark.parametrize("slopes", (None, SLOPES, np.float32(SLOPES)), ids=("0", "tuple", "array"))
def test_equation(slopes, implementation, x64):
    query, key, value = inputs(kv_heads=2)
    options = dict(slopes=slopes, scale=0.5, implementation=implementation)
    out, state = lightning_attention(query, key, value, **options, return_state=True, chunk_size=8)
    expected = oracle(query, key, value, slopes, 0.5)
    assert_close((out, state.memory), expected, jnp.float64)
    out = lightning_attention(query, key, value, **options)
    assert_close(out, expected[0], jnp.float64)


def test_parallel_chunked_and_recurrent_forms_agree(x64):
    query, key, value = inputs()
    distance = np.arange(29)[:, None] - np.arange(29)
    decays = np.exp(-np.array(SLOPES)[:, None, None] * np.maximum(distance, 0))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * np.where(distance >= 0, decays, 0)
    parallel = jnp.einsum("bnts,bsnv->btnv", scores, value)
    for size in (1, 4, 29, 64):
        chunked = lightning_attention(query, key, value, slopes=SLOPES, chunk_size=size)
        assert_close(chunked, parallel, jnp.float64)
    recurrent = lightning_attention(query, key, value, slopes=SLOPES, implementation="reference")
    assert_close(recurrent, parallel, jnp.float64)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_limits_of_the_slopes(implementation, x64):
    query, key, value = inputs()
    products = key[..., :, None] * value[..., None, :]
    for slopes in (None, (0,) * 4):
        out = lightning_attention(query, key, value, slopes=slopes, implementation=implementation)
        plain = jnp.einsum("btnh,btnhv->btnv", query, jnp.cumsum(products, axis=1))
        assert_close(out, plain, jnp.float64)
    for slope in (np.inf, 1e30, 1000.0):
        slopes = (slope,) * 4
        out = lightning_attention(query, key, value, slopes=slopes, implementation=implementation)
        alone = jnp.sum(query * key, axis=-1, keepdims=True) * value
        assert_close(out, alone, jnp.float64)


def test_learned_slopes(x64):
    query, key, value = inputs()
    weight = np.random.default_rng(1).standard_normal(value.shape)

    def loss(slopes):
        out = lightning_attention(query, key, value, slopes=slopes, chunk_size=8)
        return jnp.sum(out * weight)

    gradient = jax.jit(jax.grad(loss))(jnp.array(SLOPES))
    step = 1e-5
    for head in range(3):
        ends = [
            np.sum(oracle(query, key, value, np.array(SLOPES) + sign * step * np.eye(4)[head])[0]
                   * weight)
            for sign in (1, -1)
        ]  # fmt: skip
        np.testing.assert_allclose(gradient[head], (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
def test_prompt_then_steps_is_one_pass(dtype, implementation):
    query, key, value = inputs(tokens=20, kv_heads=2, dtype=dtype)
    options = dict(slopes=SLOPES, implementation=implementation)
    expected, last = lightning_attention(query, key, value, **options, return_state=True)

    state = init_lightning_attention_state(2, 99, 4, 2, 8, 6, dtype)
    assert state.memory.dtype == jnp.float32
    step = jax.jit(lambda state, *tokens: lightning_attention_step(state, *tokens, **options))
    out, state = step(state, query[:, :13], key[:, :13], value[:, :13])

    def one(state, token):
        out, state = lightning_attention_step(state, *(x[:, None] for x in token), **options)
        return state, out[:, 0]

    rest = [jnp.moveaxis(x[:, 13:], 1, 0) for x in (query, key, value)]
    state, outs = jax.jit(lambda *args: jax.lax.scan(one, *args))(state, rest)
    assert outs.dtype == out.dtype == dtype
    out = jnp.concatenate((out, jnp.moveaxis(outs, 0, 1)), axis=1)
    assert_close((out, state.memory), (expected, last.memory), dtype)


def test_steps_under_vmap_and_their_gradient(x64):
    query, key, value = inputs(tokens=6)
    options = dict(slopes=SLOPES)

    def steps(query, key, value):
        state = init_lightning_attention_state(1, 6, 4, 4, 8, 6, jnp.float64)
        outs = []
        for t in range(6):
            token = (x[None, t : t + 1] for x in (query, key, value))
            out, state = lightning_attention_step(state, *token, **options)
            outs.append(out[0])
        return jnp.concatenate(outs)

    def loss(fn):
        return lambda *args: jnp.sum(jnp.sin(fn(*args)))

    actual = jax.jit(jax.grad(loss(jax.vmap(steps)), argnums=(0, 1, 2)))(query, key, value)
    whole = jax.grad(loss(lambda *a: lightning_attention(*a, **options)), argnums=(0, 1, 2))
    assert_close(actual, whole(query, key, value), jnp.float64)


def test_relative_positions_pass_through_the_memory(x64):
    """With LRPE the product of queries with the memory sees distances only."""
    query, key, value = inputs(tokens=9)
    theta = init_lrpe_theta(4, 8)

    def call(shift):
        at = jnp.arange(9) + shift
        return lightning_attention(
            lrpe(query, theta, at), lrpe(key, theta, at), value, slopes=SLOPES, chunk_size=4
        )

    assert_close(call(500), call(0), jnp.float64, factor=20)


def test_transnormer_slopes():
    base = alibi_slopes(12).astype(np.float64)
    for layer in range(4):
        expected = base * (1 - layer / 3 + 1e-5)
        np.testing.assert_allclose(transnormer_slopes(layer, 4, 12), expected, rtol=1e-12)
        expected = [8 * h / 12 * (1 - layer / 4) for h in range(12)]
        np.testing.assert_allclose(transnormer_slopes(layer, 4, 12, "paper"), expected, rtol=1e-12)
    assert max(transnormer_slopes(3, 4, 12)) < 1e-5
    assert transnormer_slopes(0, 4, 12, decay="paper")[0] == 0
    np.testing.assert_allclose(transnormer_slopes(0, 1, 12), base * (1 + 1e-5), rtol=1e-12)
    assert all(type(slope) is float for slope in transnormer_slopes(0, 1, 12))
    assert len(set(transnormer_slopes(0, 2, 12))) == 12
    hash(transnormer_slopes(0, 2, 12))


QUERY, KEY, VALUE = inputs(tokens=5, kv_heads=2, dtype=jnp.float32)


@pytest.mark.parametrize(
    "options, error, message",
    (
        (dict(slopes=(0.1, 0.2)), ValueError, r"slopes: .*\(4,\).*\(2,\)"),
        (dict(slopes=(0.1, 0.2, -0.3, 0)), ValueError, "slopes: must be at least 0"),
        (dict(slopes=np.array([0, 0, 0, np.nan])), ValueError, "slopes: must be at least 0"),
        (dict(slopes=("a",) * 4), TypeError, "slopes: must be numbers"),
        (dict(slopes=jnp.ones(4, int)), TypeError, "slopes: .*int32"),
        (dict(segment_ids=jnp.zeros((2, 4), int)), ValueError, "segment_ids"),
        (dict(initial_state=jnp.zeros((2, 4, 8, 6))), TypeError, "initial_state"),
        (dict(chunk_size=-1), ValueError, "chunk_size"),
        (dict(implementation="cudnn"), ValueError, "lightning_attention: implementation"),
        (
            dict(implementation="pallas_gpu", value=jnp.tile(VALUE, 40)),
            NotImplementedError,
            "lightning_attention: implementation 'pallas_gpu' .*at most 192; got 240",
        ),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        lightning_attention(**dict(query=QUERY, key=KEY, value=VALUE) | options)


def test_wrong_state_or_layer():
    with pytest.raises(TypeError, match="state: must be a LinearState; got ndarray"):
        lightning_attention_step(np.zeros((2, 4, 8, 6)), QUERY, KEY, VALUE)
    state = LinearState(jnp.zeros((1, 4, 8, 6)))
    with pytest.raises(ValueError, match=r"initial_state: .*\(1, 4, 8, 6\).*\(2, 4, 8, 6\)"):
        lightning_attention_step(state, QUERY, KEY, VALUE)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"layer: {layer} must be from 0 to .* 3"):
            transnormer_slopes(layer, 4, 8)
    with pytest.raises(ValueError, match="decay: 'linear'"):
        transnormer_slopes(0, 4, 8, decay="linear")
    with pytest.raises(ValueError, match="num_heads: 0"):
        transnormer_slopes(0, 4, 0)


def test_public_names():
    assert attention.LinearState is LinearState
    assert attention.catalogue.get("lightning_attention").function is lightning_attention
