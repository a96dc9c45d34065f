"""Near words and near paths."""

from pathlib import Path

import pytest

from data_tools.core.errors import DataError
from data_tools.core.near import check_there, near_path, nearest


def test_case_and_dashes_do_not_count():
    assert nearest("zeroshot", ["search", "zero-shot"]) == "zero-shot"
    assert nearest("Batch-Size", ["batch_size", "steps"]) == "batch_size"
    assert nearest("quux", ["search", "zero-shot"]) is None


def test_near_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/emoji/model", "runs/half", "data"):
        Path(name).mkdir(parents=True)
    Path("my.yaml").touch()
    Path(".hidden").touch()
    assert near_path("my.yml") == "did you mean my.yaml?"
    assert near_path("dta/*.tar") == "did you mean data?"
    assert near_path("runs/emojy/model") == "did you mean runs/emoji/model?"
    assert near_path("runs/emojy/log") == "did you mean runs/emoji?"
    assert near_path("runs/x") == "runs contains runs/emoji, runs/half"
    assert near_path("quux") == ""
    assert near_path("data/x") == ""  # which is empty


def test_missing_file_is_named(tmp_path: Path):
    (tmp_path / "cat.jpg").touch()
    check_there([tmp_path / "cat.jpg"], "image")
    with pytest.raises(DataError, match="the image does not exist") as caught:
        check_there([tmp_path / "cat.jpg", tmp_path / "cat.jpeg"], "image")
    assert caught.value.where == str(tmp_path / "cat.jpeg")
    assert caught.value.hint == f"did you mean {tmp_path / 'cat.jpg'}?"
