"""Killed at ten random moments a run of two processes ends with the same bytes; `python tests/faults/kills.py 200`."""

from pathlib import Path

import pytest
from kills import kill_often


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bytes(tiny_config: Path, tmp_path: Path):
    met = kill_often(tiny_config, tmp_path, num_kills=10, num_steps=120, seed=1)
    assert met["checkpoint readable"] >= 5
