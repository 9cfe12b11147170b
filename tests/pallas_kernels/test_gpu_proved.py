"""The files that say what has passed on a GPU."""

import pytest

from pallas_kernels.gpu_proved import Proved


@pytest.fixture
def proved(monkeypatch, tmp_path):
    """Returns the table of a family whose calls have the parts they are given."""
    (tmp_path / "gpu_proved.json").write_text("[]\n")
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    return Proved("family", lambda parts: frozenset(parts))


def test_what_has_passed_is_written_and_read(proved):
    assert proved.unproved(parts={"b", "a"}) == "not yet seen on a GPU: a, b"
    proved.write({"b", "a"})
    assert proved.file.read_text() == '[\n "a",\n "b"\n]\n'
    assert proved.parts() == {"a", "b"}
    assert proved.unproved(parts={"b", "a"}) is None
    assert proved.unproved(parts={"b", "c"}) == "not yet seen on a GPU: c"
