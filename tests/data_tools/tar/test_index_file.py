"""The index file is the same for the same tar on every machine, and every damaged byte is detected."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from data_tools.core.errors import CheckpointError
from data_tools.tar.index import ShardIndex, index_path
from data_tools.tar.index_file import MAGIC, index_bytes
from data_tools.tar.scan import Member, Problem, ScannedTar


def scan(**changes: object) -> ScannedTar:
    samples = [
        {"txt": Member(512, 3, hashlib.sha256(b"cat").digest())},
        {
            "txt": Member(1536, 3, hashlib.sha256(b"dog").digest()),
            "png": Member(2560, 1, hashlib.sha256(b"x").digest()),
        },
    ]
    problems = [Problem("missing-field", 512, "a", "it has no image")]
    whole = ScannedTar(10_240, 10**18, ["a", "\uac1c"], samples, Counter({"exe": 2}), problems)
    return whole._replace(**changes)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    index_path(path).write_bytes(index_bytes(scan()))
    return path


def test_index_bytes_are_a_promise():
    digest = hashlib.sha256(index_bytes(scan())).hexdigest()
    assert digest == "5b32d7798313548df265637182ab980b872153985f23e199aadbd10c96d09f33"


def test_everything_comes_back(tar: Path):
    index = ShardIndex(tar)
    assert index.scanned() == scan()
    assert (len(index), index.fields, index.ignored) == (2, ("png", "txt"), {"exe": 2})
    assert index.problem_counts == {"missing-field": 1}
    assert (index.key(1), index.locate(1)) == ("\uac1c", {"png": (2560, 1), "txt": (1536, 3)})
    assert index.digest(0, "txt") == hashlib.sha256(b"cat").digest()
    for i in (-1, len(index)):
        for call in (index.key, index.locate, lambda j: index.digest(j, "txt")):
            with pytest.raises(IndexError):
                call(i)


def test_every_damaged_byte_is_found(tar: Path):
    whole = index_path(tar).read_bytes()
    line_end = whole.index(b"\n", len(MAGIC)) + 1
    body = line_end + -line_end % 64
    for place in [*range(0, line_end, 7), *range(body, len(whole), 7), len(whole) - 1]:
        index_path(tar).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            ShardIndex(tar).locate(0)
        assert caught.value.hint == f"mmvit-data index --rebuild {tar}"
        assert caught.value.where == str(index_path(tar))
    for size in range(0, len(whole), 11):
        index_path(tar).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            ShardIndex(tar)


def test_opening_reads_the_header_only(tar: Path):
    whole = index_path(tar).read_bytes()
    index_path(tar).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    index = ShardIndex(tar)
    assert len(index) == 2
    index_path(tar).write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match="damaged"):
        index.key(0)


def test_the_header_stays_small(tar: Path):
    suffixes = Counter({f"{i:03d}" * 20: 2 if i == 7 else 1 for i in range(300)})
    index = ShardIndex(tar, index_bytes(scan(ignored=suffixes)))
    assert index.ignored["007" * 13 + "0"] == 2
    assert index.ignored["(others)"] == 200
    assert sum(index.ignored.values()) == 301
    assert len(str(index.header)) < 20_000


def test_the_content_hash_is_of_keys_and_bytes(tmp_path: Path):
    def content(**changes: object) -> str:
        return ShardIndex(tmp_path / "a.tar", index_bytes(scan(**changes))).header["content_sha256"]

    moved = [
        {field: member._replace(offset=member.offset + 512) for field, member in s.items()} for s in scan().samples
    ]
    assert content(samples=moved, mtime_ns=5, problems=[], size=20_480) == content()
    assert content(keys=["a", "b"]) != content()
    assert content(samples=scan().samples[::-1]) != content()
    assert content(samples=[{"txt": scan().samples[0]["txt"]}] * 2) != content()


def test_a_file_from_before_1970(tar: Path):
    assert ShardIndex(tar, index_bytes(scan(mtime_ns=-(10**9)))).header["tar_mtime_ns"] == -(10**9)
