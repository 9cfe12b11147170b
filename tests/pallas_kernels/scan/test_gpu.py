"""The GPU kernels of scans, in numbers: compiled for a GPU, and emulated on a CPU.

See tests/ptx. Memory that nothing was written to is NaN, and races are errors.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu_proved import Proved
from pallas_kernels.scan import gated_scan, gpu, selective_scan
from pallas_kernels.scan.gpu_proved import parts_of
from pallas_kernels.scan.inputs import Gated, Inputs, Options, Parameters, ScanState
from tests.gpu import emulated
from tests.numerics import assert_close
from tests.pallas_kernels.scan.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUMBERS = {
    "gated, all": (CASES["gated, all"], np.float32),
    "gated, one token": (CASES["gated, one token"], np.float32),
    "gated, chunks of one": (CASES["gated, chunks of one"], np.float32),
    # Two blocks of channels, and chunks of two tiles, of which the last is filled up.
    "gated, bfloat16": (Case("gated", 70, 1, 260, chunk=32), jnp.bfloat16),
    # Eight chunks, which are side by side.
    "gated, more chunks": (
        Case("gated", 31, 1, chunk=4, segments=True, state=True),
        np.float32,
    ),
    "gated, float16": (Case("gated", 20, 1, chunk=None, state=True), jnp.float16),
    "selective, all": (CASES["selective, all"], np.float32),
    "selective, one token": (CASES["selective, one token"], np.float32),
    "selective, no softplus": (Case("selective", softplus=False, bias=False), np.float32),
    "selective, groups, 32 numbers, bfloat16": (
        Case("selective", 20, 1, 6, features=18, groups=2, chunk=8, skip=False, segments=True),
        jnp.bfloat16,
    ),
    "softmax, all": (CASES["softmax, all"], np.float32),
    "softmax, shared values, bfloat16": (
        Case("softmax", 20, 1, 4, 5, groups=2, chunk=8, state=True),
        jnp.bfloat16,
    ),
}


def _kernel(case, arrays, seed=0):
    with emulated(seed):
        return jax.block_until_ready(case.gradients(arrays, "pallas_gpu"))


def _expected(case, arrays):
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.float64(x)) for n, x in arrays.items()}
        return case.gradients(wide, "reference")


@pytest.mark.parametrize("name", NUMBERS)
def test_results_and_gradients(name):
    case, dtype = NUMBERS[name]
    arrays = case.arrays(dtype)
    gradients, results = _kernel(case, arrays)
    assert results[0].dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(results[1])} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    assert_close((gradients, results), _expected(case, arrays), dtype)


@pytest.mark.parametrize(
    "name", ["gated, all", "gated, more chunks", "selective, all", "softmax, all"]
)
def test_without_gradients(name):
    """The same bits: only what is kept for the backward is left out."""
    case, dtype = NUMBERS[name]
    case = dataclasses.replace(case, tokens=min(case.tokens, 31 if "more" in name else 5))
    arrays = case.arrays(dtype)
    with emulated():
        results = jax.block_until_ready(case.call(arrays, "pallas_gpu"))
    chex.assert_trees_all_equal(results, _kernel(case, arrays)[1])


def test_log_decays_of_another_dtype():
    """Decays near 1, which in bfloat16 would be 1, are not rounded."""
    case = Case("gated", 20, 1, chunk=None)
    arrays = case.arrays(jnp.bfloat16)
    arrays["log_decay"] = 1e-3 * jnp.float32(arrays["log_decay"])
    gradients, results = _kernel(case, arrays)
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    assert_close((gradients, results), _expected(case, arrays), jnp.bfloat16)
    assert_close(results[1], _expected(case, arrays)[1][1], jnp.float32)


def test_decays_of_0_and_1():
    case = Case("gated", tokens=20, batch=1, chunk=None, state=True)
    arrays = case.arrays(np.float32)
    strengths = np.float32([-np.inf, -1e30, -100, -1e-4, 0, 0])
    arrays["log_decay"] = jnp.broadcast_to(strengths, arrays["x"].shape)
    gradients, results = _kernel(case, arrays)
    chex.assert_tree_all_finite((gradients, results))
    np.testing.assert_array_equal(gradients["log_decay"][..., :2], 0)
    assert_close((gradients, results), _expected(case, arrays))


def test_scores_of_any_size():
    """Some tokens are left out, and so are all before the first."""
    case = Case("softmax", 13, 1, chunk=8, segments=True)
    arrays = case.arrays(np.float32)
    arrays["score"] = jnp.where(jnp.arange(13)[:, None] % 5 == 0, -jnp.inf, 30 * arrays["score"])
    gradients, results = _kernel(case, arrays)
    assert (results[0][:, 0] == 0).all()
    assert (gradients["value"][:, ::5] == 0).all()
    assert_close((gradients, results), _expected(case, arrays), factor=4)


def test_the_same_twice():
    """Nothing depends on what happens first."""
    case = Case("selective", 6, 1, 130, chunk=4, state=True)
    arrays = case.arrays(np.float32)
    first, second = (_kernel(case, arrays, seed) for seed in range(2))
    chex.assert_trees_all_equal(first, second)


def test_vmap():
    """Of parameters, too: then rows of the batch have their own."""
    case = dataclasses.replace(CASES["selective, all"], tokens=6, batch=1, chunk=4, segments=False)
    several = [case.arrays(np.float32, seed) for seed in range(2)]
    several = [one | {"D": several[0]["D"]} for one in several]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several) | {"D": several[0]["D"]}

    def run(arrays):
        return case.gradients(arrays, "pallas_gpu")

    dims = {n: None if n == "D" else 0 for n in stacked}
    with emulated():
        actual = jax.block_until_ready(jax.jit(jax.vmap(run, in_axes=(dims,)))(stacked))
    expected = [_expected(case, arrays) for arrays in several]
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected), factor=2)


X = jnp.ones((1, 32, 6))


def test_large_states_are_refused_by_name():
    arrays = (X, X, -jnp.ones((6, 33)), *[jnp.ones((1, 32, 33))] * 2)
    reason = "N must be at most 32; got 33"
    with pytest.raises(NotImplementedError, match=f"selective_scan: .*'pallas_gpu'.*{reason}"):
        selective_scan(*arrays, implementation="pallas_gpu")
    # Whoever does not ask for it gets another one.
    chex.assert_tree_all_finite(selective_scan(*arrays))


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_by_name():
    x = jnp.asarray(X, jnp.float64)
    for arrays in ((x, x), (X, x)):
        with pytest.raises(NotImplementedError, match=r"'pallas_gpu'.*not compute in float64"):
            gated_scan(*arrays, implementation="pallas_gpu")


def _parts(x=X, chunk_size=128, begins=None):
    inputs = Inputs(Gated(x, X), Parameters(), begins, ScanState(X[:, 0]))
    return parts_of(options=Options("gated", chunk_size, False, None, None), inputs=inputs)


def test_none_chooses_what_has_passed_on_a_gpu(monkeypatch):
    """On a GPU; on a CPU the kernels are never traced."""

    def traced(*_):
        raise AssertionError("the GPU kernel is traced")

    for function in ("forward", "forward_keeping", "backward"):
        monkeypatch.setattr(gpu, function, traced)

    def lowered(platform):
        jax.clear_caches()
        gradient = jax.jit(jax.value_and_grad(lambda x: gated_scan(x, x).sum()))
        return gradient.trace(X).lower(lowering_platforms=(platform,))

    lowered("cuda")
    parts = _parts()
    monkeypatch.setattr(Proved, "parts", lambda _: parts)
    with pytest.raises(AssertionError, match="the GPU kernel is traced"):
        lowered("cuda")
    lowered("cpu")
    monkeypatch.setattr(Proved, "parts", lambda _: parts - {"gated: x in float32"})
    lowered("cuda")
    jax.clear_caches()


def test_parts_of_a_call():
    """Whatever makes a kernel another one has a name of its own."""
    assert _parts() == {"gated: x in float32", "gated: log_decay in float32", "gated: tiles of 16"}
    more = _parts(x=X.astype(jnp.bfloat16), begins=jnp.zeros((1, 32), bool))
    assert more - _parts() == {"gated: x in bfloat16", "gated: segments"}
    odd = _parts(chunk_size=20)
    assert odd - _parts() == {"gated: tiles of 4", "gated: tokens behind the last"}
    many = _parts(chunk_size=4)
    assert many - _parts() == {"gated: tiles of 4", "gated: chunks side by side"}
