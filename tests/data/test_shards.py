"""Reading by offset gives what tarfile gives, in any process, and names shard and key of what is wrong."""

import json
import os
import pickle
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from samples import write_tar

from data_tools.core.errors import CheckpointError, DataError, SampleError, UsageError
from data_tools.tar.index import build_index, index_path
from data_tools.tar.writer import ShardWriter
from mmvit.data.shards import IndexedShards
from mmvit.data.source import RawSample

NUM_SAMPLES = 25


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    with ShardWriter(tmp_path, max_samples=4) as writer:
        for i in range(NUM_SAMPLES):
            fields = {"png": os.urandom(300 + i), "txt": f"caption {i} \uac1c", "json": {"number": i}, "cls": i % 7}
            writer.write(f"d/key{i}", fields)
    return writer.shards


def expected_samples(paths: list[Path]) -> list[RawSample]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as archive:
            for info in archive:
                key, field = f"{path.name}/{info.name}".rsplit(".", 1)
                samples.setdefault(key, {})[field] = archive.extractfile(info).read()
    return [
        RawSample(key, fields["png"], fields["txt"].decode(), json.loads(fields["json"]), int(fields["cls"]))
        for key, fields in samples.items()
    ]


def test_reads_what_tarfile_reads(paths: list[Path]):
    shards = IndexedShards(paths, verify=True)
    assert len(shards) == NUM_SAMPLES
    assert shards.shard_sizes == (4, 4, 4, 4, 4, 4, 1)
    assert [shards.read(i) for i in range(len(shards))] == expected_samples(paths)
    assert shards.key(24) == "shard-00006.tar/d/key24"
    assert shards.read(np.int64(5)).meta == {"number": 5}


def test_numbers_out_of_range(paths: list[Path]):
    shards = IndexedShards(paths)
    for i in (-1, NUM_SAMPLES):
        with pytest.raises(IndexError):
            shards.read(i)


def read_all(shards: IndexedShards) -> list[RawSample]:
    return [shards.read(i) for i in range(len(shards))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_reads_in_other_processes(paths: list[Path], method: str):
    shards = IndexedShards(paths)
    expected = read_all(shards)  # files and maps are open when the others start
    with get_context(method).Pool(1) as pool:
        assert pool.map(read_all, [shards]) == [expected]


def test_a_pickle_is_small_and_works(paths: list[Path]):
    shards = IndexedShards(paths)
    unread = len(pickle.dumps(shards))
    read_all(shards)
    data = pickle.dumps(shards)
    assert len(data) == unread < 20_000
    assert read_all(pickle.loads(data)) == expected_samples(paths)


def test_text_is_strict(tmp_path: Path):
    good = {"bom.png": b"x", "bom.txt": b"\xef\xbb\xbf a cat\r\n"}
    bad = {
        "empty.png": b"x",
        "empty.txt": b" \n\t",
        "latin.png": b"x",
        "latin.txt": b"caf\xe9",
        "nul.png": b"x",
        "nul.txt": b"a\0b",
        "pair.png": b"x",
        "nopic.txt": b"x",
        "zero.png": b"",
        "zero.txt": b"x",
        "meta.png": b"x",
        "meta.txt": b"x",
        "meta.json": b"[1]",
        "meta2.png": b"x",
        "meta2.txt": b"x",
        "meta2.json": b"{",
        "half.png": b"x",
        "half.txt": b"x",
        "half.json": rb'{"c": "a dog \ud83d"}',
        "escaped.png": b"x",
        "escaped.txt": b"x",
        "escaped.json": rb'{"c": "a\u0000b"}',
        "label.png": b"x",
        "label.txt": b"x",
        "label.cls": b" \n",
    }
    tar = write_tar(tmp_path / "bad.tar", good | bad)
    shards = IndexedShards([tar])
    assert shards.read(0).caption == "a cat"
    expected = [
        ("empty", "caption is empty"),
        ("latin", r"not UTF-8 \(byte 3\)"),
        ("nul", "NUL"),
        ("pair", "no caption"),
        ("nopic", "no image"),
        ("zero", "empty file"),
        ("meta", "list instead of an object"),
        ("meta2", "not JSON"),
        ("half", "not JSON .*surrogates"),
        ("escaped", "NUL"),
        ("label", "label is empty"),
    ]
    assert len(shards) == 1 + len(expected)
    for i, (key, what) in enumerate(expected, start=1):
        with pytest.raises(DataError, match=what) as caught:
            shards.read(i)
        assert caught.value.where == f"{tar}, key {key!r}"


def test_captions_can_be_optional(tmp_path: Path):
    tar = write_tar(
        tmp_path / "a.tar",
        {"a.webp": b"x", "a.cls": b"3\n", "b.jpg": b"y", "c.jpg": b"z", "c.txt": b" ", "c.cls": b" dog\n"},
    )
    shards = IndexedShards([tar], require_caption=False)
    assert shards.read(0) == RawSample("a.tar/a", b"x", None, None, 3)
    assert shards.read(1) == RawSample("a.tar/b", b"y", None, None, None)
    assert shards.read(2) == RawSample("a.tar/c", b"z", "", None, "dog")


def test_metadata_without_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tar = write_tar(tmp_path / "a.tar", {"a.png": b"x" * 9999, "a.txt": b"t", "a.json": b'{"n": 1}', "a.cls": b"4"})
    shards = IndexedShards([tar])
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset))
    assert shards.read(0, image=False) == RawSample("a.tar/a", b"", "t", {"n": 1}, 4)
    assert shards.label(0) == 4
    assert max(sizes) < 9999


def test_rot_and_changes_are_told_with_shard_and_key(paths: list[Path]):
    offset, size = build_index(paths[1]).locate(2)["png"]
    stat = paths[1].stat()
    data = bytearray(paths[1].read_bytes())
    data[offset + size // 2] ^= 4
    paths[1].write_bytes(data)
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # rot leaves the time alone
    assert IndexedShards(paths).read(6)
    with pytest.raises(SampleError, match="hash") as caught:
        IndexedShards(paths, verify=True).read(6)
    assert caught.value.where == f"{paths[1]}, key 'd/key6'"
    assert IndexedShards(paths, verify=True).read(5)
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(SampleError, match="hash"):  # a shard that changed is verified in any case
        IndexedShards(paths).read(6)


def test_what_a_tar_had_lost_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = {f"k{i}.{field}": b"x" * 600 for i in range(4) for field in ("jpg", "txt")}
    tar = write_tar(tmp_path / "a.tar", files | {"double.jpg": b"1", "lonely.jpg": b"2"})
    data = bytearray(tar.read_bytes())
    data[3 * 1536] ^= 1  # the header of k1.txt
    tar.write_bytes(data)
    for _ in range(2):
        lost = IndexedShards([tar]).lost()
        assert [(error.cause, error.key) for error in lost] == [("damaged", "")]
        assert lost[0].where == str(tar)
        assert "bytes 3072 to 6144 are lost" in lost[0].what
        assert "samples of the shards are lost (1 damaged)" in caplog.text
    tar.write_bytes(data[:8000])  # what changes afterwards is told when it is read, and not once more
    shards = IndexedShards([tar])
    assert [error.cause for error in shards.lost()] == ["damaged"]
    assert [shards.key(i) for i in range(len(shards))] == [
        "a.tar/k0",
        "a.tar/k2",
        "a.tar/k3",
        "a.tar/double",
        "a.tar/lonely",
    ]


def test_missing_shards_damaged_indexes_and_no_shards(paths: list[Path], tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        IndexedShards([*paths, tmp_path / "none.tar"])
    index_path(paths[0]).write_bytes(index_path(paths[0]).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        IndexedShards(paths)
    with pytest.raises(UsageError, match="no shards"):
        IndexedShards([])


def test_fingerprint_is_of_the_content(paths: list[Path], tmp_path: Path):
    fingerprint = IndexedShards(paths).fingerprint()
    (tmp_path / "moved").mkdir()
    moved = [path.rename(tmp_path / "moved" / path.name) for path in paths]
    assert IndexedShards(moved).fingerprint() == fingerprint
    os.utime(moved[0], ns=(5, 5))
    assert IndexedShards(moved).fingerprint() == fingerprint
    assert IndexedShards(moved[::-1]).fingerprint() != fingerprint
    data = bytearray(moved[0].read_bytes())
    data[build_index(moved[0]).locate(0)["png"][0]] ^= 1
    moved[0].write_bytes(data)
    assert IndexedShards(moved).fingerprint() == fingerprint  # of what was indexed: the sample is left out
    build_index(moved[0])
    assert IndexedShards(moved).fingerprint() != fingerprint
