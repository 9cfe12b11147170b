"""Vision transformers: oracle, equivariances, mechanisms that are full attention, sizes, errors."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention import catalogue
from models.layers import GridAttentionLayer, LayerNorm
from models.vision import PyramidTransformer, VisionTransformer
from models.vision_config import (
    PyramidConfig,
    StageConfig,
    ViTConfig,
    agent_deit,
    biformer,
    nat,
    parameter_count,
    soft_tiny,
)
from tests.models import oracles
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = ViTConfig(features=16, num_layers=2, num_heads=2, hidden_features=24)
MEAN = dataclasses.replace(SMALL, pooling="mean", positions="none", num_layers=1)
STAGES = (
    StageConfig(features=8, num_heads=2, depth=1),
    StageConfig(features=12, num_heads=3, depth=2, hidden_features=20),
)
PYRAMID = PyramidConfig(stages=STAGES, image_size=24, channels=2, num_classes=3, stem_layers=1)


def kind_of(config):
    return PyramidTransformer if isinstance(config, PyramidConfig) else VisionTransformer


def make(config):
    """A model with parameters of NumPy, all of them drawn: nothing is compiled for it."""
    return filled(abstract(config))


def filled(model):
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        inputs = math.prod(leaf.shape[:-1])
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            noise /= math.sqrt(inputs)
        return jnp.asarray(noise if "kernel" in name else 0.2 * noise + ("scale" in name))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def abstract(config):
    return nnx.eval_shape(lambda: kind_of(config)(config, rngs=nnx.Rngs(0)))


def images_of(config, batch=2, seed=0):
    shape = (batch, config.image_size, config.image_size, config.channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@nnx.jit
def run(model, images):
    return model(images)


def with_parameters_of(model, config):
    """A model of another configuration with the same parameters."""
    return nnx.merge(nnx.graphdef(abstract(config)), nnx.state(model))


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def vit(image, p, config):
    """A vision transformer in NumPy, for one image, patch by patch and head by head."""
    size, heads = config.patch_size, config.num_heads
    height, width = config.grid
    x = []
    for i in range(height):
        for j in range(width):
            patch = image[i * size : (i + 1) * size, j * size : (j + 1) * size]
            x.append(np.tensordot(patch, p["embed"]["kernel"], 3) + p["embed"]["bias"])
    x = np.array([p["class_token"], *x] if config.pooling == "class" else x)
    if config.positions == "learned":
        x = x + p["positions"]
    for i in range(config.num_layers):
        layer = p["layers"][i]
        y, a = layer_norm(x, layer["attention_norm"]), layer["attention"]
        q, k, v = (np.split(linear(y, a[n]), heads, -1) for n in ("query", "key", "value"))
        mixed = []
        for n in range(heads):
            scores = np.exp(q[n] @ k[n].T / math.sqrt(q[n].shape[-1]))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[n])
        x = x + linear(np.concatenate(mixed, -1), a["out"])
        y, f = layer_norm(x, layer["feed_forward_norm"]), layer["feed_forward"]
        x = x + linear(oracles.gelu_tanh(linear(y, f["up"])), f["down"])
    x = layer_norm(x, p["final_norm"])
    return linear(x[0] if config.pooling == "class" else x.mean(0), p["head"])


@pytest.mark.parametrize("config", (SMALL, MEAN), ids=("class token", "mean"))
def test_vit_is_its_equations(config):
    model, images = make(config), images_of(config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    expected = np.stack([vit(image.astype(np.float64), p, config) for image in images])
    logits = run(model, images)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected, factor=2)


def patches_moved(images, config, order):
    """Images whose patches are in another order."""
    size, (height, width) = config.patch_size, config.grid
    x = images.reshape(len(images), height, size, width, size, -1).swapaxes(2, 3)
    x = x.reshape(len(images), height * width, size, size, -1)[:, order]
    x = x.reshape(len(images), height, width, size, size, -1).swapaxes(2, 3)
    return x.reshape(images.shape)


def test_the_order_of_patches():
    """It is of no meaning without positions and convolutions, and of some with either."""
    order = np.random.default_rng(1).permutation(16)
    single = dataclasses.replace(SMALL, num_layers=1)
    cases = {
        dataclasses.replace(single, positions="none"): True,
        dataclasses.replace(MEAN, value_convolution=3): False,
        single: False,
    }
    for config, same in cases.items():
        model, images = make(config), images_of(config)
        outs = run(model, images), run(model, patches_moved(images, config, order))
        if same:
            assert_close(*outs, factor=2)
        else:
            assert np.abs(outs[0] - outs[1]).max() > 1e-3


@pytest.mark.parametrize("class_token", (False, True))
def test_value_convolution(class_token):
    """What it adds is a convolution of each channel of the values, place by place."""
    height, width, first = 3, 4, int(class_token)
    layer = nnx.eval_shape(
        lambda: GridAttentionLayer(
            12,
            6,
            num_kv_heads=3,
            grid=(height, width),
            class_token=class_token,
            value_convolution=5,
            rngs=nnx.Rngs(0),
        )
    )
    layer = filled(layer)
    x = np.random.default_rng(1).standard_normal((2, first + height * width, 12))
    x = x.astype(np.float32)
    with_convolution = run(layer, x)
    kernel = np.asarray(layer.value_convolution.kernel[...], np.float64)[:, :, 0]
    bias = np.asarray(layer.value_convolution.bias[...], np.float64)
    del layer.value_convolution
    value = np.asarray(layer.value(x), np.float64)
    added = np.zeros(value.shape)
    for i, j, c in np.ndindex(height, width, 6):
        for y, z in np.ndindex(height, width):
            if abs(y - i) <= 2 and abs(z - j) <= 2:
                weight = kernel[y - i + 2, z - j + 2, c]
                added[:, first + i * width + j, c] += weight * value[:, first + y * width + z, c]
    added[:, first:] += bias
    # Every value head serves two query heads.
    added = added.reshape(2, -1, 3, 1, 2).repeat(2, 3).reshape(2, -1, 12)
    expected = run(layer, x) + added @ np.asarray(layer.out.kernel[...], np.float64)
    assert_close(with_convolution, expected, factor=2)


def test_mechanisms_that_see_everything_are_full_attention():
    """Neighbourhoods as large as the grid, then all regions chosen: with the same parameters."""
    assert PYRAMID.grids == ((12, 12), (6, 6))
    first = {"mechanism": "neighborhood_attention", "options": {"window": 12}}
    second = {"mechanism": "bi_level_routing_attention", "options": {"regions": 2, "top_k": 4}}
    full, other = (
        dataclasses.replace(
            PYRAMID,
            stages=tuple(
                dataclasses.replace(stage, depth=1, **options)
                for stage, options in zip(STAGES, changes, strict=True)
            ),
        )
        for changes in (({}, {}), (first, second))
    )
    model, images = make(full), images_of(full)
    assert_close(run(with_parameters_of(model, other), images), run(model, images), factor=4)


def test_a_neighbourhood_sees_no_further():
    """Of one stage and no convolution over places, a far pixel changes no token but its own."""
    config = dataclasses.replace(
        SMALL, pooling="mean", num_layers=1, mechanism="neighborhood_attention",
        options={"window": 3}, image_size=16,
    )  # fmt: skip
    block = make(config).layers[0]
    x = np.random.default_rng(0).standard_normal((1, 64, 16)).astype(np.float32)
    moved = x + (np.arange(64) == 0)[:, None].astype(np.float32)
    changed = np.any(run(block, x) != run(block, moved), axis=(0, 2)).reshape(8, 8)
    # Windows are moved at borders, so that those of the first three rows begin with the first two.
    assert changed[:2, :2].all() and not changed[3:].any() and not changed[:, 3:].any()


def test_bfloat16_and_odd_sides():
    """Every part of the layouts, at a small size: logits are float32 and near those of float32."""
    stages = tuple(
        dataclasses.replace(stage, value_convolution=5, position_convolution=3, depth=1)
        for stage in STAGES
    )
    changes = {"image_size": 18, "stem_layers": 2, "stem_activation": True, "post_norm": True}
    config = dataclasses.replace(PYRAMID, stages=stages, **changes)
    assert config.grids == ((5, 5), (3, 3))
    model, images = make(config), images_of(config)
    narrow = with_parameters_of(model, dataclasses.replace(config, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype("float32")}
    logits, rounded = run(model, images), run(narrow, images)
    assert rounded.dtype == logits.dtype == jnp.float32 and logits.shape == (2, 3)
    assert_close(rounded, logits, jnp.bfloat16, factor=3)


def test_remat_computes_blocks_again():
    def program(remat):
        config = dataclasses.replace(SMALL, remat=remat)
        graph, state = nnx.split(make(config))

        def loss(state):
            return jnp.sum(nnx.merge(graph, state)(images_of(config)))

        return str(jax.make_jaxpr(jax.grad(loss))(state))

    assert program(True).count("remat") >= SMALL.num_layers and "remat" not in program(False)


VARIANTS = {
    "class token": SMALL,
    "mean": MEAN,
    "grouped": dataclasses.replace(SMALL, num_kv_heads=1, value_convolution=3, norm="rms"),
    "gated": dataclasses.replace(SMALL, feed_forward="swiglu", hidden_features=None, norm="srms"),
    "colours": dataclasses.replace(SMALL, channels=3, image_size=12, patch_size=4),
    "pyramid": PYRAMID,
    "one convolution": dataclasses.replace(PYRAMID, stem_layers=3, norm="rms"),
    "nat": nat(),
    "biformer": biformer(),
}
PUBLISHED = {"nat": 20.0e6, "biformer": 13.1e6, "agent_deit": 6.0e6, "soft_tiny": 13.1e6}
IN_CATALOGUE = {
    name: preset
    for name, slug, preset in (
        ("agent_deit", "agent_attention", agent_deit),
        ("soft_tiny", "soft_attention", soft_tiny),
    )
    if slug in catalogue.mechanisms()
}
VARIANTS |= {name: preset() for name, preset in IN_CATALOGUE.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name):
    """The formula is right, and presets are as large as published, to 4 %."""
    config = VARIANTS[name]
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract(config)))]
    assert parameter_count(config) == sum(sizes)
    if name in PUBLISHED:
        assert abs(sum(sizes) / PUBLISHED[name] - 1) < 0.04


def test_presets_are_configurations():
    """Those too whose mechanism is not in the catalogue; they and their JSON say the same."""
    for preset in (nat, biformer, soft_tiny, agent_deit):
        config = preset(num_classes=7)
        assert config.num_classes == 7 and len(config.mixers) in (18, 14, 8, 12)
        values = json.loads(json.dumps(dataclasses.asdict(config)))
        if isinstance(config, PyramidConfig):
            values["stages"] = tuple(StageConfig(**stage) for stage in values["stages"])
        assert type(config)(**values) == config


@pytest.mark.parametrize("name", IN_CATALOGUE)
def test_layers_of_mechanisms_with_weights(name):
    """Small models with biases of agents, or landmarks by convolution: all parameters learn."""
    config = IN_CATALOGUE[name](num_classes=3, channels=1, image_size=32)
    if name == "agent_deit":
        # By the mean: a class token's last layer would not read what the patches are biased by.
        config = dataclasses.replace(
            config,
            pooling="mean",
            patch_size=8,
            features=12,
            num_layers=1,
            options={"num_agents": 2},
        )
    else:
        stages = tuple(
            dataclasses.replace(
                s,
                depth=1,
                features=4 * s.num_heads,
                hidden_features=8,
                options={"inverse": "solve"},
            )
            for s in config.stages[1:2]
        )
        config = dataclasses.replace(config, stages=stages, stem_layers=1)

    def loss(model, images):
        return jnp.sum(model(images) ** 2)

    gradient = nnx.jit(nnx.grad(loss))(make(config), images_of(config))
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.isfinite(leaf[...]).all() and (leaf[...] != 0).any(), path


def test_every_mechanism_that_is_not_causal():
    for record in catalogue.mechanisms().values():
        if "self non-causal" not in record.patterns or record.has_weights or record.one_query:
            continue
        options = {
            name: x
            for name, x in record.small.items()
            if isinstance(x, int | float | str) and name != "shape"
        }
        config = dataclasses.replace(
            MEAN, mechanism=record.slug, options=options, image_size=16, num_heads=4
        )
        shape = nnx.eval_shape(lambda m, x: m(x), abstract(config), images_of(config)).shape
        assert shape == (2, 10), record.slug


def test_layer_norm():
    norm = LayerNorm(6, rngs=nnx.Rngs(0))
    norm.bias[...] += 0.5
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    p = {"scale": np.ones(6), "bias": np.full(6, 0.5)}
    assert_close(norm(x), layer_norm(x.astype(np.float64), p))
    low = 300 * jnp.asarray(x, jnp.float16)
    assert norm(low).dtype == jnp.float16
    assert (norm(low) == norm(low.astype(jnp.float32)).astype(jnp.float16)).all()


@pytest.mark.parametrize(
    ("config", "changes", "error", "message"),
    (
        (SMALL, {"patch_size": 3}, ValueError, "patch_size: 3 must divide image_size, 8"),
        (SMALL, {"num_heads": 3}, ValueError, "num_heads: 3 must divide the 16 features"),
        (SMALL, {"pooling": "max"}, ValueError, "pooling: 'max' must be one of"),
        (SMALL, {"channels": 0}, ValueError, "channels: 0 must be at least 1"),
        (SMALL, {"image_size": 8.0}, TypeError, "image_size: 8.0 must be an int"),
        (SMALL, {"mechanism": "neighborhood_attention"}, ValueError, "pool by the mean"),
        (SMALL, {"mechanism": "rat_attention"}, ValueError, "does not support is_causal=False"),
        (SMALL, {"value_convolution": 4}, ValueError, "value_convolution: 4 must be odd"),
        (SMALL, {"agent_biases": True}, ValueError, "softmax_attention takes no agent_bias"),
        (SMALL, {"options": {"window": 3}}, ValueError, "'window' is not an option"),
        (PYRAMID, {"stages": ()}, ValueError, "stages: 0 must be at least 1"),
        (PYRAMID, {"norm": "batch"}, ValueError, "norm: 'batch' must be one of"),
    ),
)
def test_wrong_configurations(config, changes, error, message):
    with pytest.raises(error, match=message):
        abstract(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("config", (SMALL, PYRAMID), ids=("vit", "pyramid"))
def test_wrong_images(config):
    model, images = abstract(config), images_of(config)
    for wrong in (images[:, 1:], images[..., :0], images[0]):
        with pytest.raises(ValueError, match=r"images: shape .* must be"):
            nnx.eval_shape(lambda m, x: m(x), model, wrong)
    with pytest.raises(TypeError, match="images: dtype uint8 must be a floating type"):
        nnx.eval_shape(lambda m, x: m(x), model, images.astype(np.uint8))


def test_wrong_stages():
    stage = dataclasses.replace(STAGES[0], landmark_stride=2)
    with pytest.raises(ValueError, match="softmax_attention takes no landmarks"):
        abstract(dataclasses.replace(PYRAMID, stages=(stage,)))
    with pytest.raises(ValueError, match="depth: 0 must be at least 1"):
        StageConfig(depth=0)
