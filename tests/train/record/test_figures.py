"""Figures of the log."""

import sys
from pathlib import Path

import pytest
import torch

from mmvit.train.record.figures import Throughput, parameter_norm, peak_memory


def test_speed_counts_work_waiting_and_no_pauses(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr("mmvit.train.record.figures.time.perf_counter", clock)
    throughput = Throughput()

    for _ in range(4):
        clock.now += 0.5  # s
        throughput.wait(0.5)
        clock.now += 1.5
        throughput.count(16, flops=3e12)
        with throughput.paused():
            clock.now += 50
    numbers = throughput.numbers(peak_flops=6e12)
    assert numbers == pytest.approx({"samples_per_s": 8.0, "data_wait": 0.25, "tflops": 1.5, "mfu": 0.25})
    clock.now += 1
    assert throughput.numbers(peak_flops=6e12) == {"samples_per_s": 0.0, "data_wait": 0.0}


def test_a_reading_in_a_pause_is_of_what_came_before(monkeypatch: pytest.MonkeyPatch):
    """As the loop reads it: after an evaluation, before saving."""
    clock = Clock()
    monkeypatch.setattr("mmvit.train.record.figures.time.perf_counter", clock)
    throughput = Throughput()
    for _ in range(3):
        clock.now += 2
        throughput.count(16)
        with throughput.paused():
            clock.now += 50
            assert throughput.numbers()["samples_per_s"] == 8
            clock.now += 50


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_the_system_says():
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))  # KiB
    assert peak_memory(torch.device("cpu")) == pytest.approx(peak / 1024, rel=0.05)


def test_parameter_norm_is_that_of_all_parameters_together():
    model = torch.nn.Linear(3, 2)
    everything = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert parameter_norm(model) == pytest.approx(everything.norm().item(), rel=1e-6)
