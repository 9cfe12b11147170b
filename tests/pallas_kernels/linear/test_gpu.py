"""The GPU kernels of linear attention, in numbers: compiled for a GPU, and emulated on a CPU.

See tests/ptx. Memory that nothing was written to is NaN, and races are errors.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu as hopper
from pallas_kernels.gpu_proved import Proved
from pallas_kernels.linear import features, gpu, gpu_call, linear_attention
from tests.gpu import PRODUCTS_IN_PARTS, compiled, emulated
from tests.numerics import assert_close
from tests.pallas_kernels.linear.cases import ONE, Case, equal_keys, of_rows
from tests.pallas_kernels.linear.gpu_calls import GPU_CASES, check, dtype_of, parts_of
from tests.pallas_kernels.linear.test_gpu_compiled import check_kernels
from tests.training import check_training

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _run(case, arrays, seed=0):
    """Returns results and gradients, and the kernels."""
    with emulated(seed) as kernels:
        found = jax.block_until_ready(case.differentiated(arrays, "pallas_gpu"))
    return found, compiled(kernels)


def _check(case, dtype, arrays=None):
    """Compares results and gradients with their definition; returns gradients and kernels."""
    arrays = case.arrays(dtype) if arrays is None else arrays
    (results, gradients), kernels = _run(case, arrays)
    assert results["out"].dtype == dtype
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    check((results, gradients), case.defined(arrays), dtype)
    return gradients, kernels


@pytest.mark.parametrize("name", GPU_CASES)
def test_results_and_gradients(name):
    case, dtype = GPU_CASES[name], dtype_of(name)
    arrays = case.arrays(dtype)
    gradients, kernels = _check(case, dtype, arrays)
    check_kernels(name, kernels)
    if "log_decay" not in arrays:
        return
    nothing = np.asarray(arrays["log_decay"]) <= -1e30
    if case.segments and nothing.ndim > 1:
        nothing[:, 1:][np.diff(case.segment_ids(), axis=1) != 0] = True
    np.testing.assert_array_equal(gradients["log_decay"][nothing], 0)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(330, **ONE, decay="step", segments=True), jnp.float32),
        (Case(330, 1, 2, 2, decay=(-0.003, 0.0)), jnp.bfloat16),
        (Case(330, **ONE, decay="channel"), jnp.bfloat16),
        (Case(330, **ONE, decay="channel", beta=True), jnp.bfloat16),
        (Case(330, **ONE, decay=-0.2, beta=True), jnp.float32),
        (Case(330, **ONE, decay="step", beta=True, momentum=True), jnp.bfloat16),
    ],
    ids=["steps, segments", "decay", "channels", "delta, channels", "delta, float32", "momentum"],
)
def test_spans(case, dtype, monkeypatch):
    """Where batch and memories are few, several spans of time are walked at the same time."""
    monkeypatch.setattr(gpu_call, "SHORTEST", 2)
    monkeypatch.setattr(gpu_call, "WORTH", 0)
    _, kernels = _check(case, dtype)
    names = [kernel.kernel for kernel in kernels]
    assert {"linear_state", "linear_state_gradient"} <= {*names}
    assert not any(kernel.spill_bytes or kernel.serialized for kernel in kernels)


@pytest.mark.parametrize("name", ["elu", "elu_plus_one", "relu", "taylor"])
def test_features_are_made_by_the_walks(name, monkeypatch):
    """Nothing as large as all features is written and read again."""

    def mapped(*_):
        raise AssertionError("XLA makes features")

    monkeypatch.setattr(features, "mapped", mapped)

    def attend(implementation, x):
        options = dict(feature_map=name, implementation=implementation)
        return jnp.sum(linear_attention(x, x, x, log_decay=jnp.zeros(1), **options))

    x = jnp.ones((1, 100, 1, 6), jnp.bfloat16)
    jax.eval_shape(functools.partial(attend, "pallas_gpu"), x)
    with pytest.raises(AssertionError, match="XLA makes features"):
        jax.eval_shape(functools.partial(attend, "xla"), x)


def test_the_same_twice():
    case = GPU_CASES["decay, bfloat16"]
    arrays = case.arrays(jnp.bfloat16)
    chex.assert_trees_all_equal(*(_run(case, arrays, seed)[0] for seed in range(2)))


def test_equal_keys_by_the_delta_rule_in_bfloat16(monkeypatch):
    """Some tokens write nothing: their betas have gradients, too. Warpgroups take three chunks."""
    monkeypatch.setattr(hopper, "PROCESSORS", 1)
    case = Case(330, **ONE, decay=None, beta=True)
    arrays = equal_keys(case)
    arrays["beta"] = arrays["beta"].at[:, ::3].set(0)
    gradients, kernels = _check(case, jnp.bfloat16, arrays)
    assert not any(kernel.spill_bytes or kernel.serialized for kernel in kernels)
    _, expected = case.defined(arrays)
    nothing = {"beta": gradients["beta"][:, ::3]}
    assert_close(nothing, {"beta": expected["beta"][:, ::3]}, jnp.bfloat16)


def test_some_gradients_alone():
    """Not every walk of the backward is needed for each."""
    case = Case(70, 1, 2, 1, decay=-0.1, state=True)
    arrays = case.arrays(jnp.float32)
    with emulated():
        for names in (("query",), ("key",), ("value",), ("memory",)):
            some = {name: arrays[name] for name in names}
            actual, expected = (
                jax.block_until_ready(
                    jax.jit(
                        jax.grad(lambda x: case.call(arrays | x, which)["out"].sum())  # noqa: B023
                    )(some)
                )
                for which in ("pallas_gpu", "reference")
            )
            assert_close(actual, expected, factor=PRODUCTS_IN_PARTS)


def test_under_vmap():
    case = Case(64, 1, 2, 2)
    with emulated():
        actual = of_rows(case, "pallas_gpu")
    assert_close(actual, of_rows(case, "reference"), factor=4 * PRODUCTS_IN_PARTS)


def test_a_language_model_trains():
    """Sharded over batch and heads: the steps on the kernels are the steps on plain JAX."""
    with emulated():
        check_training("lightning_attention", 4, length=40, layers=1, steps=2)


X = jnp.ones((1, 32, 1, 4))
WIDE = jnp.ones((1, 32, 1, 193))


@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    (
        (
            (X, X, X),
            dict(causal=False, segment_ids=np.ones((1, 32), int)),
            "it has no segments if causal is False",
        ),
        (
            (WIDE[..., :65], WIDE[..., :65], X),
            dict(log_momentum=jnp.zeros((1, 32, 1))),
            "features of float32 must be at most 64 with momentum; got 65",
        ),
        (
            (WIDE[..., :129], WIDE[..., :129], X),
            dict(beta=jnp.zeros((1, 32, 1))),
            "features of float32 must be at most 128 by the delta rule; got 129",
        ),
        (
            (X, X, X),
            dict(chunk_size=100),
            "chunk_size must divide 256 or be a multiple of 64; got 100",
        ),
        ((WIDE, WIDE, X), {}, "features of float32 must be at most 192; got 193"),
        ((X, X, WIDE), {}, "values of float32 must be at most 192; got 193"),
        (
            (X, X, WIDE[..., :191]),
            dict(normalize=True),
            "values of float32 must be at most 190, as the output is normalised; got 191",
        ),
        (
            (WIDE[..., :22].astype(jnp.bfloat16),) * 2 + (X.astype(jnp.bfloat16),),
            dict(feature_map="taylor"),
            "features of bfloat16 must be at most 256; got 276",
        ),
    ),
)
def test_what_the_kernel_lacks_is_refused_by_name(arrays, options, reason):
    with pytest.raises(NotImplementedError, match=f"linear_attention: .*'pallas_gpu'.*{reason}"):
        linear_attention(*arrays, **options, implementation="pallas_gpu")
    # Whoever does not ask for it gets another one.
    chex.assert_tree_all_finite(linear_attention(*arrays, **options))


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_by_name():
    x = jnp.asarray(X, jnp.float64)
    with pytest.raises(NotImplementedError, match=r"'pallas_gpu'.*it does not compute in float64"):
        linear_attention(x, x, x, implementation="pallas_gpu")


def test_none_chooses_what_has_passed_on_a_gpu(monkeypatch):
    """On a GPU; on a CPU the kernels are never traced."""

    def traced(*_):
        raise AssertionError("the GPU kernel is traced")

    for function in ("forward", "forward_keeping", "backward"):
        monkeypatch.setattr(gpu, function, traced)
    case = GPU_CASES["decay, bfloat16"]
    arrays, parts = case.arrays(jnp.bfloat16), parts_of(case, jnp.bfloat16)

    def lowered(platform):
        jax.clear_caches()
        return case.differentiated.trace(case, arrays, None).lower(lowering_platforms=(platform,))

    lowered("cuda")
    monkeypatch.setattr(Proved, "parts", lambda _: parts)
    with pytest.raises(AssertionError, match="the GPU kernel is traced"):
        lowered("cuda")
    lowered("cpu")
    monkeypatch.setattr(Proved, "parts", lambda _: parts - {"initial state"})
    lowered("cuda")
    jax.clear_caches()


def test_parts_of_a_call():
    """Whatever makes a kernel another one has a name of its own."""
    parts = {name: parts_of(case, dtype_of(name)) for name, case in GPU_CASES.items()}
    assert len(set(parts.values())) == len(parts)
    delta = parts["delta, channels, relu, bfloat16"]
    assert "bfloat16, delta rule, decay of a token and feature" in delta
    grouped = parts["steps, groups of both, wide, relu"]
    assert {"more values than queries", "features: relu", "normalised"} <= grouped
    assert "float32, 192 of keys" in grouped
