"""Baselines against a slow count, and against what is known of them."""

import lzma
import math

import numpy as np
import pytest

from experiments.baselines import ByteModel, lzma_bits

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRAINING = [b"abracadabra", b"banana\x00\xff", b"", b"cab"]
TEST = [b"abra", b"nab\xfe", b"c"]


def slow_bits(order, training, test):
    counts = {}
    for document in training:
        for i, byte in enumerate(document):
            for length in range(order + 1):
                padded = (None,) * order + tuple(document)
                context = padded[i + order - length : i + order]
                counts.setdefault(context, {}).setdefault(byte, 0)
                counts[context][byte] += 1
    bits = 0.0
    for document in test:
        for i, byte in enumerate(document):
            p = 1 / 256
            for length in range(order + 1):
                padded = (None,) * order + tuple(document)
                seen = counts.get(padded[i + order - length : i + order], {})
                if seen:
                    p = (seen.get(byte, 0) + len(seen) * p) / (sum(seen.values()) + len(seen))
            bits -= math.log2(p)
    return bits


@pytest.mark.parametrize("order", [0, 1, 2])
def test_byte_model_is_the_slow_count(order):
    expected = slow_bits(order, TRAINING, TEST)
    assert ByteModel(order, TRAINING).bits(TEST) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_byte_model_is_a_distribution(order):
    model = ByteModel(order, TRAINING)
    for context in (b"a", b"ab", b"\xfe\xfe"):
        prefix = model.bits([context])
        total = sum(2 ** (prefix - model.bits([context + bytes([b])])) for b in range(256))
        assert total == pytest.approx(1, rel=1e-9)


def test_known_values():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 200_000, np.uint8).tobytes()
    assert ByteModel(0, [noise]).bits([noise]) / len(noise) == pytest.approx(8, abs=0.01)
    cycle = b"abc" * 10_000
    assert ByteModel(2, [cycle]).bits([cycle]) / len(cycle) < 0.001
    assert ByteModel(0, [cycle]).bits([cycle]) / len(cycle) == pytest.approx(
        math.log2(3), abs=0.001
    )
    assert lzma_bits([b"x" * 500, noise[:1000]]) == 8 * len(
        lzma.compress(b"x" * 500 + noise[:1000], preset=9 | lzma.PRESET_EXTREME)
    )


def test_order_out_of_range():
    with pytest.raises(ValueError, match="order: 3; it must be 0, 1 or 2"):
        ByteModel(3, TRAINING)
