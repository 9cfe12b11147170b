"""The decoder: oracles, dtype policy, initialisation, causality, generation, rematerialisation."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attention import catalogue
from models.language import (
    DecoderConfig,
    DecoderLM,
    parameter_count,
    transformer,
    transnormer_llm,
)
from tests.models import oracles
from tests.numerics import assert_close, error_ratio
from tests.tpu import compile_for_tpu

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"vocab_size": 31, "features": 16, "num_layers": 2, "num_heads": 4, "hidden_features": 24}
TRANSFORMER = transformer(**TINY, num_kv_heads=2)
TRANSNORMER = transnormer_llm(**TINY)
CONFIGS = {
    "transformer": TRANSFORMER,
    "transnormer_llm": TRANSNORMER,
    "transnormer_llm with softmax": transnormer_llm(**TINY, mechanism="softmax_attention"),
    "hybrid": transformer(
        **TINY,
        layers=("lightning_attention", "softmax_attention"),
        options={
            "lightning_attention.head_dim": 2,
            "lightning_attention.value_dim": 6,
            "lightning_attention.positions": None,
            "softmax_attention.local_window_size": 4,
            "softmax_attention.num_kv_heads": 1,
        },
    ),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_models = pytest.mark.parametrize(
    "config", [TRANSFORMER, TRANSNORMER], ids=["transformer", "transnormer_llm"]
)


def make(config, **changes):
    return DecoderLM(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def some_tokens(batch=2, length=9, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 31)


@nnx.jit
def run(model, tokens, segment_ids=None):
    return model(tokens, segment_ids=segment_ids)


@nnx.jit
def run_step(model, tokens):
    """The logits of a prompt, from the step."""
    return model.step(tokens, model.init_state(*tokens.shape))[0]


def loss(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def paths(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): leaf for path, leaf in state}


@pytest.mark.parametrize("decay", ["alibi", "paper"])
def test_transnormer_llm_is_its_equations(decay):
    model, tokens = make(TRANSNORMER, num_layers=3, decay=decay), some_tokens()
    p = oracles.float64(nnx.to_pure_dict(nnx.state(model)))
    expected = [oracles.transnormer_llm(row, p, 4, decay) for row in np.asarray(tokens)]
    # Rounding adds up over three layers.
    assert_close(run(model, tokens), np.stack(expected), factor=2)


def test_transformer_is_its_equations():
    model, tokens = make(TRANSFORMER), some_tokens()
    for path, leaf in paths(model).items():
        if path.endswith("scale"):
            leaf[...] = 1 + 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    p = oracles.float64(nnx.to_pure_dict(nnx.state(model)))
    expected = [oracles.transformer(row, p, 4) for row in np.asarray(tokens)]
    assert_close(run(model, tokens), np.stack(expected), factor=2)


@every_model
def test_logits(config):
    model, tokens = make(config), some_tokens()
    logits = model(tokens)
    assert logits.shape == (2, 9, 31) and logits.dtype == jnp.float32
    assert_close(run(model, tokens), logits)
    assert np.isnan(run(model, tokens.at[1, 5].set(31))[1, 5]).all()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [*((config, "bfloat16") for config in CONFIGS.values()), (TRANSNORMER, "float16")],
    ids=[*CONFIGS, "transnormer_llm in float16"],
)
def test_computes_in_narrow_dtypes_with_float32_parameters(config, dtype):
    narrow, wide, tokens = make(config, dtype=dtype), make(config), some_tokens()
    chex.assert_trees_all_equal(nnx.state(narrow), nnx.state(wide))
    assert {leaf.dtype for leaf in paths(narrow).values()} == {jnp.dtype("float32")}
    logits, whole = run_step(narrow, tokens), run(narrow, tokens)
    assert logits.dtype == whole.dtype == jnp.float32
    # Each of about ten sublayers rounds the stream once more.
    assert_close(whole, run(wide, tokens), dtype, factor=3)
    # Products are accumulated and returned in float32, not rounded on their way.
    assert error_ratio(logits.astype(dtype), logits) > 1e-5
    block = nnx.eval_shape(lambda layer, x: layer(x), narrow.layers[0], jnp.ones((1, 3, 16), dtype))
    assert block.dtype == jnp.dtype(dtype)


def count_by_formula(config):
    """Returns the number of parameters by the formula of docs/models.md."""
    d, h, k = config.features, config.head_channels, config.kv_heads
    inner = config.num_heads * h
    layers = d * (2 * inner + 2 * k * h)
    layers += d * inner if config.output_gate else 0
    layers += inner if config.output_norm == "rms" else 0
    layers += (2 if config.feed_forward == "gelu" else 3) * d * config.hidden_channels
    angles = {None: 0, "rope": 0, "lrpe": k * h}[config.positions]
    angles *= config.num_layers if config.position_layers == "all" else 1
    gains = (2 * config.num_layers + 1) * d if config.norm == "rms" else 0
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * d
    return config.num_layers * layers + angles + gains + embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_layers": 5, "head_dim": 6},
        {"feed_forward": "gelu", "hidden_features": None},
        {"feed_forward": "swiglu", "hidden_features": None, "features": 40},
        {"norm": "rms", "output_norm": "rms", "output_gate": True},
        {"norm": "srms", "output_norm": None, "output_gate": False},
        {"positions": "lrpe", "position_layers": "all", "num_kv_heads": 2},
        {"positions": "lrpe", "position_layers": "first", "num_kv_heads": 1},
    ],
    ids=str,
)
@both_models
def test_parameter_count(config, changes):
    config = dataclasses.replace(config, **changes)
    assert parameter_count(config) == count_by_formula(config)


def test_default_hidden_features():
    widths = {"swiglu": 512, "sglu": 512, "gelu": 768}
    for kind, width in widths.items():
        config = transformer(features=192, feed_forward=kind)
        assert config.hidden_channels == width
    assert transformer(features=256).hidden_channels == 704


@both_models
def test_initialisation(config):
    config = dataclasses.replace(
        config, vocab_size=200, features=64, num_layers=3, num_kv_heads=2, hidden_features=160
    )
    leaves = paths(make(config))
    for path, leaf in leaves.items():
        values = np.asarray(leaf[...], np.float64)
        if path.endswith("scale"):
            np.testing.assert_array_equal(values, 1)
        elif path.endswith("theta"):
            exponents = -2 * np.arange(values.size) / values.size
            assert_close(values.ravel(), 10_000.0**exponents)
        else:
            fan_in = 64 if path == "embed/embedding" else values.shape[0]
            adds_to_stream = path.endswith(("attention/out/kernel", "down/kernel"))
            deviation = 1 / math.sqrt(fan_in * (2 * 3 if adds_to_stream else 1))
            # Standard errors: of the deviation 1 / sqrt(2n) at most, of the mean 1 / sqrt(n).
            n = values.size
            assert abs(values.std() / deviation - 1) < 5 / math.sqrt(2 * n), path
            assert abs(values.mean()) < 5 * deviation / math.sqrt(n), path
            # A normal distribution cut at 2 deviations and brought back to deviation 1.
            assert 2.0 < abs(values).max() / deviation < 2.28, path
    matrices = [np.asarray(leaf[...]).ravel()[:64] for leaf in leaves.values() if leaf.ndim == 2]
    correlations = np.corrcoef([m for m in matrices if m.size == 64 and (m < 0).any()])
    assert abs(correlations - np.eye(len(correlations))).max() < 0.7


def test_logits_start_with_unit_variance():
    tokens = some_tokens(4, 32)
    for config in (TRANSFORMER, TRANSNORMER, transformer(**TINY, tie_embeddings=True)):
        logits = run(make(config, features=64, hidden_features=128), tokens)
        assert 0.8 < np.asarray(logits).std() < 1.25


def test_scaled_and_tied_embeddings():
    tokens = some_tokens()
    plain = make(TRANSFORMER, num_layers=1)
    scaled = make(TRANSFORMER, num_layers=1, scale_embedding=True)
    plain.embed.embedding[...] *= 4  # the root of 16 features
    assert_close(run(scaled, tokens), run(plain, tokens))
    tied, untied = make(TRANSFORMER, tie_embeddings=True), make(TRANSFORMER)
    assert "head/kernel" in paths(untied) and "head/kernel" not in paths(tied)
    for path, leaf in paths(untied).items():
        leaf[...] = tied.embed.embedding[...].T if path == "head/kernel" else paths(tied)[path][...]
    assert_close(run(tied, tokens), run(untied, tokens))


def test_lrpe_in_the_first_layer_only_and_decay_in_all():
    for heads, features in ((4, 16), (12, 24)):
        model = make(TRANSNORMER, num_layers=3, num_heads=heads, features=features)
        thetas = [path for path in paths(model) if "theta" in path]
        assert thetas == ["layers/0/attention/theta"]
        assert [b.attention.positions for b in model.layers] == ["lrpe", None, None]
        for layer, block in enumerate(model.layers):
            found = dict(block.attention.options)["slopes"]
            assert_close(np.array(found), oracles.slopes(layer, 3, heads, "alibi"))
            assert len(set(found)) == heads and min(found) > 0
    everywhere = make(TRANSNORMER, position_layers="all")
    assert len([path for path in paths(everywhere) if "theta" in path]) == 2


def test_layers_take_turns_and_have_options_of_their_own():
    model = make(CONFIGS["hybrid"], num_layers=5)
    mixers = [block.attention for block in model.layers]
    assert [m.mechanism[:4] for m in mixers] == ["ligh", "soft", "ligh", "soft", "ligh"]
    assert [m.positions for m in mixers[:2]] == [None, "rope"]
    assert [m.value_dim for m in mixers[:2]] == [6, 4]
    assert [m.query.kernel.shape for m in mixers[:2]] == [(16, 8), (16, 16)]
    assert [m.value.kernel.shape for m in mixers[:2]] == [(16, 24), (16, 4)]
    assert dict(mixers[1].options) == {"local_window_size": 4}
    assert_close(np.array(dict(mixers[2].options)["slopes"]), oracles.slopes(2, 5, 4, "alibi"))
    with pytest.raises(ValueError, match=r"options: 'hip_attention.block_size', but no layer is"):
        make(CONFIGS["hybrid"], options={"hip_attention.block_size": 4})
    with pytest.raises(ValueError, match="options: 'window' is not an option of softmax_attention"):
        make(CONFIGS["hybrid"], options={"softmax_attention.window": 4})


def test_decay_is_passed_to_mechanisms_that_have_one():
    tokens = some_tokens()
    logits = {
        decay: run(make(TRANSNORMER, decay=decay), tokens) for decay in ("alibi", "paper", None)
    }
    assert error_ratio(logits["paper"], logits["alibi"]) > 1e-3
    assert error_ratio(logits[None], logits["alibi"]) > 1e-3
    given = make(TRANSNORMER, options={"slopes": [0.0] * 4})
    assert_close(run(given, tokens), logits[None])
    softmax = dataclasses.replace(TRANSNORMER, mechanism="softmax_attention")
    chex.assert_trees_all_equal_shapes(nnx.state(make(softmax)), nnx.state(make(TRANSNORMER)))
    np.testing.assert_array_equal(
        make(softmax, decay="alibi")(tokens), make(softmax, decay=None)(tokens)
    )


def test_options_and_implementation_reach_every_layer():
    tokens = some_tokens()
    plain = make(TRANSFORMER)(tokens)
    capped = make(TRANSFORMER, options={"logits_soft_cap": 0.1})
    assert error_ratio(capped(tokens), plain) > 1e-3
    assert_close(capped.step(tokens, capped.init_state(2, 9))[0], capped(tokens))
    for config in (TRANSFORMER, TRANSNORMER):
        logits = {n: make(config, implementation=n)(tokens) for n in ("reference", "xla", None)}
        assert_close(logits["xla"], logits["reference"], factor=2)
        np.testing.assert_array_equal(logits["xla"], logits[None])
        with pytest.raises(NotImplementedError, match="pallas_gpu"):
            make(config, implementation="pallas_gpu", head_dim=160)(tokens)  # too wide for it


@pytest.mark.parametrize(
    ("changes", "kernels"), [({}, 4), ({"remat": "full", "dtype": "bfloat16"}, 6)]
)
def test_a_transformer_for_tpu_is_made_of_kernels(changes, kernels):
    """A forward and a backward in each layer, and the forward again where it is rematerialised."""
    graph, state = nnx.split(make(TRANSFORMER, **changes))

    def gradients(state, tokens):
        return jax.grad(lambda state: loss(nnx.merge(graph, state), tokens))(state)

    program = compile_for_tpu(gradients, state, some_tokens(2, 129)).as_text()
    assert program.count("tpu_custom_call") == kernels


@every_model
def test_a_token_changes_nothing_before_it(config):
    model, tokens = make(config), some_tokens()
    logits = run(model, tokens)
    changed = run(model, tokens.at[:, 5].set((tokens[:, 5] + 1) % 31))
    np.testing.assert_array_equal(logits[:, :5], changed[:, :5])
    assert all(error_ratio(changed[:, t], logits[:, t]) > 1e-5 for t in range(5, 9))


@every_model
def test_packed_documents_are_apart(config):
    model, tokens = make(config), some_tokens()
    segments = jnp.array([[1] * 3 + [2] * 6, [1] * 6 + [2] * 3])
    packed = run(model, tokens, segments)
    for row, cut in enumerate((3, 6)):
        alone = [run(model, tokens[row : row + 1, :cut]), run(model, tokens[row : row + 1, cut:])]
        # Angles of later positions round differently.
        assert_close(packed[row : row + 1], jnp.concatenate(alone, 1), factor=3)
    assert error_ratio(packed, run(model, tokens)) > 1e-2


@every_model
def test_prompt_and_steps_are_the_parallel_form(config):
    model, tokens = make(config), some_tokens()
    expected = run(model, tokens)
    graph, parameters = nnx.split(model)

    @jax.jit
    def prompt_and_steps(parameters, tokens):
        model = nnx.merge(graph, parameters)
        prompt, state = model.step(tokens[:, :5], model.init_state(2, 9))

        def one(state, token):
            logits, state = nnx.merge(graph, parameters).step(token[:, None], state)
            return state, logits[:, 0]

        end, rest = jax.lax.scan(one, state, tokens[:, 5:].T)
        return jnp.concatenate([prompt, rest.swapaxes(0, 1)], 1), state.position, end.position

    logits, position, end = prompt_and_steps(parameters, tokens)
    assert position.dtype == jnp.int32 and int(position) == 5 and int(end) == 9
    assert_close(logits, expected, factor=2)
    assert_close(run_step(model, tokens), expected, factor=2)


def test_memory_of_generation():
    def size(config, length):
        model = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
        return sum(x.nbytes for x in jax.tree.leaves(model.init_state(2, length)))

    linear = [size(TRANSNORMER, n) for n in (16, 16_384)]
    # [B, N, H, H] in float32 for each layer, twice that with LRPE, and the position.
    assert linear == [2 * 4 * 4 * 4 * 4 * (2 + 1) + 4] * 2
    softmax = [size(TRANSFORMER, n) for n in (16, 32)]
    # Keys and values [B, max_length, K, H] in float32 for each of two layers.
    assert softmax[1] - softmax[0] == 2 * 2 * (2 * 16 * 2 * 4) * 4


def product_count(jaxpr):
    """How often a traced program names a matrix product."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == "dot_general"
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
                total += count(value) if hasattr(value, "eqns") else 0
        return total

    return count(jaxpr)


def test_rematerialisation_and_scan_change_no_value():
    tokens, results, products = some_tokens(), {}, {}
    compiled = {("none", False), ("dots", False), ("none", True), ("full", True)}
    for scan in (False, True):
        for remat in ("none", "dots", "full"):
            model = make(TRANSNORMER, num_layers=3, remat=remat, scan_layers=scan)
            graph, parameters = nnx.split(model)
            step = jax.value_and_grad(lambda p, graph=graph: loss(nnx.merge(graph, p), tokens))
            traced = jax.jit(step).trace(parameters)
            products[remat, scan] = product_count(traced.jaxpr)
            if (remat, scan) in compiled:
                results[remat, scan] = traced.lower().compile()(parameters)
    for result in results.values():
        assert_close(result, results["none", False], factor=5)
    # What is rematerialised is computed twice; a scanned layer stands in the program once.
    for scan in (False, True):
        assert products["none", scan] < products["dots", scan] < products["full", scan]
    for remat in ("none", "dots", "full"):
        assert products[remat, True] < products[remat, False]


@every_model
def test_gradient_reaches_every_parameter(config):
    gradients = nnx.jit(nnx.grad(loss))(make(config), some_tokens(4, 33))
    for path, leaf in paths(gradients).items():
        values = np.asarray(leaf[...])
        assert np.isfinite(values).all(), path
        assert (values != 0).mean() > 0.95, path


def test_gradients_of_frequent_tokens_are_summed_in_float32():
    tokens = jnp.zeros((64, 16), jnp.int32)

    @nnx.jit
    def gradient(model):
        return nnx.grad(lambda model: model(tokens)[..., 0].mean())(model).embed.embedding[...]

    wide, narrow = (
        gradient(make(TRANSFORMER, num_layers=1, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert_close(narrow, wide, jnp.bfloat16)


def test_training_by_nnx_and_by_optax_alone():
    tokens = some_tokens(4, 17)
    model = make(TRANSNORMER)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return value

    by_nnx = [float(train(model, optimizer)) for _ in range(5)]

    graph, parameters = nnx.split(make(TRANSNORMER))
    transform = optax.adam(1e-2)
    state = transform.init(parameters)

    @jax.jit
    def pure(parameters, state):
        value, gradients = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), tokens))(
            parameters
        )
        updates, state = transform.update(gradients, state)
        return value, optax.apply_updates(parameters, updates), state

    by_optax = []
    for _ in range(5):
        value, parameters, state = pure(parameters, state)
        by_optax.append(float(value))
    np.testing.assert_allclose(by_optax, by_nnx, rtol=1e-5)
    assert by_nnx[-1] < by_nnx[0] - 0.3


def test_models_of_equal_seeds_are_equal():
    a, b, c = (DecoderLM(TRANSNORMER, rngs=nnx.Rngs(seed)) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(nnx.state(a), nnx.state(b))
    assert error_ratio(c.embed.embedding[...], a.embed.embedding[...]) > 1


@pytest.mark.parametrize("config", [*CONFIGS.values(), transformer(options={"scale": 0.1})])
def test_config_goes_through_json(config):
    again = DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "num_heads: 5 must divide the 16 features"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: 3 must divide the 4 heads of num_heads"),
        ({"num_layers": 0}, ValueError, "num_layers: 0 must be at least 1"),
        ({"vocab_size": 2.0}, TypeError, r"vocab_size: 2\.0 must be an int"),
        ({"remat": "some"}, ValueError, "remat: 'some' must be one of 'none', 'full', 'dots'"),
        ({"dtype": "int8"}, ValueError, "dtype: 'int8' must be one of 'float32', 'bfloat16'"),
        ({"positions": "none"}, ValueError, "positions: 'none' must be one of 'rope', 'lrpe', No"),
        ({"mechanism": "lightning"}, ValueError, "mechanism: 'lightning' .*lightning_attention"),
        ({"options": {"chunks": 8}}, ValueError, "options: 'chunks' is not an option of softmax_"),
    ],
)
def test_wrong_configurations_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        make(TRANSFORMER, **changes)


def test_mechanisms_that_are_not_causal_are_refused(monkeypatch):
    record = dataclasses.replace(
        catalogue.get("softmax_attention"), patterns=frozenset({"self non-causal"})
    )
    monkeypatch.setattr(catalogue, "get", lambda slug: record)
    with pytest.raises(ValueError, match="'softmax_attention' does not support is_causal=True"):
        make(TRANSFORMER)


def test_wrong_calls_are_refused():
    model, tokens = make(TRANSFORMER), some_tokens()
    with pytest.raises(ValueError, match=r"tokens: shape \(9,\) must be \[batch, tokens\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"tokens: shape \(2, 0\) must be"):
        model(tokens[:, :0])
    with pytest.raises(TypeError, match="tokens: dtype float32 must be an integer type"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"segment_ids: shape \(2, 8\) must be \(2, 9\)"):
        model(tokens, segment_ids=tokens[:, 1:])
    with pytest.raises(ValueError, match="max_length: 0 must be at least 1"):
        model.init_state(2, 0)
    with pytest.raises(TypeError, match="tokens: dtype float32"):
        model.step(tokens.astype(jnp.float32), model.init_state(2, 9))
