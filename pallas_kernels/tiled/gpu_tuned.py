"""How the GPU kernels of tiled attention are configured, where that has been measured.

`python -m experiments.benchmark tiled tune --write` measures it, and writes gpu_tuned.json: for
every device the fastest configurations by kernel, mask, dtype and features. What is not in it has
the configuration that the compiler's reports speak for.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

import jax

from pallas_kernels import gpu
from pallas_kernels.tiled.inputs import Inputs
from pallas_kernels.tiled.schedule import split

KERNELS = ("forward", "backward_queries", "backward_keys")


class Config(NamedTuple):
    """What can be chosen of a kernel."""

    tile: int
    """Columns of a tile, at most: where registers do not suffice there are fewer."""
    persistent: bool
    """Whether blocks do several tiles of rows, one after the other."""
    one_pass: bool = False
    """Of `backward_keys`: whether it makes the gradients of queries, too, where it can. Then blocks
    do several tiles of rows whatever `persistent` says."""


_tried: contextvars.ContextVar[tuple[str, Config] | None] = contextvars.ContextVar(
    "tried", default=None
)


@contextlib.contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Has a kernel configured so where it is traced inside, whatever has been measured.

    Args:
      kernel: one of `KERNELS`.
      config: its configuration.
    """
    token = _tried.set((kernel, config))
    try:
        yield
    finally:
        _tried.reset(token)


def key(kernel: str, x: Inputs) -> str:
    """Returns what configurations are found by."""
    features = gpu.whole(max(x.query.shape[3], x.value.shape[3]))
    return f"{kernel}, {_kind(x)}, {x.query.dtype.name}, {features} features"


def config(kernel: str, x: Inputs) -> Config | None:
    """Returns how a kernel is configured on this machine's GPU, or None if nobody measured it."""
    tried = _tried.get()
    if tried and tried[0] == kernel:
        return tried[1]
    # A program for a GPU that is not there is compiled for none of the table's.
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
    found = table().get(device, {}).get(key(kernel, x))
    return found and Config(*found)


def one_pass(x: Inputs) -> bool:
    """Returns whether the backward is one pass where it can be, as it is if nobody measured it."""
    tried = _tried.get()
    if tried and tried[0] == "backward_queries":
        return False  # a kernel of two passes
    found = config("backward_keys", x)
    return found is None or found.one_pass


def file() -> Any:
    """Returns the file of the table."""
    return resources.files(__package__).joinpath("gpu_tuned.json")


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Returns, by device and `key`, configurations."""
    return json.loads(file().read_text())


def write(device: str, found: Mapping[str, Config]) -> None:
    """Adds configurations, by `key`, to the table, or replaces those of a device."""
    whole = dict(table())
    whole[device] = dict(sorted((whole.get(device, {}) | dict(found)).items()))
    file().write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    table.cache_clear()


def _kind(x: Inputs) -> str:
    if x.mask is None:
        return "full"
    return "lists" if split(x.mask)[0] else "masked"
