"""Stopped by signals at random moments a run ends with the same bytes; `python tests/faults/stops.py 100`."""

from pathlib import Path

import pytest
from stops import stop_often


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_stopped_at_random_moments_loses_nothing(tiny_config: Path, tmp_path: Path, num_processes: int):
    met, _ = stop_often(tiny_config, tmp_path, num_stops=3, num_steps=60, num_processes=num_processes, seed=1)
    assert met["between steps"] >= 1
