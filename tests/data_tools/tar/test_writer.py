"""Shards are written atomically, are equal for equal samples, and readable by webdataset."""

import json
from pathlib import Path

import pytest
import webdataset

from data_tools.core.errors import DataError, UsageError
from data_tools.tar.index import ShardIndex, index_path
from data_tools.tar.open import open_file
from data_tools.tar.writer import ShardWriter


def write(folder: Path, num_samples: int = 5) -> list[Path]:
    with ShardWriter(folder, "part", max_samples=2) as writer:
        for i in range(num_samples):
            writer.write(f"f{i}/key", {"png": b"picture %d" % i, "txt": f"caf\u00e9 {i}", "json": {"i": i}, "cls": i})
        assert writer.num_samples == num_samples
    return writer.shards


def test_shards_and_indexes(tmp_path: Path):
    shards = write(tmp_path)
    assert [shard.name for shard in shards] == ["part-00000.tar", "part-00001.tar", "part-00002.tar"]
    assert [len(ShardIndex(shard)) for shard in shards] == [2, 2, 1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {shard.name for shard in shards} | {f"{shard.name}.idx" for shard in shards}
    assert all(ShardIndex(shard).is_fresh(open_file(shard)) for shard in shards)


def test_webdataset_reads_them(tmp_path: Path):
    samples = []
    for shard in write(tmp_path):
        with shard.open("rb") as file:
            members = ({**member, "__url__": ""} for member in webdataset.tariterators.tar_file_iterator(file))
            samples += webdataset.tariterators.group_by_keys(members)
    assert [sample["__key__"] for sample in samples] == [f"f{i}/key" for i in range(5)]
    assert samples[3]["txt"].decode() == "caf\u00e9 3"
    assert json.loads(samples[3]["json"]) == {"i": 3}
    assert (samples[3]["cls"], samples[3]["png"]) == (b"3", b"picture 3")


def test_the_bytes_are_those_of_webdataset_itself(tmp_path: Path):
    fields = {"png": b"picture" * 100, "txt": "caf\u00e9", "json": {"b": 1, "a": "\u00e9"}, "cls": 3}
    keys = ["0", "folder/caf\u00e9", "long/" * 40 + "name"]
    with ShardWriter(tmp_path, "ours") as writer:
        for key in keys:
            writer.write(key, fields)
    encoded = {
        "png": fields["png"],
        "txt": "caf\u00e9".encode(),
        "json": '{"a": "\u00e9", "b": 1}'.encode(),
        "cls": b"3",
    }
    how = {"encoder": False, "mtime": 0, "user": "mmvit", "group": "mmvit", "mode": 0o644, "format": "PAX_FORMAT"}
    with (tmp_path / "theirs.tar").open("wb") as file, webdataset.TarWriter(file, **how) as theirs:
        for key in keys:
            theirs.write({"__key__": key, **encoded})
    assert writer.shards[0].read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_several_writers_make_one_data_set(tmp_path: Path):
    for first in (2, 0):
        with ShardWriter(tmp_path, max_samples=1, first_number=first) as writer:
            for i in range(2):
                writer.write(f"{first + i}", {"txt": "x"})
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == [f"shard-{i:05d}.tar" for i in range(4)]


def test_same_samples_same_bytes(tmp_path: Path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert [shard.read_bytes() for shard in first] == [shard.read_bytes() for shard in second]


@pytest.mark.parametrize("key", ["", "a.b", "dir/a.b", "/a", "a/", "__meta__", "a\nb", ".hidden"])
def test_keys_that_would_be_read_differently(tmp_path: Path, key: str):
    with ShardWriter(tmp_path) as writer, pytest.raises(DataError, match="read back"):
        writer.write(key, {"txt": "x"})


def test_bad_samples_are_refused_and_the_rest_is_written(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"txt": "x"})
        with pytest.raises(DataError, match="already written"):
            writer.write("a", {"txt": "y"})
        with pytest.raises(DataError, match="caption is empty"):
            writer.write("b", {"txt": " \n"})
        with pytest.raises(DataError, match="at least one field"):
            writer.write("b", {})
        with pytest.raises(UsageError, match="did you mean 'txt'"):
            writer.write("b", {"text": "x"})
        for fields in ({"png": "str"}, {"png": b""}, {"txt": b"x"}, {"cls": -1}, {"cls": True}):
            with pytest.raises(UsageError, match="not a valid value of the field"):
                writer.write("b", fields)
        writer.write("b", {"txt": "x"})
    assert list(ShardIndex(writer.shards[0]).keys()) == ["a", "b"]


def test_an_exception_leaves_finished_shards_only(tmp_path: Path):
    def fail() -> None:
        with ShardWriter(tmp_path, max_samples=2) as writer:
            for i in range(3):
                writer.write(f"{i}", {"txt": "x"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    shard = tmp_path / "shard-00000.tar"
    assert sorted(tmp_path.iterdir()) == [shard, index_path(shard)]


def test_nothing_is_overwritten(tmp_path: Path):
    before = [shard.read_bytes() for shard in write(tmp_path)]
    with pytest.raises(UsageError, match="already contains"):
        ShardWriter(tmp_path, "part")
    with ShardWriter(tmp_path, "part", max_samples=1, first_number=5) as writer:
        writer.write("5", {"txt": "x"})
        (tmp_path / "part-00006.tar").write_bytes(b"of another")
        with pytest.raises(UsageError, match="already contains"):
            writer.write("6", {"txt": "x"})
    assert (tmp_path / "part-00006.tar").read_bytes() == b"of another"
    assert [shard.read_bytes() for shard in sorted(tmp_path.glob("*.tar"))][:3] == before
