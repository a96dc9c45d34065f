"""Runs become one image; errors are reported."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmvit.config import FinetuneConfig, to_yaml
from mmvit.train.record import curves

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a run that logged so many times."""

    def write(name: str, num_lines: int = 200, every: int = 10, batch_size: int = 64, loss: float = 5.0) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [
            {
                **{"step": i * every, "time_s": i * 36.0, "loss": loss / i, "lr": 1e-3, "logit_scale": 14.0},
                **{"grad_norm": 1 + i % 3, "samples_per_s": 100.0, "data_wait": 0.1, "skipped_steps": i // 70},
                **({"zero_shot_acc1": 0.5} if i % 50 == 0 else {}),
            }
            for i in range(1, num_lines + 1)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.yaml").write_text(f"train: {{batch_size: {batch_size}}}\n")
        return folder

    return write


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def shows(picture: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(picture.astype(int) - wanted).max(axis=2) <= 2).sum() > 100)


def test_runs_lie_over_each_other_in_colours_of_their_own(
    run_cli: RunCli, write_run: Callable[..., Path], tmp_path: Path
):
    runs = [write_run("a"), write_run("b", loss=4.0)]
    out = tmp_path / "curves.png"
    code, output, err = run_cli("plot", *runs, "--out", out, "--json")
    assert code == 0, err
    summary = json.loads(output)
    assert summary["runs"]["a"]["loss"] == 5.0 / 200
    assert summary["runs"]["b"]["loss"] == 4.0 / 200
    picture = pixels(out)
    assert picture.shape[1] == 1600
    assert [shows(picture, colour) for colour in curves.COLOURS[:3]] == [True, True, False]


def test_skipped_steps_are_marked(write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run("run")
    curves.plot_runs([run], tmp_path / "with.png")
    monkeypatch.setattr(curves, "SKIPPED", "no such number")
    curves.plot_runs([run], tmp_path / "without.png")
    assert not np.array_equal(pixels(tmp_path / "with.png"), pixels(tmp_path / "without.png"))


@pytest.mark.parametrize(("x", "last"), [("step", 2000.0), ("samples", 2000.0 * 64), ("hours", 2.0)])
def test_axis_is_what_was_asked_for(write_run: Callable[..., Path], x: str, last: float):
    run = curves._read(write_run("run"), "run", x)
    assert run.x[-1] == pytest.approx(last)


@pytest.mark.slow
def test_logs_of_many_lines_are_drawn_in_seconds(write_run: Callable[..., Path], tmp_path: Path):
    run = write_run("long", num_lines=100_000)
    start = time.process_time()
    curves.plot_runs([run], tmp_path / "curves.png")
    assert time.process_time() - start < 20  # 3 s on an idle machine


def test_runs_of_one_name_keep_apart(write_run: Callable[..., Path]):
    runs = [write_run("one/run"), write_run("two/run")]
    assert curves._names(runs) == [str(run) for run in runs]
    assert curves._names([*runs[:1], write_run("two/other")]) == ["run", "other"]


def test_log_of_a_diverged_run_is_drawn(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity}\n{"step": 2, "loss": 3.0, "grad_norm": 0.0}\n')
    summary = curves.plot_runs([log], tmp_path / "curves.png")
    assert summary["runs"][tmp_path.name]["loss"] == 3.0
    assert pixels(tmp_path / "curves.png").shape[1] == 1600


def test_smoothing_keeps_a_constant_and_the_mean_of_noise():
    noise = np.random.default_rng(0).normal(3.0, 1.0, 1000)
    assert np.allclose(curves._smoothed(np.full(100, 7.0)), 7.0)
    smooth = curves._smoothed(noise)
    assert smooth.std() < 0.3
    assert math.isclose(smooth.mean(), 3.0, abs_tol=0.1)


def test_what_cannot_be_drawn_is_reported(run_cli: RunCli, write_run: Callable[..., Path], tmp_path: Path):
    run, out = write_run("run"), tmp_path / "curves.png"
    assert run_cli("plot", tmp_path / "nothing", "--out", out)[0] == 2
    code, _, err = run_cli("plot", run, "--out", out, "--x", "miles")
    assert code == 2
    assert "choose from step, samples, hours" in err
    log = run / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n')
    assert "hint: use --x step" in run_cli("plot", run, "--out", out, "--x", "hours")[2]
    log.write_text('{"step": 1, "lo\n{"step": 2}\n')
    code, _, err = run_cli("plot", run, "--out", out)
    assert code == 4
    assert str(log) in err
    assert not out.exists()


def test_supervised_runs_have_their_accuracy_drawn(run_cli: RunCli, write_run: Callable[..., Path], tmp_path: Path):
    run = write_run("classes", num_lines=20)
    (run / "config.yaml").write_text(to_yaml(FinetuneConfig()))
    log = run / "log.jsonl"
    drawn = []
    for text in (log.read_text(), log.read_text().replace('"lr"', '"val_acc1": 0.9, "lr"')):
        log.write_text(text)
        out = tmp_path / f"{len(drawn)}.png"
        assert run_cli("plot", run, "--out", out, "--x", "samples")[0] == 0
        drawn.append(pixels(out))
    assert not np.array_equal(*drawn)  # a panel more


def test_missing_matplotlib_is_reported(
    run_cli: RunCli, write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run_cli("plot", write_run("run"), "--out", tmp_path / "curves.png")
    assert code == 2
    assert "pip install 'mmvit[eval]'" in err
