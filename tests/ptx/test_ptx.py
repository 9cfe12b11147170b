"""That the emulation of GPU kernels finds what is wrong with one, and how numbers lie."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.tiled import tiled_attention
from tests import ptx
from tests.gpu import emulated
from tests.ptx import block
from tests.ptx.host import TensorMap
from tests.ptx.memory import Fault, Gmem, swizzled
from tests.ptx.translate import translate

WAIT = r"\{\s*\.reg \.pred\s+P1;\s*LAB_WAIT:.*?DONE:\s*\}"
ARRIVE = r"mbarrier\.arrive\.release[^;]*;"
EXPECT = r"mbarrier\.arrive\.expect_tx[^;]*;"
SYNC = r"bar\.sync\s+%r\d+, 128;"
FENCE = r"fence\.proxy\.async[^;]*;"
PRODUCTS = r"wgmma\.wait_group[^;]*;"
STORES = r"cp\.async\.bulk\.wait_group[^;]*;"


def _launched(function, *arrays):
    """Returns the kernels that a function runs, and what it calls them with."""
    calls = []
    original = ptx.Kernel.run

    def kept(kernel, arrays, seed):
        calls.append((kernel, arrays))
        return original(kernel, arrays, seed)

    with mock.patch.object(ptx.Kernel, "run", kept), emulated():
        jax.block_until_ready(jax.jit(function)(*arrays))
    return calls


def _attend(*arrays):
    return tiled_attention(*arrays, implementation="pallas_gpu")


def _normal(*shapes):
    return [jax.random.normal(jax.random.key(i), x, jnp.bfloat16) for i, x in enumerate(shapes)]


@pytest.fixture(scope="module")
def run():
    """Runs tiled attention's forward kernel, its PTX changed, on keys that need several tiles."""
    arrays = _normal((1, 70, 1, 64), (1, 500, 1, 64), (1, 500, 1, 64))
    ((kernel, arrays),) = _launched(_attend, *arrays)
    return functools.partial(_run, kernel, arrays)


def _run(kernel, arrays, change=lambda ptx: ptx, seed=0, of_arrays=lambda x: x):
    changed = ptx.Kernel.__new__(ptx.Kernel)
    vars(changed).update(vars(kernel), program=translate(change(kernel.ptx)))
    return changed.run(of_arrays(arrays), seed)


def _without(pattern, *indices):
    """Returns a function that removes occurrences of a pattern from PTX, or all of them."""

    def change(text):
        found = [*re.finditer(pattern, text, re.DOTALL)]
        assert len(found) > max(indices, default=0)
        for match in reversed([found[i] for i in indices] or found):
            text = text[: match.start()] + text[match.end() :]
        return text

    return change


FAULTS = {
    "copies are not waited for": (_without(WAIT), "SMEM: a race|more arrivals"),
    "keys are not waited for": (_without(WAIT, 2), "race: what is read"),
    "no one says that keys were read": (_without(ARRIVE), "wait for ever"),
    "bytes to come are not told": (_without(EXPECT, 0), "wait for ever"),
    "warps do not meet": (_without(SYNC), "race: what is overwritten may still be read"),
    "products are not waited for": (_without(PRODUCTS), "ends before|may still be read"),
    "results are not waited for": (_without(STORES), "ends before what it has begun"),
}


THERE = r"cp\.async\.bulk\.wait_group\s+0;"


@pytest.fixture(scope="module")
def gradient():
    """Runs the backward in one pass, its PTX changed, with two tiles of keys for each block."""
    gradient = jax.grad(lambda *x: _attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with mock.patch.object(gpu, "PROCESSORS", 1):
        _, (kernel, arrays) = _launched(gradient, *_normal(*[(1, 256, 1, 64)] * 3))
    return functools.partial(_run, kernel, arrays)


def test_additions_are_in_order(gradient):
    """What is added is there before something else is added to it."""
    assert gradient()[0].shape == (1, 256, 1, 64)
    with pytest.raises(Fault, match="GMEM: a race: what was written before need not be there"):
        gradient(_without(THERE))


def test_additions_of_blocks_are_in_no_order():
    memory = Gmem([np.ones(8, np.float32)])
    place = memory.places(np.arange(16) + memory.addresses[0])
    for _ in range(2):
        memory.begin(place, 1)
        memory.end(place, np.full(4, 2, np.float32).view(np.uint8), adds=True)
    np.testing.assert_array_equal(memory.array(0, (8,), np.float32), [5, 5, 5, 5, 1, 1, 1, 1])
    with pytest.raises(Fault, match="GMEM: a race: another block has written there"):
        memory.begin(place, 2)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FAULTS)
def test_faults(run, name, seed):
    change, reason = FAULTS[name]
    with pytest.raises(Fault, match=reason):
        run(change, seed)


def test_the_copy_engine_does_not_see_what_has_no_fence(run):
    out, changed = (
        run(change)[0].astype(np.float32) for change in (_without(SYNC[:0]), _without(FENCE))
    )
    assert np.isfinite(out).all() and np.isnan(changed).all()


def test_addresses_outside_of_arrays(run):
    with pytest.raises(Fault, match="GMEM: an address is in no array"):
        run(of_arrays=lambda arrays: [x[:, :-1] if x.ndim == 4 else x for x in arrays])


def test_an_instruction_that_is_not_known(run):
    with pytest.raises(NotImplementedError, match=r"PTX: dance\.b32 %r1, %r2"):
        run(lambda text: text.replace("bar.sync", "dance.b32 %r1, %r2;\n\tbar.sync", 1))


def test_threads_that_go_different_ways(run):
    with pytest.raises(NotImplementedError, match="threads of a warpgroup go different ways"):
        run(
            lambda text: re.sub(
                r"@%p\d+ bra", "setp.eq.b32 %p1, %r1, 5;\n\t@%p1 bra", text, count=1
            )
        )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((8, 2, (64, 8), (2, 128), (64, 8), 128), "no multiple of 16 bytes"),
        ((0, 2, (64, 8), (2, 120), (64, 8), 128), "no multiple of 16 bytes"),
        ((0, 2, (64, 512), (2, 128), (64, 512), 128), "too much"),
        ((0, 2, (128, 8), (2, 256), (128, 8), 128), "rows are longer"),
    ],
)
def test_descriptors_that_cuda_refuses(values, reason):
    with pytest.raises(Fault, match=reason):
        TensorMap(*values)


def test_swizzles():
    """Units of 16 bytes of row i change places by i, in rows of 128 bytes; see the PTX ISA."""
    unit, row = np.arange(8), np.arange(16)[:, None]
    at = 128 * row + 16 * unit + 5
    np.testing.assert_array_equal(swizzled(at, 128), 128 * row + 16 * (unit ^ row % 8) + 5)
    # Of shorter rows two or four fill 128 bytes, and change places together.
    unit, row = np.arange(4), np.arange(16)[:, None]
    at = 64 * row + 16 * unit
    np.testing.assert_array_equal(swizzled(at, 64), 64 * row + 16 * (unit ^ row // 2 % 4))
    unit = np.arange(2)
    at = 32 * row + 16 * unit
    np.testing.assert_array_equal(swizzled(at, 32), 32 * row + 16 * (unit ^ row // 4 % 2))
    np.testing.assert_array_equal(swizzled(at, 16), at)


def test_registers_of_the_left_matrix():
    """As the PTX ISA has them, thread by thread."""
    matrix = np.arange(64 * 16, dtype=np.float16).reshape(64, 16)
    registers = np.zeros((4, 128, 2), np.float16)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            row = 16 * warp + lane // 4 + (8 if i // 2 % 2 else 0)
            column = lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)
            registers[i // 2, thread, i % 2] = matrix[row, column]
    found = block._left(registers.view(np.uint32).reshape(4, 128), "f16")
    np.testing.assert_array_equal(found, matrix)
