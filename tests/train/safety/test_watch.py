"""The verdicts of the watch about reports of ranks; real ones are lost in tests/faults/ranks."""

import os
import subprocess
import sys
import threading

import pytest

from data_tools.core.errors import ResourceError
from mmvit.train.safety.verdict import BROKEN_S, LOST_S, Seen, Status, judge
from mmvit.train.safety.watch import Watch

NOW, TIMEOUT_S = 1000.0, 30.0


def seen(*statuses: Status, silent_s: dict[int, float] | None = None) -> dict[int, Seen]:
    silent = silent_s or {}
    return {rank: Seen(status, NOW - silent.get(rank, 0.5)) for rank, status in enumerate(statuses)}


def verdict(*statuses: Status, silent_s: dict[int, float] | None = None) -> str:
    error = judge(seen(*statuses, silent_s=silent_s), NOW, TIMEOUT_S)
    assert error is None or isinstance(error, ResourceError)
    return str(error or "")


def status(step: int, phase: str = "step", **values: object) -> Status:
    return Status(beat=5, step=step, phase=phase, key=f"key-{step}", **values)


def test_ranks_at_work_are_left_alone():
    assert verdict(status(4, idle_s=29.0), status(5, "read", waiting=True), silent_s={1: LOST_S - 1}) == ""


def test_silent_rank_is_named_with_the_step_that_the_others_came_to():
    message = verdict(status(9, waiting=True), status(7), silent_s={1: 11.0})
    assert message.startswith("rank 1 did not respond for 11 s")
    assert "where: rank 1, step 9, last reported step 7, phase step, first key 'key-7'" in message
    assert "the checkpoints are complete" in message


def test_broken_connection_shortens_the_limit_of_silence():
    silent = {1: (BROKEN_S + LOST_S) / 2}
    assert verdict(status(3), status(3), silent_s=silent) == ""
    assert verdict(status(3, broken="Connection closed"), status(3), silent_s=silent).startswith(
        "rank 1 did not respond"
    )


def test_the_rank_with_an_error_is_named_and_not_its_echo():
    message = verdict(
        status(3, broken="Connection closed by peer"), status(3, left="MemoryError: 1 TiB"), silent_s={1: 4.0}
    )
    assert message.startswith("rank 1 ended with MemoryError: 1 TiB")
    assert "rank 1, step 3, phase step, first key 'key-3'" in message


def test_error_that_all_leave_with_is_no_verdict_for_a_while():
    assert verdict(status(3, left="DataError: x"), status(3, left="DataError: x"), silent_s={1: 5.0}) == ""


def test_rank_that_ended_its_run_is_lost_only_for_those_that_continue():
    ended = status(3, left="")
    assert verdict(status(3), ended, silent_s={1: 100.0}) == ""
    assert "exited before" in verdict(status(4, broken="Connection closed"), ended, silent_s={1: 4.0})
    assert verdict(status(4, idle_s=31.0), ended, silent_s={1: 100.0}).startswith(
        "rank 1 exited before the other ranks"
    )


@pytest.mark.parametrize(
    ("first", "second", "guilty"),
    [
        (status(5, idle_s=31.0, waiting=True), status(4, idle_s=31.0), 1),  # behind
        (status(5, idle_s=35.0, waiting=True), status(5, idle_s=31.0), 1),  # at the same step, and the other one waits
    ],
)
def test_a_stall_is_the_fault_of_the_rank_that_does_not_wait(first: Status, second: Status, guilty: int):
    message = verdict(first, second)
    assert message.startswith(f"rank {guilty} made no progress; the run was stalled for 3")
    assert f"rank {guilty}, step" in message


def test_patient_work_of_one_is_no_standstill_of_any_but_a_death_is_noticed():
    long = status(5, idle_s=9999.0, patient="evaluating")
    assert verdict(long, status(5, idle_s=9999.0, waiting=True)) == ""
    assert verdict(long, status(5, waiting=True), silent_s={0: 11.0}).startswith("rank 0 did not respond")
    assert "phase evaluating" in verdict(long, status(5), silent_s={0: 11.0})


def test_single_rank_has_no_thread_and_its_errors_pass():
    before = threading.active_count()
    with Watch(0.0) as watch:
        watch.at(1, "read", "x")
        with watch.patient("indexing"):
            assert threading.active_count() == before
        with pytest.raises(RuntimeError, match="gloo"), watch.explaining():
            raise RuntimeError("gloo: connection closed by peer")


def test_rank_that_waits_for_others_in_vain_ends():
    code = "import time; from mmvit.train.safety.watch import joining\nwith joining(0.2): time.sleep(60)"
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50, env=environment
    )
    assert done.returncode == 5
    assert "did not connect within 0 s" in done.stderr
    assert "rank 1 of 2" in done.stderr
