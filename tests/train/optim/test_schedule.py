"""The schedule's values at named steps, and that no value of an earlier run moves by a bit."""

import itertools
import math

import pytest

from mmvit.config import OptimConfig
from mmvit.train.optim.schedule import schedule_factor


@pytest.mark.parametrize(
    ("decay", "share", "expected"),
    [
        ("cosine", 1.0, {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 0.5, 99: (1 + math.cos(math.pi * 89 / 90)) / 2, 100: 0.0}),
        ("linear", 1.0, {0: 1 / 11, 10: 1.0, 55: 0.5, 99: 1 / 90, 100: 0.0}),
        ("linear", 0.2, {5: 6 / 11, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        ("sqrt", 0.2, {5: 6 / 11, 10: 1.0, 80: 1.0, 85: 0.5, 99: 1 - 0.95**0.5, 100: 0.0}),
        ("sqrt", 1.0, {10: 1.0, 20: 2 / 3, 100: 0.0}),
        ("cosine", 0.0, {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 1.0, 99: 1.0}),
        ("linear", 0.0, {10: 1.0, 99: 1.0}),
        ("sqrt", 0.0, {10: 1.0, 99: 1.0}),
        ("inverse_sqrt", 1.0, {0: 1 / 11, 9: 10 / 11, 10: 1.0, 43: 0.5, 98: 1 / 3, 100: (11 / 101) ** 0.5}),
    ],
)
def test_values_at_named_steps(decay: str, share: float, expected: dict[int, float]):
    config = OptimConfig(warmup_share=0.1, decay=decay, decay_share=share)
    assert {step: schedule_factor(step, 100, config) for step in expected} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_values_of_earlier_runs_keep_every_bit(decay: str):
    """The formula as it stood when runs were first saved."""

    def first(step: int, num_steps: int, config: OptimConfig) -> float:
        warmup = config.warmup_share * num_steps
        decay_start = num_steps * (1 - config.decay_share)
        rise = min(1.0, (step + 1) / (warmup + 1))
        done = max(0.0, (step - max(decay_start, warmup)) / max(1.0, num_steps - max(decay_start, warmup)))
        fall = 1 - done if config.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return rise * fall

    for num_steps, warmup, share in itertools.product((1, 7, 383, 1000), (0.0, 0.05, 1.0), (0.0, 0.3, 1.0)):
        config = OptimConfig(decay=decay, warmup_share=warmup, decay_share=share)
        for step in range(num_steps):
            assert schedule_factor(step, num_steps, config) == first(step, num_steps, config)


@pytest.mark.parametrize("decay", ["cosine", "linear", "sqrt", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_it_rises_once_and_falls_once_and_no_step_is_lost(decay: str, warmup: float, share: float):
    config = OptimConfig(decay=decay, warmup_share=warmup, decay_share=share)
    factors = [schedule_factor(step, 200, config) for step in range(200)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup < 1:
        assert factors[peak] == 1


def test_the_inverse_root_does_not_know_the_end():
    short, long = (OptimConfig(decay="inverse_sqrt", warmup_share=share) for share in (0.1, 0.01))
    assert [schedule_factor(step, 100, short) for step in range(100)] == [
        schedule_factor(step, 1000, long) for step in range(100)
    ]
