"""The README's example runs, its table is what the catalogue says, its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import config as configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 24
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == "(2, 100, 64)\n"


def test_tables_are_up_to_date():
    found = subprocess.run(
        [sys.executable, "scripts/readme_tables.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, "run `make readme`"
    assert "softmax_attention" in README and "lightning_attention" in README


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())
    ]
    assert links
    for page, link in links:
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_commands_name_options_that_exist(capsys):
    options = set()
    for task in configs.CONFIGS:
        with pytest.raises(SystemExit):
            configs.parse(["--help"], f"python -m experiments.train {task}", task)
        options |= set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    pages = README + (ROOT / "docs" / "training.md").read_text()
    named = set(re.findall(r"--(?:mesh|data|model|log|checkpoint|distributed)\.[\w-]+", pages))
    assert named and named <= options, named - options
