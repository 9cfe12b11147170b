"""The TPU kernels of linear attention, in numbers: on a CPU, in Pallas's TPU interpret mode.

There memory that nothing was written to is NaN, a copy arrives when it is waited for and not
before, reads beyond an array's end and races are errors.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.linear import linear_attention, tpu
from pallas_kernels.partition import axes
from tests.numerics import assert_close
from tests.pallas_kernels.linear.cases import ONE, STATE, TPU_CASES, Case, equal_keys, of_rows
from tests.sharding import mesh, place
from tests.tpu import interpreted

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _kernel(case, arrays, **params):
    with interpreted(**params):
        return jax.block_until_ready(case.differentiated(arrays, "pallas_tpu"))


def _check(actual, expected, dtype=jnp.float32):
    """Compares results and gradients.

    The gradient of a decay of all tokens is a sum over them, in which much cancels.
    """
    (results, gradients), (expected, expected_gradients) = actual, expected
    assert_close(results, expected, dtype)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        factor = 4 if gradient.ndim == 1 else 1
        assert_close({name: gradient}, {name: expected_gradients[name]}, dtype, factor)


def _nothing_decays(case, log_decay):
    """Returns where a decay is 0, or a segment begins."""
    nothing = np.asarray(log_decay) <= -1e30
    if case.segments and log_decay.ndim > 1:
        nothing[:, 1:][np.diff(case.segment_ids(), axis=1) != 0] = True
    return nothing


@functools.cache
def _arrays_and_kernel(name):
    case = TPU_CASES[name]
    arrays = case.arrays(jnp.bfloat16 if "bfloat16" in name else jnp.float32)
    return arrays, _kernel(case, arrays)


@pytest.mark.parametrize("name", TPU_CASES)
def test_results_and_gradients(name):
    arrays, (results, gradients) = _arrays_and_kernel(name)
    assert results["out"].dtype == arrays["query"].dtype
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    case = TPU_CASES[name]
    _check((results, gradients), case.defined(arrays), arrays["query"].dtype)
    for log in ("log_decay", "log_momentum"):
        if log in arrays:
            np.testing.assert_array_equal(gradients[log][_nothing_decays(case, arrays[log])], 0)


def test_the_order_of_the_grid_does_not_matter():
    """What is carried along a dimension of the grid must not be called parallel."""
    name = "decay, segments"
    arrays, expected = _arrays_and_kernel(name)
    # A seed is an order of the parallel dimensions; without one it is the plain one.
    chex.assert_trees_all_equal(_kernel(TPU_CASES[name], arrays, random_seed=1), expected)


def test_heads_in_several_steps_of_the_grid():
    """Or no case above has a key that several of them share."""
    case = TPU_CASES["steps, shared keys, elu"]
    with interpreted():
        traced = jax.make_jaxpr(lambda x: case.differentiated(x, "pallas_tpu"))(
            case.arrays(np.float32)
        )
    steps = re.findall(r"GridMapping\(grid=\(1, (\d+), \d+\)", str(traced))
    assert len(steps) == 2
    assert min(map(int, steps)) > 1


def test_equal_keys_by_the_delta_rule_in_bfloat16():
    case = Case(200, **ONE, decay=None, beta=True)
    arrays = equal_keys(case)
    _check(_kernel(case, arrays), case.defined(arrays), jnp.bfloat16)


def test_under_vmap():
    case = Case(256, 1, 2, 2)
    with interpreted():
        actual = of_rows(case, "pallas_tpu")
    assert_close(actual, of_rows(case, "reference"), factor=4)


def test_sharded():
    """Over eight devices, each with its part of batch and memories."""
    case = Case(20, 4, heads=2, kv_heads=2, state=True, segments=True, decay=(-0.5, -0.1))
    arrays = case.arrays(np.float32)
    devices = mesh(AxisType.Auto)

    def spec(name, x):
        if x.ndim == 1:
            return ("tensor",)
        return ("data", "tensor") if name in STATE else ("data", None, "tensor")

    placed = {name: place(devices, x, *spec(name, x)) for name, x in arrays.items()}
    with jax.set_mesh(devices), axes(batch="data", heads="tensor"), interpreted():
        actual = jax.block_until_ready(case.differentiated(placed, "pallas_tpu"))
    _check(actual, case.defined(arrays))
    assert actual[0]["out"].sharding.spec[:3] == ("data", None, "tensor")


X = jnp.ones((1, 32, 1, 4))


@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    (
        (
            (X, X, X),
            dict(causal=False, segment_ids=np.ones((1, 32), int)),
            "it has no segments if causal is False",
        ),
        ((X[:, :15],) * 3, {}, "it takes 16 tokens or more; got 15"),
        ((X, X, X), dict(chunk_size=96), "chunk_size must divide 256; got 96"),
    ),
)
def test_what_the_kernel_lacks_is_refused_by_name(arrays, options, reason):
    with pytest.raises(NotImplementedError, match=f"linear_attention: .*'pallas_tpu'.*{reason}"):
        linear_attention(*arrays, **options, implementation="pallas_tpu")
    # Whoever does not ask for it gets another one.
    chex.assert_tree_all_finite(linear_attention(*arrays, **options))


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_by_name():
    x = jnp.asarray(X, jnp.float64)
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*it does not compute in float64"):
        linear_attention(x, x, x, implementation="pallas_tpu")


def test_a_user_without_tpu_never_traces_the_kernel(monkeypatch):
    def traced(*_):
        raise AssertionError("the TPU kernel is traced")

    for function in ("forward", "forward_keeping", "backward"):
        monkeypatch.setattr(tpu, function, traced)
    jax.clear_caches()
    gradient = jax.jit(jax.value_and_grad(lambda x: linear_attention(x, x, x).sum()))
    chex.assert_tree_all_finite(gradient(X))
    with pytest.raises(AssertionError, match="the TPU kernel is traced"):
        gradient.trace(X).lower(lowering_platforms=("tpu",))
    jax.clear_caches()
