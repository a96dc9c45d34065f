"""Signals become a stop request, once or repeatedly, and their handlers are restored afterwards."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_tools.core.program import STOP_SIGNALS
from mmvit.train.safety.stop import StopFlag, Stopped


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as it is outside of nohup, which the tests themselves may run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_is_a_stop_request_and_a_second_one_has_no_effect(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], hangup: None
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


def test_closed_terminal_is_a_stop_request_except_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not flag.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert flag.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_receives_no_signals():
    def handlers() -> list[object]:
        with StopFlag():
            return [signal.getsignal(number) for number in STOP_SIGNALS]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result() == [signal.getsignal(number) for number in STOP_SIGNALS]


CLOSED_TERMINAL = """
import os, signal, sys
from mmvit.train.safety.stop import StopFlag
sys.stdin.readline()
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
with StopFlag() as flag:
    os.kill(os.getpid(), 1)
    for _ in range(2):
        print("a line of the log", file=sys.stderr, flush=True)
    sys.exit(143 if flag.requested else 1)
"""


def test_messages_to_a_closed_terminal_are_no_errors():
    main, terminal = os.openpty()
    command = [sys.executable, "-c", CLOSED_TERMINAL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        os.close(main)
        process.communicate(b"\n")
    assert process.returncode == 143
