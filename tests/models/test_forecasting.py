"""The Autoformer: its equations, what it leaves unchanged, other mechanisms, dtypes, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from models.forecasting import Autoformer, ForecasterConfig, SeasonalNorm, parameter_count
from models.layers import CrossAttentionLayer
from tests.models.oracles import gelu_tanh
from tests.numerics import assert_close
from tests.oracles import auto_correlation as oracle

CONFIG = ForecasterConfig(
    channels=3,
    outputs=2,
    horizon=5,
    label_length=4,
    features=8,
    num_heads=2,
    encoder_layers=1,
    window=4,
    options={"factor": 2},
)
INPUTS = np.random.default_rng(0).standard_normal((2, 11, 3)).astype(np.float32)


def make(**changes):
    return Autoformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


@nnx.jit
def run(model, inputs):
    return model(inputs)


def circular(x, p):
    """A convolution of three times, around the ends; x [T, D]."""
    kernel = p["kernel"]
    return np.stack(
        [sum(x[(t + i - 1) % len(x)] @ kernel[i] for i in range(3)) for t in range(len(x))]
    )


def decomposed(x):
    """The rest and the mean of four times, one before and two after, with the ends repeated."""
    trend = np.stack(
        [
            np.mean([x[min(max(t + i, 0), len(x) - 1)] for i in (-1, 0, 1, 2)], axis=0)
            for t in range(len(x))
        ]
    )
    return x - trend, trend


def attended(x, memory, p):
    """Auto-correlation of two heads, of which the memory is cut to as many times."""

    def heads(x, p):
        return (x @ p["kernel"] + p["bias"]).reshape(1, -1, 2, 4)

    key, value = (heads(memory[: len(x)], p[name]) for name in ("key", "value"))
    out = oracle.auto_correlation(heads(x, p["query"]), key, value, factor=2)
    return out.reshape(len(x), 8) @ p["out"]["kernel"] + p["out"]["bias"]


def fed(x, p):
    return gelu_tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def normed(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * p["scale"] + p["bias"]
    return x - x.mean(axis=0)


def forecast(inputs, p):
    """The whole model on one row [T, C], with inputs no shorter than the decoder's sequence."""
    memory = circular(inputs, p["encoder_embed"])
    layer = p["encoder"][0]
    memory, _ = decomposed(memory + attended(memory, memory, layer["attention"]))
    memory, _ = decomposed(memory + fed(memory, layer["feed_forward"]))
    memory = normed(memory, p["encoder_norm"])
    season, trend = decomposed(inputs)
    x = circular(np.concatenate([season[-4:], np.zeros((5, 3))]), p["decoder_embed"])
    trend = np.concatenate([trend[-4:], np.tile(inputs.mean(axis=0), (5, 1))])[:, :2]
    layer = p["decoder"][0]
    x, first = decomposed(x + attended(x, x, layer["attention"]))
    x, second = decomposed(x + attended(x, memory, layer["cross_attention"]))
    x, third = decomposed(x + fed(x, layer["feed_forward"]))
    trend = trend + circular(first + second + third, layer["trend"])
    head = p["head"]
    return (normed(x, p["decoder_norm"]) @ head["kernel"] + head["bias"] + trend)[-5:]


def test_is_its_equations():
    model = make()
    state = nnx.state(model, nnx.Param)
    # Gains and biases that are not 1 and 0.
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), state)
    nnx.update(model, moved)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(moved))
    found = run(model, INPUTS)
    assert found.shape == (2, 5, 2) and found.dtype == jnp.float32
    expected = np.stack([forecast(row, p) for row in INPUTS.astype(np.float64)])
    # Rounding adds up over seven sublayers.
    assert_close(found, expected, factor=3)
    assert parameter_count(CONFIG) == sum(x.size for x in jax.tree.leaves(p))


def test_of_a_constant_series():
    """It has no season, so but for biases, which start at 0, nothing is added to its mean."""
    constant = np.broadcast_to(np.float32([[1], [-2]])[..., None], (2, 11, 3))
    found = run(make(), constant)
    # The decoder's embedding sees zeros; the encoder's memory is the same at all times.
    np.testing.assert_allclose(found, constant[:, :5, :2], atol=1e-5)


def test_norm_has_no_mean_over_time():
    norm = SeasonalNorm(3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.asarray(run(norm, INPUTS + 3)).mean(axis=1), 0, atol=1e-6)
    assert nnx.eval_shape(norm, jnp.zeros((2, 7, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_encoder_goes_around():
    """Embedding and auto-correlation do not know where a series begins."""
    model = make()
    x = jnp.asarray(INPUTS)

    @nnx.jit
    def attend(model, x):
        x = model.encoder_embed(x)
        return model.encoder[0].attention(x)

    assert_close(attend(model, jnp.roll(x, 3, axis=1)), jnp.roll(attend(model, x), 3, axis=1))


def test_another_mechanism_and_dtype():
    """Rows are forecast by themselves, and every column of the inputs reaches the forecast."""
    model = make(mechanism="softmax_attention", options={})
    found = run(model, INPUTS)
    assert found.shape == (2, 5, 2)
    for column in range(3):
        changed = INPUTS.copy()
        changed[1, 0, column] += 1
        moved = run(model, changed)
        np.testing.assert_array_equal(found[0], moved[0])
        assert (np.asarray(found[1]) != np.asarray(moved[1])).all()

    narrow = make(mechanism="softmax_attention", options={}, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype("float32")}
    assert nnx.eval_shape(narrow, INPUTS).dtype == jnp.float32
    memory = nnx.eval_shape(lambda x: narrow.encoder[0](narrow.encoder_embed(x)), INPUTS)
    assert memory.dtype == jnp.bfloat16


def test_training_lowers_the_loss():
    """Waves are learnt, and every matrix has gradients."""
    times = np.arange(11 + 5) + np.arange(16)[:, None]
    waves = np.sin(2 * np.pi * times[..., None] / np.array([6, 8, 12])).astype(np.float32)
    graph, parameters = nnx.split(make(), nnx.Param)
    # One vector: an optimiser of each of forty arrays takes long to compile.
    vector, tree = ravel_pytree(parameters)
    optimizer = optax.adam(0.01)

    def loss(vector):
        error = nnx.merge(graph, tree(vector))(waves[:, :11]) - waves[:, 11:, :2]
        return (error**2).mean()

    @jax.jit
    def train(vector):
        def step(state, _):
            vector, optimizer_state = state
            value, gradient = jax.value_and_grad(loss)(vector)
            update, optimizer_state = optimizer.update(gradient, optimizer_state)
            return (vector + update, optimizer_state), (value, jnp.abs(gradient))

        return jax.lax.scan(step, (vector, optimizer.init(vector)), length=60)[1]

    losses, sizes = train(vector)
    assert losses[-1] < 0.2 * losses[0]
    # Biases of queries and keys change no lag, and the encoder's are taken off with its trends.
    leaves = jax.tree_util.tree_leaves_with_path(tree(sizes.max(axis=0)))
    found = {jax.tree_util.keystr(path): float(x.max()) for path, x in leaves}
    assert not [name for name, size in found.items() if "kernel" in name and size < 1e-6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": 4}, "outputs: 4 must be at most the 3 channels"),
        ({"num_heads": 3}, "num_heads: 3 must divide the 8 features"),
        ({"window": 0}, "window: 0 must be at least 1"),
        ({"dtype": "float8"}, "dtype: 'float8' must be one of"),
        ({"mechanism": "lightning_attention", "options": {}}, "does not support is_causal=False"),
        (
            {"mechanism": "diag_attention", "options": {}},
            "mechanism: 'diag_attention' does not attend to another sequence",
        ),
        ({"options": {"factors": 2}}, "options: 'factors' is not an option of auto_correlation"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: make(**changes))


def test_wrong_inputs():
    model = make()
    with pytest.raises(ValueError, match=r"inputs: shape \(2, 11, 2\) must be \[batch, times, 3\]"):
        model(INPUTS[..., :2])
    with pytest.raises(ValueError, match="inputs: 3 times, but label_length is 4"):
        model(INPUTS[:, :3])
    layer = CrossAttentionLayer(8, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, 8))
    with pytest.raises(ValueError, match=r"memory: shape \(1, 3, 8\) must be \[2, tokens, 8\]"):
        layer(x, x[:1, :3])
    with pytest.raises(ValueError, match="positions: 'rope', but cross-attention has none"):
        CrossAttentionLayer(8, 2, positions="rope", rngs=nnx.Rngs(0))
