"""Errors that a command shows as one message, and the exit codes it ends with."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import absl.logging

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
"""Environment in which libtpu, installed for its compiler, does not complain of missing TPUs."""

NO_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
"""Environment in which JAX's CUDA plugin, likewise, does not complain of missing libraries."""

USAGE = 2
FAILURE = 1


class ExperimentError(Exception):
    """Something that the user can put right: shown as one message, with no traceback.

    Args:
      message: what is wrong and what to do about it.
      exit_code: the exit code of the command; 2 for a wrong command line, else 1.
    """

    def __init__(self, message: str, exit_code: int = FAILURE):
        super().__init__(message)
        self.exit_code = exit_code


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`; an ExperimentError becomes one message and an exit code."""
    quiet_libraries()
    try:
        main()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has had enough. What Python still holds of it
        # must not fail when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def quiet_libraries() -> None:
    """Leaves the terminal to the commands' own messages.

    What fails while a checkpoint is written in the background is raised where it is waited for.
    Orbax logs it besides, asyncio does for each array, and tensorstore prints a traceback of its
    own thread, and one for every array it still reads or writes for a loop that has ended. JAX
    looks for TPUs wherever libtpu is installed, and for GPUs wherever its CUDA plugin is.
    """
    missing = {}
    if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        missing |= NO_TPU
    if not Path("/dev/nvidiactl").exists():
        missing |= NO_GPU
    for name, value in missing.items():
        os.environ.setdefault(name, value)
    log = logging.getLogger("experiments")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def main_thread_only(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, error, trace)

    def not_of_ended_loops(unraisable: UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            sys.__unraisablehook__(unraisable)

    sys.excepthook = main_thread_only
    sys.unraisablehook = not_of_ended_loops
