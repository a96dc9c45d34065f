"""A run that is stopped, which tests of each kind of run go on from."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mmvit.config import RunConfig
from mmvit.data.batches import Batch
from mmvit.train.contract import StepResult
from mmvit.train.loop import run_to_end
from mmvit.train.run import Run
from mmvit.train.safety.stop import Stopped


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, int], int]:
    """Run until a signal comes in a step, from 0; returns how many steps were saved."""

    def run(config: RunConfig, step: int) -> int:
        take_step = Run.step

        def step_and_signal(self: Run, number: int, parts: Sequence[Batch]) -> StepResult:
            if number == step:
                signal.raise_signal(signal.SIGTERM)
            return take_step(self, number, parts)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", step_and_signal)
            with pytest.raises(Stopped):
                run_to_end(config)
        return max(int(path.name.removeprefix("step-")) for path in (Path(config.out) / "checkpoints").iterdir())

    return run
