"""Scans: every implementation against the equations, in values and gradients."""

import dataclasses
import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.scan import (
    CHUNK_SIZE,
    IMPLEMENTATIONS,
    ScanState,
    SoftmaxState,
    gated_scan,
    selective_scan,
    softmax_scan,
)
from pallas_kernels.scan.inputs import join
from tests.numerics import assert_close
from tests.pallas_kernels.scan.cases import CASES, PARAMETERS, Case, meaning

NAMES = ("xla", "reference")
ALL = [name for name in CASES if name.endswith("all")]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equations_and_gradients(case, x64):
    arrays = case.arrays()
    (gradients, results), (expected, defined) = (case.gradients(arrays, name) for name in NAMES)
    assert_close((results, defined), (case.expected(arrays),) * 2, jnp.float64)
    assert_close(gradients, expected, jnp.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ALL)
def test_gradients_by_differences(case, name, x64):
    case = dataclasses.replace(CASES[case], tokens=9, chunk=4)
    arrays = {n: np.asarray(x) for n, x in case.arrays().items()}
    gradients, _ = case.gradients(arrays, name)
    for array, x in arrays.items():
        step = 1e-5 * np.random.default_rng(3).standard_normal(x.shape)
        more, less = (case.loss(case.expected(arrays | {array: y})) for y in (x + step, x - step))
        slope = np.sum(np.asarray(gradients[array]) * step)
        np.testing.assert_allclose(slope, (more - less) / 2, rtol=1e-6, atol=1e-12, err_msg=array)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*itertools.product(ALL, (jnp.float32, jnp.bfloat16)), ("gated, all", jnp.float16)],
)
def test_precision(case, dtype):
    case = dataclasses.replace(CASES[case], tokens=28)
    arrays = case.arrays(dtype)
    gradients, results = case.gradients(arrays, "xla")
    assert results[0].dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(results[1])} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.float64(x)) for n, x in arrays.items()}
        assert_close((gradients, results), case.gradients(wide, "reference"), dtype)


@pytest.mark.parametrize(("dtype", "factor"), [(jnp.float32, 4), (jnp.bfloat16, 1)])
def test_decays_of_any_strength_over_many_tokens(dtype, factor):
    strengths = np.float32([-np.inf, -1e30, -100, -8, -0.1, -1e-3, -1e-4, 0])
    shape = 1, 65536, len(strengths)
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    log_decay = jnp.broadcast_to(strengths, shape)

    def run(x, log_decay, cotangent, implementation):
        call = functools.partial(gated_scan, implementation=implementation)
        out, vjp = jax.vjp(call, x, log_decay)
        return (out, *vjp(cotangent))

    actual = run(x, log_decay, cotangent, "xla")
    chex.assert_tree_all_finite(actual)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.float64(array)) for array in (x, log_decay, cotangent))
        expected = run(*wide, "reference")
    np.testing.assert_array_equal(actual[2][..., :3], 0)  # below what float32 holds
    # Each decay by itself, or the long sums would hide the others. They are of 65536 numbers.
    for n in range(len(strengths)):
        of_one = [[array[..., n] for array in arrays] for arrays in (actual, expected)]
        shown = slice(0, 2 if n < 3 else 3)
        assert_close(of_one[0][shown], of_one[1][shown], dtype, factor)


def test_scores_of_any_size(x64):
    case = Case("softmax", tokens=28, segments=True)
    arrays = case.arrays()
    arrays["score"] = 1e4 * arrays["score"]
    arrays["score"] = jnp.where(jnp.arange(28)[:, None] % 5 == 0, -jnp.inf, arrays["score"])
    for name in NAMES:
        gradients, results = case.gradients(arrays, name)
        assert_close(results, case.expected(arrays), jnp.float64)
        assert (results[0][:, 0] == 0).all()  # nothing has been seen yet
        chex.assert_tree_all_finite(gradients)
        assert (gradients["value"][:, ::5] == 0).all()


def test_states_form_a_monoid(x64):
    rng = np.random.default_rng(0)

    def state(maximum):
        weights, values = rng.uniform(0.5, 2, (3, 2)), rng.standard_normal((3, 2, 4))
        return SoftmaxState(jnp.full((3, 2), maximum), jnp.asarray(weights), jnp.asarray(values))

    nothing = SoftmaxState(jnp.full((3, 2), -jnp.inf), jnp.zeros((3, 2)), jnp.zeros((3, 2, 4)))
    a, b, c = state(1e4), state(-3.0), state(1e4 + 1)
    assert_close(join(a, join(b, c)), join(join(a, b), c), jnp.float64)
    assert_close(join(a, b), join(b, a), jnp.float64)
    for one in (a, nothing):
        chex.assert_trees_all_equal(join(one, nothing), one)
        chex.assert_trees_all_equal(join(nothing, one), one)


SIZES = st.integers(1, 20)


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_chunks_and_splits_do_not_matter(data):
    case = Case(
        data.draw(st.sampled_from(("gated", "selective", "softmax")), "scan"),
        tokens=data.draw(SIZES, "tokens"),
        batch=1,
        channels=2 * data.draw(st.integers(1, 3), "channels"),
        features=data.draw(st.integers(1, 5), "features"),
        groups=data.draw(st.sampled_from((None, 1, 2)), "groups"),
        chunk=data.draw(SIZES, "chunk"),
        segments=data.draw(st.booleans(), "segments"),
        state=True,
    )
    cut = data.draw(st.integers(1, case.tokens), "cut")
    with jax.enable_x64(True):
        arrays = case.arrays()
        whole = case.call(arrays, "xla")
        other = dataclasses.replace(case, chunk=data.draw(SIZES, "other chunk"))
        assert_close(in_parts(other, arrays, (cut, case.tokens), "xla"), whole, jnp.float64)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def in_parts(case, arrays, ends, implementation):
    """Returns the results of a call made part by part, each up to an end."""
    ids, state, outs, start = case.segment_ids(), case.initial(arrays), [], 0
    for end in ends:
        if start == end:
            continue
        if start and ids is not None and ids[0, start] != ids[0, start - 1]:
            state = None  # that of a segment that has ended is the caller's to drop
        part = slice(start, end)
        out, state = case.part(arrays, part, state, ids, implementation)
        outs.append(out)
        start = end
    return jnp.concatenate(outs, axis=1), meaning(state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scan", ("gated", "selective", "softmax"))
def test_a_prompt_and_then_token_by_token(scan, name):
    case = Case(scan, tokens=8, state=True)
    arrays = case.arrays(np.float32)
    stepped = in_parts(case, arrays, tuple(range(4, 9)), name)
    assert_close(stepped, case.call(arrays, name))


@pytest.mark.parametrize("case", ALL)
def test_vmap(case):
    case = dataclasses.replace(CASES[case], tokens=8)
    several = [case.arrays(np.float32, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    stacked |= {n: several[0][n] for n in PARAMETERS if n in stacked}
    several = [one | {n: several[0][n] for n in PARAMETERS if n in one} for one in several]
    dims = {n: None if n in PARAMETERS else 0 for n in stacked}

    def run(arrays):
        return case.gradients(arrays, "xla")

    actual = jax.jit(jax.vmap(run, in_axes=(dims,)))(stacked)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(run), several))
    assert_close(actual, expected, factor=2)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_and_no_rate(name, x64):
    """A step of 0 leaves the skip alone; with rates of 0 and vectors of ones there is a sum."""
    arrays = Case("selective").arrays()
    x, skip, step = arrays["x"], arrays["D"], jnp.abs(arrays["delta"])
    options = dict(softplus=False, implementation=name)
    rest = (arrays["A"], arrays["B"], arrays["C"])
    assert_close(selective_scan(x, 0 * x, *rest, D=skip, **options), skip * x, jnp.float64)
    ones = jnp.ones_like(arrays["B"])
    out = selective_scan(x, step, jnp.zeros((6, 4)), ones, ones, **options)
    assert_close(out, 4 * jnp.cumsum(step * x, axis=1), jnp.float64)


@pytest.mark.parametrize("name", NAMES)
def test_one_rate_of_one_is_a_gate(name, x64):
    """Softplus steps and a rate of -1 make a gated scan: its decay is 1 - sigmoid(delta)."""
    arrays = Case("selective", features=1).arrays()
    x, delta = arrays["x"], arrays["delta"]
    ones = jnp.ones((*x.shape[:2], 1))
    out = selective_scan(x, delta, -jnp.ones((6, 1)), ones, ones, implementation=name)
    step = jax.nn.softplus(delta)
    expected = gated_scan(step * x, jax.nn.log_sigmoid(-delta), implementation=name)
    assert_close(out, expected, jnp.float64)


X = jnp.ones((2, 4, 6))
SELECTIVE = dict(x=X, delta=X, A=-jnp.ones((6, 3)), B=jnp.ones((2, 4, 3)), C=jnp.ones((2, 4, 3)))
GROUPS = jnp.ones((2, 4, 4, 3))
WRONG = {
    "x of one row": (gated_scan, dict(x=X[0]), ValueError, r"x: .*\[B, T, D\]; got \(4, 6\)"),
    "no tokens": (gated_scan, dict(x=X[:, :0]), ValueError, r"x: .*\(2, 0, 6\)"),
    "integers": (gated_scan, dict(x=X.astype(int)), TypeError, "x: .*int32"),
    "decay by channel": (
        gated_scan,
        dict(log_decay=X[0, 0]),
        ValueError,
        r"log_decay: .*\[2, 4, 6\]; got \(6,\)",
    ),
    "an array as state": (
        gated_scan,
        dict(initial_state=X[:, 0]),
        TypeError,
        "initial_state: must be a ScanState; got",
    ),
    "state of a selective scan": (
        gated_scan,
        dict(initial_state=ScanState(jnp.ones((2, 3, 6)))),
        ValueError,
        r"initial_state: hidden: .*\[2, 6\]; got \(2, 3, 6\)",
    ),
    "segments of another length": (
        gated_scan,
        dict(segment_ids=jnp.ones((2, 5), int)),
        ValueError,
        r"segment_ids: .*\(2, 4\); got \(2, 5\)",
    ),
    "segments of floats": (
        gated_scan,
        dict(segment_ids=jnp.ones((2, 4))),
        TypeError,
        "segment_ids: .*float32",
    ),
    "chunk of 0": (gated_scan, dict(chunk_size=0), ValueError, "chunk_size: .*0"),
    "unknown implementation": (
        gated_scan,
        dict(implementation="cuda"),
        ValueError,
        "gated_scan: implementation .*reference.*'cuda'",
    ),
    "kernel that does not serve it": (
        gated_scan,
        dict(implementation="pallas_tpu", chunk_size=100),
        NotImplementedError,
        "gated_scan: implementation 'pallas_tpu'",
    ),
    "transposed rates": (
        selective_scan,
        dict(A=-jnp.ones((3, 6))),
        ValueError,
        r"A: .*\[6, N\]; got \(3, 6\)",
    ),
    "vectors that do not fit": (
        selective_scan,
        dict(B=jnp.ones((2, 4, 5))),
        ValueError,
        r"B: .*\[2, 4, 3\]; got \(2, 4, 5\)",
    ),
    "groups that do not divide": (
        selective_scan,
        dict(B=GROUPS, C=GROUPS),
        ValueError,
        "B: 4 groups do not divide the 6 channels",
    ),
    "groups of one only": (
        selective_scan,
        dict(B=GROUPS[:, :, :2]),
        ValueError,
        r"C: .*\[2, 4, 2, 3\]; got \(2, 4, 3\)",
    ),
    "skip of another size": (
        selective_scan,
        dict(D=jnp.ones(5)),
        ValueError,
        r"D: .*\[6\]; got \(5,\)",
    ),
    "heads that do not divide": (
        softmax_scan,
        dict(value=jnp.ones((2, 4, 4, 3))),
        ValueError,
        "value: 4 heads do not divide the 6 heads of score",
    ),
    "values of other tokens": (
        softmax_scan,
        dict(value=jnp.ones((2, 5, 6, 3))),
        ValueError,
        r"value: .*\[2, 4, K, V\]; got \(2, 5, 6, 3\)",
    ),
    "state of another width": (
        softmax_scan,
        dict(initial_state=SoftmaxState(X[:, 0], X[:, 0], jnp.ones((2, 6, 2)))),
        ValueError,
        r"initial_state: weighted: .*\[2, 6, 3\]; got \(2, 6, 2\)",
    ),
}
RIGHT = {
    gated_scan: dict(x=X, log_decay=-X),
    selective_scan: SELECTIVE,
    softmax_scan: dict(score=X, value=jnp.ones((2, 4, 6, 3))),
}


@pytest.mark.parametrize(("scan", "wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(scan, wrong, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: scan(**(RIGHT[scan] | wrong)))
    assert jax.eval_shape(lambda: scan(**RIGHT[scan])).shape[:3] == (2, 4, 6)


def test_defaults():
    assert set(NAMES) <= set(IMPLEMENTATIONS)
    x = jnp.ones((1, 2 * CHUNK_SIZE + 3, 2))
    assert_close(gated_scan(x, 0 * x), jnp.cumsum(x, axis=1))
