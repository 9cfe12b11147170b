"""What is measured in a process of its own, see test_benchmark_apart.py, which imports little."""

import functools
import os
import time

from experiments.errors import ExperimentError

BROKEN = []
"""Not empty where nothing works any more."""


def fill(config, report):
    """Has a row for each of the actions, and writes which were begun."""
    path, actions = config
    for name in actions:
        found = report.measure(name, functools.partial(act, path, name))
        report.add({"action": name, "seconds": str(found.get("seconds", "-"))}, {name: found})
        if name == "fails":
            report.failures.append("it has failed")


def act(path, name):
    """Does what its name says."""
    with path.open("a") as file:
        file.write(f"{name} {os.getpid()}\n")
    if BROKEN:
        raise AssertionError("nothing works")
    if name == "breaks":
        BROKEN.append(name)
    if name in ("breaks", "fails"):
        raise ValueError(name)
    if name == "dies":
        os._exit(7)
    while name == "hangs":
        time.sleep(1)
    return {"seconds": len(name)}


def works():
    return not BROKEN


def refuse(config, report):
    raise ExperimentError(config, 2)


def die(config, report):
    os._exit(config)
