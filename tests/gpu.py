"""Kernels for GPUs, interpreted on a machine that has none."""

import contextlib

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import gpu

PRODUCTS_IN_PARTS = 16.0
"""How far float32 may be: products of two parts of bfloat16 each have 16 bits, not 24."""


@contextlib.contextmanager
def interpreted():
    """Runs GPU kernels in Pallas's GPU interpret mode, where races are errors.

    Memory that nothing was written to is NaN. Wait for results inside. It knows one device only.
    """
    with gpu.interpreted(detect_races=True):
        try:
            yield
        finally:
            # Which an exception leaves as it was; there is no public name for it yet.
            interpret_pallas_call.reset_gpu_interpret_mode_state()
