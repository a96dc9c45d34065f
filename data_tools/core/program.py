"""What the command-line programs share: streams that print any name, short messages and exit codes for errors."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import termios
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_tools.core.errors import MmvitError, ResourceError, UsageError
from data_tools.core.text import text_fault

if TYPE_CHECKING:
    import typer

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.EIO)
# From a user, from a batch system at its time limit, the advance warning that some batch systems send, and from a
# terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def run_program(app: typer.Typer, name: str, argv: Sequence[str] | None = None) -> None:
    """Run a typer app and exit: 0 on success, otherwise the error's exit code, with its message on standard error.

    `--debug` anywhere among the arguments shows the traceback instead of the short message. Without arguments the help
    is printed; `help VERB` is that of a verb.
    """
    from data_tools.core.verbs import ParserError, parser_error

    escape_unprintable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    try:
        try:
            sys.exit(app(args=arguments, prog_name=name, standalone_mode=False) or 0)
        except ParserError as error:
            raise parser_error(error, name, arguments) from error
    except KeyboardInterrupt:  # while the program starts; later typer exits the same way
        sys.exit(130)
    except UnicodeEncodeError:
        bad = [argument for argument in arguments if text_fault(argument)]
        if not bad or debug:
            raise
        print(f"{name}: {UsageError(f'the argument {bad[0][:60]!a} is not valid UTF-8')}", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    except (MmvitError, OSError, MemoryError) as error:
        user_error = as_user_error(error)
        if user_error is None or debug:
            raise
        if user_error.exit_code == 128 + signal.SIGTERM:  # it is stopping on request; ignore further signals
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        leave_closed_terminal()
        print(f"{name}: {user_error}", file=sys.stderr)
        sys.exit(user_error.exit_code)


def escape_unprintable() -> None:
    """Make standard output and error print characters that their encoding lacks as backslash escapes.

    A file name may hold bytes that are not UTF-8, and a stream may be ASCII: neither may end a finished job.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave_closed_terminal() -> None:
    """Send what is printed from now on nowhere, if the terminal it went to was closed: writing there is an error."""
    for fd in (1, 2):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)


def print_version(wanted: bool) -> None:
    """Print the version of the installed package and exit, as the callback of an option."""
    if wanted:
        from importlib.metadata import version

        print(f"mmvit {version('mmvit')}")
        sys.exit(0)


def as_user_error(error: Exception) -> MmvitError | None:
    """Return the error as one with a message for users, or None if users cannot fix it."""
    if isinstance(error, MmvitError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", hint="use a smaller size, or a machine with more memory")
    if isinstance(error, OSError) and error.errno in (*_FULL, *_NOT_ALLOWED):
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if error.errno in _FULL:
            return ResourceError(f"{error.strerror}", where=place, hint="free some space or choose another folder")
        return UsageError(f"{error.strerror}", where=place, hint="choose another folder, or change its permissions")
    return None
