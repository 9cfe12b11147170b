"""The GPU kernels of scans on a GPU: what has passed is what is chosen there.

`make test-gpu ARGS=--write-proved` writes the names of the parts of all calls that passed, see
`pallas_kernels.gpu_proved` and tests/on_gpu.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.scan import gated_scan, gpu
from pallas_kernels.scan.gpu_proved import PROVED, parts_of  # noqa: F401
from tests.numerics import assert_close
from tests.pallas_kernels.scan.cases import CASES, Case
from tests.pallas_kernels.scan.test_gpu import NUMBERS

pytestmark = pytest.mark.gpu


def _selective(batch=2, **features):
    return Case("selective", 300, batch, 600, chunk=None, **{"features": 16} | features)


DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
PLAIN = {"skip": False, "bias": False, "softplus": False}
CALLS = (
    {name: (case, np.float32) for name, case in CASES.items()}
    | NUMBERS
    | {
        f"{kind}, {name}": (case, dtype)
        for name, dtype in DTYPES.items()
        for kind, case in {
            "gated, long": Case("gated", 4096, 2, 2048, chunk=None, state=True),
            "gated, many channels": Case("gated", 1024, 8, 2304, chunk=None, segments=True),
            "gated, segments": Case("gated", 1000, 3, 300, chunk=None, segments=True),
            "gated, chunks of 200": Case("gated", 1000, 1, 300, chunk=200),
            "gated, chunks of 2": Case("gated", 50, 1, 300, chunk=2),
            "selective, long": Case("selective", 2048, 2, 1024, 16, chunk=None, state=True),
            "selective, segments": _selective(segments=True),
            "selective, nothing but the scan": _selective(**PLAIN),
            "selective, 32 numbers": _selective(features=32),
            "selective, 32 numbers, groups": _selective(features=25, groups=3, segments=True),
            "selective, chunks of 20": Case("selective", 100, 1, 300, 16, chunk=20),
            "selective, chunks of 2": Case("selective", 20, 1, 300, 16, chunk=2),
            "softmax, long": Case("softmax", 2048, 2, 16, 64, chunk=None, state=True),
            "softmax, shared values": Case(
                "softmax", 1000, 2, 6, 130, groups=2, chunk=None, segments=True
            ),
            "softmax, chunks of 20": Case("softmax", 100, 1, 6, 64, chunk=20),
            "softmax, chunks of 2": Case("softmax", 20, 1, 6, 64, chunk=2),
        }.items()
    }
)


def parts(name):
    """Returns the parts of a call, as the kernels are asked for them."""
    case, dtype = CALLS[name]
    found = []

    def recorded(**call):
        found.append(parts_of(**call))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpu, "supports", recorded)
        jax.eval_shape(lambda arrays: case.traced(arrays, "pallas_gpu"), case.arrays(dtype))
    return found[0]


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name):
    case, dtype = CALLS[name]
    arrays = case.arrays(dtype)
    gradients, results = case.gradients(arrays, "pallas_gpu")
    assert results[0].dtype == dtype
    chex.assert_trees_all_equal_dtypes(gradients, arrays)
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.float64(x)) for n, x in arrays.items()}
        expected = case.gradients(wide, "reference")
    assert_close((gradients, results), expected, dtype, 2)
    again = case.gradients(arrays, "pallas_gpu")
    chex.assert_trees_all_equal(again, (gradients, results))


def test_decays_of_any_strength_over_many_tokens():
    strengths = np.float32([-np.inf, -1e30, -100, -8, -0.1, -1e-3, -1e-4, 0])
    shape = 1, 65536, len(strengths)
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal(shape), np.float32) for _ in range(2))
    log_decay = jnp.broadcast_to(strengths, shape)

    def run(x, log_decay, cotangent, implementation):
        call = functools.partial(gated_scan, implementation=implementation)
        out, vjp = jax.vjp(call, x, log_decay)
        return (out, *vjp(cotangent))

    actual = run(x, log_decay, cotangent, "pallas_gpu")
    chex.assert_tree_all_finite(actual)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.float64(array)) for array in (x, log_decay, cotangent))
        expected = run(*wide, "reference")
    np.testing.assert_array_equal(actual[2][..., :3], 0)  # below what float32 holds
    # A product of decays near 1 has a rounding for each: three digits over 10,000 tokens.
    for n in range(len(strengths)):
        of_one = [[array[..., n] for array in arrays] for arrays in (actual, expected)]
        shown = slice(0, 2 if n < 3 else 3)
        assert_close(of_one[0][shown], of_one[1][shown], factor=1000)
