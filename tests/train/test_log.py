"""The log of a run: one JSON line a step, also over a crash."""

import json
from pathlib import Path

import pytest

from mmvit.train.log import RunLog, read_log


def write(path: Path, start_step: int, steps: range) -> None:
    log = RunLog(path, num_steps=100, start_step=start_step, active=True)
    for step in steps:
        log.write(step, {"loss": 1.0 / step, "samples_per_s": 1234.0})
    log.close()


def test_resumed_log_has_each_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "log.jsonl"
    write(path, 0, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a crash in the middle of a line
    assert [line["step"] for line in read_log(path)] == list(range(1, 8))
    write(path, 5, range(6, 10))
    assert [line["step"] for line in read_log(path)] == list(range(1, 10))
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert "step 7/100  loss 0.143  1234 samples/s" in capsys.readouterr().err


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = RunLog(tmp_path / "log.jsonl", num_steps=1, start_step=0, active=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_no_log_is_an_empty_one(tmp_path: Path):
    assert read_log(tmp_path / "log.jsonl") == []
