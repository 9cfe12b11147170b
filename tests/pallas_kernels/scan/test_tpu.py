"""The TPU kernels of scans, in numbers: on a CPU, in Pallas's TPU interpret mode.

There memory that nothing was written to is NaN, a copy arrives when it is waited for and not
before, reads beyond an array's end and races are errors.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.partition import axes
from pallas_kernels.scan import gated_scan, selective_scan, softmax_scan, tpu
from tests.numerics import assert_close
from tests.pallas_kernels.scan.cases import TPU_CASES, Case
from tests.sharding import mesh, place
from tests.tpu import interpreted

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _kernel(case, arrays, **params):
    with interpreted(**params):
        return jax.block_until_ready(case.gradients(arrays, "pallas_tpu"))


@pytest.mark.parametrize("name", TPU_CASES)
def test_results_and_gradients(name):
    case, dtype = TPU_CASES[name], jnp.bfloat16 if "bfloat16" in name else jnp.float32
    arrays = case.arrays(dtype)
    gradients, results = _kernel(case, arrays)
    assert results[0].dtype == dtype
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    assert_close((gradients, results), case.gradients(wide, "reference"), dtype)


def test_the_order_of_the_grid_does_not_matter():
    """What is carried along a dimension of the grid must not be called parallel."""
    case = Case("gated", tokens=136, batch=1, channels=384, chunk=None, state=True)
    arrays = case.arrays(np.float32)
    # A seed is an order of the parallel dimensions; None is the plain one.
    results = [_kernel(case, arrays, random_seed=seed) for seed in (None, 1)]
    chex.assert_trees_all_equal(*results)


def test_decays_of_0_and_1():
    case = Case("gated", tokens=130, batch=1, chunk=None, state=True)
    arrays = case.arrays(np.float32)
    strengths = np.float32([-np.inf, -1e30, -100, -1e-4, 0, 0])
    arrays["log_decay"] = jnp.broadcast_to(strengths, arrays["x"].shape)
    gradients, results = _kernel(case, arrays)
    chex.assert_tree_all_finite((gradients, results))
    np.testing.assert_array_equal(gradients["log_decay"][..., :2], 0)
    assert_close((gradients, results), case.gradients(arrays, "reference"), factor=4)


def test_scores_of_any_size():
    """Some tokens are left out, and so are all before the first."""
    case = Case("softmax", tokens=130, batch=1, chunk=None, segments=True)
    arrays = case.arrays(np.float32)
    arrays["score"] = jnp.where(jnp.arange(130)[:, None] % 5 == 0, -jnp.inf, 30 * arrays["score"])
    gradients, results = _kernel(case, arrays)
    assert (results[0][:, 0] == 0).all()
    assert (gradients["value"][:, ::5] == 0).all()
    assert_close((gradients, results), case.gradients(arrays, "reference"), factor=4)


def test_float16():
    case = Case("softmax", tokens=20, batch=1, chunk=None)
    arrays = case.arrays(np.float16)
    gradients, results = _kernel(case, arrays)
    assert results[0].dtype == jnp.float16
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    assert_close((gradients, results), case.gradients(wide, "reference"), jnp.float16)


def test_sharded():
    """Over eight devices, each with its part of batch and channels."""
    case = Case("gated", tokens=20, batch=4, chunk=None, segments=True, state=True)
    arrays = case.arrays(np.float32)
    devices = mesh(AxisType.Auto)
    placed = {
        name: place(devices, x, *(("data", None, "tensor") if x.ndim == 3 else ("data", "tensor")))
        for name, x in arrays.items()
    }
    with jax.set_mesh(devices), axes(batch="data", heads="tensor"), interpreted():
        actual = jax.block_until_ready(case.gradients(placed, "pallas_tpu"))
    assert_close(actual, case.gradients(arrays, "reference"))
    assert actual[1][0].sharding.spec[:3] == ("data", None, "tensor")


X = jnp.ones((1, 32, 6))
VECTORS = jnp.ones((1, 32, 2, 3))


@pytest.mark.parametrize(
    ("scan", "args", "options", "reason"),
    [
        (softmax_scan, (X[:, :4], X[:, :4, :, None]), {}, "it takes 16 tokens or more; got 4"),
        (gated_scan, (X[:, :4], -X[:, :4]), {}, "it takes 16 tokens or more; got 4"),
        (
            gated_scan,
            (X, -X),
            {"chunk_size": 64},
            "chunk_size must be a multiple of 128, at most 512; got 64",
        ),
        (
            selective_scan,
            (X, X, -jnp.ones((6, 300)), *[jnp.ones((1, 32, 300))] * 2),
            {},
            "N times chunk_size must be at most 32768; got 38400",
        ),
        (
            selective_scan,
            (X, X, -jnp.ones((6, 3)), VECTORS, VECTORS),
            {},
            "channels of a group must be a multiple of 128; got 3",
        ),
    ],
)
def test_what_the_kernel_lacks_is_refused_by_name(scan, args, options, reason):
    with pytest.raises(NotImplementedError, match=f"{scan.__name__}: .*'pallas_tpu'.*{reason}"):
        scan(*args, **options, implementation="pallas_tpu")
    # Whoever does not ask for it gets another one.
    chex.assert_tree_all_finite(scan(*args, **options))


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_by_name():
    x = jnp.asarray(X, jnp.float64)
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*it does not compute in float64"):
        gated_scan(x, x, implementation="pallas_tpu")


def test_a_user_without_tpu_never_traces_the_kernel(monkeypatch):
    def traced(*_):
        raise AssertionError("the TPU kernel is traced")

    for function in ("forward", "forward_keeping", "backward"):
        monkeypatch.setattr(tpu, function, traced)
    jax.clear_caches()
    gradient = jax.jit(jax.value_and_grad(lambda x: gated_scan(x, x).sum()))
    chex.assert_tree_all_finite(gradient(-X))
    with pytest.raises(AssertionError, match="the TPU kernel is traced"):
        gradient.trace(X).lower(lowering_platforms=("tpu",))
    jax.clear_caches()
