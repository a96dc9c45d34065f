"""Every benchmark starts, and runs to its end at its smallest size."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "report.py")

# Arguments of each script, and how many rows its report has.
REPORTS = {
    "data start": ("data.py start --scale 0.002 --rounds 1", 1),
    "loss": ("loss.py --pairs 512 --width 16 --rounds 1", 3),
    "data": ("data.py --scale 0.002 --rounds 1", 8),
    "recipes": ("recipes.py quickstart sigmoid --steps 2", 2),
    "train_step": ("train_step.py --batch 4 --rounds 1", None),
    "train_step bf16": ('train_step.py small --batch 4 --rounds 1 --sides "mmvit bf16 compiled"', 2),
    "vision digits": ("vision.py digits --steps 2", 4),
    "vision emoji": ("vision.py emoji --steps 2", 5),
    "vision larger": ("vision.py larger --steps 10", 3),
    "vision positions": ("vision.py positions --steps 2", 8),
    "vision teacher": ("vision.py teacher --steps 2", 3),
}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of benchmarks/ to its end, with nothing on its standard input."""
    command = [sys.executable, str(FOLDER / arguments[0]), *arguments[1:]]
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, check=False, timeout=900, **pipes)


def check_report(command: str, rows: int | None, out: Path) -> None:
    """Run a script; it prints something for each row and writes a report that says where it was measured."""
    done = run(*shlex.split(command), "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"date", "machine", "threads", "versions"} <= set(report)
    if rows is not None:
        assert len(report.get("rows", report.get("ratio_seconds"))) == rows
    assert len(done.stdout.splitlines()) >= (rows or 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_finds_what_it_imports(monkeypatch: pytest.MonkeyPatch, script: str):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # data.py sets it
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.removesuffix('.py')}", FOLDER / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.mark.parametrize(
    "side", ["mmvit fp32", *(pytest.param(side, marks=pytest.mark.slow) for side in ("mmvit bf16", "open_clip fp32"))]
)
def test_a_side_of_the_training_step_takes_its_steps(side: str):
    done = run("train_step.py", "--worker", "small", side, "4")
    assert done.returncode == 0, done.stderr
    losses, peak_mib = json.loads(done.stdout)
    assert len(losses) == 3
    assert losses[0] > losses[-1]  # it learns the one batch
    assert peak_mib > 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "rows"), REPORTS.values(), ids=REPORTS.keys())
def test_the_whole_script_writes_its_report(tmp_path: Path, command: str, rows: int | None):
    check_report(command, rows, tmp_path / "report.json")


@pytest.mark.slow
def test_a_side_that_fails_ends_the_benchmark():
    done = run("train_step.py", "small", "--batch", "-1", "--rounds", "1")
    assert done.returncode == 1
    assert "the side ended with exit code" in done.stderr
