"""`titans_neural_memory`: its definition, its limits, documents, steps, and deep memories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import init_titans_neural_memory_state, titans_neural_memory, titans_weights
from tests.numerics import assert_close
from tests.oracles import titans_neural_memory as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H = 2, 19, 4, 2, 6

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = np.array([[0] * 8 + [1] * 11, [3] * 2 + [4] * 1 + [5] * 3 + [3] * 13])
GATES = ("rate", "log_decay", "log_momentum")


def _arrays(dtype=np.float32, batch=B, tokens=T):
    """Returns query, key and value, and the gates."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((batch, tokens, n, H)) for n in (N, K, K))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    gates = (s * rng.uniform(0.1, 1, (batch, tokens, N)) for s in (0.3, -0.3, -2.0))
    return [x.astype(dtype) for x in (query, key, value, *gates)]


def _weights(depth, dtype=np.float32):
    rng = np.random.default_rng(depth)
    shapes = [(N, H, H)] if depth == 1 else [(N, H, 9), *[(N, 9, 9)] * (depth - 2), (N, 9, H)]
    return [(rng.standard_normal(s) * s[1] ** -0.5).astype(dtype) for s in shapes]


def _call(query, key, value, *gates, weights=None, segment_ids=None, **options):
    gates = dict(zip(GATES, gates, strict=False))
    return titans_neural_memory(
        query, key, value, **gates, weights=weights, segment_ids=segment_ids, **options
    )


def _expected(arrays, **options):
    gates = dict(zip(GATES, arrays[3:], strict=False))
    return oracle.titans_neural_memory(*arrays[:3], **gates, **options)


@pytest.mark.parametrize(("depth", "chunk_size"), ((0, 4), (1, 1), (3, 4)), ids=lambda x: str(x))
def test_against_the_oracle(depth, chunk_size, x64):
    """Whole sequences, by both ways to compute them, with and without momentum and decay."""
    arrays, options = _arrays(np.float64), dict(chunk_size=chunk_size)
    counts = (6,) if depth > 1 else (4, 6)
    options["weights"] = _weights(depth, np.float64) if depth else None

    @jax.jit
    def every(*arrays):
        return [
            _call(*arrays[:count], implementation=name, **options)
            for count in counts
            for name in ("xla", "reference")
        ]

    expected = [_expected(arrays[:count], **options) for count in np.repeat(counts, 2)]
    assert_close(every(*arrays), expected, jnp.float64)


def test_random_documents_and_gradients(x64):
    """Chunks begin with their documents, wherever in a row; one program, many rows.

    Gradients are of all arrays, with decay and momentum of 0 at some tokens, whose logarithms are
    -inf.
    """
    arrays, weights = _arrays(np.float64), _weights(2, np.float64)
    for gate, period in ((4, 5), (5, 4)):
        arrays[gate] = np.where(np.arange(T)[:, None] % period == 2, -np.inf, arrays[gate])

    def loss(arrays, weights, ids, name):
        out = _call(*arrays, weights=weights, segment_ids=ids, chunk_size=4, implementation=name)
        return jnp.sum(jnp.sin(3 * out)), out

    @jax.jit
    def both(*args):
        gradient = jax.grad(loss, (0, 1), has_aux=True)
        return [gradient(*args, name) for name in ("xla", "reference")]

    rng = np.random.default_rng(2)
    for change in (0.1, 0.3, 0.6):
        ids = np.cumsum(rng.uniform(size=(B, T)) < change, axis=1)
        (gradients, out), (defined, reference) = both(arrays, weights, ids)
        expected = _expected(arrays, weights=weights, segment_ids=ids, chunk_size=4)
        assert_close([out, reference], [expected, expected], jnp.float64)
        assert_close(gradients, defined, jnp.float64, factor=4)


def test_limits():
    """The delta rule; linear attention; a memory without a past."""
    query, key, value, rate, _, log_momentum = _arrays()
    key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))

    @jax.jit
    def every(*arrays):
        query, key, value, rate, log_momentum = arrays
        call = functools.partial(titans_neural_memory, query, key, value, rate=rate)
        return (
            call(chunk_size=1),
            call(chunk_size=T),
            call(chunk_size=4, log_decay=-np.inf, log_momentum=log_momentum, return_state=True),
        )

    delta, linear, (forgetful, state) = every(query, key, value, rate, log_momentum)
    memory = np.zeros((B, N, H, H))
    total, moving = np.zeros_like(memory), np.zeros_like(memory)
    start = memory
    for t in range(T):
        q, k, v, step = (x[:, t] for x in (query, key, value, 2 * rate))
        step = step[..., None]

        def added(memory, k=k, v=v, step=step):
            return np.einsum("bni,bno->bnio", k, step * (v - np.einsum("bni,bnio->bno", k, memory)))

        memory = memory + added(memory)
        assert_close(delta[:, t], np.einsum("bni,bnio->bno", q, memory))
        total = total + added(0 * total)
        assert_close(linear[:, t], np.einsum("bni,bnio->bno", q, total))
        eta = np.exp(log_momentum[:, t])[..., None, None]
        start = moving if t % 4 == 0 else start
        moving = eta * moving + added(start)
        assert_close(forgetful[:, t], np.einsum("bni,bnio->bno", q, moving))
    assert_close((state.weights[0], state.momentum[0]), (moving, moving))


@pytest.mark.parametrize("seed", (0, 1))
def test_causal_at_every_token(seed):
    rng = np.random.default_rng(seed)
    tokens, chunk_size = int(rng.integers(2, 14)), int(rng.integers(2, 6))
    arrays = _arrays(tokens=tokens)
    run = jax.jit(functools.partial(_call, weights=_weights(1 + seed), chunk_size=chunk_size))
    before = run(*arrays)
    for token in range(tokens):
        later = (np.arange(tokens) >= token)[:, None]
        changed = [np.where(later[..., None], -x, x) for x in arrays[:3]]
        changed += [np.where(later, 0.5 * x, x) for x in arrays[3:]]
        differs = np.any(before != run(*changed), axis=(0, 2, 3))
        assert differs[token:].all() and not differs[:token].any()


@pytest.mark.parametrize(("depth", "chunk_size"), ((2, 4), (1, 1)))
def test_steps_across_chunks(depth, chunk_size):
    """Of five tokens, more than a chunk, which end anywhere in one."""
    arrays, weights, parts = _arrays(tokens=20), _weights(depth), []

    @jax.jit
    def step(state, *arrays):
        gates = dict(zip(GATES, arrays[3:], strict=True), chunk_size=chunk_size)
        return attention.titans_neural_memory_step(state, *arrays[:3], **gates)

    state = init_titans_neural_memory_state(B, 20, N, K, H, H, weights=weights)
    for start in range(0, 20, 5):
        out, state = step(state, *(x[:, start : start + 5] for x in arrays))
        parts.append(out)
    expected = _expected(arrays, weights=weights, chunk_size=chunk_size)
    assert_close(np.concatenate(parts, axis=1), expected, factor=2)
    assert np.all(state.place == 20)


def test_a_state_continues_the_first_document_only():
    arrays, options = _arrays(), dict(weights=_weights(1), chunk_size=4, return_state=True)

    @jax.jit
    def parts(*arrays):
        first, state = _call(*(x[:, :7] for x in arrays), segment_ids=IDS[:, :7], **options)
        arrays, ids = [x[:, 7:] for x in arrays], IDS[:, 7:]
        rest, state = _call(*arrays, segment_ids=ids, initial_state=state, **options)
        return jnp.concatenate([first, rest], axis=1), state.place

    out, place = parts(*arrays)
    del options["return_state"]
    assert_close(out, _expected(arrays, segment_ids=IDS, **options), factor=2)
    np.testing.assert_array_equal(place, [11, 13])


def test_deep_memory_in_bfloat16_and_its_weights():
    sizes = dict(num_heads=2, head_dim=50, depth=3, expansion=4)
    weights = jax.jit(lambda key: titans_weights(key, **sizes))(jax.random.key(0))
    assert [w.shape for w in weights] == [(2, 50, 200), (2, 200, 200), (2, 200, 50)]
    for w in weights:
        assert abs(np.std(w) * w.shape[1] ** 0.5 - 1) < 0.05
    low, options = _arrays(jnp.bfloat16), dict(weights=_weights(2), chunk_size=4)
    out = jax.jit(functools.partial(_call, **options))(*low)
    assert out.dtype == jnp.bfloat16
    assert_close(out, _expected([np.float32(x) for x in low], **options), jnp.bfloat16)


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    arrays[1:3] = (np.repeat(x, N // K, axis=2) for x in arrays[1:3])
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    weights = [place(devices, w, "tensor") for w in _weights(2)]

    def run(weights, *arrays):
        return _call(*arrays, weights=weights, chunk_size=4)

    program = jax.jit(run).lower(weights, *placed).compile()
    expected = _expected(arrays, weights=_weights(2), chunk_size=4)
    assert_close(program(weights, *placed), expected)
    assert not COLLECTIVE.findall(program.as_text())


def test_wrong_input():
    query, key, value, rate, *_ = _arrays()
    deep, narrow = _weights(2), value[..., :5]
    for changes, error, message in (
        (dict(chunk_size=0), ValueError, "chunk_size: must be a positive integer; got 0"),
        (
            dict(rate=rate[:, :3]),
            ValueError,
            r"rate: shape \(2, 3, 4\) must broadcast to \[B, T, N",
        ),
        (dict(rate=rate.astype(int)), TypeError, "rate: must be floating point; got int"),
        (dict(log_decay=0.1), ValueError, "log_decay: must be at most 0; got one of 0.1"),
        (dict(log_momentum=rate), ValueError, "log_momentum: must be at most 0"),
        (dict(weights=deep[0]), TypeError, "weights: must be matrices of one or more layers"),
        (dict(weights=deep[:1]), ValueError, r"weights\[0\]: must have shape \[4, 6, 6\]"),
        (dict(weights=deep[::-1]), ValueError, r"weights\[0\]: must have shape \[4, 6, outputs\]"),
        (dict(value=narrow, weights=[deep[0], deep[1][..., :5]]), ValueError, "value: 5 channels"),
        (dict(value=value.astype(jnp.bfloat16)), ValueError, "value: dtype bfloat16"),
        (dict(initial_state=3), TypeError, "state: must be a TitansState; got int"),
    ):
        with pytest.raises(error, match=message):
            titans_neural_memory(**dict(query=query, key=key, value=value) | changes)
    state = init_titans_neural_memory_state(B, T, N, K, H, 5)
    with pytest.raises(
        ValueError, match=r"state: was made for .*\[2, 4, 6, 5\]; these are \[2, 4, 6"
    ):
        attention.titans_neural_memory_step(state, query, key, value)
    state = init_titans_neural_memory_state(B, T, N, K, H, H, weights=deep)
    call = functools.partial(titans_neural_memory, query, key, value, initial_state=state)
    with pytest.raises(ValueError, match="weights: must be given, for documents that begin"):
        call(segment_ids=IDS)
    with pytest.raises(ValueError, match="weights: must be as those of the state"):
        call(weights=_weights(1))
