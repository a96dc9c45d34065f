"""How a command-line program of the project ends: a short message for what a user can fix, and the exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_tools.core.errors import MmvitError, ResourceError, UsageError

if TYPE_CHECKING:
    import typer

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.EIO)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def run_program(app: typer.Typer, name: str, argv: Sequence[str] | None = None) -> None:
    """Run a typer app and exit: 0 done, otherwise the code of the error, whose message goes to standard error.

    `--debug` anywhere among the arguments shows the traceback of an error that is otherwise told in words.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments, prog_name=name)
    except KeyboardInterrupt:  # while the program starts; later typer ends it the same way
        sys.exit(130)
    except (MmvitError, OSError, MemoryError) as error:
        told = told_error(error)
        if told is None or debug:
            raise
        if told.exit_code == 128 + signal.SIGTERM:  # it is ending as it was asked to, and a second signal is in vain
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        print(f"{name}: {told}", file=sys.stderr)
        sys.exit(told.exit_code)


def print_version(wanted: bool) -> None:
    """Print the version of the installed package and exit, as the callback of an option."""
    if wanted:
        from importlib.metadata import version

        print(f"mmvit {version('mmvit')}")
        sys.exit(0)


def told_error(error: Exception) -> MmvitError | None:
    """Return the error in words a user can use, or None where it is none that a user can fix."""
    if isinstance(error, MmvitError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("there is not enough memory", hint="use a smaller size, or a machine with more memory")
    if isinstance(error, OSError) and error.errno in (*_FULL, *_NOT_ALLOWED):
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if error.errno in _FULL:
            return ResourceError(f"{error.strerror}", where=place, hint="free some space or choose another folder")
        return UsageError(f"{error.strerror}", where=place, hint="choose another folder, or its permissions")
    return None
