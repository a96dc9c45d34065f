"""An output folder only resumes the work that it was created for."""

from pathlib import Path

import pytest

from data_tools.core.errors import UsageError
from data_tools.core.output_folder import check_apart, check_free, close_output, is_free, open_output

PLAN = {"verb": "synthetic", "size": 3, "seed": None}


def test_begun_finished_and_found_again(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    assert open_output(folder, PLAN) is None
    assert open_output(folder, PLAN) is None
    (folder / ".x.tar.tmp-1").write_bytes(b"left by a kill")
    close_output(folder, PLAN, {"samples": 3})
    assert open_output(folder, PLAN) == {"samples": 3}
    assert [path.name for path in folder.iterdir()] == ["shards.json"]


def test_other_work_is_refused_and_nothing_of_it_is_lost(tmp_path: Path):
    open_output(tmp_path / "out", PLAN)
    with pytest.raises(UsageError, match="unfinished work that differs in: seed, size") as caught:
        open_output(tmp_path / "out", PLAN | {"size": 4, "seed": 1})
    assert f"rm -r {tmp_path / 'out'}" in caught.value.hint
    close_output(tmp_path / "out", PLAN, {"samples": 3})
    for plan, what in ((PLAN | {"size": 4}, "finished work that differs in: size"), ({"verb": "x"}, "data synthetic")):
        with pytest.raises(UsageError, match=what) as caught:
            open_output(tmp_path / "out", plan)
        assert caught.value.hint == "choose another folder"  # never a hint to remove finished work
    assert open_output(tmp_path / "out", PLAN) == {"samples": 3}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 5, "report": null}', "\x00"])
def test_a_folder_of_something_else(tmp_path: Path, text: str):
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(UsageError, match="contains other files"):
        open_output(tmp_path, PLAN)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="contains other files"):
        open_output(tmp_path / "file", PLAN)
    assert (tmp_path / "shards.json").read_text() == text


def test_a_finished_folder_whose_shards_are_gone(tmp_path: Path):
    open_output(tmp_path, PLAN)
    (tmp_path / "a.tar").write_bytes(b"12345")
    close_output(tmp_path, PLAN, {"samples": 3})
    assert open_output(tmp_path, PLAN) == {"samples": 3}
    (tmp_path / "b.tar").write_bytes(b"1")
    with pytest.raises(UsageError, match="finished with 1 tars of 5 bytes, and now has 2 tars of 6 bytes") as caught:
        open_output(tmp_path, PLAN)
    assert "rm -r" not in caught.value.hint
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UsageError, match="now has 1 tars of 1 bytes") as caught:
        open_output(tmp_path, PLAN)
    assert f"rm -r {tmp_path}" in caught.value.hint


def test_what_is_free(tmp_path: Path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".a.tmp-1").write_text("left by a kill")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    free = dict.fromkeys(("none", "empty"), (True, True))
    free |= {"hidden": (True, False), "link": (True, False), "dangling": (True, False), "full": (False, False)}
    free["full/a"] = False, False
    for name, expected in free.items():
        assert (is_free(tmp_path / name), is_free(tmp_path / name, replaced=True)) == expected, name
    check_free(tmp_path / "empty")
    with pytest.raises(UsageError, match="holds no run") as caught:
        check_free(tmp_path / "full", "it holds no run", hint="name another out=FOLDER")
    assert (caught.value.where, caught.value.hint) == (str(tmp_path / "full"), "name another out=FOLDER")
    assert caught.value.exit_code == 2


def test_shards_are_not_written_next_to_those_that_are_read(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "shards")
    check_apart(tmp_path / "new", [tmp_path / "shards" / "a.tar"])
    with pytest.raises(UsageError, match="folder of the input shards"):
        check_apart(tmp_path / "link", [tmp_path / "x" / "a.tar", tmp_path / "shards" / "a.tar"])
