"""An index is built once, reused while its tar is unchanged, and remains authoritative if the tar changes."""

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from samples import write_tar

from data_tools.core.errors import CheckpointError, DataError, SampleError
from data_tools.tar import index as tar_index
from data_tools.tar.index import ShardIndex, build_index, index_path, open_index, open_indexes
from data_tools.tar.index_file import MAGIC
from data_tools.tar.reader import ShardReader

FILES = {f"k{i}.{field}": b"%d" % i * 700 for i in range(8) for field in ("jpg", "txt")}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = write_tar(tmp_path / "a.tar", FILES)
    build_index(path)
    return path


def delivered(index: ShardIndex) -> dict[str, bytes]:
    """Return the samples that can be read."""
    reader, found = ShardReader([index]), {}
    for i in range(len(index)):
        with contextlib.suppress(SampleError):
            found |= {f"{index.key(i)}.{field}": data for field, data in reader.fields(0, i).items()}
    return found


def later(tar: Path) -> None:
    """Change the modification time of the tar, as every write does."""
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 10**9))


def test_it_is_made_once(tar: Path, caplog: pytest.LogCaptureFixture):
    first = index_path(tar).stat()
    index = open_index(tar)
    assert list(index.keys()) == [f"k{i}" for i in range(8)]
    assert delivered(index) == FILES
    assert index_path(tar).stat() == first
    assert {path.name for path in tar.parent.iterdir()} == {"a.tar", "a.tar.idx"}
    assert caplog.text == ""


def test_a_touched_or_copied_tar_keeps_its_index(tar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    later(tar)
    assert delivered(open_index(tar)) == FILES
    assert open_index(tar).header["tar_mtime_ns"] == tar.stat().st_mtime_ns
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "a.tar"
    shutil.copy(tar, copy)
    shutil.copy(index_path(tar), index_path(copy))
    assert open_index(copy).header["content_sha256"] == open_index(tar).header["content_sha256"]
    assert caplog.text == ""


def test_the_same_samples_at_other_places(tar: Path, caplog: pytest.LogCaptureFixture):
    write_tar(tar, {"__readme__": b"x" * 5000} | FILES)
    later(tar)
    before = ShardIndex(tar).locate(0)
    index = open_index(tar)
    assert index.locate(0) != before
    assert delivered(index) == FILES
    assert delivered(ShardIndex(tar)) == FILES
    assert caplog.text == ""


@pytest.mark.parametrize("more", [{"new.jpg": b"x", "new.txt": b"y"}, {"k7.json": b"{}"}])
def test_added_samples_are_indexed_and_logged(tar: Path, caplog: pytest.LogCaptureFixture, more: dict[str, bytes]):
    write_tar(tar, FILES | more)
    later(tar)
    assert delivered(open_index(tar)) == FILES | more
    assert "samples or fields were added or reordered" in caplog.text
    caplog.clear()
    assert delivered(open_index(tar)) == FILES | more
    assert caplog.text == ""


def test_another_order_is_said(tar: Path, caplog: pytest.LogCaptureFixture):
    write_tar(tar, dict(sorted(FILES.items(), reverse=True)))
    later(tar)
    assert next(open_index(tar).keys()) == "k7"
    assert "reordered: 8 samples, now 8" in caplog.text


def test_where_samples_change_the_index_stays_the_truth(tar: Path, caplog: pytest.LogCaptureFixture):
    content = ShardIndex(tar).header["content_sha256"]
    kept = index_path(tar).read_bytes()
    rest = {name: data for name, data in FILES.items() if name[:2] not in ("k0", "k3")}
    write_tar(tar, {"k0.jpg": FILES["k0.jpg"], "k0.txt": b"another caption"} | rest)
    later(tar)
    index = open_index(tar)
    assert len(index) == 8  # numbers and order are those of before
    assert (index.header["content_sha256"], index.header["changed"]) == (content, 2)
    assert delivered(index) == rest
    assert [problem.key for problem in index.problems() if problem.cause == "hash"] == ["k0", "k3"]
    assert f"{tar} has changed since it was indexed: 2 of 8 samples are missing or differ" in caplog.text
    assert f"mmvit-data index --rebuild {tar}" in caplog.text
    assert index_path(tar).read_bytes() == kept
    assert delivered(pickle.loads(pickle.dumps(index))) == delivered(index)
    assert len(open_indexes([tar], rebuild=True)[0]) == 7


def test_damage_after_indexing_costs_only_what_it_hits(tar: Path, caplog: pytest.LogCaptureFixture):
    data = tar.read_bytes()
    in_header = bytearray(data)
    in_header[4 * 1536] ^= 1
    tar.write_bytes(in_header)
    later(tar)
    assert delivered(open_index(tar)) == FILES  # a scan alone would lose two samples
    assert "there is damage, but all 8 samples are intact" in caplog.text
    tar.write_bytes(data[: 9 * 1536 + 600])
    later(tar)
    assert delivered(open_index(tar)) == dict(list(FILES.items())[:8])
    assert "4 of 8 samples are missing" in caplog.text


def test_an_index_finds_the_one_sample_that_a_scan_does_not(tmp_path: Path):
    tar = write_tar(tmp_path / "one.tar", {"a.txt": b"caption"})
    build_index(tar)
    tar.write_bytes(b"\xff" + tar.read_bytes()[1:])
    later(tar)
    assert delivered(open_index(tar)) == {"a.txt": b"caption"}


def test_another_tar_under_the_same_name(tar: Path):
    write_tar(tar, {name: b"other" + data for name, data in FILES.items()})
    later(tar)
    with pytest.raises(CheckpointError, match="not the shard that was indexed: all of its 8 samples") as caught:
        open_index(tar)
    assert caught.value.exit_code == 4
    assert caught.value.where == str(tar)
    assert f"mmvit-data index --rebuild {tar}" in caught.value.hint


def test_an_index_of_another_version_is_refused_with_the_command_that_makes_it_again(tar: Path):
    new = index_path(tar).read_bytes()
    for version in (b"1", b"3"):
        index_path(tar).write_bytes(new.replace(MAGIC, b"MMVIT-TAR-INDEX " + version + b"\n"))
        for opened in (lambda: open_index(tar), lambda: open_indexes([tar])):
            with pytest.raises(CheckpointError, match=f"version {version.decode()} of the format") as caught:
                opened()
            assert f"mmvit-data index --rebuild {tar}" in caught.value.hint
    open_indexes([tar], rebuild=True)
    assert index_path(tar).read_bytes() == new


def test_a_damaged_index_is_refused_and_kept(tar: Path):
    damaged = index_path(tar).read_bytes()[:-1]
    index_path(tar).write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        open_indexes([tar])
    assert index_path(tar).read_bytes() == damaged


def test_missing_shards(tar: Path, tmp_path: Path):
    for opened in (open_index, build_index, lambda place: open_indexes([tar, place])):
        with pytest.raises(DataError, match="does not exist") as caught:
            opened(tmp_path / "none.tar")
        assert caught.value.where == str(tmp_path / "none.tar")
    tar.unlink()
    with pytest.raises(DataError, match="does not exist"):
        open_index(tar)


@pytest.mark.parametrize("number", [13, 28, 30])
def test_where_it_cannot_be_written_it_is_kept_in_memory(
    tar: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    index_path(tar).unlink()

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("data_tools.core.files.os.fsync", refuse)
    index = open_index(tar)
    assert f"cannot be written ({os.strerror(number)}); the index is kept in memory" in caplog.text
    assert [path.name for path in tar.parent.iterdir()] == ["a.tar"]
    assert delivered(pickle.loads(pickle.dumps(index))) == FILES


def test_many_are_made_at_once_and_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tars = [write_tar(tmp_path / f"{i}.tar", {f"{i}.txt": b"x"}) for i in range(5)]
    build_index(tars[3])
    together = threading.Barrier(2, timeout=20)
    scan = tar_index.scan_tar
    threads = set()

    def scan_with_another(tar: Path) -> object:
        together.wait()  # passes only when two are made at the same time
        threads.add(threading.get_ident())
        return scan(tar)

    monkeypatch.setattr(tar_index, "scan_tar", scan_with_another)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [index.key(0) for index in open_indexes(tars)] == ["0", "1", "2", "3", "4"]
    assert len(threads) >= 2
    assert [index.key(0) for index in open_indexes(tars)] == ["0", "1", "2", "3", "4"]


def test_processes_make_what_threads_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar_index, "_MANY_BYTES", 0)
    monkeypatch.setattr(tar_index, "build_index", None)  # nothing is made in this process
    tars = [write_tar(tmp_path / f"{i}.tar", {f"{i}.txt": b"x"}) for i in range(3)]
    indexes = open_indexes(tars, num_workers=2, engine="local")
    assert [index.key(0) for index in indexes] == ["0", "1", "2"]
    assert all(index_path(tar).exists() for tar in tars)
    broken = [tmp_path / "4.tar", tmp_path / "5.tar"]
    for path in broken:
        path.write_bytes(b"no tar")
    with pytest.raises(DataError, match="no sample"):
        open_indexes([*tars, *broken], num_workers=2, engine="local")


def test_processes_that_make_the_same_index_do_not_hurt_each_other(tar: Path):
    index_path(tar).unlink()
    script = "import sys\nfrom data_tools.tar.index import build_index\n"
    script += "for _ in range(20):\n    build_index(sys.argv[1]).key(0)\n"
    commands = [[sys.executable, "-c", script, str(tar)] for _ in range(3)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    assert [(one.communicate(timeout=60)[1], one.returncode) for one in running] == [(b"", 0)] * 3
    assert delivered(open_index(tar)) == FILES
    assert {path.name for path in tar.parent.iterdir()} == {"a.tar", "a.tar.idx"}


def test_problems_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    tar = write_tar(tmp_path / "a.tar", FILES | {"x.v1.jpg": b"x", "lonely.txt": b"x"})
    index = build_index(tar)
    assert index.problem_counts == {"dotted-name": 1, "missing-field": 1}
    assert [(problem.cause, problem.key) for problem in ShardIndex(tar).problems()] == [
        ("dotted-name", "x"),
        ("missing-field", "lonely"),
    ]
