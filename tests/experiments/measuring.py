"""What is measured in a process of its own, see test_benchmark_apart.py, which imports little."""

import functools
import os
import time

from experiments.benchmark import apart
from experiments.errors import ExperimentError

BROKEN = []
"""Not empty where nothing works any more."""


def fill(config, report):
    """Has a row for each of the actions, and writes which were begun."""
    path, actions = config
    for name in actions:
        found = report.measure(name, functools.partial(act, path, name))
        report.add({"action": name, "seconds": str(found.get("seconds", "-"))}, {name: found})
        if name == "fails" and report.whole:
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
    with apart.alone():
        began = time.monotonic()
        if name == "dies":
            os._exit(7)
        while name == "hangs":
            time.sleep(1)
        time.sleep(0.05)
        return {"seconds": len(name), "began": began, "ended": time.monotonic()}


def works():
    return not BROKEN


def refuse(config, report):
    raise ExperimentError(config, 2)


def die(config, report):
    os._exit(config)
