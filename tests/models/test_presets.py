"""The language models of the presets, each with its mechanism: causal, and the same in steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config import presets
from models.language import DecoderLM
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENS = 22

# Options with which few tokens use all that a mixer does.
SMALL = {
    "transnormer": {"diag_attention.block_size": 4},
    "based": {"based_linear_attention.value_dim": 4, "softmax_attention.local_window_size": 3},
    "rat": {"chunk_size": 4},
    "routing": {"num_clusters": 3, "window": 4},
    "combiner": {"span_size": 4},
    "titans_mac": {"segment": 4},
    "titans_mag": {"window": 4, "chunk_size": 4},
    "titans_mal": {"window": 4, "chunk_size": 4},
}
NAMES = [*SMALL, "landmark", "aaren", "mamba"]


def model_of(name):
    """Returns the preset's model, made small, with every kind of layer that it has."""
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
    return DecoderLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_later_ones_and_steps_are_the_whole(name):
    graph, parameters = nnx.split(model_of(name))
    place = int(np.random.default_rng(len(name)).integers(5, TOKENS - 5))

    @jax.jit
    def run(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens)

    @jax.jit
    def run_steps(parameters, tokens):
        model = nnx.merge(graph, parameters)
        first, state = model.step(tokens[:, :7], model.init_state(2, TOKENS))
        rest, _ = model.step(tokens[:, 7:], state)
        return jnp.concatenate([first, rest], 1)

    tokens = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 31)
    logits = run(parameters, tokens)
    after = run(parameters, tokens.at[:, place].set((tokens[:, place] + 1) % 31))
    differs = np.any(logits != after, axis=(0, 2))
    assert differs[place:].all()
    if name == "routing":  # later tokens decide which of the earlier ones meet, as published
        with pytest.raises(ValueError, match="'routing_attention' has no step form"):
            nnx.merge(graph, parameters).init_state(2, TOKENS)
        return
    assert not differs[:place].any()
    assert_close(run_steps(parameters, tokens), logits, factor=3)


def test_presets_train_the_same_size():
    sizes = {}
    for name in ("transformer", *NAMES):
        model = presets()[name].model
        made = nnx.eval_shape(lambda model=model: DecoderLM(model, rngs=nnx.Rngs(0)))
        sizes[name] = sum(x.size for x in jax.tree.leaves(nnx.state(made)))
    assert all(0.9 < size / sizes["transformer"] < 2.2 for size in sizes.values()), sizes
