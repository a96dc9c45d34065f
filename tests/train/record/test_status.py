"""The state of a run, from its folder alone."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.core.errors import UsageError
from data_tools.core.ownership import OWNER, owned, owner_of
from mmvit.train.record.status import describe_status, run_status

CONFIG = "train: {steps: 100, batch_size: 8}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    for step in (20, 40):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    lines = [{"step": step, "time_s": step / 2, "loss": 1 / step, "skipped_steps": 1} for step in range(10, 50, 10)]
    lines.insert(2, {"step": 20, "time_s": 10.0, "changed": {"optim.clip_norm": [1, 2]}})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    (folder / "bad_samples.jsonl").write_text('{"cause": "hash"}\n{"cause": "bad-image"}\n{"cause": "hash"}\n')
    return folder


def test_numbers_of_a_run(run: Path):
    os.utime(run / "checkpoints" / "step-00000040", (time.time() - 600, time.time() - 600))
    status = run_status(run)
    assert (status.state, status.step, status.steps, status.loss) == ("stopped", 40, 100, 1 / 40)
    assert (status.steps_per_s, status.samples_per_s, status.left_s) == (2, 16, 30)
    assert status.checkpoint == 40
    assert status.checkpoint_s_ago == pytest.approx(600, abs=30)
    assert (status.bad_samples, status.skipped_steps, status.owner) == ({"hash": 2, "bad-image": 1}, 1, None)
    rows = describe_status(status)
    assert rows["step"] == "40 of 100 (40%)"
    assert rows["time left"] == "30 s, once it is resumed"
    assert rows["last checkpoint"] == "step 40, 10 min ago"
    assert rows["corrupt samples"] == "2 x hash, 1 x bad-image"


def test_owner_is_alive_or_not(run: Path):
    assert owner_of(run) is None
    with owned(run):
        status = run_status(run)
        assert status.state == "running"
        assert status.owner
        assert (status.owner["pid"], status.owner["alive"]) == (os.getpid(), True)
        assert "alive, since" in describe_status(status)["owner"]
        assert describe_status(status)["time left"] == "30 s"
        text = (run / OWNER).read_text()
    assert run_status(run).owner is None
    (run / OWNER).write_text(json.dumps(json.loads(text) | {"birth": "1"}))  # another process of the same number
    assert run_status(run).state == "stopped"
    assert "no longer alive" in describe_status(run_status(run))["owner"]
    (run / OWNER).write_text(json.dumps(json.loads(text) | {"host": "elsewhere"}))
    assert run_status(run).state == "unknown"
    assert "not known whether" in describe_status(run_status(run))["owner"]
    (run / OWNER).write_text("{")
    assert run_status(run).state == "stopped"


def test_run_that_diverged_or_has_only_begun(run: Path):
    (run / "diverged.json").touch()
    assert run_status(run).state == "diverged"
    for name in ("log.jsonl", "bad_samples.jsonl", "diverged.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    status = run_status(run)
    assert (status.step, status.steps_per_s, status.left_s, status.loss, status.checkpoint) == (0, *[None] * 4)
    assert describe_status(status)["last checkpoint"] == "none yet"


def test_finished_run(run_cli: Callable[..., tuple[int, str, str]], finished_run: Path):
    code, out, _ = run_cli("status", finished_run, "--json")
    status = json.loads(out)
    assert (code, status["state"], status["model"]) == (0, "finished", str(finished_run / "model"))
    assert status["step"] == status["steps"]
    out = run_cli("status", finished_run)[1]
    assert "finished" in out
    assert "time left" not in out


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path):
    hints = {"runs": f"did you mean {run}?", "runs/b": f"{run.parent} contains {run}", "rusn": "did you mean"}
    for place, hint in hints.items():
        with pytest.raises(UsageError) as caught:
            run_status(tmp_path / place)
        assert str(caught.value.hint).startswith(hint)
