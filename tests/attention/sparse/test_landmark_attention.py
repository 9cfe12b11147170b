"""`landmark_attention`: its definition, what landmarks are for, its choice of blocks, and steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import landmark_attention, softmax_attention
from tests.numerics import assert_close
from tests.oracles import landmark_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place
from tests.tpu import interpreted

B, T, N, K, H, V = 2, 19, 4, 2, 8, 19

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, tokens, K, H), (batch, tokens, K, V)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


# Documents end within blocks and with them, and one is a single token.
IDS = np.array([[0] * 8 + [1] * 10 + [2], [3] * 1 + [4] * 5 + [3] * 9 + [5] * 4])
# Windows that begin anywhere in a block, on a landmark too; a block of a landmark alone.
WINDOWS = np.zeros((B, T), bool)
WINDOWS[0, [2, 6, 10, 14, 18]] = WINDOWS[1, [0, 4, 5, 8, 12, 16]] = True
CASES = {
    "documents": dict(block_size=4, segment_ids=IDS, scale=1.0),
    "windows": dict(block_size=4, is_landmark=WINDOWS, num_landmarks=7),
    "everything": dict(
        block_size=4,
        is_landmark=WINDOWS,
        num_landmarks=7,
        segment_ids=IDS,
        top_k=1,
        share_heads=True,
    ),
}


@functools.cache
def _compiled(case):
    """Returns the function of a case; that of `everything` is in the program of gradients."""
    if case == "everything":
        return lambda *arrays, is_landmark: _gradients(*arrays)[0][1]
    options = {n: x for n, x in CASES[case].items() if n != "is_landmark"}
    return jax.jit(functools.partial(landmark_attention, **options))


def _run(case, *arrays, **changed):
    options = {n: x for n, x in CASES[case].items() if n == "is_landmark"}
    return _compiled(case)(*arrays, **options | changed)


@jax.jit
def _gradients(*arrays):
    """Returns gradients and output of both implementations."""

    def loss(implementation, *arrays):
        out = landmark_attention(*arrays, **CASES["everything"], implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    return [
        jax.grad(functools.partial(loss, name), (0, 1, 2), has_aux=True)(*arrays)
        for name in ("xla", "reference")
    ]


def _of_oracle(case):
    return {n: x for n, x in CASES[case].items() if n != "num_landmarks"}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    """And as weights: the values are unit vectors."""
    query, key, _ = _arrays(jnp.float64)
    value = np.array(np.broadcast_to(np.eye(T)[None, :, None], (B, T, K, T)))
    weights = np.asarray(_run(case, query, key, value))
    wanted = oracle.landmark_attention(query, key, value, **_of_oracle(case))
    assert_close(weights, wanted, jnp.float64)
    landmarks = CASES[case].get("is_landmark")
    if landmarks is None:
        begins = np.zeros((B, T), bool)
        if "segment_ids" in CASES[case]:
            begins[:, 1:] = IDS[:, 1:] != IDS[:, :-1]
        begins[:, 0] = True
        first = np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
        landmarks = (np.arange(T) - first) % 4 == 3
    assert not np.moveaxis(weights, 3, 1)[landmarks].any()
    sums = weights.sum(axis=-1)
    alone = wanted.sum(axis=-1) == 0
    assert alone.any() == ("is_landmark" in CASES[case])  # a landmark that begins a window
    assert_close(sums, np.where(alone, 0, 1), jnp.float64)
    assert (np.triu(np.ones((T, T)), 1)[None, :, None] * weights == 0).all()


def test_gradients(x64):
    assert_close(*_gradients(*_arrays(jnp.float64)), jnp.float64, factor=4)


def test_the_kernel_for_tpu():
    """In Pallas's TPU interpret mode: documents, and blocks that begin anywhere."""
    case = {"segment_ids": IDS, "is_landmark": WINDOWS, "num_landmarks": 7}

    def results(implementation):
        def loss(*arrays):
            out = landmark_attention(*arrays, block_size=8, implementation=implementation, **case)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*_arrays())

    with interpreted():
        actual = jax.block_until_ready(results("pallas_tpu"))
    assert_close(actual, results("reference"), factor=2)
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*: groups of keys must have 8, "):
        landmark_attention(*_arrays(), block_size=4, implementation="pallas_tpu")


def test_few_tokens_are_causal_softmax_attention():
    @jax.jit
    def run(cases):
        found = [landmark_attention(*arrays, block_size=8) for arrays in cases]
        plain = functools.partial(softmax_attention, is_causal=True, implementation="reference")
        return found, [plain(*arrays) for arrays in cases]

    assert_close(*run([_arrays(tokens=tokens) for tokens in (1, 7)]))


def test_equal_scores_share_a_block_equally(x64):
    """Keys of a block are the same, but that of the landmark: older blocks are means."""
    query, key, value = _arrays(jnp.float64)
    key[0, 8:11] = key[0, 8]
    value = np.array(np.broadcast_to(np.eye(T)[None, :, None], (B, T, K, T)))
    weights = np.asarray(_run("documents", query, key, value))[:1, 12:18, :, 8:11]
    assert (weights > 0).all()
    assert_close(weights, np.broadcast_to(weights[..., :1], weights.shape), jnp.float64)


def test_a_choice_of_all_blocks_is_none():
    arrays = _arrays()
    out = jax.jit(functools.partial(landmark_attention, block_size=4, top_k=9))(*arrays)
    assert_close(out, oracle.landmark_attention(*arrays, block_size=4))


def test_causal_at_random_shapes():
    rng = np.random.default_rng(3)
    for _ in range(2):
        tokens, size = int(rng.integers(2, 30)), int(rng.integers(2, 7))
        options = {"top_k": int(rng.integers(1, 3))} if rng.integers(2) else {}
        run = jax.jit(functools.partial(landmark_attention, block_size=size, **options))
        arrays, token = _arrays(tokens=tokens), int(rng.integers(1, tokens))
        changed = [x + (np.arange(tokens) == token)[:, None, None].astype(x.dtype) for x in arrays]
        differs = np.any(np.asarray(run(*changed)) != run(*arrays), axis=(0, 2, 3))
        assert differs[token] and not differs[:token].any()


def test_steps():
    """Of three tokens, which end anywhere in a block of four."""
    arrays, options = _arrays(tokens=18), {"block_size": 4, "top_k": 1, "share_heads": True}
    step = jax.jit(functools.partial(attention.landmark_attention_step, **options))
    state, parts = attention.init_landmark_attention_state(B, T, N, K, H, V), []
    for start in range(0, 18, 3):
        out, state = step(state, *(x[:, start : start + 3] for x in arrays))
        parts.append(out)
    whole = oracle.landmark_attention(*arrays, **options)
    assert_close(np.concatenate(parts, axis=1), whole, factor=2)
    assert state.length == 18


def test_rows_with_too_many_landmarks_or_too_long_blocks(x64):
    run, arrays = functools.partial(_run, "windows"), _arrays(jnp.float64)
    landmarks = WINDOWS.copy()
    landmarks[0, [11, 12, 13]] = True
    out = run(*arrays, is_landmark=landmarks)
    assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()
    landmarks = WINDOWS.copy()
    landmarks[1, 12] = False
    out = run(*arrays, is_landmark=landmarks)
    assert jnp.isnan(out[1]).all() and jnp.isfinite(out[0]).all()


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    options = {"block_size": 4, "top_k": 2}
    run = jax.jit(functools.partial(landmark_attention, **options)).lower(*placed).compile()
    assert_close(run(*placed), oracle.landmark_attention(*arrays, **options))
    # Rows of lists go in step, up to the longest list of all devices.
    assert set(COLLECTIVE.findall(run.as_text())) == {"all-reduce"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(block_size=1), ValueError, "block_size: must be an integer of at least 2; got 1"),
        (dict(top_k=0), ValueError, "top_k: must be a positive integer; got 0"),
        (dict(num_landmarks=3), ValueError, "num_landmarks: is of is_landmark, which is None"),
        (dict(is_landmark=np.zeros((B, T))), TypeError, "is_landmark: must be boolean"),
        (dict(is_landmark=WINDOWS[:1]), ValueError, r"is_landmark: must have shape \(2, 19\)"),
        (dict(is_landmark=WINDOWS, num_landmarks=0), ValueError, "num_landmarks: .*got 0"),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        landmark_attention(*_arrays(), **options)


def test_wrong_state():
    with pytest.raises(TypeError, match="state: must be a KVCache; got int"):
        attention.landmark_attention_step(3, *_arrays())
