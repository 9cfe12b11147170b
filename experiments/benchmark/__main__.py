"""Measures kernels beside their peers: `python -m experiments.benchmark tiled schedule`."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys

import tyro

from experiments.benchmark import linear, tiled
from experiments.benchmark.mechanisms import MechanismsConfig
from experiments.benchmark.table import Report, show, write
from experiments.errors import USAGE, ExperimentError, run_command

FAMILIES = {
    "tiled": ("online-softmax attention over tiles", tiled.REPORTS),
    "linear": ("linear attention and scans", linear.REPORTS),
    "mechanisms": ("growth of every mechanism of the catalogue with the length", MechanismsConfig),
}


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    family = arguments[0] if arguments else None
    if family not in FAMILIES:
        listing = "\n".join(f"  {name}  {what}" for name, (what, _) in FAMILIES.items())
        usage = "usage: python -m experiments.benchmark KERNELS [REPORT] [OPTIONS]"
        usage += f"\nkernels:\n{listing}"
        if family in ("-h", "--help"):
            print(usage)
            return
        problem = "no kernels given" if family is None else f"kernels: {family!r} is unknown"
        raise ExperimentError(f"{problem}\n{usage}", USAGE)
    reports = FAMILIES[family][1]
    # One report needs no name.
    read = tyro.extras.subcommand_cli_from_dict if isinstance(reports, dict) else tyro.cli
    config = read(
        reports,
        prog=f"python -m experiments.benchmark {family}",
        description=__doc__,
        args=arguments[1:],
    )
    command = f"benchmark {' '.join(arguments)}"
    report = Report(functools.partial(write, config.output, command))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        config.fill(report)
    except (KeyboardInterrupt, SystemExit):
        # What was measured before somebody stopped it is not lost.
        if report.rows:
            with contextlib.suppress(ExperimentError):
                show(report, config.output, command)
        raise
    show(report, config.output, command)


if __name__ == "__main__":
    run_command(main)
