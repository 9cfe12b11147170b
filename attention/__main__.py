"""`python -m attention` prints the catalogue, `python -m attention NAME` one mechanism of it."""

import argparse
import doctest
import functools
import inspect
import re
import sys

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from attention import catalogue
from attention.catalogue import Mechanism
from pallas_kernels.choose import IMPLEMENTATIONS


def main(arguments: list[str] | None = None) -> int:
    """Prints the catalogue or a mechanism; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attention", description="The catalogue.")
    parser.add_argument("name", nargs="?", help="a mechanism; without it, the table of all")
    name = parser.parse_args(arguments).name
    if name is None:
        print_table()
        return 0
    try:
        record = catalogue.get(name)
    except ValueError as error:
        print(f"python -m attention: {error}", file=sys.stderr)
        return 2
    print(description(record))
    return 0


def print_table() -> None:
    """Prints the table of all mechanisms: drawn on a terminal, tab-separated lines elsewhere."""
    rows = [catalogue.row(record) for record in catalogue.mechanisms().values()]
    if not sys.stdout.isatty():
        for cells in (catalogue.HEADER, *rows):
            print("\t".join(cells))
        return
    table = Table(caption="python -m attention NAME shows all of a mechanism, with an example")
    for name in ("mechanism", "patterns", "time", "memory", "kernel"):
        table.add_column(name, no_wrap=True)
    table.add_column("paper")
    family = None
    for record in catalogue.mechanisms().values():
        if record.family != family:
            family = record.family
            table.add_section()
        table.add_row(
            record.slug,
            "\n".join(_patterns(record)),
            record.time,
            record.memory,
            record.kernel or "-",
            record.citation,
        )
    Console().print(table)


def description(record: Mechanism) -> str:
    """Returns the record, signatures, implementations, documentation and example of a mechanism."""
    docstring, _, _ = inspect.getdoc(record.function).partition("\nExample:")
    fields = {
        "paper": record.citation,
        "family": record.family,
        "patterns": ", ".join(_patterns(record)),
        "time, memory": f"{record.time}, {record.memory}",
        "kernel": record.kernel or "none: plain JAX",
        "weights": f"params, made by {record.init.__name__}" if record.init else "none",
        "step": record.step.__name__ if record.step else "none",
        "page": f"docs/mechanisms/{record.slug}.md",
    }
    support = {name: f"no: {why}" if why else "yes" for name, why in unsupported(record).items()}
    parts = [
        f"{record.slug}\n",
        *(f"  {name:13}{value}" for name, value in fields.items()),
        "\nImplementations\n",
        *(f"  {name:13}{value}" for name, value in support.items()),
        "\nSignatures\n",
        *(_indented(signature(member)) for member in record.exports.values()),
        f"\nDocumentation\n\n{_indented(docstring.strip())}",
        f"\nExample\n\n{_indented(example(record))}",
    ]
    return "\n".join(parts)


def unsupported(record: Mechanism) -> dict[str, str | None]:
    """Returns why an implementation does not serve a plain call, by name; None where it does."""
    if record.has_weights:
        absent = "this mechanism has none"
        return {n: None if n in record.implementations else absent for n in IMPLEMENTATIONS}
    reasons: dict[str, str | None] = {}
    if record.arguments:
        arrays = tuple(record.example_arguments(1, 16).values())
    else:
        tokens = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)
        query = jax.ShapeDtypeStruct((1, 1, 2, 8), jnp.float32) if record.one_query else tokens
        arrays = query, tokens, tokens
    for name in IMPLEMENTATIONS:
        try:
            call = functools.partial(record.function, implementation=name)
            jax.eval_shape(call, *arrays)
            reasons[name] = None
        except NotImplementedError as error:
            reasons[name] = str(error).rpartition("this call: ")[2]
    return reasons


def signature(member: object) -> str:
    """Returns the name and parameters of a function or type, one parameter a line if long."""
    name, parameters = member.__name__, inspect.signature(member).parameters.values()
    # Annotations are in the documentation's terms: shapes fill lines. Names and defaults stay here.
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = re.sub(r"<class '([\w.]+)'>", r"\1", f"{name}{inspect.Signature(plain)}")
    return text if len(text) <= 96 else text.replace("(", "(\n    ", 1).replace(", ", ",\n    ")


def example(record: Mechanism) -> str:
    """Returns the example of the function's docstring as a program."""
    text = inspect.getdoc(record.function).partition("\nExample:")[2]
    steps = doctest.DocTestParser().get_examples(text)
    body = []
    for step in steps:
        source = step.source.rstrip("\n")
        # What a prompt would show, a program must print.
        body.append(f"print({source})  # {' '.join(step.want.split())}" if step.want else source)
    text = "\n".join(body)
    names = [name for name in record.exports if re.search(rf"\b{name}\b", text)]
    modules = {"np": "import numpy as np", "jnp": "import jax.numpy as jnp", "jax": "import jax"}
    lines = [line for name, line in modules.items() if re.search(rf"\b{name}\b", text)][::-1]
    lines.append(f"from attention import {', '.join(names)}")
    body = [line for line in body if line not in lines]
    return "\n".join((*lines, "", *body))


def _patterns(record: Mechanism) -> list[str]:
    return [pattern for pattern in catalogue.PATTERNS if pattern in record.patterns]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
