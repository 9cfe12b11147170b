"""Titans' layers: their equations, steps, documents, limits, dtypes and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import AttentionLayer, TitansMAC, TitansMAG, TitansMAL, TitansMemory
from tests.numerics import assert_close
from tests.oracles import titans_neural_memory as oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D, N, W, C, P = 2, 11, 12, 2, 4, 3, 2
H = D // N
IDS = np.array([[1] * 5 + [2] * 6, [1] * 1 + [2] * 9 + [1] * 1])

LAYERS = {
    "mag": functools.partial(TitansMAG, window=W, chunk_size=C),
    "mal": functools.partial(TitansMAL, window=W, chunk_size=C),
    "mac": functools.partial(TitansMAC, segment=W),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, features=D, **arguments):
    """A layer, whose memory is deep in `mac`; `mag` and `mal` have theirs from the same class."""
    sizes = dict(num_heads=N, num_persistent=P, expansion=2, depth=2 if name == "mac" else 1)
    return drawn(functools.partial(LAYERS[name], features, **(sizes | arguments)))


def drawn(kind):
    """A layer with parameters of NumPy, all of them drawn: nothing is compiled for it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise, name = rng.standard_normal(leaf.shape), jax.tree_util.keystr(path)
        if "kernel" in name or "weights" in name:
            return jnp.asarray(noise * leaf.shape[-2] ** -0.5, leaf.dtype)
        return jnp.asarray(0.2 * noise + ("scale" in name), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def inputs(features=D):
    return np.random.default_rng(1).standard_normal((B, T, features)).astype(np.float32)


def parameters(layer):
    return jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(layer)))


@nnx.jit(static_argnames="implementation")
def run(layer, x, segment_ids=None, implementation=None):
    options = {"implementation": implementation}
    return layer(x, segment_ids=segment_ids, options=options)


def whole(name, layer, x, ids):
    """What `mal` has beside `mag` is another input of attention: the reference is enough."""
    return run(layer, x, ids, "reference" if name == "mal" else None)


def documents(name):
    """Those of the inputs, and one for all, for programs that take them."""
    return (None, None) if name == "mac" else (IDS, np.zeros_like(IDS))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def split(x):
    return x.reshape(*x.shape[:-1], N, H)


def turned(x, position):
    half = H // 2
    angle = position * 10_000.0 ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def memory_heads(p, x, ids):
    """Queries, keys, values and gates of the memory, of tokens [T, D] of documents."""
    heads = np.concatenate([x @ p[n]["kernel"] for n in ("query", "key", "value")], axis=-1)
    if "conv" in p:
        kernel, convolved = p["conv"]["kernel"], np.zeros_like(heads) + p["conv"]["bias"]
        for t in range(len(x)):
            for back in range(4):
                if back <= t and len(set(ids[t - back : t + 1])) == 1:
                    convolved[t] += kernel[3 - back] * heads[t - back]
        heads = convolved
    query, key, value = (split(a) for a in np.split(heads * sigmoid(heads), 3, axis=-1))
    query, key = (a / np.sqrt(np.sum(a**2, -1, keepdims=True) + 1e-6) for a in (query, key))
    gates = np.split(x @ p["gates"]["kernel"] + p["gates"]["bias"], 3, axis=-1)
    return query, key, value, gates


def weights_of(p):
    return [p["weights"][i] for i in sorted(p["weights"])]


def memory(p, x, ids):
    query, key, value, (rate, momentum, forgetting) = memory_heads(p, x, ids)
    out = oracle.titans_neural_memory(
        *(a[None] for a in (query, key, value)),
        weights=weights_of(p),
        rate=(sigmoid(rate) / C)[None],
        log_momentum=np.log(sigmoid(momentum))[None],
        log_decay=np.log(sigmoid(4 - forgetting))[None],
        chunk_size=C,
        segment_ids=ids[None],
    )
    return out[0].reshape(len(x), -1) @ p["out"]["kernel"]


def attend(p, query, position, others):
    """Attention of one token [D] to others, a list of tokens and positions, and persistent ones."""
    query = split(query @ p["query"]["kernel"])
    scores, values = [], []
    for token, at in [*others, *((token, None) for token in p.get("persistent", ()))]:
        key = split(token @ p["key"]["kernel"])
        if at is None:
            scores.append(np.sum(query * key, -1) / np.sqrt(H))
        else:
            scores.append(np.sum(turned(query, position) * turned(key, at), -1) / np.sqrt(H))
        values.append(split(token @ p["value"]["kernel"]))
    weights = np.exp(np.array(scores))
    weights /= weights.sum(0)
    out = np.sum(weights[..., None] * np.array(values), axis=0)
    return out.reshape(-1) @ p["out"]["kernel"]


def windowed(p, x, ids):
    out = np.zeros_like(x)
    for t in range(len(x)):
        seen = [j for j in range(max(t - W + 1, 0), t + 1) if len(set(ids[j : t + 1])) == 1]
        out[t] = attend(p, x[t], t, [(x[j], j) for j in seen])
    return out


def gated(p, y, m):
    def norm(a, scale):
        return a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-6) * scale

    gate = 2 * sigmoid(norm(m, p["memory_norm"]["scale"]))
    return norm(y, p["attention_norm"]["scale"]) * gate


def mag(p, x, ids):
    return gated(p, windowed(p, x, ids), memory(p["memory"], x, ids))


def mal(p, x, ids):
    return windowed(p, x + memory(p["memory"], x, ids), ids)


def mac(p, x, ids):
    own, out = p["memory"], np.zeros_like(x)

    def heads(token):
        query, key, value, gates = memory_heads(own, token[None], ids)
        return query[0], key[0], value[0], [g[0] for g in gates]

    def read(now, query):
        said = [oracle.recall([w[n] for w in now], query[n])[0] for n in range(N)]
        return np.concatenate(said) @ own["out"]["kernel"]

    now = [w.copy() for w in weights_of(own)]
    moving = [np.zeros_like(w) for w in now]
    for t in range(len(x)):
        if t % W == 0:
            start, seen = [w.copy() for w in now], []
        seen += [(read(start, heads(x[t])[0]), t), (x[t], t)]
        y = attend(p, x[t], t, seen)
        query, key, value, (rate, momentum, forgetting) = heads(y)
        for n in range(N):
            slopes = oracle.gradient([w[n] for w in start], key[n], value[n])
            for s, w, g in zip(moving, now, slopes, strict=True):
                s[n] = sigmoid(momentum[n]) * s[n] - sigmoid(rate[n]) / W * g
                w[n] = sigmoid(4 - forgetting[n]) * w[n] + s[n]
        out[t] = gated(p, y, read(now, query))
    return out


def expected(layer, x, segment_ids):
    p, equations = parameters(layer), {TitansMAG: mag, TitansMAL: mal, TitansMAC: mac}[type(layer)]
    rows = zip(np.float64(x), segment_ids, strict=True)
    return np.stack([equations(p, row, ids) for row, ids in rows])


@each_layer
def test_is_its_equations(name):
    layer, x, (ids, one) = make(name), inputs(), documents(name)
    y = expected(layer, x, np.zeros((B, T), int) if ids is None else ids)
    assert_close(whole(name, layer, x, ids), y, factor=2)
    if name == "mac":  # without what the memory says, whose rows take their share of the weights
        layer.memory.out.kernel[...] = jnp.zeros_like(layer.memory.out.kernel)
        assert_close(
            whole(name, layer, x, one), expected(layer, x, np.zeros((B, T), int)), factor=2
        )


@each_layer
def test_steps_are_the_parallel_form_and_see_nothing_later(name):
    @nnx.jit
    def step(layer, x, state, position):
        return layer.step(x, state, position)

    layer, x, (_, one) = make(name), inputs(), documents(name)
    y, state, outputs = whole(name, layer, x, one), layer.init_state(B, T), []
    for token in range(T):
        before = state
        out, state = step(layer, x[:, token : token + 1], state, np.int32(token))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
        outputs.append(out)
    assert_close(np.concatenate(outputs, 1), y, factor=2)
    for token in np.random.default_rng(0).integers(1, T, 3):
        changed = x + (np.arange(T) == token)[:, None].astype(np.float32)
        differs = np.any(whole(name, layer, changed, one) != y, axis=(0, 2))
        assert differs[token:].all() and not differs[:token].any()


@each_layer
def test_a_state_does_not_grow(name):
    layer = make(name, dtype=jnp.bfloat16)
    small, large = (layer.init_state(3, length) for length in (8, 8192))
    chex.assert_trees_all_equal_shapes_and_dtypes(small, large)
    kept = W if name == "mac" else W - 1
    arrays = [x for x in jax.tree.leaves(large.attention) if x.ndim]
    assert {x.shape for x in arrays} == {(3, kept, N, H)}
    assert {x.dtype for x in arrays} == {jnp.dtype("bfloat16")}
    wide = jax.tree.leaves(layer.init_state(3, 8, jnp.float32).attention)
    assert {x.dtype for x in wide if x.ndim} == {jnp.dtype("float32")}
    assert large.memory.memory.weights[0].dtype == jnp.float32


@pytest.mark.parametrize("name", ("mag", "mal"))
def test_a_silent_memory_leaves_attention(name):
    layer, x = make(name, num_persistent=0), inputs()
    layer.memory.out.kernel[...] = jnp.zeros_like(layer.memory.out.kernel)
    options = {"local_window_size": (W - 1, 0)}
    plain = drawn(functools.partial(AttentionLayer, D, N, positions="rope", options=options))
    for part in ("query", "key", "value", "out"):
        getattr(plain, part).kernel[...] = getattr(layer, part).kernel[...]
    y = run(plain, x, IDS, "reference")
    out = run(layer, x, IDS, "reference")
    assert_close(out, layer.attention_norm(y) if name == "mag" else y)


@pytest.mark.parametrize(("name", "num_persistent"), (("mag", P), ("mac", 0)))
def test_computes_in_bfloat16_with_float32_parameters(name, num_persistent):
    sizes = dict(head_dim=H, depth=1, num_persistent=num_persistent)
    layer, x = make(name, 32, dtype=jnp.bfloat16, **sizes), inputs(32)
    y = run(layer, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, expected(layer, x, np.zeros((B, T), int)), jnp.bfloat16)


@pytest.mark.parametrize(("name", "implementation"), (("mal", "reference"), ("mac", None)))
def test_gradient_reaches_every_parameter(name, implementation):
    def loss(layer, x):
        return (layer(x, options={"implementation": implementation}) ** 3).sum()

    gradients = nnx.jit(nnx.grad(loss))(make(name, depth=1), inputs())
    for path, g in nnx.to_flat_state(gradients):
        assert np.isfinite(g[...]).all() and np.any(np.asarray(g[...]) != 0), path


def test_parameters():
    names = {
        name: {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer))}
        for name, layer in ((name, make(name, depth=2)) for name in LAYERS)
    }
    linear = {f"{n}/kernel" for n in ("query", "key", "value", "out")}
    of_memory = {f"memory/{n}" for n in (*linear, "gates/kernel", "gates/bias")}
    of_memory |= {"memory/weights/0", "memory/weights/1"}
    assert names["mal"] == linear | of_memory | {
        "persistent",
        "memory/conv/kernel",
        "memory/conv/bias",
    }
    norms = {"attention_norm/scale", "memory_norm/scale"}
    assert names["mag"] == names["mal"] | norms
    assert names["mac"] == linear | of_memory | {"persistent"} | norms


def test_wrong_arguments_are_refused():
    for name, arguments, error, message in (
        ("mag", dict(window=0), ValueError, "window: 0 must be at least 1"),
        ("mac", dict(segment=2.5), TypeError, "segment: 2.5 must be an int"),
        ("mal", dict(num_persistent=-1), ValueError, "num_persistent: -1 must be an int of"),
        ("mal", dict(head_dim=3), ValueError, "head_dim: 3 must be even, for rotary positions"),
        ("mac", dict(depth=0), ValueError, "depth: 0 must be at least 1"),
        ("mag", dict(num_heads=5), ValueError, "num_heads: 5 must divide the 12 features"),
    ):
        with pytest.raises(error, match=message):
            make(name, **arguments)
    x = inputs()
    for name in LAYERS:
        layer = make(name)
        with pytest.raises(
            ValueError, match=r"x: shape \(2, 11, 9\) must be \[batch, tokens, 12\]"
        ):
            layer(x[..., :9])
        with pytest.raises(TypeError, match="state: must be a TitansLayerState; got int"):
            layer.step(x, 3, 0)
        with pytest.raises(ValueError, match="options: 'rate' is not free: the layer sets it"):
            layer(x, options={"rate": 1.0})
    with pytest.raises(ValueError, match="segment_ids: memory as context takes no packed docu"):
        make("mac")(x, segment_ids=IDS)
    memory = TitansMemory(D, N, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="conv_width: must be None"):
        memory.recall(x, memory.init_state(B, T))
