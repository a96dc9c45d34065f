"""One run at a time in a Python process: accelerate and torch have one state for all."""

import contextlib
import threading
from collections.abc import Iterator

from data_tools.core.errors import UsageError

_running = threading.Lock()


@contextlib.contextmanager
def alone_in_process() -> Iterator[None]:
    """Raise UsageError if another run is in progress in this process; runs may follow one another."""
    if not _running.acquire(blocking=False):
        raise UsageError(
            "another run is in progress in this process",
            note="nothing was started; the other run continues",
            hint="wait until it ends, or start this one in a process of its own",
        )
    try:
        yield
    finally:
        _running.release()
