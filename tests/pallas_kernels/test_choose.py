"""Choosing an implementation by name, or the best that serves a call."""

import pytest

from pallas_kernels.choose import resolve_implementation


def _yes(**call):
    return None


def _small_only(*, size):
    return None if size < 10 else f"size {size} is more than 9"


def _resolve(name, available, size=1):
    return resolve_implementation(name, available, function="some_attention", size=size)


def test_none_takes_the_first_that_supports_the_call():
    available = {"xla": _small_only, "reference": _yes}
    assert _resolve(None, available) == "xla"
    assert _resolve(None, available, size=10) == "reference"


def test_none_says_why_nothing_serves():
    with pytest.raises(NotImplementedError, match=r"some_attention: .*xla: size 12 is more than 9"):
        _resolve(None, {"xla": _small_only}, size=12)


def test_a_name_is_taken_at_its_word():
    assert _resolve("reference", {"xla": _yes, "reference": _yes}) == "reference"
    with pytest.raises(NotImplementedError, match=r"some_attention: .*'xla'.*size 12 is more"):
        _resolve("xla", {"xla": _small_only, "reference": _yes}, size=12)


def test_an_implementation_that_the_family_lacks():
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*it has xla, reference"):
        _resolve("pallas_tpu", {"xla": _yes, "reference": _yes})


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"None or one of reference, xla, pallas_tpu, pallas_gpu"):
        _resolve("cudnn", {"xla": _yes})
