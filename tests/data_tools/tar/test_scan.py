"""Members are grouped as in webdataset; split samples are joined if possible, and every loss is reported."""

import gzip
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import webdataset
from samples import write_tar

from data_tools.core.errors import CAUSES, DataError
from data_tools.tar.scan import NOTICES, ScannedTar, scan_tar

Scan = Callable[[Sequence[tuple[str, bytes]]], ScannedTar]
BLOCK = 512


@pytest.fixture
def scanned(tmp_path: Path) -> Scan:
    return lambda files: scan_tar(write_tar(tmp_path / "a.tar", files))


def pair(key: str, n: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", b"picture %d" % n), (f"{key}.txt", b"caption %d" % n)]


def fields(scan: ScannedTar) -> dict[str, list[str]]:
    return {key: sorted(sample) for key, sample in zip(scan.keys, scan.samples, strict=True)}


def problems_of(scan: ScannedTar) -> list[tuple[str, str]]:
    assert all(problem.cause in CAUSES or problem.cause in NOTICES for problem in scan.problems)
    return [(problem.cause, problem.key) for problem in scan.problems]


def test_keys_group_as_webdataset_groups(scanned: Scan, tmp_path: Path):
    files = ["__meta__", "a.b/c.JPG", "a.b/c.txt", "d.png", "d.seg.png", "noext", ".hidden.txt", "e.exe", "f.txt"]
    scan = scanned([(name, b"x") for name in files])
    assert fields(scan) == {"a.b/c": ["jpg", "txt"], "d": ["png"], "f": ["txt"]}
    assert scan.ignored == {"(no suffix)": 2, "exe": 1, "seg.png": 1}
    with (tmp_path / "a.tar").open("rb") as file:
        members = ({**member, "__url__": ""} for member in webdataset.tariterators.tar_file_iterator(file))
        keys = [sample["__key__"] for sample in webdataset.tariterators.group_by_keys(members)]
    assert keys == ["a.b/c", "d", "e", "f"]  # e has no field that is used here


def test_hidden_files_belong_to_no_sample(scanned: Scan):
    scan = scanned(
        [("a/._1.jpg", b"mac"), ("a/1.jpg", b"x"), ("a/._1.txt", b"mac"), ("a/1.txt", b"y"), ("./.b.jpg", b"")]
    )
    assert fields(scan) == {"a/1": ["jpg", "txt"]}
    assert scan.problems == []
    assert scan.ignored == {"(no suffix)": 3}


def test_members_that_lie_apart_are_joined(scanned: Scan):
    scan = scanned([pair("a", 1)[0], *pair("b", 2), pair("c", 3)[0], pair("a", 1)[1], ("x.exe", b""), pair("c", 3)[1]])
    assert fields(scan) == {"a": ["jpg", "txt"], "b": ["jpg", "txt"], "c": ["jpg", "txt"]}
    assert problems_of(scan) == [("non-adjacent", "a"), ("non-adjacent", "c")]
    assert "its other members are at byte 512" in scan.problems[0].detail
    assert scan.samples[0]["txt"].offset > scan.samples[1]["txt"].offset


@pytest.mark.parametrize(
    ("files", "keys", "problems"),
    [
        ([*pair("a"), pair("a")[1]], ["a"], [("copy", "a")]),
        ([*pair("a"), *pair("b"), *pair("a")], ["a", "b"], [("copy", "a")]),
        ([*pair("a"), ("a.txt", b"other")], [], [("double-field", "a")]),
        ([("a.JPG", b"one"), ("a.jpg", b"other"), *pair("b")], ["b"], [("double-field", "a")]),
        ([*pair("a", 1), *pair("b"), *pair("a", 2)], ["a", "b"], [("double-key", "a")]),
        ([*pair("a", 1), *pair("b"), ("a.txt", b"other")], ["a", "b"], [("double-key", "a")]),
        ([("a.v1.jpg", b"1"), ("a.v2.jpg", b"2"), *pair("b")], ["b"], [("dotted-name", "a")]),
        ([*pair("a"), ("a.seg.png", b"mask")], ["a"], [("ignored-dotted", "a")]),
    ],
)
def test_double_members_and_dotted_names(scanned: Scan, files: list, keys: list, problems: list):
    files = [*files, *pair("last", 9)]
    scan = scanned(files)
    assert scan.keys == [*keys, "last"]
    assert problems_of(scan) == problems
    assert all(problem.detail for problem in scan.problems)


def test_of_two_samples_with_one_key_the_first_is_used(scanned: Scan):
    first, *_ = scanned(pair("a", 1)).samples
    scan = scanned([*pair("a", 1), *pair("b"), *pair("a", 2)])
    assert scan.samples[0] == first
    assert f"is at byte {first['jpg'].offset}" in scan.problems[0].detail


def test_missing_fields_are_reported_and_images_are_one_kind(scanned: Scan):
    kinds = ["jpg", "png", "webp", "jpeg"]
    files = [(f"{i}.{field}", b"x") for i in range(8) for field in (kinds[i % 4], "txt")]
    assert scanned(files).problems == []
    scan = scanned([*files, ("8.txt", b"x"), ("9.jpg", b"x"), ("9.json", b"{}")])
    assert problems_of(scan) == [("missing-field", "8"), ("missing-field", "9")]
    assert [problem.detail for problem in scan.problems] == ["it has no image", "it has no txt"]
    assert len(scan.keys) == 10  # a run may still use an image without a caption


def test_damage_takes_the_sample_that_it_tears_and_no_other(tmp_path: Path):
    whole = [member for i in range(6) for member in pair(f"k{i}", i)]
    data = write_tar(tmp_path / "a.tar", whole).read_bytes()
    for place in range(1, len(whole)):
        damaged = bytearray(data)
        damaged[place * 2 * BLOCK] ^= 1  # in the header of a member
        (tmp_path / "b.tar").write_bytes(damaged)
        scan = scan_tar(tmp_path / "b.tar")
        torn = {place // 2, (place - 1) // 2}
        assert scan.keys == [f"k{i}" for i in range(6) if i not in torn]
        assert scan.problems[0].cause == "damaged"
        assert all(set(sample) == {"jpg", "txt"} for sample in scan.samples)


def test_truncation_loses_only_the_last_sample(tmp_path: Path):
    data = write_tar(tmp_path / "a.tar", [member for i in range(3) for member in pair(f"k{i}", i)]).read_bytes()
    for size, keys in ((5 * 1024, 2), (5 * 1024 + 100, 2), (5 * 1024 + 700, 3), (6 * 1024, 3), (6 * 1024 + 300, 3)):
        (tmp_path / "b.tar").write_bytes(data[:size])
        scan = scan_tar(tmp_path / "b.tar")
        assert len(scan.keys) == keys, size
        assert scan.problems[-1].cause in ("truncated", "damaged")
        assert "truncated" in [problem.cause for problem in scan.problems]


def test_many_odd_suffixes_are_counted(scanned: Scan):
    scan = scanned([*pair("a"), *((f"{i}.s{i}", b"") for i in range(150))])
    assert scan.ignored == Counter({f"s{i}": 1 for i in range(150)})


@pytest.mark.parametrize("files", [[], [("a.exe", b"x"), ("b", b"x")], [("a.tar.gz", b"x")]])
def test_a_shard_without_samples_is_refused(scanned: Scan, tmp_path: Path, files: list):
    with pytest.raises(DataError, match="the shard contains no sample") as caught:
        scanned(files)
    assert caught.value.where == str(tmp_path / "a.tar")
    assert "jpg" in caught.value.hint
    if files:
        assert "1 x ." in caught.value.what


def test_what_is_no_tar_is_refused_with_the_reason(tmp_path: Path):
    path = tmp_path / "a.tar"
    data = write_tar(path, pair("a")).read_bytes()
    path.write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match="compressed") as caught:
        scan_tar(path)
    assert caught.value.hint == f"gzip -d {path}"
    for content, reason in ((b"", "empty"), (bytes(10_240), "no sample"), (b"<html>" * 2000, "header is damaged")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            scan_tar(path)
    with pytest.raises(DataError, match="does not exist"):
        scan_tar(tmp_path / "none.tar")


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    path = write_tar(tmp_path / "a.tar", pair("a"))
    for name in ("pread", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data_tools.tar.byte_file.os.{name}", fail)
            with pytest.raises(DataError, match="cannot be read: Input/output error") as caught:
                scan_tar(path)
        assert caught.value.where == str(path)
        assert caught.value.hint
