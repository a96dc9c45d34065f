"""The log of a run: one JSON line a step, also over a crash."""

import json
from pathlib import Path

import pytest

from data_tools.core.errors import ResourceError
from mmvit.train.record.run_log import RunLog, read_log


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


def test_an_accuracy_is_shown_at_the_step_of_its_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = RunLog(tmp_path / "log.jsonl", num_steps=2, start_step=0, active=True)
    log.write(1, {"loss": 1.0})
    log.write(1, {"val_acc1": 0.5})
    log.write(2, {"loss": 0.5})
    log.close()
    shown = [line.partition("  0:")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["step 1/2  loss 1", "step 1/2  loss 1  accuracy 50.0%", "step 2/2  loss 0.5"]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = RunLog(tmp_path / "log.jsonl", num_steps=1, start_step=0, active=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_number_that_json_cannot_hold_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = RunLog(tmp_path / "log.jsonl", num_steps=2, start_step=0, active=True)
    log.write(1, {"loss": None, "samples_per_s": 5.0})
    log.close()
    assert "step 1/2  5 samples/s" in capsys.readouterr().err


def test_no_log_is_an_empty_one(tmp_path: Path):
    assert read_log(tmp_path / "log.jsonl") == []


def test_time_of_a_resumed_run_continues(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5, "time_s": 100.0}\n{"step": 6, "time_s": 120.0}\n')
    write(path, 5, range(6, 8))
    times = [line["time_s"] for line in read_log(path)]
    assert times == sorted(times)
    assert times[0] == 100.0
    assert 100.0 <= times[1] < 110.0  # the 20 s of the lost step are not counted


def test_full_disk_is_reported(tmp_path: Path):
    log = RunLog(tmp_path / "log.jsonl", num_steps=100, start_step=0, active=True)
    log.file.close()
    with Path("/dev/full").open("ab", buffering=0) as log.file:  # every write to it fails as on a full disk
        with pytest.raises(ResourceError, match="No space left on device") as error:
            log.write(1, {"loss": 1.0})
        log.close()
    assert error.value.exit_code == 5
    assert "free disk space" in str(error.value)


def test_line_that_the_disk_takes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, num_steps=100, start_step=0, active=True)
    whole = log.file

    class Reluctant:
        def write(self, data: bytes) -> int:
            return whole.write(data[:7])

    log.file = Reluctant()
    log.write(1, {"loss": 1.0})
    whole.close()
    assert [line["loss"] for line in read_log(path)] == [1.0]
