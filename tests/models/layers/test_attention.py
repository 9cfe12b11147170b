"""The attention layer with each mechanism: oracles, invariants, generation, options, errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention import catalogue
from models.layers import AttentionLayer
from tests.models import oracles
from tests.numerics import assert_close, error_ratio

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOPES = (0.5, 0.1, 0.0, 2.0)
GLA = {
    "mechanism": "lightning_attention",
    "options": {"slopes": SLOPES},
    "query_key_activation": "silu",
    "output_norm": "srms",
    "output_gate": True,
}
SOFTMAX = {"mechanism": "softmax_attention", "positions": "rope"}
LAYERS = {
    "gla": GLA,
    "gla with lrpe": GLA | {"positions": "lrpe"},
    "gla, grouped": GLA | {"positions": "lrpe", "num_kv_heads": 2},
    "softmax": SOFTMAX,
    "softmax, grouped": SOFTMAX | {"num_kv_heads": 2},
    "softmax, lrpe and gate": SOFTMAX
    | {"positions": "lrpe", "output_gate": True, "output_norm": "rms"},
    "norm": {"mechanism": "norm_attention", "options": {"feature_map": "elu"}},
    "diag": {"mechanism": "diag_attention", "options": {"block_size": 4}, "positions": "rope"},
    "based": {"mechanism": "based_linear_attention"},
    "aaren, grouped": {"mechanism": "aaren_attention", "num_kv_heads": 2},
}
every_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)


def make(arguments, **more):
    sizes = {"features": 16, "num_heads": 4}
    return AttentionLayer(**(sizes | arguments | more), rngs=nnx.Rngs(0))


def inputs(batch=2, tokens=7, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (batch, tokens, 16), dtype)


@nnx.jit
def run(layer, x, **keywords):
    return layer(x, **keywords)


def parameters(layer):
    return oracles.float64(nnx.to_pure_dict(nnx.state(layer)))


@pytest.mark.parametrize("name", ["gla", "gla with lrpe", "gla, grouped"])
def test_gated_linear_attention_is_its_equations(name):
    layer, x = make(LAYERS[name]), inputs()
    p = parameters(layer)
    expected = [oracles.gated_linear_attention(row, p, SLOPES, 4) for row in np.float64(x)]
    assert_close(run(layer, x), np.stack(expected))


@pytest.mark.parametrize("name", ["softmax", "softmax, grouped"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_softmax_attention_is_its_equations(name, is_causal):
    layer, x = make(LAYERS[name], is_causal=is_causal), inputs()
    p = parameters(layer)
    expected = [oracles.softmax_attention(row, p, 4, is_causal) for row in np.float64(x)]
    assert_close(run(layer, x), np.stack(expected))


@every_layer
def test_parameters(arguments):
    layer = make(arguments, head_dim=6)
    kv = 6 * arguments.get("num_kv_heads", 4)
    shapes = {
        "query/kernel": (16, 24),
        "key/kernel": (16, kv),
        "value/kernel": (16, kv),
        "out/kernel": (24, 16),
    }
    if arguments.get("output_gate"):
        shapes["gate/kernel"] = (16, 24)
    if arguments.get("output_norm") == "rms":
        shapes["norm/scale"] = (24,)
    if arguments.get("positions") == "lrpe":
        shapes["theta"] = (kv // 6, 6)
    if arguments.get("mechanism") == "aaren_attention":
        shapes["query_token"] = (16,)
    state = nnx.to_flat_state(nnx.state(layer))
    assert {"/".join(path): p.shape for path, p in state} == shapes
    assert all(isinstance(p, nnx.Param) and p.dtype == jnp.float32 for _, p in state)


@every_layer
def test_a_causal_layer_sees_nothing_later(arguments):
    layer, x = make(arguments), inputs()
    y, changed = run(layer, x), run(layer, x.at[:, 4].add(1.0))
    np.testing.assert_array_equal(y[:, :4], changed[:, :4])
    assert all(error_ratio(changed[:, t], y[:, t]) > 1e-4 for t in (4, 5, 6))


def test_a_layer_that_is_not_causal_sees_everything():
    layer, x = make(SOFTMAX, is_causal=False), inputs()
    y, changed = run(layer, x), run(layer, x.at[:, 4].add(1.0))
    assert all(error_ratio(changed[:, t], y[:, t]) > 1e-4 for t in range(7))


@every_layer
def test_packed_documents_are_apart(arguments):
    layer, x = make(arguments), inputs(tokens=9)
    segments = jnp.array([[1] * 3 + [2] * 6, [1] * 6 + [2] * 3])
    packed = run(layer, x, segment_ids=segments)
    for row, cut in enumerate((3, 6)):
        alone = [run(layer, x[row : row + 1, :cut]), run(layer, x[row : row + 1, cut:])]
        assert_close(packed[row : row + 1], jnp.concatenate(alone, 1), factor=2)
    assert error_ratio(packed, run(layer, x)) > 1e-2


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        *((name, (3, 1, 2, 1)) for name in LAYERS),
        *((name, (1,) * 7) for name in ("gla, grouped", "softmax, grouped")),
        *((name, (7,)) for name in ("gla, grouped", "softmax, grouped")),
    ],
    ids=str,
)
def test_steps_are_the_parallel_form(name, splits):
    @nnx.jit
    def both(layer, x):
        state = layer.init_state(2, 7)
        outputs, position = [], 0
        for tokens in splits:
            shapes = state
            y, state = layer.step(x[:, position : position + tokens], state, position)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
            outputs.append(y)
            position += tokens
        return jnp.concatenate(outputs, 1), layer(x)

    assert_close(*both(make(LAYERS[name]), inputs()))


def test_state_of_linear_attention_does_not_grow():
    small, large = (
        make(LAYERS["gla, grouped"], dtype=jnp.bfloat16).init_state(2, n) for n in (8, 8192)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(small, large)
    # [B, N, 2H, H] in float32: LRPE doubles the keys.
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(large)] == [((2, 4, 8, 4), jnp.float32)]


def test_cache_holds_key_heads_in_the_layers_dtype():
    layer = make(LAYERS["softmax, grouped"], dtype=jnp.bfloat16)
    for state, dtype in (
        (layer.init_state(3, 11), jnp.bfloat16),
        (layer.init_state(3, 11, jnp.float32), jnp.float32),
    ):
        caches = [s for s in jax.tree.leaves(state) if s.ndim == 4]
        assert [(c.shape, c.dtype) for c in caches] == [((3, 11, 2, 4), dtype)] * 2


@every_layer
def test_computes_in_bfloat16_with_float32_parameters(arguments):
    arguments = arguments | {"head_dim": 16}
    narrow, wide = make(arguments, dtype=jnp.bfloat16), make(arguments)
    x = inputs(tokens=16)
    chex.assert_trees_all_equal(nnx.state(narrow), nnx.state(wide))
    y, expected = run(narrow, x), run(wide, x)
    assert y.dtype == jnp.bfloat16
    assert expected.dtype == jnp.float32
    assert_close(y, expected, jnp.bfloat16)


@every_layer
def test_gradient_reaches_every_parameter(arguments):
    layer, x = make(arguments), inputs()
    gradients = nnx.jit(nnx.grad(lambda layer: (layer(x) ** 2).sum()))(layer)
    for path, g in nnx.to_flat_state(gradients):
        assert np.isfinite(g[...]).all() and (np.asarray(g[...]) != 0).all(), path


def test_lrpe_and_rope_depend_on_distances_only():
    x = inputs()
    for name in ("gla with lrpe", "softmax", "softmax, lrpe and gate"):
        layer = make(LAYERS[name])
        y = run(layer, x)
        assert_close(run(layer, x, positions=jnp.arange(7) + 20), y, factor=5)
        assert error_ratio(run(layer, x, positions=2 * jnp.arange(7)), y) > 1e-3
        rows = jnp.stack([jnp.arange(7), 2 * jnp.arange(7)])
        assert_close(run(layer, x, positions=rows)[0], y[0])


def test_softmax_with_lrpe_keeps_the_scale_of_its_head_dim():
    layer, x = make(SOFTMAX | {"positions": "lrpe"}), inputs()
    explicit = make(SOFTMAX | {"positions": "lrpe", "options": {"scale": 0.5}})
    assert_close(run(layer, x), run(explicit, x))
    layer.theta[...] = jnp.zeros_like(layer.theta)
    assert_close(run(layer, x), run(make({}), x))


def test_state_of_a_mechanism_has_the_sizes_of_its_options():
    for size in (4, 100):
        state = make(LAYERS["diag"] | {"options": {"block_size": size}}).init_state(2, 50)
        assert state.key.shape == (2, size, 4, 4)
    rat = make({"mechanism": "rat_attention", "options": {"chunk_size": 4}})
    assert rat.init_state(2, 50).chunk_keys.shape == (2, 12, 4, 4)


def test_output_norm_hides_the_scale_of_the_mechanism():
    x = inputs()
    for kind, hidden in (("srms", True), ("rms", True), (None, False)):
        layer = make(GLA | {"output_norm": kind})
        y, scaled = layer(x), layer(x, options={"scale": 8.0})
        # Up to the norm's epsilon, beside mean squares of about 1.
        assert (error_ratio(scaled, y) < 1e-4) == hidden


def test_grouped_heads_are_repeated_key_heads():
    grouped, full = make(LAYERS["softmax, grouped"]), make(SOFTMAX)
    for name in ("query", "out"):
        getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
    for name in ("key", "value"):
        kernel = getattr(grouped, name).kernel[...].reshape(16, 2, 1, 4)
        getattr(full, name).kernel[...] = jnp.repeat(kernel, 2, axis=2).reshape(16, 16)
    x = inputs()
    assert_close(run(grouped, x), run(full, x))


def test_options_reach_the_mechanism():
    x = inputs()
    plain = make(SOFTMAX)(x)
    capped = make(SOFTMAX, options={"logits_soft_cap": 0.1})
    assert error_ratio(capped(x), plain) > 1e-3
    assert_close(capped(x, options={"logits_soft_cap": None}), plain)
    assert_close(capped.step(x, capped.init_state(2, 7), 0)[0], capped(x))
    lists, tuples = make(GLA, options={"slopes": list(SLOPES)}), make(GLA)
    assert nnx.graphdef(lists) == nnx.graphdef(tuples)
    array = make(GLA, options={})(x, options={"slopes": jnp.array(SLOPES)})
    assert_close(array, tuples(x))
    bias = jnp.where(jnp.arange(7) == 0, 0.0, -1e9)
    first_only = make({}, is_causal=False)
    y = first_only(x, options={"bias": jnp.broadcast_to(bias, (2, 4, 7, 7))})
    assert_close(y, jnp.broadcast_to(first_only.out(first_only.value(x[:, :1])), y.shape))


def test_reference_and_xla_agree():
    x = inputs()
    for arguments in (GLA, SOFTMAX):
        layer = make(arguments)
        assert_close(
            layer(x, options={"implementation": "xla"}),
            layer(x, options={"implementation": "reference"}),
        )


def test_biases():
    layer, x = make(SOFTMAX, use_bias=True), inputs()
    biases = [p for path, p in nnx.to_flat_state(nnx.state(layer)) if path[-1] == "bias"]
    assert len(biases) == 4 and not any(np.asarray(b[...]).any() for b in biases)
    y = layer(x)
    layer.out.bias[...] = jnp.arange(16.0)
    assert_close(layer(x), y + jnp.arange(16.0))


def test_jit_and_vmap():
    layer, x = make(LAYERS["gla with lrpe"]), inputs(batch=6)
    y = layer(x)
    assert_close(run(layer, x), y)
    rows = jax.jit(jax.vmap(layer))(x.reshape(3, 2, 7, 16))
    assert_close(rows.reshape(y.shape), y)


def test_float64_throughout():
    with jax.enable_x64(True):
        for name in ("gla with lrpe", "softmax"):
            layer = make(LAYERS[name], param_dtype=jnp.float64)
            x = inputs(dtype=jnp.float64)
            p = parameters(layer)
            for row, y in zip(np.asarray(x), layer(x), strict=True):
                if name == "softmax":
                    expected = oracles.softmax_attention(row, p, 4)
                else:
                    expected = oracles.gated_linear_attention(row, p, SLOPES, 4)
                assert_close(y, expected, jnp.float64)


def with_record(monkeypatch, **changes):
    record = dataclasses.replace(catalogue.get("softmax_attention"), **changes)
    monkeypatch.setattr(catalogue, "get", lambda slug: record)


def test_mechanisms_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"mechanism: 'softmax' .*known: .*lightning_attention"):
        make({"mechanism": "softmax"})
    with pytest.raises(
        ValueError, match=r"'lightning_attention' does not support is_causal=False; .*self causal"
    ):
        make(GLA, is_causal=False)
    with pytest.raises(ValueError, match="'selective_scan' takes x, delta, A, B, C, not the quer"):
        make({"mechanism": "selective_scan"})
    with_record(monkeypatch, patterns=frozenset({"self non-causal"}))
    with pytest.raises(
        ValueError, match=r"'softmax_attention' does not support is_causal=True; .*self non-causal"
    ):
        make({})
    with_record(monkeypatch, has_weights=True)
    with pytest.raises(ValueError, match="'softmax_attention' has weights of its own"):
        make({})


def test_packed_documents_are_refused_where_a_mechanism_takes_none(monkeypatch):
    def without(query, key, value, *, is_causal=False):
        return value

    record = catalogue.get("softmax_attention")
    monkeypatch.setattr(without, "__name__", record.slug)
    without = dataclasses.replace(record, function=without, extras=(), step=None, init_state=None)
    layer = make({"mechanism": "softmax_attention"})
    monkeypatch.setattr(catalogue, "get", lambda slug: without)
    assert layer(inputs()).shape == (2, 7, 16)
    with pytest.raises(ValueError, match="segment_ids: softmax_attention takes no packed doc"):
        layer(inputs(), segment_ids=jnp.zeros((2, 7), int))


def test_steps_that_do_not_exist_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="is_causal: False, but only a causal layer has a step"):
        make({}, is_causal=False).init_state(1, 8)
    with pytest.raises(ValueError, match="'query_offset' is not an option of softmax_attention_st"):
        make({}, options={"query_offset": 0}).init_state(1, 8)
    with_record(monkeypatch, step=None, init_state=None)
    with pytest.raises(ValueError, match="mechanism: 'softmax_attention' has no step form"):
        make({}).init_state(1, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads: 3 must divide the 16 features"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: 3 must divide the 4 heads of num_heads"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: 0 must be at least 1"),
        ({"head_dim": 4.0}, TypeError, r"head_dim: 4\.0 must be an int"),
        ({"head_dim": 3, "positions": "rope"}, ValueError, "head_dim: 3 must be even"),
        ({"positions": "alibi"}, ValueError, "positions: 'alibi' must be one of None, 'rope'"),
        ({"output_norm": "layer"}, ValueError, "output_norm: 'layer' must be one of None, 'rms'"),
        (
            {"mechanism": "aaren_attention", "positions": "rope"},
            ValueError,
            "positions: 'rope', but the query of aaren_attention has no position",
        ),
        ({"query_key_activation": "relu"}, ValueError, "query_key_activation: 'relu' must be"),
        ({"options": {"slopes": (1.0,)}}, ValueError, "'slopes' is not an option of softmax_att"),
        ({"options": {"is_causal": True}}, ValueError, "'is_causal' is not free: the layer"),
        ({"options": {"return_residual": True}}, ValueError, "'return_residual' is not free"),
        ({"options": {"bias": np.zeros(3)}}, TypeError, "'bias' is a ndarray, which is not hash"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make(arguments)


def test_wrong_calls_are_refused():
    layer, x = make({}), inputs()
    with pytest.raises(ValueError, match=r"x: shape \(2, 7, 8\) must be \[batch, tokens, 16\]"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match=r"x: shape \(7, 16\) must be \[batch, tokens, 16\]"):
        layer.step(x[0], layer.init_state(2, 7), 0)
    with pytest.raises(ValueError, match="positions: this layer has no positions"):
        layer(x, positions=jnp.arange(7))
    with pytest.raises(ValueError, match="'slopes' is not an option of softmax_attention"):
        layer(x, options={"slopes": jnp.zeros(4)})
