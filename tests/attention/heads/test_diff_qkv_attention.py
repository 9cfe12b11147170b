"""`diff_qkv_attention`: its definition, the groupings that it contains, and selected values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import diff_qkv_attention, init_diff_qkv_attention_state
from attention.heads import diff_qkv_attention as module
from tests.numerics import assert_close
from tests.oracles import diff_qkv_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, L, H, D, V = 2, 13, 12, 2, 4, 6, 3, 5

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, batch=B, tokens=T, keys=None, sizes=(N, K, L), width=H):
    rng = np.random.default_rng(0)
    heads, kv_heads, value_heads = sizes
    keys = tokens if keys is None else keys
    shapes = (
        (batch, tokens, heads, H),
        (batch, keys, kv_heads, width),
        (batch, keys, value_heads, V),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _lift(dtype=jnp.float32, heads=None):
    shape = (D, H) if heads is None else (heads, D, H)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


@pytest.fixture
def few_rows(monkeypatch):
    """Selects values for 5 queries at a time."""
    monkeypatch.setattr(module, "ROWS", 5)


IDS = np.sort(np.random.default_rng(2).integers(0, 3, (B, T)), axis=1)


def test_against_the_oracle(x64, few_rows):
    """In one program: lifts, positions, documents, selections, more keys than values."""
    same, small = _arrays(jnp.float64), _arrays(jnp.float64, width=D)
    swapped = _arrays(jnp.float64, sizes=(6, 3, 2))
    cross = _arrays(jnp.float64, keys=T + 4)
    lift, lifts = _lift(jnp.float64), _lift(jnp.float64, K)
    cases = [
        (same, dict(is_causal=True)),
        (swapped, dict(segment_ids=IDS)),
        (small, dict(key_lift=lift, is_causal=True)),
        (small, dict(key_lift=lifts, scale=0.2, segment_ids=IDS)),
        (small, dict(key_lift=lifts, rope_base=100.0, is_causal=True, segment_ids=IDS)),
        (same, dict(rope_base=100.0, is_causal=True)),
        (same, dict(top_values=3, is_causal=True)),
        (cross, dict(top_values=4, renormalise=True)),
        (small, dict(top_values=2, key_lift=lift, segment_ids=IDS, implementation="reference")),
        (swapped, dict(top_values=3, renormalise=True, segment_ids=IDS, is_causal=True)),
    ]
    outs = jax.jit(lambda: [diff_qkv_attention(*arrays, **case) for arrays, case in cases])()
    for out, (arrays, case) in zip(outs, cases, strict=True):
        case.pop("implementation", None)
        assert_close(out, oracle.diff_qkv_attention(*arrays, **case), jnp.float64)


@pytest.mark.parametrize("top_values", (None, 3))
def test_gradients_and_rows_with_no_key(top_values, few_rows):
    ids = np.full((B, T), 1), np.where(np.arange(T) < 4, 1, 2)[None].repeat(B, 0)
    ids[0][:, -6:] = 7

    def loss(implementation, lift, *arrays):
        out = diff_qkv_attention(
            *arrays,
            key_lift=lift,
            top_values=top_values,
            is_causal=True,
            segment_ids=ids,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(3 * out)), out

    @jax.jit
    def run(*arguments):
        gradient = jax.grad(loss, (1, 2, 3, 4), has_aux=True)
        return [gradient(name, *arguments) for name in ("xla", "reference")]

    found, defined = run(_lift(heads=K), *_arrays(width=D))
    assert_close(found, defined, factor=4)
    (_, query, key, _), out = found
    assert (out[:, -6:] == 0).all() and (out[:, :-6] != 0).all()
    assert (query[:, -6:] == 0).all() and (key[:, 4:] == 0).all()


def test_groupings_that_it_contains():
    """As many heads of all, of keys and values, and one: MHA, GQA and MQA."""
    cases = [_arrays(sizes=(6, heads, heads)) for heads in (6, 2, 1)]
    outs, expected = jax.jit(
        lambda cases: [
            [function(*arrays, is_causal=True) for arrays in cases]
            for function in (diff_qkv_attention, attention.softmax_attention)
        ]
    )(cases)
    assert_close(outs, expected)


def test_lifts():
    """One that copies channels changes nothing; another is what it does to keys, also turned."""

    @jax.jit
    def run(same, small, lift):
        query, key, value = small
        lifted = key @ lift
        turned = attention.positions.rope(query), attention.positions.rope(lifted)
        outs = (
            diff_qkv_attention(*same, key_lift=jnp.eye(H)),
            diff_qkv_attention(*small, key_lift=lift),
            diff_qkv_attention(*small, key_lift=lift, rope_base=10_000.0),
        )
        plain = same, (query, lifted, value), (*turned, value)
        return outs, tuple(diff_qkv_attention(*arrays) for arrays in plain)

    assert_close(*run(_arrays(), _arrays(width=D), _lift()), factor=2)


def test_all_values_selected_are_all(few_rows):
    @jax.jit
    def run(*arrays):
        return [
            [diff_qkv_attention(*arrays, is_causal=is_causal, top_values=count)]
            for is_causal in (False, True)
            for count in (None, T, 100)
        ]

    outs = run(*_arrays())
    assert_close(outs, [outs[i] for i in (0, 0, 0, 3, 3, 3)])


def test_selection_of_one_value():
    """It is the best key's value, times its weight or not."""
    query, key, value = _arrays(sizes=(N, N, N))
    best = jnp.argmax(jnp.einsum("btnh,bsnh->btns", query, key), axis=-1)
    expected = jnp.take_along_axis(value, best[..., None], axis=1)

    @jax.jit
    def run(*arrays):
        return [diff_qkv_attention(*arrays, top_values=1, renormalise=x) for x in (True, False)]

    whole, part = run(query, key, value)
    assert_close(whole, expected)
    ratio = part / expected
    assert (ratio > 1 / T).all() and (ratio < 1).all()


def test_selection_in_linear_memory():
    """Neither scores of all pairs nor their gradients are kept."""

    def temporary(tokens):
        def loss(*arrays):
            return jnp.sum(diff_qkv_attention(*arrays, top_values=4, is_causal=True))

        x = jax.ShapeDtypeStruct((1, tokens, 2, 4), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4.4 * temporary(2048)


def test_causal_at_random_sizes():
    rng = np.random.default_rng(3)
    for top_values in (None, 2):
        tokens = int(rng.integers(2, 20))
        heads = [int(x) for x in rng.choice((1, 2, 3, 6), 2)]
        run = jax.jit(functools.partial(diff_qkv_attention, is_causal=True, top_values=top_values))
        arrays, token = _arrays(tokens=tokens, sizes=(6, *heads)), int(rng.integers(1, tokens))
        changed = [x + (np.arange(tokens) == token)[:, None, None] for x in map(np.asarray, arrays)]
        differs = np.any(run(*arrays) != run(*changed), axis=(0, 2, 3))
        assert differs[token] and not differs[:token].any()


@pytest.mark.parametrize(
    "options",
    (dict(), dict(rope_base=50.0, top_values=3)),
    ids=("plain", "turned and selected"),
)
def test_steps_keep_small_keys(options):
    arrays, options = _arrays(width=D), dict(key_lift=_lift()) | options
    whole = oracle.diff_qkv_attention(*arrays, is_causal=True, **options)
    step = jax.jit(functools.partial(attention.diff_qkv_attention_step, **options))
    state = init_diff_qkv_attention_state(B, 16, N, K, D, V, num_value_heads=L)
    assert state.key.shape == (B, 16, K, D) and state.value.shape == (B, 16, L, V)
    parts = []
    for part in (slice(0, T - 2), slice(T - 2, T - 1), slice(T - 1, T)):
        out, state = step(state, *(x[:, part] for x in arrays))
        parts.append(out)
    assert_close(np.concatenate(parts, axis=1), whole, factor=2)


def test_one_token_of_bfloat16():
    arrays = _arrays(jnp.bfloat16, tokens=1)
    expected = np.repeat(arrays[2], N // L, axis=2)
    run = jax.jit(lambda *arrays: [diff_qkv_attention(*arrays, top_values=x) for x in (None, 1)])
    for out in run(*arrays):
        assert out.dtype == jnp.bfloat16
        assert_close(out, expected, jnp.bfloat16)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_sharded(kind):
    arrays, devices = _arrays(batch=4, width=D), mesh(kind)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    cases = dict(key_lift=_lift()), dict(key_lift=_lift(heads=K), top_values=3, is_causal=True)

    @jax.jit
    def run(*arrays):
        with attention.parallel.axes(batch="data", heads="tensor"):
            return [diff_qkv_attention(*arrays, **case) for case in cases]

    program = run.lower(*placed).compile()
    expected = [oracle.diff_qkv_attention(*arrays, **case) for case in cases]
    assert_close(program(*placed), expected, factor=2)
    assert not COLLECTIVE.findall(program.as_text())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(top_values=0), ValueError, "top_values: must be a positive integer; got 0"),
        (dict(renormalise=True), ValueError, "renormalise: is of the weights that top_values"),
        (
            dict(key_lift=jnp.zeros((H, H + 1))),
            ValueError,
            r"key_lift: must be \(6, 6\), or that for each of 2 key heads; got shape \(6, 7\)",
        ),
        (dict(key_lift=jnp.zeros((H, H), int)), TypeError, "key_lift: .*int32"),
        (
            dict(rope_base=10.0, segment_ids=(IDS, IDS)),
            ValueError,
            "rope_base: needs one array of segment_ids",
        ),
        (
            dict(top_values=2, implementation="pallas_tpu"),
            NotImplementedError,
            "diff_qkv_attention: implementation 'pallas_tpu' .*top_values must be None",
        ),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        diff_qkv_attention(*_arrays(), **options)


def test_wrong_shapes():
    query, key, value = _arrays(width=D)
    with pytest.raises(ValueError, match=r"key: shape .* head dimension"):
        diff_qkv_attention(query, key, value)
    with pytest.raises(ValueError, match="value: 5 heads do not divide"):
        diff_qkv_attention(*_arrays(sizes=(N, K, 5)))
    with pytest.raises(ValueError, match="key: 5 heads do not divide the 12"):
        diff_qkv_attention(*_arrays(sizes=(N, 5, L), width=D), key_lift=_lift())
    with pytest.raises(ValueError, match="key: must be 4-dimensional"):
        diff_qkv_attention(query, key[0], value, key_lift=_lift())
