"""Writes the generated parts of README.md: the table of mechanisms, from the catalogue."""

import re
import sys
from pathlib import Path

from attention import catalogue

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- mechanisms -->", "<!-- /mechanisms -->")


def with_tables(text: str) -> str:
    """The README's text with its generated parts made anew."""
    pattern = re.compile(f"(?<={MARKS[0]}\n).*?(?={MARKS[1]})", re.DOTALL)
    new, count = pattern.subn(lambda _: catalogue.markdown_table() + "\n", text)
    if count != 1:
        raise SystemExit(f"error: README.md must hold {MARKS[0]} and {MARKS[1]} once")
    return new


if __name__ == "__main__":
    new = with_tables(README.read_text())
    if "--check" in sys.argv:
        sys.exit(new != README.read_text())
    README.write_text(new)
