"""Stopping on request: finish the step, save, leave."""

import contextlib
import os
import signal
from types import FrameType

from data_tools.core.errors import MmvitError

# A person, a batch system at the end of the time, and the warning that some of those send ahead.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(MmvitError):  # noqa: N818 - it reports a state, not an error
    """A signal asked the run to stop, and its state is saved."""

    exit_code = 143

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step} with the state saved", hint="run the same command again to go on")


class StopFlag:
    """Turns SIGTERM, SIGINT and SIGUSR1, within a `with` block, into a wish.

    A second signal changes nothing. After the block the signals mean what they meant before. Any process of a run may
    get them, one or all: `gather_errors` carries the wish of one to all, and all leave after the same step.

    Under `accelerate launch` a SIGTERM or SIGINT to the launcher reaches all processes; 30 s later it kills those that
    are left, in which a step and a save have to fit. Whatever the processes leave with, the launcher leaves with 1 and
    a traceback of its own. It dies of SIGUSR1, unless TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 is set;
    without that send it to the processes.
    """

    def __init__(self) -> None:
        self.wished = False

    def __enter__(self) -> "StopFlag":
        self.before = {number: signal.signal(number, self._wish) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step\n")  # no logging: a handler may interrupt the logger itself
