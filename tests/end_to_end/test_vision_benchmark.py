"""The commands that print the tables of the classifiers run to their end, in a few steps each."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vision.py"


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "steps", "rows"), [("positions", 2, 8), ("larger", 10, 3), ("teacher", 2, 3)])
def test_it_prints_a_row_for_each_run(experiment: str, steps: int, rows: int):
    if not SCRIPT.exists():
        pytest.skip("benchmarks/ is in a checkout alone")
    command = [sys.executable, str(SCRIPT), experiment, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0  ") == rows
