"""The language models of the presets, each with its mechanism: causal, and the same in steps."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config import presets
from models.language import DecoderLM
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENS = 21

# Options with which few tokens use all that a mixer does.
SMALL = {
    "transnormer": {"diag_attention.block_size": 4},
    "based": {"based_linear_attention.value_dim": 4, "softmax_attention.local_window_size": 3},
    "rat": {"chunk_size": 4},
    "routing": {"num_clusters": 3, "window": 4},
    "combiner": {"span_size": 4},
    "titans_mac": {"segment": 4, "depth": 1},
    "titans_mag": {"window": 4, "chunk_size": 4, "depth": 1},
    "titans_mal": {"window": 4, "chunk_size": 4, "depth": 1},
}
NAMES = [*SMALL, "landmark", "aaren", "mamba"]


def model_of(name):
    """Returns graph and parameters of the preset's model, made small, with every kind of layer."""
    config = presets()[name].model
    kinds = tuple(dict.fromkeys(config.mixers))
    config = dataclasses.replace(
        config,
        vocab_size=31,
        features=16,
        hidden_features=16,
        num_heads=2,
        num_layers=len(kinds),
        layers=kinds if config.layers else (),
        landmarks=3 if name == "landmark" else None,
        options=config.options | SMALL.get(name, {}),
    )
    model = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)
    return graph, jax.tree_util.tree_map_with_path(drawn, parameters)


def drawn(path, leaf):
    """Returns a parameter of NumPy: no program is compiled for it."""
    name, fan_in = jax.tree_util.keystr(path), math.prod(leaf.shape[:-1])
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
    x = x / math.sqrt(fan_in) if "kernel" in name else 0.2 * x + ("scale" in name)
    return jnp.asarray(x, leaf.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_later_ones_and_steps_are_the_whole(name):
    graph, parameters = model_of(name)
    place = int(np.random.default_rng(len(name)).integers(5, TOKENS - 5))

    @jax.jit
    def run(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens)

    @jax.jit
    def step(parameters, tokens, state):
        return nnx.merge(graph, parameters).step(tokens, state)

    tokens = np.random.default_rng(1).integers(0, 31, (2, TOKENS))
    changed = tokens.copy()
    changed[:, place] = (tokens[:, place] + 1) % 31
    logits = run(parameters, tokens)
    differs = np.any(logits != run(parameters, changed), axis=(0, 2))
    assert differs[place]
    model = nnx.merge(graph, parameters)
    if name == "routing":  # later tokens decide which of the earlier ones meet, as published
        with pytest.raises(ValueError, match="'routing_attention' has no step form"):
            model.init_state(2, TOKENS)
        return
    assert differs[place:].all()
    assert not differs[:place].any()
    state, parts = model.init_state(2, TOKENS), []
    for part in np.split(tokens, 3, axis=1):
        out, state = step(parameters, part, state)
        parts.append(out)
    assert_close(np.concatenate(parts, axis=1), logits, factor=3)


def test_presets_train_the_same_size():
    sizes = {}
    for name in ("transformer", *NAMES):
        model = presets()[name].model
        made = nnx.eval_shape(lambda model=model: DecoderLM(model, rngs=nnx.Rngs(0)))
        sizes[name] = sum(x.size for x in jax.tree.leaves(nnx.state(made)))
    assert all(0.9 < size / sizes["transformer"] < 2.2 for size in sizes.values()), sizes
