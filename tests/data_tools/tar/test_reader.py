"""The reader returns the indexed bytes from any thread or process; errors name shard and key."""

import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from samples import write_tar

from data_tools.core.errors import DataError, SampleError
from data_tools.tar import index as tar_index
from data_tools.tar import reader as shard_reader
from data_tools.tar.byte_file import LocalFile
from data_tools.tar.index import build_index, open_index
from data_tools.tar.reader import ShardReader

FILES = {f"k{i}.{field}": os.urandom(200 + i) for i in range(6) for field in ("jpg", "json", "txt")}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", FILES)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the offset and size of each disk read from now on."""
    found: list[tuple[int, int]] = []
    read = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda self, *place: found.append(place) or read(self, *place))
    return found


def everything(reader: ShardReader) -> dict[str, bytes]:
    return {
        f"{index.key(i)}.{field}": data
        for shard, index in enumerate(reader.indexes)
        for i in range(len(index))
        for field, data in reader.fields(shard, i).items()
    }


def change(tar: Path, place: int, new: bytes) -> None:
    """Overwrite bytes of the tar, like bit rot: its size and modification time are unchanged."""
    stat = tar.stat()
    with tar.open("r+b") as file:
        file.seek(place)
        file.write(new)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("verify", [False, True])
def test_a_sample_takes_one_read_where_its_members_lie_together(tar: Path, reads: list, verify: bool):
    reader = ShardReader([build_index(tar)], verify)
    assert everything(reader) == FILES
    reads.clear()
    assert reader.fields(0, 3) == {field: FILES[f"k3.{field}"] for field in ("jpg", "json", "txt")}
    assert len(reads) == 1


def test_only_what_is_wanted_is_read(tar: Path, reads: list):
    reader = ShardReader([build_index(tar)])
    reads.clear()
    assert reader.fields(0, 2, ("txt",)) == {"txt": FILES["k2.txt"]}
    assert reads == [(reader.indexes[0].locate(2)["txt"][0], 202)]
    assert reader.fields(0, 2, ("cls",)) == {}
    assert len(reads) == 1


def test_members_that_lie_far_apart_are_read_one_by_one(tmp_path: Path, reads: list):
    files = {"a.jpg": b"picture", "between.exe": bytes(1 << 20), "a.txt": b"caption"}
    reader = ShardReader([build_index(write_tar(tmp_path / "a.tar", files))])
    reads.clear()
    assert reader.fields(0, 0) == {"jpg": b"picture", "txt": b"caption"}
    assert sum(size for _, size in reads) == len(b"picture" + b"caption")


def test_rot_is_found_when_verifying(tar: Path):
    index = build_index(tar)
    offset, size = index.locate(2)["jpg"]
    change(tar, offset + size // 2, b"rot")
    assert index.is_fresh(LocalFile(tar))
    assert ShardReader([index]).fields(0, 2)["jpg"] != FILES["k2.jpg"]
    with pytest.raises(SampleError, match=r"\.jpg is damaged: its hash is not the one in the index") as caught:
        ShardReader([index], verify=True).fields(0, 2)
    assert (caught.value.cause, caught.value.shard, caught.value.key) == ("hash", str(tar), "k2")
    assert caught.value.where == f"{tar}, key 'k2'"
    assert ShardReader([index], verify=True).fields(0, 1)


def test_a_shard_that_changed_after_indexing_is_always_verified(tar: Path):
    build_index(tar)
    write_tar(tar, FILES | {"k4.txt": FILES["k4.txt"][::-1]})
    os.utime(tar, ns=(1, 1))
    reader = ShardReader([open_index(tar)])
    with pytest.raises(SampleError) as caught:
        reader.fields(0, 4)
    assert caught.value.cause == "hash"
    assert reader.fields(0, 5)["txt"] == FILES["k5.txt"]


@pytest.mark.parametrize("how", ["shorter", "longer", "longer at the same time", "later", "gone"])
def test_a_shard_that_changes_after_it_was_opened(tar: Path, how: str):
    reader = ShardReader([build_index(tar)])
    data = tar.read_bytes()
    if how == "gone":
        tar.unlink()
    elif how == "later":
        os.utime(tar, ns=(1, 1))
    else:
        time_ns = tar.stat().st_mtime_ns
        tar.write_bytes(data[:3000] if how == "shorter" else data + bytes(512))
        os.utime(tar, ns=(1, time_ns if "same time" in how else time_ns + 1))
    with pytest.raises(
        DataError, match="does not exist" if how == "gone" else "has changed since it was opened"
    ) as caught:
        reader.fields(0, 0)
    assert not isinstance(caught.value, SampleError)
    assert str(tar) in caught.value.where


def test_a_shard_that_is_truncated_while_it_is_read(tar: Path):
    reader = ShardReader([build_index(tar)])
    assert reader.fields(0, 0)
    os.truncate(tar, reader.indexes[0].locate(4)["txt"][0] + 1)
    assert reader.fields(0, 3)
    with pytest.raises(SampleError, match="truncated") as caught:
        reader.fields(0, 4)
    assert (caught.value.cause, caught.value.key) == ("truncated", "k4")


def test_a_disk_that_cannot_be_read(tar: Path, monkeypatch: pytest.MonkeyPatch):
    reader = ShardReader([build_index(tar)])

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(SampleError, match="Input/output error") as caught:
        reader.fields(0, 1)
    assert (caught.value.cause, caught.value.key) == ("damaged", "k1")


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list):
    files = {"a.jpg": b"x" * 900, "a.txt": b"caption", "b.jpg": b"x", "b.txt": b"y" * 20, "c.jpg": b"x", "c.txt": b"y"}
    reader = ShardReader([build_index(write_tar(tmp_path / "a.tar", files))])
    monkeypatch.setattr(shard_reader, "MAX_BYTES", {"jpg": 800, "txt": 10})
    monkeypatch.setattr(shard_reader, "_SMALLEST_LIMIT", 10)
    reads.clear()
    for i, what in ((0, ".jpg has 900 bytes, more than 800"), (1, ".txt has 20 bytes, more than 10")):
        with pytest.raises(SampleError, match=what) as caught:
            reader.fields(0, i)
        assert caught.value.cause == "too-large"
    assert reads == []
    assert reader.fields(0, 0, ("txt",)) == {"txt": b"caption"}
    assert reader.fields(0, 2) == {"jpg": b"x", "txt": b"y"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_other_processes_read_the_same(tar: Path, method: str):
    reader = ShardReader([build_index(tar)], verify=True)
    assert everything(reader) == FILES  # files and maps are open when the other process starts
    with get_context(method).Pool(1) as pool:
        assert pool.map(everything, [reader]) == [FILES]
    assert everything(reader) == FILES


def test_a_pickle_holds_no_data(tar: Path):
    reader = ShardReader([build_index(tar)])
    unused = pickle.dumps(reader)
    everything(reader)
    assert len(pickle.dumps(reader)) == len(unused) < 5000
    assert everything(pickle.loads(pickle.dumps(reader))) == FILES


def test_threads_share_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_reader, "_MAX_OPEN_FILES", 3)
    monkeypatch.setattr(tar_index, "_MAX_MAPS", 4)
    tars = [write_tar(tmp_path / f"{i}.tar", {"a.txt": b"%d" % i}) for i in range(12)]
    reader = ShardReader([build_index(tar) for tar in tars])
    order = [i * 7 % 12 for i in range(600)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: int(reader.fields(i, 0)["txt"]), order)) == order
    if sys.platform == "linux":
        # .exists() is False for the descriptor that the listing itself used
        names = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        open_files = [name.rpartition(".")[2] for name in names if name.startswith(str(tmp_path))]
        assert 0 < open_files.count("tar") <= 3
        assert 0 < open_files.count("idx") <= 4


def test_errors_name_shard_and_key(tar: Path):
    reader: ShardReader = ShardReader([build_index(tar)])
    build: Callable[..., SampleError] = reader.error
    error = pickle.loads(pickle.dumps(build("hash", "what", 0, 2)))
    assert (error.cause, error.shard, error.key, error.exit_code) == ("hash", str(tar), "k2", 3)
    with pytest.raises(IndexError):
        reader.fields(0, 6)
