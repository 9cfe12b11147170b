"""Writes docs/mechanisms: a page for each mechanism of the catalogue, with a figure, and an index.

`--figures` draws all figures again; without it, only those that are missing. `--check` writes
nothing, and fails where a page is not what the catalogue says.
"""

import functools
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import jax
import numpy as np

from attention import catalogue
from attention.__main__ import example, signature
from attention.catalogue import Mechanism

PAGES = Path(__file__).parents[1] / "docs" / "mechanisms"
INDEX = "README.md"
TOKENS = 64


@dataclass(frozen=True)
class Picture:
    """How a figure calls its mechanism."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options with which `TOKENS` tokens show what it does; others are those of a plain call."""
    heads: int = 1
    """Heads, one beside the other."""
    features: int = 16
    """Channels of queries and keys; where keys must be as wide as values, `TOKENS`."""
    arrays: Callable[[int], dict[str, np.ndarray]] | None = None
    """Arrays of this many tokens, by name: arguments, and options beside `options`."""


def _gates(tokens: int) -> dict[str, np.ndarray]:
    return {"log_decay": np.full((1, tokens, 1, tokens), np.log(0.7))}


def _series(tokens: int) -> dict[str, np.ndarray]:
    """Queries and keys that repeat four times."""
    rng = np.random.default_rng(0)
    once = np.tile(rng.standard_normal((tokens // 4, 16)), (4, 1))
    query, key = once + 0.5 * rng.standard_normal((2, tokens, 16))
    return {"query": query[None, :, None], "key": key[None, :, None]}


def _scan(tokens: int) -> dict[str, np.ndarray]:
    """Inputs of a scan whose channels differ in nothing but that each has an input of its own."""
    rng = np.random.default_rng(0)
    delta = np.repeat(rng.standard_normal((1, tokens, 1)), tokens, axis=2) - 2
    b, c = words(rng, tokens, 8, shared=2)
    rates = np.tile(-np.arange(1.0, 9.0), (tokens, 1))
    return {"x": np.eye(tokens)[None], "delta": delta, "A": rates, "B": b[None], "C": c[None]}


# A mechanism that is not named here is called with the options of the tests, `Mechanism.small`.
PICTURES: dict[str, Picture] = {
    "agent_attention": Picture({"num_agents": 8}),
    "auto_correlation": Picture(arrays=_series),
    "bi_level_routing_attention": Picture({"shape": (8, 8), "regions": 4, "top_k": 3}),
    "combiner_attention": Picture({"span_size": 8}),
    "diag_attention": Picture({"block_size": 12}),
    "flex_prefill_attention": Picture(
        {"block_size": 4, "min_budget": 12, "gamma": 0.6, "tau": 0.07}
    ),
    "hip_attention": Picture(
        {"mask_k": 8, "block_q": 4, "block_k": 1, "group": 2, "window": 8, "sinks": 2}
    ),
    "hyper_attention": Picture({"min_seq_len": 16, "block_size": 8, "num_samples": 8}),
    "landmark_attention": Picture({"block_size": 8}),
    "lightning_attention": Picture({"slopes": (0.1,)}),
    "mixture_of_head_attention": Picture({"num_shared": 1, "top_k": 2}, heads=4),
    "neighborhood_attention": Picture({"shape": (8, 8), "window": 5, "is_causal": False}),
    "rat_attention": Picture({"chunk_size": 8}, features=TOKENS, arrays=_gates),
    "routing_attention": Picture({"num_clusters": 4, "window": 16, "shared_qk": True}),
    "selective_scan": Picture(arrays=_scan),
    "shifted_sparse_attention": Picture({"group_size": 16, "num_sinks": 1}, heads=2),
    "soft_attention": Picture({"num_landmarks": 16}),
    "titans_neural_memory": Picture({"chunk_size": 8, "log_decay": -0.02}),
}

# Why a mechanism has no figure. Beside these, none has that takes other arrays than query, key and
# value, unless `PICTURES` says which, nor that has weights, which would have to be trained first.
WITHOUT_FIGURE: dict[str, str] = {}


def has_figure(record: Mechanism) -> bool:
    """Whether the output of a mechanism is a sum of values, whose weights a figure shows."""
    known = PICTURES.get(record.slug, Picture())
    plain = record.arguments is None or known.arrays is not None
    return plain and not record.has_weights and record.slug not in WITHOUT_FIGURE


def words(
    rng: np.random.Generator, tokens: int, features: int, shared: int = 1, kinds: int = 6
) -> np.ndarray:
    """Returns vectors of tokens that come in runs of the same kind: [shared, tokens, features].

    Those of one kind are alike, also among the `shared` draws, such as queries and keys.
    """
    changes = rng.random(tokens) < 0.25
    kind = rng.integers(kinds, size=tokens)[np.cumsum(changes)]
    centres = rng.standard_normal((kinds, features))
    noise = rng.standard_normal((shared, tokens, features))
    # Products of tokens of a kind, over the root of the features, are about 4.
    return features**-0.25 * (2 * centres[kind] + noise)


def picture_options(record: Mechanism) -> dict[str, Any]:
    """Returns the options that are not arrays with which a figure calls its mechanism."""
    shown = PICTURES.get(record.slug)
    options = dict(shown.options if shown else record.small)
    if "is_causal" in record.options and "self causal" in record.patterns:
        options = {"is_causal": True} | options
    return options


def weights(record: Mechanism, tokens: int = TOKENS) -> np.ndarray:
    """Returns the weights that each token gives to the values of all, [heads, tokens, tokens].

    The values of a call are unit vectors, so its output holds the weight of each. Where a
    mechanism scales its output by a norm, the weights are those of each row up to that factor.

    Raises:
      ValueError: the output is no weighted sum of values.
    """
    shown = PICTURES.get(record.slug, Picture())
    arrays = {}
    if record.arguments is None:
        rng = np.random.default_rng(0)
        pairs = [words(rng, tokens, shown.features, shared=2) for _ in range(shown.heads)]
        query, key = np.stack(pairs, axis=2)[:, None]
        value = np.broadcast_to(np.eye(tokens)[:, None], (1, tokens, shown.heads, tokens))
        query = query[:, :1] if record.one_query else query
        arrays = {"query": query, "key": key, "value": value}
    arrays |= shown.arrays(tokens) if shown.arrays else {}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    options = {**picture_options(record), "implementation": "reference"}
    # One program: operations one by one take longer to compile.
    function = jax.jit(functools.partial(record.function, **options))

    def output(factor: float) -> np.ndarray:
        scaled = arrays | {values: np.float32(factor) * arrays[values]}
        inputs = [scaled.pop(name) for name in record.inputs]
        return np.asarray(function(*inputs, **scaled), np.float32)

    values = "value" if "value" in arrays else record.inputs[0]
    out, twice = output(1), output(2)
    bound = 1e-3 * np.abs(out).max()
    if not any(np.allclose(twice, factor * out, rtol=0, atol=bound) for factor in (1, 2)):
        raise ValueError("the output is no sum of values")
    if out.shape[1] != tokens or out.shape[-1] != tokens:
        raise ValueError(f"the output has shape {out.shape}, no weight for each pair of tokens")
    return out[0].reshape(tokens, -1, tokens).swapaxes(0, 1)


def draw(record: Mechanism, path: Path, tokens: int = TOKENS) -> None:
    """Draws a mechanism's weights: keys from left to right, queries downwards, zero white."""
    # Half a second to import, which only a command that draws should wait for.
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    panels = weights(record, tokens)
    # Roots, so that small weights are seen too.
    panels = np.sign(panels) * np.sqrt(np.abs(panels))
    limit = np.abs(panels).max()
    colours = LinearSegmentedColormap.from_list(
        "signed", ["#67001f", "#d6604d", "white", "#4393c3", "#053061"]
    )
    figure = Figure(figsize=(2.6 * len(panels), 2.6))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(panel, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99, wspace=0.02)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def sections(docstring: str) -> dict[str, str]:
    """Returns the parts of a docstring by their headings; what stands before them by ""."""
    parts = re.split(r"^(Args|Returns|Raises|Example):\n", docstring + "\n", flags=re.MULTILINE)
    named = dict(zip(parts[1::2], map(textwrap.dedent, parts[2::2]), strict=True))
    return {"": parts[0].strip("\n"), **named}


def entries(text: str) -> list[tuple[str, str]]:
    """Returns names and descriptions, each on one line, of a section such as Args."""
    found = re.findall(r"^(\w+): (.*(?:\n +.*)*)", text, re.MULTILINE)
    return [(name, " ".join(description.split())) for name, description in found]


def markdown(text: str) -> str:
    """Returns a docstring's text with its indented blocks fenced and its signs as they are."""
    blocks = re.split(r"\n{2,}", text.strip("\n"))
    out: list[str] = []
    code: list[str] = []
    for block in [*blocks, ""]:
        if block.startswith("    "):
            code.append(block)
            continue
        if code:
            out.append(f"```text\n{textwrap.dedent('\n\n'.join(code))}\n```")
            code = []
        if block:
            out.append(_paragraph(block))
    return "\n\n".join(out)


def _paragraph(block: str) -> str:
    item = re.match(r"\d+\. |- ", block)
    source = re.match(r"(Sources?):\s", block)
    if source:
        return f"**{source[1]}:** {inline(block[source.end() :])}"
    lines = []
    for line in inline(block).split("\n"):
        if item and re.match(r"\d+\. |- ", line):
            lines.append(line)
        else:
            # What begins a list or a heading in Markdown is a sign of the text here.
            line = re.sub(r"^([-+*#>](?=\s)|\d+(?=[.)]\s))", _escaped, line.strip())
            lines.append(f"{' ' * len(item[0])}{line}" if item else line)
    return "\n".join(lines)


def _escaped(found: re.Match) -> str:
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def inline(text: str) -> str:
    """Returns text whose signs mean nothing in Markdown; `code` and *emphasis* stay."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        part = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", parts[i])
        # One that is part of *emphasis*, or stands alone, means what it should.
        part = re.sub(
            r"(?<!\w)\*\w[\w']*\*(?!\w)|\s\*+\s|(\*)",
            lambda found: r"\*" if found[1] else found[0],
            part,
        )
        parts[i] = re.sub(r"<(?=[A-Za-z/!?])|(?<=\])\(", r"\\\g<0>", part)
    return "".join(parts)


def kind(annotation: object) -> str:
    """Returns an argument's type as text: arrays by dtype and shape."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return ""
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    names: list[str] = []
    for member in typing.get_args(annotation) if is_union else (annotation,):
        if hasattr(member, "dim_str"):
            dtype = member.__name__.partition("[")[0].lower()
            name = f"{dtype} [{', '.join(member.dim_str.split())}]" if member.dim_str else dtype
        elif typing.get_origin(member) is typing.Literal:
            name = " or ".join(repr(value) for value in typing.get_args(member))
        elif member is NoneType:
            name = "None"
        elif typing.get_origin(member) is tuple:
            name = "tuple"
        else:
            name = getattr(member, "__name__", None) or str(member)
        names.append(name)
    names.sort(key=lambda name: name == "None")
    return " or ".join(dict.fromkeys(names))


def claims(record: Mechanism) -> dict[str, str]:
    """Returns what the record says of a mechanism, by headings."""
    places = {
        "code": inspect.getmodule(record.function).__name__.replace(".", "/"),
        "oracle": f"tests/oracles/{record.slug}",
        "tests": f"tests/attention/{record.family}/test_{record.slug}",
    }
    links = ", ".join(f"[{name}](../../{place}.py)" for name, place in places.items())
    claims = {
        "family": record.family,
        "patterns": ", ".join(p for p in catalogue.PATTERNS if p in record.patterns),
        "time": record.time,
        "memory": record.memory,
        "kernel": f"`{record.kernel}`" if record.kernel else "none: plain JAX",
        "implementations": ", ".join(f"`{name}`" for name in record.implementations),
        "step form": f"`{record.step.__name__}`" if record.step else "no",
        "weights": f"`params`, made by `{record.init.__name__}`" if record.init else "none",
        "packed documents": "yes" if record.takes_segments else "no",
    }
    if record.one_query:
        claims["queries"] = "one for all tokens, which a layer learns"
    if record.selects_ahead:
        claims["choice of keys"] = "may depend on later tokens, as published"
    return claims | {"files": links}


def page(record: Mechanism) -> str:
    """Returns the text of a mechanism's page."""
    parts = sections(inspect.getdoc(record.function))
    body = parts[""].partition("\n")[2]
    out = [
        f"# {record.slug}",
        inline(record.summary),
        f"*{inline(record.title)}* ({record.year})",
        _figure(record),
        markdown(body),
        _table(claims(record)),
        "## Call",
        _python(signature(record.function)),
        _arguments(record.function, parts.get("Args", "")),
        f"**Returns:** {inline(' '.join(parts.get('Returns', '').split()))}",
        "**Raises:**",
        "\n".join(f"- `{n}`: {inline(text)}" for n, text in entries(parts.get("Raises", ""))),
        "## Example",
        _python(example(record)),
    ]
    further = [member for member in record.exports.values() if member is not record.function]
    if further:
        out.append("## Further functions and types")
    for member in further:
        summary = (inspect.getdoc(member) or "").partition("\n")[0]
        out += [f"`{member.__name__}`: {inline(summary)}", _python(signature(member))]
    out.append(f"[All mechanisms]({INDEX})")
    return "\n\n".join(part for part in out if part) + "\n"


def _figure(record: Mechanism) -> str:
    if not has_figure(record):
        return ""
    shown = PICTURES.get(record.slug, Picture())
    keywords = [f"{name}={value!r}" for name, value in picture_options(record).items()]
    called = f", called with `{', '.join(keywords)}`" if keywords else ""
    heads = f"; {shown.heads} heads" if shown.heads > 1 else ""
    return (
        f"![weights of {record.slug}]({record.slug}.png)\n\n"
        f"The weights that {TOKENS} tokens (downwards) give to the values of each (to the right)"
        f"{called}{heads}. Blue is above 0, red below, and depth the square root."
    )


def _arguments(function: Callable, text: str) -> str:
    parameters = inspect.signature(function).parameters
    lines = []
    for name, description in entries(text):
        kinds = kind(parameters[name].annotation) if name in parameters else ""
        lines.append(f"- `{name}`{f' ({inline(kinds)})' if kinds else ''}: {inline(description)}")
    return "\n".join(lines)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {n} | {text} |" for n, text in rows.items())])


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def index() -> str:
    """Returns the text of the index of all pages."""
    out = [
        "# Mechanisms",
        "A page for each mechanism of the catalogue, written by `make pages` from its record and "
        "docstring.\nFigures show what weights the mechanisms give to tokens that come in runs of "
        "alike ones.",
    ]
    records = catalogue.mechanisms().values()
    for family in catalogue.FAMILIES:
        own = [record for record in records if record.family == family]
        if own:
            package = importlib.import_module(f"attention.{family}")
            out += [f"## {family}", inline((package.__doc__ or "").partition("\n")[0])]
            out.append("\n".join(f"- [{r.slug}]({r.slug}.md): {inline(r.summary)}" for r in own))
    return "\n\n".join(part for part in out if part) + "\n"


def pages() -> dict[str, str]:
    """Returns the text of every file of docs/mechanisms that is text, by name."""
    texts = {f"{record.slug}.md": page(record) for record in catalogue.mechanisms().values()}
    return {INDEX: index(), **texts}


def out_of_date() -> list[str]:
    """Returns the names of files that are not what the catalogue says, are missing, or too many."""
    texts = pages()
    figures = {f"{r.slug}.png" for r in catalogue.mechanisms().values() if has_figure(r)}
    there = {path.name for path in PAGES.glob("*")}
    changed = {n for n in texts if n in there and (PAGES / n).read_text() != texts[n]}
    return sorted(changed | there ^ (figures | set(texts)))


def write(figures: bool = False) -> None:
    """Writes all pages and the figures that are missing, or all; removes what has no record."""
    PAGES.mkdir(exist_ok=True)
    texts = pages()
    for name, text in texts.items():
        (PAGES / name).write_text(text)
    shown = {f"{r.slug}.png": r for r in catalogue.mechanisms().values() if has_figure(r)}
    for name, record in shown.items():
        if figures or not (PAGES / name).exists():
            try:
                draw(record, PAGES / name)
            except Exception as error:
                error.add_note(f"{record.slug}: give options in PICTURES, or why not to draw it")
                raise
    for path in PAGES.glob("*"):
        if path.name not in texts and path.name not in shown:
            path.unlink()


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(", ".join(out_of_date()) or 0)
    write(figures="--figures" in sys.argv)
