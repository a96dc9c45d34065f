"""Stopping on request: finish the step, save, leave."""

import contextlib
import os
import signal
from types import FrameType

from data_tools.errors import MmvitError


class Stopped(MmvitError):  # noqa: N818 - it reports a state, not an error
    """A signal asked the run to stop, and its state is saved."""

    exit_code = 143

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step} with the state saved", mend="run the same command again to go on")


class StopFlag:
    """Turns SIGTERM and SIGINT, within a `with` block, into a wish.

    A second signal changes nothing. After the block the signals mean what they meant before.
    """

    def __init__(self) -> None:
        self.wished = False

    def __enter__(self) -> "StopFlag":
        self.before = {number: signal.signal(number, self._wish) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step\n")  # no logging: a handler may interrupt the logger itself
