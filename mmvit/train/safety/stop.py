"""Stopping on request: finish the step, save, exit."""

import contextlib
import os
import signal
import threading
from types import FrameType

from data_tools.core.errors import MmvitError
from data_tools.core.program import STOP_SIGNALS, leave_closed_terminal


class Stopped(MmvitError):  # noqa: N818 - it reports a state, not an error
    """A signal requested the run to stop, and its state is saved."""

    exit_code = 143

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step} with the state saved", hint="run the same command again to resume")


class StopFlag:
    """Records SIGTERM, SIGINT, SIGUSR1 and SIGHUP within a `with` block as a stop request.

    A second signal has no further effect. SIGHUP stays ignored where it was ignored before, as under nohup. Only the
    main thread receives signals: in another one the block changes nothing. The previous handlers are restored after
    it. One or several ranks may receive the signals: `gather_errors` passes the request to all, and all stop after the
    same step.

    Under `accelerate launch` a SIGTERM or SIGINT to the launcher reaches all ranks; it kills them after 30 s, in which
    a step and a save have to complete. The launcher exits with code 1 and a traceback of its own, whatever the exit
    codes of the ranks. SIGUSR1 kills the launcher, unless TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 is
    set; otherwise send it to the ranks.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopFlag":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
            self.before = {n: signal.signal(n, self._request) for n in STOP_SIGNALS if n not in ignored}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        leave_closed_terminal()
        with contextlib.suppress(OSError):  # it may be closed just now
            os.write(2, b"\nstopping after this step\n")  # no logging: a handler may interrupt the logger itself
