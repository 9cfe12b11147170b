"""The examples of docs/models.md run and say what the page says they say."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(code, capsys):
    exec(compile(code, PAGE.name, "exec"), {"__name__": "models_page"})
    promised = re.findall(r"  # -> (.*)$", code, re.MULTILINE)
    assert promised, "an example must show something"
    assert capsys.readouterr().out.splitlines() == promised


def test_linen_is_shown():
    assert any("nnx.bridge.to_linen" in code for code in EXAMPLES)
