"""Linear attention: every implementation against the equations, in values and gradients."""

import dataclasses
import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear import CHUNK_SIZE, IMPLEMENTATIONS, LinearState, linear_attention
from tests.numerics import assert_close, error_ratio
from tests.oracles.lightning_attention import lightning_attention as oracle

NAMES = tuple(IMPLEMENTATIONS)
OTHERS = tuple(name for name in NAMES if name != "reference")


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and features of a call; `decay` is None or log decays, one or one for each head."""

    tokens: int = 37
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    features: int = 8
    width: int = 6
    chunk: int = 16
    decay: float | tuple[float, ...] | None = -0.3
    segments: bool = False
    state: bool = False
    scale: float = 1.0

    def arrays(self, dtype=np.float64, seed=0):
        """Returns the differentiable arguments by name."""
        rng = np.random.default_rng(seed)
        b, t, n, k, h, v = (
            self.batch,
            self.tokens,
            self.heads,
            self.kv_heads,
            self.features,
            self.width,
        )
        arrays = {
            "query": rng.standard_normal((b, t, n, h)),
            "key": rng.standard_normal((b, t, k, h)),
            "value": rng.standard_normal((b, t, k, v)),
        }
        arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        wide = jnp.promote_types(dtype, jnp.float32)
        if self.decay is not None:
            arrays["log_decay"] = jnp.asarray(np.broadcast_to(self.decay, (n,)), wide)
        if self.state:
            arrays["memory"] = jnp.asarray(rng.standard_normal((b, n, h, v)), wide)
        return arrays

    def segment_ids(self):
        """Returns ids of unequal runs, of which some recur, or None."""
        if not self.segments:
            return None
        rng = np.random.default_rng(1)
        lengths = rng.integers(1, 12, (self.batch, self.tokens))
        ids = [np.repeat(np.arange(self.tokens) % 2 + 5, row)[: self.tokens] for row in lengths]
        return np.stack(ids)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def call(self, arrays, implementation):
        """Returns output and memory."""
        arrays = dict(arrays)
        memory = arrays.pop("memory", None)
        out, state = linear_attention(
            **arrays,
            scale=self.scale,
            segment_ids=self.segment_ids(),
            initial_state=None if memory is None else LinearState(memory),
            return_state=True,
            chunk_size=self.chunk,
            implementation=implementation,
        )
        return out, state.memory

    def expected(self, arrays):
        """Returns output and memory by the oracle."""
        return oracle(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            None if self.decay is None else -np.float64(arrays["log_decay"]),
            self.scale,
            self.segment_ids(),
            arrays.get("memory"),
        )

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def gradients(self, arrays, implementation):
        """Returns the gradients of all arguments under random cotangents of both results."""

        def loss(arrays):
            results = self.call(arrays, implementation)
            rng = np.random.default_rng(2)
            cotangents = [rng.standard_normal(x.shape) for x in results]
            wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in results]
            return sum(jnp.sum(x * c) for x, c in zip(wide, cotangents, strict=True))

        return jax.grad(loss)(arrays)


CASES = {
    "plain": Case(decay=None),
    "decay": Case(decay=(-1.0, -0.1, -0.01, 0.0)),
    "whole chunks": Case(tokens=32),
    "one token": Case(tokens=1, state=True),
    "one chunk": Case(tokens=16, chunk=64),
    "chunks of one": Case(tokens=5, chunk=1, state=True),
    "state": Case(state=True, scale=0.25),
    "grouped": Case(kv_heads=2, decay=(-1.0, -0.5, -0.2, -0.1), state=True),
    "one key head": Case(kv_heads=1, decay=None, width=12),
    "decay of 0": Case(decay=(-np.inf, -np.inf, -1e4, 0.0), state=True),
    "segments": Case(segments=True, state=True),
    "segments, grouped": Case(tokens=50, kv_heads=2, segments=True, decay=(-np.inf, -1, -0.1, 0)),
    "segments, no decay": Case(segments=True, decay=None, chunk=8),
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equations(case, name, x64):
    arrays = case.arrays()
    assert_close(case.call(arrays, name), case.expected(arrays), jnp.float64)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case, name, x64):
    arrays = case.arrays()
    assert_close(case.gradients(arrays, name), case.gradients(arrays, "reference"), jnp.float64)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_decay_by_differences(name, x64):
    case = Case(tokens=21, segments=True, state=True, decay=(-0.5, -0.2, -0.05, -0.01))
    arrays = case.arrays()
    gradient = case.gradients(arrays, name)["log_decay"]

    def loss(log_decay):
        results = case.expected(arrays | {"log_decay": log_decay})
        rng = np.random.default_rng(2)
        return sum(np.sum(x * rng.standard_normal(x.shape)) for x in results)

    steps = 1e-5 * np.eye(4)
    middle = np.asarray(arrays["log_decay"])
    differences = [(loss(middle + step) - loss(middle - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(gradient, differences, rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
def test_precision(dtype, name):
    case = Case(tokens=150, kv_heads=2, features=16, width=16, chunk=32, state=True, segments=True)
    arrays = case.arrays(dtype)
    out, memory = case.call(arrays, name)
    assert out.dtype == dtype
    assert memory.dtype == jnp.float32
    assert_close((out, memory), case.expected(arrays), dtype)

    gradients = case.gradients(arrays, name)
    assert {n: x.dtype for n, x in gradients.items()} == {n: x.dtype for n, x in arrays.items()}
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.float64(x)) for n, x in arrays.items()}
        assert_close(gradients, case.gradients(wide, "reference"), dtype)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
def test_strong_decays_over_many_tokens(dtype):
    decay = (-np.inf, -1e30, -100, -8, -1e-4, 0)
    case = Case(4096, 1, 6, 3, chunk=CHUNK_SIZE, decay=decay)
    arrays = case.arrays(dtype)
    results, gradients = case.call(arrays, "xla"), case.gradients(arrays, "xla")
    chex.assert_tree_all_finite((results, gradients))
    np.testing.assert_array_equal(gradients["log_decay"][:2], 0)
    # In float32 the definition, step by step, would be the less exact of the two.
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.float64(x)) for n, x in arrays.items()}
        assert_close(results, case.call(wide, "reference"), dtype)
        assert_close(gradients, case.gradients(wide, "reference"), dtype)


def test_float16_memories_beyond_its_range():
    tokens = 1024
    query, key, value = (jnp.full((1, tokens, 1, 4), x, jnp.float16) for x in (0.5, 16, 16))
    out, state = linear_attention(query, key, value, scale=1e-3, return_state=True)
    assert state.memory.max() == 256 * tokens > float(jnp.finfo(jnp.float16).max)
    expected = 0.5 * 4 * 256 * 1e-3 * np.arange(1, tokens + 1)
    assert_close(out[0, :, 0, 0], expected, jnp.float16)


SIZES = st.integers(1, 24)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_chunks_and_splits_do_not_matter(data):
    groups = data.draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1))), "heads, key heads")
    sizes = {
        n: data.draw(SIZES, n) for n in ("tokens", "features", "width", "chunk", "other_chunk")
    }
    case = Case(
        tokens=sizes["tokens"],
        batch=1,
        heads=groups[0],
        kv_heads=groups[1],
        features=sizes["features"],
        width=sizes["width"],
        chunk=sizes["chunk"],
        decay=data.draw(st.sampled_from((None, 0.0, -1e-3, -1.0, -50.0, -np.inf)), "decay"),
        segments=data.draw(st.booleans(), "segments"),
        state=True,
    )
    cut = data.draw(st.integers(0, case.tokens), "cut")
    with jax.enable_x64(True):
        arrays = case.arrays()
        whole = case.call(arrays, "xla")
        other = dataclasses.replace(case, chunk=sizes["other_chunk"])
        assert_close(other.call(arrays, "xla"), whole, jnp.float64)

        ids, state, outs = case.segment_ids(), LinearState(arrays.pop("memory")), []
        for part in (slice(0, cut), slice(cut, None)):
            if not 0 < cut < case.tokens:
                part = slice(None)
            tokens = {n: x if n == "log_decay" else x[:, part] for n, x in arrays.items()}
            same = part.start and ids is not None and ids[0, cut] == ids[0, cut - 1]
            if part.start and ids is not None and not same:
                # The state of a segment that has ended is the caller's to drop.
                state = jax.tree.map(jnp.zeros_like, state)
            out, state = linear_attention(
                **tokens,
                segment_ids=None if ids is None else ids[:, part],
                initial_state=state,
                return_state=True,
                chunk_size=case.chunk,
                implementation="xla",
            )
            outs.append(out)
            if part == slice(None):
                break
        assert_close((jnp.concatenate(outs, axis=1), state.memory), whole, jnp.float64)


@pytest.mark.parametrize("name", NAMES)
def test_linear_in_values_and_memory(name, x64):
    case = Case(segments=True, state=True)
    first, second = case.arrays(seed=0), case.arrays(seed=1)
    mixed = first | {n: 2 * first[n] - 3 * second[n] for n in ("value", "memory")}
    other = first | {n: second[n] for n in ("value", "memory")}
    expected = jax.tree.map(
        lambda a, b: 2 * a - 3 * b, case.call(first, name), case.call(other, name)
    )
    assert_close(case.call(mixed, name), expected, jnp.float64)


@pytest.mark.parametrize("name", NAMES)
def test_causal(name):
    case = Case()
    arrays = case.arrays(np.float32)
    out, _ = case.call(arrays, name)
    for token in (0, 15, 16, 33, 36):
        changed = {n: x if n == "log_decay" else x.at[:, token].add(1) for n, x in arrays.items()}
        differs = np.any(case.call(changed, name)[0] != out, axis=(0, 2, 3))
        assert not differs[:token].any()
        assert differs[token:].all()


@pytest.mark.parametrize("name", NAMES)
def test_segments_are_separate_documents(name):
    case = Case(tokens=40, batch=1, state=True)
    arrays = case.arrays(np.float32)
    ids = np.repeat([3, 1, 3, 3, 0], 8)[None]
    memory = arrays.pop("memory")
    decay = arrays.pop("log_decay")
    options = dict(log_decay=decay, return_state=True, chunk_size=16, implementation=name)
    out, state = linear_attention(
        **arrays, segment_ids=ids, initial_state=LinearState(memory), **options
    )
    before = LinearState(memory)
    for start, stop in ((0, 8), (8, 16), (16, 32), (32, 40)):
        document = {n: x[:, start:stop] for n, x in arrays.items()}
        expected, last = linear_attention(**document, initial_state=before, **options)
        before = None
        assert_close(out[:, start:stop], expected)
    assert_close(state.memory, last.memory)


@pytest.mark.parametrize("name", NAMES)
def test_traced_scale(name):
    case = Case(scale=0.3)
    arrays = case.arrays(np.float32)

    def loss(scale, dtype):
        inputs = {n: arrays[n].astype(dtype) for n in ("query", "key", "value")}
        out = linear_attention(**inputs, scale=scale, chunk_size=16, implementation=name)
        assert out.dtype == dtype
        return jnp.sum(out.astype(jnp.float32)), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(0.3, np.float32)
    case = dataclasses.replace(case, decay=None)
    del arrays["log_decay"]
    expected = case.expected(arrays)[0]
    assert_close(out, expected)
    assert_close(gradient, np.sum(expected) / 0.3, factor=20)
    _, out = jax.jit(loss, static_argnums=1)(0.3, jnp.bfloat16)
    assert_close(out, expected, jnp.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_jit_scan_and_state_as_carry(name):
    case = Case(tokens=12, state=True)
    arrays = case.arrays(np.float32)
    out, memory = case.call(arrays, name)
    with jax.disable_jit():
        assert_close(case.call(arrays, name), (out, memory))

    decay = arrays.pop("log_decay")
    state = LinearState(arrays.pop("memory"))

    def step(state, token):
        query, key, value = (x[:, None] for x in token)
        out, state = linear_attention(
            query,
            key,
            value,
            log_decay=decay,
            initial_state=state,
            return_state=True,
            implementation=name,
        )
        return state, out[:, 0]

    tokens = [jnp.moveaxis(arrays[n], 1, 0) for n in ("query", "key", "value")]
    last, outs = jax.jit(lambda *args: jax.lax.scan(step, *args))(state, tokens)
    assert_close((jnp.moveaxis(outs, 0, 1), last.memory), (out, memory))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mapped", ("all", "decay", "query", "all twice"))
def test_vmap(mapped, name):
    case = Case(tokens=20, kv_heads=2, state=True, segments=True, decay=(-1, -0.3, -0.1, 0))
    arrays = case.arrays(np.float32)
    axes = {
        "all": dict.fromkeys(arrays, 0),
        "decay": dict.fromkeys(arrays) | {"log_decay": 0},
        "query": dict.fromkeys(arrays) | {"query": 0},
        "all twice": dict.fromkeys(arrays, 0),
    }[mapped]

    def widened(x, axis, size):
        return x if axis is None else jnp.stack([x * (1 + 0.1 * i) for i in range(size)])

    def mapping(fn):
        fn = jax.vmap(fn, in_axes=(axes,))
        return jax.vmap(fn, in_axes=(axes,)) if mapped == "all twice" else fn

    def calls(fn, arrays, depth):
        if not depth:
            return fn(arrays)
        size = next(x.shape[0] for n, x in arrays.items() if axes[n] is not None)
        each = [
            calls(fn, {n: x if axes[n] is None else x[i] for n, x in arrays.items()}, depth - 1)
            for i in range(size)
        ]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *each)

    depth = 2 if mapped == "all twice" else 1
    for size in (2, 3)[:depth]:
        arrays = {n: widened(x, axes[n], size) for n, x in arrays.items()}
    for fn in (
        lambda arrays: case.call(arrays, name),
        lambda arrays: case.gradients(arrays, name),
    ):
        assert_close(jax.jit(mapping(fn))(arrays), calls(fn, arrays, depth), factor=2)


def test_reference_has_all_derivatives(x64):
    case = Case(tokens=3, batch=1, heads=1, kv_heads=1, features=2, width=2)
    arrays = case.arrays()

    def loss(value):
        return jnp.sum(jnp.sin(case.call(arrays | {"value": value}, "reference")[0]))

    hessian = jax.hessian(loss)(arrays["value"]).reshape(6, 6)
    assert_close(hessian, hessian.T, jnp.float64)
    assert error_ratio(hessian, np.zeros((6, 6))) > 0.1


def test_default_chunk_does_not_matter(x64):
    case = Case(tokens=CHUNK_SIZE + 3, batch=1, heads=1, kv_heads=1)
    arrays = case.arrays()
    out = linear_attention(**arrays)
    assert isinstance(out, jax.Array)
    assert_close(out, case.expected(arrays)[0], jnp.float64)


ARRAYS = Case(tokens=4, heads=4, kv_heads=2).arrays(np.float32)
STATE = LinearState(jnp.zeros((2, 4, 8, 6)))
WRONG = {
    "query of 3 dimensions": (
        dict(query=jnp.zeros((4, 4, 8))),
        ValueError,
        r"query: .*\(4, 4, 8\)",
    ),
    "integer query": (dict(query=jnp.zeros((2, 4, 4, 8), int)), TypeError, "query: .*int32"),
    "no tokens": (
        dict(query=jnp.zeros((2, 0, 4, 8)), key=jnp.zeros((2, 0, 2, 8))),
        ValueError,
        "query: .*no elements",
    ),
    "other tokens": (dict(key=jnp.zeros((2, 5, 2, 8))), ValueError, r"key: .*\(2, 5, 2, 8\)"),
    "other features": (dict(key=jnp.zeros((2, 4, 2, 9))), ValueError, r"key: .*\(2, 4, 2, 9\)"),
    "other value tokens": (dict(value=jnp.zeros((2, 3, 2, 6))), ValueError, "value: .*start with"),
    "key heads": (
        dict(key=jnp.zeros((2, 4, 3, 8)), value=jnp.zeros((2, 4, 3, 6))),
        ValueError,
        "key: 3 heads do not divide the 4 heads of query",
    ),
    "key dtype": (
        dict(key=ARRAYS["key"].astype(jnp.bfloat16)),
        ValueError,
        "key: dtype bfloat16 must be query's, float32",
    ),
    "decays of key heads": (
        dict(log_decay=jnp.zeros(2)),
        ValueError,
        r"log_decay: .*\(4,\).*\(2,\)",
    ),
    "positive decay": (dict(log_decay=(0.0, -1.0, 0.1, 0.0)), ValueError, "log_decay: .*at most 0"),
    "NaN decay": (dict(log_decay=np.full(4, np.nan)), ValueError, "log_decay: .*at most 0"),
    "integer decay": (dict(log_decay=jnp.zeros(4, int)), TypeError, "log_decay: .*int32"),
    "segment shape": (
        dict(segment_ids=jnp.zeros((2, 5), int)),
        ValueError,
        r"segment_ids: .*\(2, 5\)",
    ),
    "float segments": (dict(segment_ids=jnp.zeros((2, 4))), TypeError, "segment_ids: .*float32"),
    "array as state": (dict(initial_state=STATE.memory), TypeError, "initial_state: .*LinearState"),
    "state of key heads": (
        dict(initial_state=LinearState(jnp.zeros((2, 2, 8, 6)))),
        ValueError,
        r"initial_state: .*\(2, 2, 8, 6\).*\(2, 4, 8, 6\)",
    ),
    "integer state": (
        dict(initial_state=LinearState(jnp.zeros((2, 4, 8, 6), int))),
        TypeError,
        "initial_state: .*int32",
    ),
    "chunk of 0": (dict(chunk_size=0), ValueError, "chunk_size: .*0"),
    "chunk of half a token": (dict(chunk_size=0.5), ValueError, "chunk_size: .*0.5"),
    "scale for each head": (dict(scale=jnp.ones(4)), ValueError, r"scale: .*\(4,\)"),
    "unknown implementation": (
        dict(implementation="cuda"),
        ValueError,
        "linear_attention: implementation .*reference.*'cuda'",
    ),
    "kernel that is not there": (
        dict(implementation="pallas_tpu"),
        NotImplementedError,
        "linear_attention: implementation 'pallas_tpu'",
    ),
}


@pytest.mark.parametrize("wrong, error, message", WRONG.values(), ids=WRONG)
def test_wrong_input(wrong, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: linear_attention(**(ARRAYS | wrong)))
    assert linear_attention(**ARRAYS, initial_state=STATE).shape == (2, 4, 4, 6)
