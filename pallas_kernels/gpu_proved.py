"""Which parts of a call the GPU kernels of a family have been seen to compute on a GPU.

A call is made of parts: its dtype, its terms, its gradients. Where no implementation is asked for,
the kernels serve calls all of whose parts are in the family's file, which
`make test-gpu ARGS=--write-proved` writes with what has passed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any


@dataclasses.dataclass(frozen=True)
class Proved:
    """The parts of a family that have passed."""

    package: str
    """Of the family, in which the file is."""
    parts_of: Callable[..., frozenset[str]]
    """Names the parts of a call, given what `supports` of its implementations is given."""

    @property
    def file(self) -> Any:
        """Returns the file: a list of names of parts."""
        return resources.files(self.package).joinpath("gpu_proved.json")

    def parts(self) -> frozenset[str]:
        """Returns the names in the file."""
        return _read(self.file)

    def write(self, parts: Iterable[str]) -> None:
        """Writes the file anew."""
        self.file.write_text(json.dumps(sorted(parts), indent=1) + "\n")
        _read.cache_clear()

    def unproved(self, **call: Any) -> str | None:
        """Returns why the kernels serve a call only if they are asked for by name, or None."""
        missing = self.parts_of(**call) - self.parts()
        return f"not yet seen on a GPU: {', '.join(sorted(missing))}" if missing else None


@functools.cache
def _read(file: Any) -> frozenset[str]:
    return frozenset(json.loads(file.read_text()))
