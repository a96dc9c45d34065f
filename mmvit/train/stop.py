"""Stopping on request: finish the step, save, leave."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class Stopped(Exception):  # noqa: N818 - it reports a state, not an error
    """A signal asked the run to stop and its state is saved."""

    exit_code = 143

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step} with the state saved; run the same command again to go on")


class StopFlag:
    """Turns SIGTERM and SIGINT into a wish that all processes agree on; a second signal changes nothing."""

    def __init__(self) -> None:
        self.wished = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._wish)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = True

    def agreed(self, accelerator: Accelerator) -> bool:
        """Tell whether any process was asked to stop; every process gets the same answer."""
        if accelerator.num_processes == 1:
            return self.wished
        wishes = torch.tensor(int(self.wished), device=accelerator.device)
        return bool(accelerator.reduce(wishes, "sum").item())
