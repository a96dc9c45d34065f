"""What another number of steps does to rate and stage is shown."""

from pathlib import Path

import pytest

from mmvit.config import OptimConfig, PretrainConfig, TrainConfig
from mmvit.data.curriculum import Stage
from mmvit.train.record.changes import describe_changes
from mmvit.train.record.run_log import CHANGED, RunLog, log_changes, read_log


def test_finished_schedule_that_is_made_longer():
    stages = [Stage(until=0.5, image_size=16), Stage()]
    optim = OptimConfig(name="muon", lr=1e-3, muon_lr=0.02, warmup_share=0.1, decay_share=0.5)
    config = PretrainConfig(out="runs/a", optim=optim, train=TrainConfig(steps=200), curriculum=stages)
    lines = describe_changes({"train.steps": (20, 200)}, config, step=20).splitlines()
    # Before: a cosine over steps 10 to 20, at its last step. Now: right after a warm-up of 20 steps.
    assert lines == [
        "    train.steps: 20 -> 200",
        "    learning rate: 2.45e-05 (decay) at step 20 -> 0.001 (constant) at step 21",
        "    learning rate of Muon: 0.000489 (decay) at step 20 -> 0.02 (constant) at step 21",
        "    stage of the curriculum: 2 -> 1 of 2",
        "  note: the schedule is now that of a run of 200 steps from its start",
        "  hint: to begin a new schedule with its model, start a new run: out=FOLDER train.init=runs/a/model",
    ]


def test_other_changes_do_not_touch_the_schedule():
    config = PretrainConfig()
    assert describe_changes({}, config, 7) == ""
    assert describe_changes({"optim.clip_norm": (1.0, None)}, config, 7) == "    optim.clip_norm: 1.0 -> None"
    assert describe_changes({"train.steps": (5, 9)}, config, 0) == "    train.steps: 5 -> 9"  # nothing ran before


def test_changed_settings_stay_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5, "time_s": 1.0}\n{"step": 6, "time_s": 2.0}\n{"step": 7, "time_s": 3.0}\n')
    for _ in range(2):  # killed before it wrote its config, and run again
        log_changes(path, 6, {"train.steps": (8, 9)})
    changed = {"step": 6, "time_s": 2.0, CHANGED: {"train.steps": [8, 9]}}
    assert read_log(path)[2:] == [changed]
    log = RunLog(path, num_steps=9, start_step=5, active=True)  # the checkpoint of step 6 was damaged
    log.write(6, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_log(path)] == [5, 5, 6]
    assert read_log(path)[1] == changed | {"step": 5, "time_s": 1.0}
