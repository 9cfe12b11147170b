"""Sampling: the filters against their definitions, and generation against the parallel model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import presets
from experiments.data.text import BOS, VOCAB_SIZE
from experiments.generate import CHUNK, _whole_characters, next_symbol, sample
from models.language import DecoderLM

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")

MECHANISMS = ("lightning_attention", "softmax_attention")


def kept(logits, **options):
    """Which symbols are ever drawn, from many draws."""
    draws = jax.vmap(lambda key: next_symbol(key, logits[None], **options)[0])(
        jax.random.split(jax.random.key(0), 4000)
    )
    return set(np.unique(draws).tolist()), np.asarray(draws)


def padded(values):
    return jnp.full(VOCAB_SIZE, -30.0).at[: len(values)].set(jnp.asarray(values, jnp.float32))


def test_temperature_0_is_the_likeliest_and_beyond_the_vocabulary_is_never_drawn():
    logits = jnp.zeros((2, VOCAB_SIZE + 7)).at[:, -1].set(100.0).at[0, 5].set(1.0).at[1, 9].set(1.0)
    assert next_symbol(jax.random.key(0), logits, temperature=0).tolist() == [5, 9]
    assert next_symbol(jax.random.key(0), logits, temperature=0.01).tolist() == [5, 9]


def test_temperature_scales_the_logits():
    _, draws = kept(padded(np.log([0.2, 0.8])), temperature=0.5)
    expected = 0.8**2 / (0.8**2 + 0.2**2)
    assert (draws == 1).mean() == pytest.approx(expected, abs=0.02)


def test_top_k_and_top_p():
    logits = padded(np.log([0.1, 0.4, 0.2, 0.3]))
    assert kept(logits)[0] == {0, 1, 2, 3}
    assert kept(logits, top_k=1)[0] == {1}
    assert kept(logits, top_k=3)[0] == {1, 2, 3}
    assert kept(logits, top_k=1000)[0] == {0, 1, 2, 3}
    assert kept(logits, top_p=0.39)[0] == {1}
    assert kept(logits, top_p=0.6)[0] == {1, 3}
    assert kept(logits, top_p=0.75)[0] == {1, 3, 2}
    assert kept(logits, top_p=1.0)[0] == {0, 1, 2, 3}
    # top_p counts what top_k has left: 0.4 and 0.3 become 4/7 and 3/7.
    assert kept(logits, top_k=2, top_p=0.5)[0] == {1}


@pytest.fixture(scope="module", params=MECHANISMS)
def model(request):
    config = dataclasses.replace(presets()["tiny"].model, mechanism=request.param)
    _, parameters = nnx.split(DecoderLM(config, rngs=nnx.Rngs(0)))
    # Larger weights make the model's choices depend on its whole context.
    return config, jax.tree.map(lambda x: x * 2, parameters)


def test_greedy_generation_is_that_of_the_parallel_model(model):
    config, parameters = model
    graph, _ = nnx.split(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))
    prompt = jnp.asarray([[BOS, *b"def f"], [BOS, *b"class"]], jnp.int32)
    length = CHUNK + 6
    pieces = list(
        sample(config, parameters, prompt, jax.random.key(0), length=length, temperature=0)
    )
    assert [piece.shape[1] for piece in pieces] == [CHUNK, 6]
    symbols = np.concatenate(pieces, 1)
    whole = jnp.concatenate([prompt, symbols], 1)
    logits = nnx.merge(graph, parameters)(whole)[:, prompt.shape[1] - 1 : -1, :VOCAB_SIZE]
    chosen = jnp.take_along_axis(logits, symbols[..., None], -1)[..., 0]
    # Equal but for ties that rounding breaks one way or the other.
    np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-4)
    assert len(np.unique(symbols)) > 1


def test_seed_decides(model):
    config, parameters = model
    prompt = jnp.asarray([[BOS, *b"x"]], jnp.int32)

    def text(seed):
        key = jax.random.key(seed)
        return np.concatenate(list(sample(config, parameters, prompt, key, length=40)), 1).tolist()

    assert text(1) == text(1) != text(2)


def test_state_per_step_is_constant_for_lightning_and_a_cache_for_softmax():
    def size(mechanism, max_length):
        config = dataclasses.replace(presets()["tiny"].model, mechanism=mechanism)
        state = nnx.eval_shape(
            lambda: DecoderLM(config, rngs=nnx.Rngs(0)).init_state(1, max_length)
        )
        return sum(x.size for x in jax.tree.leaves(state))

    assert size("lightning_attention", 100) == size("lightning_attention", 100_000)
    assert size("softmax_attention", 2000) > 1.9 * size("softmax_attention", 1000)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.integers(0, 40))
def test_pieces_cut_anywhere_join_to_the_text(text, cut):
    data = text.encode()
    cut = min(cut, len(data))
    first, rest = _whole_characters(data[:cut])
    second, rest = _whole_characters(rest + data[cut:])
    assert first + second == text and rest == b""


def test_invalid_bytes_are_replaced():
    assert _whole_characters(b"a\xffb") == ("a\ufffdb", b"")
