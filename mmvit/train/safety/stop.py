"""Stopping on request: finish the step, save, exit."""

import contextlib
import os
import signal
from types import FrameType

from data_tools.core.errors import MmvitError

# From a user, from a batch system at its time limit, and the advance warning that some batch systems send.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(MmvitError):  # noqa: N818 - it reports a state, not an error
    """A signal requested the run to stop, and its state is saved."""

    exit_code = 143

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step} with the state saved", hint="run the same command again to resume")


class StopFlag:
    """Records SIGTERM, SIGINT and SIGUSR1 within a `with` block as a stop request.

    A second signal has no further effect. The previous handlers are restored after the block. One or several ranks may
    receive the signals: `gather_errors` passes the request to all, and all stop after the same step.

    Under `accelerate launch` a SIGTERM or SIGINT to the launcher reaches all ranks; it kills them after 30 s, in which
    a step and a save have to complete. The launcher exits with code 1 and a traceback of its own, whatever the exit
    codes of the ranks. SIGUSR1 kills the launcher, unless TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 is
    set; otherwise send it to the ranks.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopFlag":
        self.before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step\n")  # no logging: a handler may interrupt the logger itself
