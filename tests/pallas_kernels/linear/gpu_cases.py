"""What is compiled for Hopper GPUs: all variants, and what the benchmarks' table has."""

import jax
import jax.numpy as jnp

from experiments.benchmark import linear_hopper
from experiments.compile_report import Case
from tests.pallas_kernels.linear.cases import called
from tests.pallas_kernels.linear.gpu_calls import GPU_CASES, dtype_of


def _gradients(name: str) -> Case:
    """Returns a case with all kernels of a call."""
    case = GPU_CASES[name]

    def run(arrays):
        def loss(arrays):
            results = called(case, arrays, "pallas_gpu")
            return sum(jnp.sum(x.astype(jnp.float32)) for x in results.values()), results

        return jax.grad(loss, has_aux=True)(arrays)

    return Case(run, (jax.eval_shape(lambda: case.arrays(dtype_of(name))),))


def cases() -> dict[str, Case]:
    """Returns the cases by name."""
    return {name: _gradients(name) for name in GPU_CASES} | linear_hopper.cases()
