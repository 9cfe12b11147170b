"""Errors that a command shows as one message, and the exit codes it ends with."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

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
    """Runs a command's `main`; an ExperimentError becomes its message on stderr and an exit code."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("experiments").setLevel(logging.INFO)
    try:
        main()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)
