"""The table of claims: its rows, and what becomes of one that does not hold."""

import re

import pytest

from attention import catalogue
from experiments import claims
from experiments.claims import CLAIMS, Claim
from experiments.errors import ExperimentError


def test_claims_are_of_the_catalogue():
    assert len(CLAIMS) > 15
    for claim in CLAIMS:
        assert claim.mechanism in catalogue.mechanisms()
        assert claim.says and claim.experiment and "|" not in claim.says + claim.experiment


def test_what_does_not_hold_stays_in_the_table(monkeypatch, tmp_path, capsys):
    tried = (
        Claim("rat_attention", "it is small", "its size", lambda: ("3 bytes", True)),
        Claim("hip_attention", "it is exact", "its error", lambda: ("0.5", False)),
    )
    monkeypatch.setattr(claims, "CLAIMS", tried)
    path = tmp_path / "claims.md"
    monkeypatch.setattr("sys.argv", ["claims", "--output", str(path)])
    claims.main()
    lines = path.read_text().splitlines()
    assert lines[-2] == "| `rat_attention` | it is small | its size | 3 bytes | yes |"
    assert lines[-1] == "| `hip_attention` | it is exact | its error | 0.5 | no |"
    path.unlink()
    monkeypatch.setattr("sys.argv", ["claims", "--only", "rat", "--output", str(path)])
    claims.main()
    assert "its size" in capsys.readouterr().out and not path.exists()
    monkeypatch.setattr("sys.argv", ["claims", "--only", "nothing"])
    with pytest.raises(ExperimentError, match="only: 'nothing' is in no mechanism's name"):
        claims.main()


@pytest.mark.parametrize("name", ["diff_qkv_attention", "rat_attention", "aaren_attention"])
def test_cheap_claims_hold(name, quick_compilation):
    cheap = [c for c in CLAIMS if c.mechanism == name and c not in claims.SPEEDS]
    for line in claims.rows(cheap)[2:]:
        assert line.endswith("| yes |"), line


@pytest.mark.parametrize("name", ["sigmoid_attention", "rat_attention"])
def test_speeds_are_measured(name, quick_compilation):
    """Of few tokens: whether they hold there is no matter."""
    faster = claims._faster(name, 64, 0.0, "gradient")
    assert re.fullmatch(r"\d+\.\d\d times as fast", faster[0]) and faster[1]
    assert not claims._faster(name, 64, 1e9, "forward")[1]
    found, holds = claims._faster_generation("rat_attention", 48, 1e9, (2, 2, 2), 1)
    assert found.endswith("times as fast") and not holds
