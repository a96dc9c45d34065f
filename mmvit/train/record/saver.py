"""Asynchronous saving of checkpoints."""

import copy
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mmvit.checkpoint import save_checkpoint

Groups = Mapping[str, Mapping[str, Tensor]]


class Saver:
    """Writes checkpoints in a thread, from copies in main memory; training waits only for the copy.

    One checkpoint is written at a time. The copies take as much memory as the saved tensors, pinned for tensors on a
    GPU, and are reused by the next save. Used by the main rank only.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int | None = None):
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Groups, state: Mapping[str, Any]) -> None:
        """Copy the state and start writing it; the tensors may change as soon as this returns.

        Raises:
            ResourceError: the previous save failed; this one is not started.
        """
        self.wait()
        self._copies = _copied(tensors, self._copies)
        self._thread = Thread(target=self._write, args=(step, copy.deepcopy(dict(state))), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, and raise the error of the last save, once, if it failed."""
        self.join()
        if self._error:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the save in progress without raising its error."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def failed(self) -> bool:
        """Return, without waiting, whether the last save failed, so that `wait` would raise its error."""
        return self._error is not None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            save_checkpoint(self.run, step, self._copies, state, self.keep_last, self.keep_every)
        except BaseException as error:  # raised by `wait`
            self._error = error


def _copied(tensors: Groups, buffers: Groups) -> dict[str, dict[str, Tensor]]:
    """Copy the tensors into main memory, reusing the buffers of equal shape and dtype."""
    copies: dict[str, dict[str, Tensor]] = {}
    for name, group in tensors.items():
        copies[name] = {}
        for key, tensor in group.items():
            buffer = buffers.get(name, {}).get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name][key] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies
