"""The guard refuses what is not finite or far beyond the usual, and nothing else; its state is all it knows."""

import json
import math

import pytest

from mmvit.train.safety.guard import MIN_STEPS, WINDOW, Guard


def after_usual_steps(factor: float | None = 20.0, num_steps: int = MIN_STEPS) -> Guard:
    guard = Guard(factor)
    for _ in range(num_steps):
        assert guard.refuse(2.0, 0.5) is None
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float):
    assert "the loss is" in (Guard(None).refuse(bad, 1.0) or "")
    assert "the gradient norm is" in (Guard(None).refuse(1.0, bad) or "")


def test_spikes_are_refused_by_the_median_of_what_was_accepted():
    guard = after_usual_steps()
    assert guard.refuse(39.0, 9.9) is None
    assert guard.refuse(41.0, 0.5) == "the loss is 41, usually 2"
    assert guard.refuse(39.1, 10.1) == "the gradient norm is 10.1, usually 0.5"
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    assert guard.refuse(2.0, 0.5) is None
    assert (guard.skipped, guard.in_a_row) == (2, 0)


def test_nothing_is_a_spike_before_the_usual_is_known_or_where_nobody_asks():
    assert after_usual_steps(num_steps=MIN_STEPS - 1).refuse(1e9, 1e9) is None
    assert after_usual_steps(factor=None).refuse(1e9, 1e9) is None


def test_a_gradient_that_grows_while_the_loss_does_not_is_no_spike():
    assert after_usual_steps().refuse(1.9, 1e3) is None


def test_usual_follows_the_last_steps():
    guard = after_usual_steps()
    for _ in range(WINDOW):
        assert guard.refuse(30.0, 9.0) is None
    assert guard.refuse(500.0, 100.0) is None
    guard.forget()
    assert guard.refuse(1e9, 1e9) is None


def test_a_restored_guard_decides_equally():
    guard = after_usual_steps()
    guard.refuse(math.nan, 1.0)
    again = Guard(20.0)
    again.restore(json.loads(json.dumps(guard.state())))
    for figures in ((41.0, 0.5), (2.0, 0.5), (3.0, 11.0)):
        assert again.refuse(*figures) == guard.refuse(*figures)
    assert again.state() == guard.state()
