"""The index finds in a tar what tarfile finds, and refuses what would lose samples in silence."""

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset

from data_tools.errors import CheckpointError, DataError
from data_tools.tar_index import build_index, index_path, open_index

LONG = "folder-" * 20 + "/" + "k" * 150
SAMPLES = {
    "plain": {"png": b"\x89PNG one", "txt": b"a cat", "json": b'{"a": 1}'},
    "sub/folder.v2/b": {"png": b"x" * 5000, "txt": b"second"},
    "\uc774\ubaa8\uc9c0-\u00e9": {"png": b"unicode", "txt": "\uac1c".encode(), "cls": b"7"},
    LONG: {"png": b"long name", "txt": b"third"},
    "only-text": {"txt": b"no picture"},
}


def members() -> dict[str, bytes]:
    return {f"{key}.{field}": data for key, fields in SAMPLES.items() for field, data in fields.items()}


def write_tar(
    path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_with_webdataset(path: Path) -> Path:
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, format="PAX_FORMAT") as writer:
        for key, fields in SAMPLES.items():
            writer.write({"__key__": key, **fields})
    return path


def write_with_gnu_tar(path: Path, tar_format: str) -> Path:
    source = path.parent / "source"
    for name, data in members().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    command = ["tar", "--sort=name", f"--format={tar_format}", "-cf", str(path), "-C", str(source), "."]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    return path


def write_by(maker: str, path: Path) -> Path:
    if maker == "webdataset":
        return write_with_webdataset(path)
    if maker.startswith("tar-"):
        return write_with_gnu_tar(path, maker.removeprefix("tar-"))
    return write_tar(path, members(), getattr(tarfile, maker))


@pytest.mark.parametrize("maker", ["webdataset", "PAX_FORMAT", "GNU_FORMAT", "tar-gnu", "tar-pax"])
def test_index_equals_tarfile(tmp_path: Path, maker: str):
    tar = write_by(maker, tmp_path / "a.tar")
    index = build_index(tar)
    found = {}
    with tar.open("rb") as file:
        for i, key in enumerate(index.keys()):
            for field, (offset, size) in index.locate(i).items():
                data = os.pread(file.fileno(), size, offset)
                assert index.digest(i, field) == hashlib.sha256(data).digest()
                found[f"{key.removeprefix('./')}.{field}"] = data
    with tarfile.open(tar) as archive:
        expected = {info.name.removeprefix("./"): archive.extractfile(info).read() for info in archive if info.isreg()}
    assert found == expected == members()
    assert len(index) == len(SAMPLES)
    assert index.fields == ("cls", "json", "png", "txt")
    if not maker.startswith("tar-"):
        assert list(index.keys()) == list(SAMPLES)


def test_keys_group_as_webdataset_groups(tmp_path: Path):
    files = {
        "__meta__": b"skipped",
        "a.b/c.JPG": b"1",
        "a.b/c.txt": b"1",
        "d.png": b"2",
        "d.seg.png": b"2",
        "noext": b"3",
        ".hidden.txt": b"4",
        "e.exe": b"5",
        "f.txt": b"6",
    }
    tar = write_tar(tmp_path / "a.tar", files)
    index = build_index(tar)
    assert [(key, sorted(index.locate(i))) for i, key in enumerate(index.keys())] == [
        ("a.b/c", ["jpg", "txt"]),
        ("d", ["png"]),
        ("f", ["txt"]),
    ]
    assert index.ignored == {"(no suffix)": 2, "exe": 1, "seg.png": 1}
    with tar.open("rb") as file:
        members = ({**member, "__url__": ""} for member in webdataset.tariterators.tar_file_iterator(file))
        keys = [sample["__key__"] for sample in webdataset.tariterators.group_by_keys(members)]
    assert keys == ["a.b/c", "d", "e", "f"]  # e has no field that is used here


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["a.png", "b.png", "a.txt", "b.txt"], r"key 'a' are not adjacent: one is at byte 0"),
        (["a.png", "other.exe", "a.txt"], "not adjacent"),
        (["a.txt", "a.txt"], "field 'txt' twice"),
        (["a.JPG", "a.jpg"], "field 'jpg' twice"),
        (["a.exe", "b"], r"no sample .files of other kinds: 1 x .exe, 1 x .\(no suffix\)"),
        ([], "no sample"),
    ],
)
def test_members_that_form_no_clean_samples(tmp_path: Path, names: list[str], what: str):
    tar = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(DataError, match=what) as caught:
        build_index(tar)
    assert str(tar) in str(caught.value.where)
    assert caught.value.mend
    assert not index_path(tar).exists()


def test_every_truncation_is_found(tmp_path: Path):
    whole = write_tar(tmp_path / "whole.tar", {f"{i:03d}.txt": b"x" * 700 for i in range(12)}).read_bytes()
    end_of_data = 12 * (512 + 1024)
    tar = tmp_path / "cut.tar"
    for size in [*range(0, end_of_data + 512, 256), 1, 513, 700, end_of_data - 1, end_of_data + 511]:
        tar.write_bytes(whole[:size])
        with pytest.raises(DataError):
            build_index(tar)
    tar.write_bytes(whole[: end_of_data - 600])
    with pytest.raises(DataError, match=r"member '011.txt' at byte 16896 is cut"):
        build_index(tar)
    for size in (end_of_data + 512, end_of_data + 513, end_of_data + 1024):  # all data and an end mark are there
        tar.write_bytes(whole[:size])
        assert len(build_index(tar)) == 12


def test_damaged_headers_and_zero_holes_are_found(tmp_path: Path):
    whole = write_tar(tmp_path / "whole.tar", {f"{i:03d}.txt": b"x" * 700 for i in range(12)}).read_bytes()
    tar = tmp_path / "bad.tar"
    for sample in range(11):  # the last one's end cannot be told from the end of the tar
        start = sample * (512 + 1024)
        for hole in (b"\xff", bytes(512), bytes(1536)):
            tar.write_bytes(whole[:start] + hole + whole[start + len(hole) :])
            with pytest.raises(DataError) as caught:
                build_index(tar)
            assert str(tar) in str(caught.value.where)
            if sample > 0 and hole == b"\xff":
                assert caught.value.what == "the shard is damaged: the header here is damaged"
                assert caught.value.where == f"{tar}, byte {start}"
    tar.write_bytes(whole + whole)
    with pytest.raises(DataError, match="data after the end mark"):
        build_index(tar)
    tar.write_bytes(whole[: 6 * 1536] + bytes(2 << 20))  # a file laid out in full, downloaded in part
    with pytest.raises(DataError, match="not part of any member"):
        build_index(tar)
    tar.write_bytes(bytes(10240))
    with pytest.raises(DataError, match="no sample"):
        build_index(tar)


def test_compressed_tar_is_refused_with_the_command(tmp_path: Path):
    tar = tmp_path / "a.tar.gz"
    tar.write_bytes(gzip.compress(write_tar(tmp_path / "a.tar", members()).read_bytes()))
    with pytest.raises(DataError, match="compressed") as caught:
        open_index(tar)
    assert caught.value.mend == f"gzip -d {tar}"


def test_missing_shard(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        open_index(tmp_path / "a.tar")
    tar = write_tar(tmp_path / "b.tar", members())
    build_index(tar)
    tar.unlink()
    with pytest.raises(DataError, match="does not exist"):
        open_index(tar)


def test_open_builds_once_and_again_when_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tar = write_tar(tmp_path / "a.tar", members())
    open_index(tar)
    first = index_path(tar).stat()
    assert len(open_index(tar)) == len(SAMPLES)
    assert index_path(tar).stat().st_ino == first.st_ino
    assert caplog.text == ""

    os.utime(tar, ns=(1, 1))
    assert len(open_index(tar)) == len(SAMPLES)
    assert "made again; its samples are the same" in caplog.text

    write_tar(tar, {"new.txt": b"new"})
    assert list(open_index(tar).keys()) == ["new"]
    assert "made again; its samples have changed" in caplog.text


def test_every_damaged_byte_of_an_index_is_found(tmp_path: Path):
    tar = write_tar(tmp_path / "a.tar", members())
    build_index(tar)
    whole = index_path(tar).read_bytes()
    body = build_index(tar).header["body_offset"]
    padding = range(whole.index(b"\n", whole.index(b"\n") + 1) + 1, body)
    for place in [*range(0, body, 7), *range(body, len(whole), 13), len(whole) - 1]:
        if place in padding:
            continue
        index_path(tar).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            open_index(tar).locate(0)
        assert caught.value.mend == f"mmvit-data index --rebuild {tar}"
    for size in (0, 5, 100, body, len(whole) - 1):
        index_path(tar).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            open_index(tar)


def test_opening_reads_the_header_only(tmp_path: Path):
    tar = write_tar(tmp_path / "a.tar", members())
    build_index(tar)
    whole = index_path(tar).read_bytes()
    index_path(tar).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(open_index(tar)) == len(SAMPLES)


def test_index_bytes_are_a_promise(tmp_path: Path):
    tar = write_tar(tmp_path / "a.tar", {"a.txt": b"cat", "b.txt": b"dog", "b.png": b"x"})
    os.utime(tar, ns=(10**9, 10**9))
    build_index(tar)
    digest = hashlib.sha256(index_path(tar).read_bytes()).hexdigest()
    assert digest == "4fccb8c406f9423274febbd1ed81cb22a59f96cd3c7bc988052e5562a1771fa7"


def test_read_only_folder_keeps_the_index_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("data_tools.tar_index.write_atomic", refuse)
    tar = write_tar(tmp_path / "a.tar", members())
    index = pickle.loads(pickle.dumps(open_index(tar)))
    assert list(index.keys()) == list(SAMPLES)
    assert index.locate(0).keys() == {"png", "txt", "json"}
    assert "kept in memory" in caplog.text
    assert not index_path(tar).exists()


def test_keys_that_are_not_utf8_stay_text(tmp_path: Path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        info = tarfile.TarInfo("caf\u00e9.txt")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    assert list(build_index(tar).keys()) == ["caf\\xe9"]


def test_sample_numbers_out_of_range(tmp_path: Path):
    index = build_index(write_tar(tmp_path / "a.tar", members()))
    for i in (-1, len(index)):
        for call in (index.key, index.locate, lambda j: index.digest(j, "txt")):
            with pytest.raises(IndexError):
                call(i)
