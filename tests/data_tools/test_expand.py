"""From what a user writes to a list of shards."""

from pathlib import Path

import pytest

from data_tools.errors import DataError, UsageError
from data_tools.expand import expand_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar", "train-000.tar.idx", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_file_folder_glob_and_path(folder: Path):
    assert names(expand_shards(folder / "val-000.tar")) == ["val-000.tar"]
    assert names(expand_shards(str(folder))) == ["train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar"]
    assert names(expand_shards(f"{folder}/train-*.tar")) == ["train-000.tar", "train-001.tar", "train-002.tar"]


def test_braces(folder: Path):
    assert names(expand_shards(f"{folder}/train-{{001..002}}.tar")) == ["train-001.tar", "train-002.tar"]
    assert names(expand_shards(f"{folder}/{{val,train}}-{{000..000}}.tar")) == ["val-000.tar", "train-000.tar"]


def test_list_keeps_its_order(folder: Path):
    spec = [f"{folder}/val-000.tar", f"{folder}/train-{{000..001}}.tar"]
    assert names(expand_shards(spec)) == ["val-000.tar", "train-000.tar", "train-001.tar"]


def test_an_existing_path_is_no_pattern(tmp_path: Path):
    (tmp_path / "a{1..2}[x].tar").write_bytes(b"x")
    assert names(expand_shards(tmp_path / "a{1..2}[x].tar")) == ["a{1..2}[x].tar"]


@pytest.mark.parametrize("spec", ["none.tar", "train-{000..003}.tar", "test-*.tar", "empty"])
def test_what_is_missing_is_named(folder: Path, spec: str):
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        expand_shards(f"{folder}/{spec}")
    assert spec in str(caught.value.where)
    if "003" in spec:
        assert "train-003.tar does not exist" in caught.value.what


def test_twice_the_same_shard(folder: Path):
    with pytest.raises(DataError, match="named twice"):
        expand_shards([f"{folder}/val-000.tar", f"{folder}/../{folder.name}/val-*.tar"])


@pytest.mark.parametrize("spec", ["pipe:cat a.tar", "https://example.org/a.tar", "s3://bucket/a.tar"])
def test_only_local_files(spec: str):
    with pytest.raises(UsageError, match="local files"):
        expand_shards(spec)


def test_nothing_and_a_falling_range():
    with pytest.raises(UsageError, match="no shards"):
        expand_shards([])
    with pytest.raises(UsageError, match="must rise"):
        expand_shards("a-{3..1}.tar")
