"""docs/mechanisms holds what the catalogue says, and its figures show weights."""

import dataclasses
import re

import numpy as np
import pytest

from attention import catalogue
from scripts import mechanism_pages as pages

RECORDS = tuple(catalogue.mechanisms().values())
TEXTS = {path.name: path.read_text() for path in pages.PAGES.glob("*.md")}


def test_pages_are_up_to_date():
    assert pages.out_of_date() == [], "run `make pages`"


def test_a_page_that_is_not_up_to_date_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGES", tmp_path)
    for name, text in pages.pages().items():
        (tmp_path / name).write_text(text)
    for record in RECORDS:
        if pages.has_figure(record):
            (tmp_path / f"{record.slug}.png").touch()
    assert pages.out_of_date() == []
    (tmp_path / "softmax_attention.md").write_text("changed")
    (tmp_path / "diag_attention.png").unlink()
    (tmp_path / "no_mechanism.md").touch()
    assert pages.out_of_date() == ["diag_attention.png", "no_mechanism.md", "softmax_attention.md"]


def test_index_names_all():
    links = re.findall(r"^- \[(\w+)\]\(\1\.md\): \S", TEXTS["README.md"], re.MULTILINE)
    assert sorted(links) == sorted(catalogue.mechanisms())


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S))
        assert links, name
        for link in links:
            assert (pages.PAGES / link).exists(), f"{name}: {link}"


def test_figures_are_small():
    for path in pages.PAGES.glob("*.png"):
        assert 0 < path.stat().st_size < 25_000, path.name


@pytest.mark.parametrize(
    ("slug", "equation", "line"),
    [
        ("softmax_attention", "o_i  = sum_j p_ij v_j", "out = softmax_attention(query, key, value"),
        ("lightning_attention", "o_t = scale sum_{j<=t}", "print(out.shape)  # (2, 48, 4, 8)"),
    ],
)
def test_equations_and_example_are_code(slug, equation, line):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", TEXTS[f"{slug}.md"], re.MULTILINE | re.DOTALL)
    assert any(kind == "text" and equation in text for kind, text in blocks)
    assert any(kind == "python" and line in text for kind, text in blocks)


def test_text_means_the_same_in_markdown():
    text = (
        "k'_j and s_{t}, H ** 2, x*y, *not* `a_*`, a<b[i](j) <= c\n+ 1 of\n12. c\n\n    a_\n\n    b"
    )
    assert pages.markdown(text) == (
        "k'\\_j and s\\_{t}, H ** 2, x\\*y, *not* `a_*`, a\\<b[i]\\(j) <= c\n\\+ 1 of\n12\\. c\n\n"
        "```text\na_\n\nb\n```"
    )
    assert pages.markdown("1. one\n   + two\n2. three") == "1. one\n   \\+ two\n2. three"
    assert pages.markdown("Sources: A\n(2024)") == "**Sources:** A\n(2024)"


def test_every_argument_is_listed():
    for record in RECORDS:
        text = TEXTS[f"{record.slug}.md"]
        for name in (*record.inputs, *record.options):
            assert re.search(rf"^- `{name}` \(.+\): ", text, re.MULTILINE), (record.slug, name)
        for name in record.exports:
            assert f"`{name}`: " in text or name == record.slug


@pytest.mark.usefixtures("quick_compilation")
def test_figure_of_softmax_attention(tmp_path):
    record = catalogue.get("softmax_attention")
    (weights,) = pages.weights(record, tokens=12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert (weights[np.tril_indices(12)] > 0).all()
    assert (weights[np.triu_indices(12, 1)] == 0).all()
    pages.draw(record, tmp_path / "a.png", tokens=12)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick_compilation")
def test_no_figure_of_what_is_no_sum_of_values():
    def square(query, key, value, *, implementation):
        return value**2

    record = dataclasses.replace(
        catalogue.get("softmax_attention"),
        **dict(slug="square", function=square, step=None, init_state=None),
    )
    with pytest.raises(ValueError, match="no sum of values"):
        pages.weights(record, tokens=4)


def test_where_there_are_figures():
    slugs = {record.slug for record in RECORDS}
    assert set(pages.PICTURES) | set(pages.WITHOUT_FIGURE) <= slugs
    assert pages.has_figure(catalogue.get("selective_scan"))
    for record in RECORDS:
        text = TEXTS[f"{record.slug}.md"]
        assert (f"]({record.slug}.png)" in text) == pages.has_figure(record)
