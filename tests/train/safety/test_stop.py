"""Signals become a stop request, once or repeatedly, and their handlers are restored afterwards."""

import os
import signal

import pytest

from mmvit.train.safety.stop import StopFlag, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_is_a_stop_request_and_a_second_one_has_no_effect(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
):
    before = signal.getsignal(number)
    with StopFlag() as flag:
        assert not flag.requested
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert flag.requested
        os.kill(os.getpid(), signal.SIGTERM)  # another one
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_stopped_has_its_exit_code():
    assert Stopped(7).exit_code == 143
    assert "step 7" in str(Stopped(7))
