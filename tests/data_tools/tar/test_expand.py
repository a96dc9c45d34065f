"""Expansion of shard specifications."""

from pathlib import Path

import pytest

from data_tools.core.errors import DataError, UsageError
from data_tools.tar.expand import expand_shards
from data_tools.tar.location import Location


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar", "train-000.tar.idx", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(shards: list[Location]) -> list[str]:
    return [shard.name for shard in shards]


def test_file_folder_glob_and_path(folder: Path):
    assert names(expand_shards(folder / "val-000.tar")) == ["val-000.tar"]
    assert names(expand_shards(str(folder))) == ["train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar"]
    assert names(expand_shards(f"{folder}/train-*.tar")) == ["train-000.tar", "train-001.tar", "train-002.tar"]


def test_index_and_metadata_files_are_not_shards(folder: Path):
    assert "train-000.tar.idx" not in names(expand_shards(f"{folder}/*"))
    with pytest.raises(UsageError, match="not a shard: this is the index or metadata of one") as caught:
        expand_shards([f"{folder}/train-000.tar", f"{folder}/train-000.tar.idx"])  # as a shell expands *
    assert f"{folder}/*.tar" in caught.value.hint


def test_images_and_tables_are_not_shards(tmp_path: Path):
    for name in ("a.png", "labels.json"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UsageError, match="not a shard: shards are tar files"):
            expand_shards(tmp_path / name)


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
    with pytest.raises(DataError, match="listed twice"):
        expand_shards([f"{folder}/val-000.tar", f"{folder}/../{folder.name}/val-*.tar"])


def test_urls_keep_their_query_and_are_not_looked_up(folder: Path):
    url = "https://example.org/a/train-{000..001}.tar?sig=x"
    shards = expand_shards([url, f"{folder}/val-000.tar", "s3://bucket/{a,b}.tar"])
    assert [shard.url if shard.is_remote else shard.path for shard in shards] == [
        "https://example.org/a/train-000.tar?sig=x",
        "https://example.org/a/train-001.tar?sig=x",
        folder / "val-000.tar",
        "s3://bucket/a.tar",
        "s3://bucket/b.tar",
    ]
    with pytest.raises(DataError, match="listed twice") as caught:
        expand_shards(["https://me:secret@example.org/a.tar?sig=x", "https://example.org/a.tar?sig=y"])
    assert caught.value.where == "https://example.org/a.tar"
    assert len(expand_shards([f"https://example.org/get?id={i}" for i in range(3)])) == 3


@pytest.mark.parametrize("start", ["file://", "file://localhost", "FILE://"])
def test_file_urls_are_paths(folder: Path, start: str):
    (folder / "with space").mkdir()
    (folder / "val-000.tar").rename(folder / "with space" / "val-000.tar")
    assert names(expand_shards(f"{start}{folder}/train-{{000..001}}.tar")) == ["train-000.tar", "train-001.tar"]
    assert expand_shards(f"{start}{folder}/with%20space") == [Location(folder / "with space" / "val-000.tar")]
    with pytest.raises(UsageError, match="cannot name another machine"):
        expand_shards(f"file://server{folder}")


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder))
    assert expand_shards("~/val-*.tar") == expand_shards("~/val-{000..000}.tar") == [Location(folder / "val-000.tar")]
    with pytest.raises(DataError, match="nothing matches"):
        expand_shards("~no-such-user/a.tar")


@pytest.mark.parametrize(
    "spec",
    ["pipe:cat a.tar", "pipe://x", "ftp://host/a.tar", "zip://a.tar::https://host/b.zip", "https://h/::file:///x"],
)
def test_what_could_run_a_program_is_refused(spec: str):
    with pytest.raises(UsageError, match="local files") as caught:
        expand_shards(spec)
    assert caught.value.note == "nothing was run or opened"


def test_nothing_and_a_falling_range():
    with pytest.raises(UsageError, match="no shards"):
        expand_shards([])
    with pytest.raises(UsageError, match="must be ascending"):
        expand_shards("a-{3..1}.tar")
    with pytest.raises(UsageError, match="at most 1000000"):
        expand_shards("a-{0..99999999999}.tar")
