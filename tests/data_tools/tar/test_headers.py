"""Every byte of a tar is a member, the end mark, or reported damage; iteration continues after damage."""

import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from samples import write_tar

from data_tools.tar import headers as tar_headers
from data_tools.tar.byte_file import LocalFile
from data_tools.tar.headers import Damage, Entry, Window, walk

BLOCK = 512
FILES = {
    "plain.jpg": b"\xff\xd8 picture" * 300,
    "plain.txt": b"a caption",
    "empty.txt": b"",
    "block.cls": b"7" * BLOCK,
    "folder.v2/sub/b.png": b"png",
    "exactly-100-bytes/" + "n" * 78 + ".txt": b"a name that fills its field",
    "prefix/" * 20 + "c.txt": b"a name that fits the prefix field",
}
MORE = {
    "long/" * 20 + "k" * 150 + ".jpg": b"a name that fits nowhere" * 50,
    "\u00e9t\u00e9/\uac1c?.txt": "\uac1c".encode(),
}


def member(name: str | bytes, data: bytes = b"", size: int | None = None, kind: bytes = b"0", **fields: bytes) -> bytes:
    """Return header and data of one member, optionally with a wrong size."""
    info = tarfile.TarInfo("x")
    info.size = len(data) if size is None else size
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:])
    name = name.encode() if isinstance(name, str) else name
    block[:100] = name.ljust(100, b"\0")
    for at, value in ((124, fields.get("size_field")), (257, fields.get("magic")), (345, fields.get("prefix"))):
        if value is not None:
            block[at : at + len(value)] = value
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * ord(" ") + sum(block[156:]))
    return bytes(block) + data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)


@pytest.fixture
def walked(tmp_path: Path) -> Callable[[bytes], list[Entry | Damage]]:
    def run(data: bytes) -> list[Entry | Damage]:
        path = tmp_path / "walked.tar"
        path.write_bytes(data)
        return list(walk(Window(LocalFile(path))))

    return run


def kept(found: list[Entry | Damage]) -> list[str]:
    """Return the names of the members outside all damage."""
    damages = [one for one in found if isinstance(one, Damage)]
    entries = [one for one in found if isinstance(one, Entry)]
    return [
        entry.name.decode()
        for entry in entries
        if not any(damage.offset < entry.data_offset < damage.stop for damage in damages)
    ]


def describe(found: list[Entry | Damage]) -> list[str]:
    """Return the names of members and the texts of damages."""
    return [one.detail if isinstance(one, Damage) else one.name.decode() for one in found]


def write_with_tar(path: Path, files: dict[str, bytes], *options: str) -> None:
    source = path.with_suffix(".source")
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    command = ["tar", *options, "-cf", str(path), "-C", str(source), "."]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})


def write_with_webdataset(path: Path, files: dict[str, bytes]) -> None:
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for name, data in files.items():
            key, _, field = name.rpartition(".")
            writer.write({"__key__": key, field: data})


WRITERS: dict[str, Callable[[Path], None]] = {
    "tarfile ustar": lambda path: write_tar(path, FILES, tarfile.USTAR_FORMAT),
    "tarfile gnu": lambda path: write_tar(path, FILES | MORE, tarfile.GNU_FORMAT),
    "tarfile pax": lambda path: write_tar(path, FILES | MORE, tarfile.PAX_FORMAT),
    "webdataset": lambda path: write_with_webdataset(path, FILES | MORE),
    "tar gnu": lambda path: write_with_tar(path, FILES | MORE, "--format=gnu", "--sort=name"),
    "tar gnu unsorted": lambda path: write_with_tar(path, FILES | MORE, "--format=gnu", "--label=a label", "-b128"),
    "tar pax": lambda path: write_with_tar(path, FILES | MORE, "--format=pax", "--sort=name"),
    "tar ustar": lambda path: write_with_tar(path, FILES, "--format=ustar"),
    "tar v7": lambda path: write_with_tar(path, dict(list(FILES.items())[:5]), "--format=v7"),
    "tar oldgnu": lambda path: write_with_tar(path, FILES | MORE, "--format=oldgnu", "--owner=n:4000000"),
}


@pytest.mark.parametrize("piece", [1 << 20, 700])
@pytest.mark.parametrize("writer", WRITERS)
def test_members_are_those_of_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, piece: int):
    monkeypatch.setattr(LocalFile, "piece", piece)
    monkeypatch.setattr(tar_headers, "_CHUNK", piece // BLOCK * BLOCK)
    path = tmp_path / "a.tar"
    WRITERS[writer](path)
    found = [entry for entry in walk(Window(LocalFile(path))) if entry.kind == b"0"]
    with tarfile.open(path) as archive:
        expected = [info for info in archive if info.isreg()]
        assert [(entry.name.decode(), entry.data_offset, entry.size) for entry in found] == [
            (info.name, info.offset_data, info.size) for info in expected
        ]
        contents = [archive.extractfile(info).read() for info in expected]
    assert [entry.sha256 for entry in found] == [hashlib.sha256(data).digest() for data in contents]
    assert len(found) >= 5


def test_names_that_are_not_utf8_and_sizes_in_base_256(walked):
    base_256 = b"\x80" + (700).to_bytes(11)
    found = walked(member(b"caf\xe9.txt", b"x" * 700, size_field=base_256) + member("b.txt", b"y") + END)
    assert [(one.name, one.size) for one in found] == [(b"caf\xe9.txt", 700), (b"b.txt", 1)]


def test_every_truncation_is_reported(walked):
    whole = b"".join(member(f"{i}.txt", b"x" * 700) for i in range(4)) + END
    data_end = len(whole) - len(END)
    for size in [*range(0, data_end + BLOCK, 128), 1, BLOCK + 1, data_end - 1, data_end + 513]:
        *entries, last = walked(whole[:size])
        assert isinstance(last, Damage), size
        assert last.truncated
        assert last.offset <= last.stop == size
        assert len(entries) == sum(size >= i * 1536 + BLOCK + 700 for i in range(4)), size
    for size in (data_end + BLOCK, data_end + 1024):  # all data and an end mark are there
        assert describe(walked(whole[:size])) == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert walked(b"") == [Damage(0, 0, "the file is empty", truncated=True)]
    assert "'3.txt' is truncated" in walked(whole[: data_end - 600])[-1].detail


@pytest.mark.parametrize("fault", [b"\xff", bytes(BLOCK), b"\xaa\x01" * 256], ids=["byte", "zeros", "noise"])
def test_a_damaged_header_costs_its_member_and_at_most_the_one_before(walked, fault: bytes):
    whole = b"".join(member(f"{i}.txt", b"x" * 700) for i in range(6)) + END
    for i in range(6):
        start = i * 1536
        found = walked(whole[:start] + fault + whole[start + len(fault) :])
        expected = [f"{j}.txt" for j in range(6) if j not in ((i,) if not fault.strip(b"\0") else (i - 1, i))]
        assert kept(found) == expected
        [damage] = [one for one in found if isinstance(one, Damage)]
        assert damage.offset <= start < damage.stop
        assert not damage.truncated


@pytest.mark.parametrize("shift", [1, 7, 511, 512, 700])
def test_iteration_continues_at_any_alignment(walked, shift: int):
    parts = [member(f"{i}.txt", b"x" * 700) for i in range(5)]
    inserted = walked(b"".join(parts[:2]) + b"\xaa" * shift + b"".join(parts[2:]) + END)
    assert kept(inserted) == ["0.txt", "2.txt", "3.txt", "4.txt"]
    removed = walked(b"".join(parts[:2]) + parts[2][:-shift] + b"".join(parts[3:]) + END)
    names = kept(removed)
    assert {"0.txt", "1.txt", "3.txt", "4.txt"} - {*names} <= {"2.txt"}
    assert any(isinstance(one, Damage) for one in removed)


@pytest.mark.parametrize("magic", [b"ustar  \0", b"ustar\x0000", bytes(8)], ids=["gnu", "ustar", "v7"])
@pytest.mark.parametrize("size", [0, 100, 690, 1536, 2560, 4096, 3000, 5000, 2**40, 2**80])
def test_a_wrong_size_with_a_right_checksum(walked, magic: bytes, size: int):
    """A size that is too small truncates the member, one that is too large includes the members after it."""
    field = b"\x80" + size.to_bytes(11) if size >= 8**11 else b"%011o\0" % size
    wrong = member("wrong.txt", b"x" * 700, magic=magic, size_field=field)
    rest = [member(f"{i}.txt", b"x" * 700, magic=magic) for i in range(4)]
    found = walked(rest[0] + wrong + b"".join(rest[1:]) + END)
    assert kept(found) == ["0.txt", "1.txt", "2.txt", "3.txt"]
    [damage] = [one for one in found if isinstance(one, Damage)]
    assert (damage.offset, damage.stop, damage.truncated) == (1536, 3072, False)


def test_a_tar_in_a_tar_is_a_member(walked):
    inner = member("inner.txt", b"x" * 600) + member("inner2.txt", b"y" * 600) + END
    assert describe(walked(member("a.tar", inner) + member("b.txt", b"z") + END)) == ["a.tar", "b.txt"]


def pax(name: str | bytes, *records: bytes) -> bytes:
    return member("PaxHeaders/x", b"".join(records), kind=b"x") + member(name, b"data")


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    size = len(rest) + 2
    return b"%d%s" % (size if len(str(size)) + len(rest) == size else size + 1, rest)


LONG = b"n" * 120 + b".txt"
SHORT = LONG[:100]


@pytest.mark.parametrize(
    "damaged",
    [
        pax(SHORT, record(b"pazh", LONG)),
        pax(SHORT, record(b"path", LONG)[:-1] + b"x"),
        pax(SHORT, b"9" + record(b"path", LONG)),
        pax(SHORT, b"x" + record(b"path", LONG)[1:]),
        pax(SHORT, record(b"path", LONG[:-5] + b"\0.txt")),
        pax(SHORT, record(b"mtime", b"1.5"), bytes(5), record(b"path", LONG)),
        pax(SHORT, b"9" * 5000),
        pax(SHORT, record(b"size", b"9" * 80)),
        pax(SHORT, record(b"size", b"-4")),
        pax(SHORT, b"1234567890 path=x\n"),
        member("././@LongLink", LONG, kind=b"L") + member(SHORT, b"data"),
        member("././@LongLink", LONG[:50] + b"\0" + LONG[51:] + b"\0", kind=b"L") + member(SHORT, b"data"),
        member("x", record(b"path", LONG), kind=b"x") + b"\xff" + member(SHORT, b"data")[1:],
        b"\xff" + pax(SHORT, record(b"path", LONG))[1:],
        b"\xff" + pax("short?.txt", record(b"path", "short\u00e9.txt".encode()))[1:],
        member("x", record(b"path", LONG), kind=b"x", size=2**50) + member(SHORT, b"data"),
        member("x", b"0" * ((1 << 20) + 1), kind=b"x") + member(SHORT, b"data"),
    ],
)
def test_a_damaged_long_name_never_gives_its_short_form(walked, damaged: bytes):
    found = walked(member("a.txt", b"a") + member("b.txt", b"b") + damaged + member("c.txt", b"c") + END)
    names = kept(found)
    assert names in (["a.txt", "b.txt", "c.txt"], ["a.txt", "c.txt"])
    assert any(isinstance(one, Damage) for one in found)


def test_headers_about_all_members_and_other_records(walked):
    everyone = member("pax_global_header", record(b"comment", b"made by git"), kind=b"g")
    odd = pax("short.txt", record(b"SCHILY.xattr.user.a", b"\xff\0="), record(b"mtime", b"1.5"), record(b"path", LONG))
    found = walked(everyone + odd + member("a", kind=b"5") + member("link", kind=b"2") + END)
    assert [(one.name, one.kind) for one in found] == [(LONG, b"0"), (b"a", b"5"), (b"link", b"2")]
    assert found[0].size == 4


def test_zeros_between_members_and_after_them(walked):
    parts = [member(f"{i}.txt", b"x" * 700) for i in range(3)]
    for gap in (BLOCK, 1024, 10_240 + 7):  # a hole, or one tar after the other in one file
        found = walked(parts[0] + bytes(gap) + parts[1] + parts[2] + END)
        assert describe(found) == ["0.txt", "zero bytes where a member should be", "1.txt", "2.txt"]
        assert (found[1].offset, found[1].stop) == (1536, 1536 + gap)
    hole = parts[0] + parts[1][:1000] + bytes(536 + 1024) + parts[2]  # it begins within a member, which is lost too
    assert kept(walked(hole + END)) == ["0.txt", "2.txt"]
    assert "zeros" in walked(parts[0] + bytes(2 << 20))[-1].detail  # laid out in full, downloaded in part
    assert "bytes after its end" in walked(parts[0][:-1] + b"x" + parts[1] + END)[0].detail


@pytest.mark.parametrize("options", [("--format=gnu",), ("--format=pax",), ("--format=pax", "--sparse-version=0.1")])
def test_sparse_members_are_reported(tmp_path: Path, options: tuple[str, ...]):
    source = tmp_path / "a.source"
    source.mkdir()
    with (source / "b.jpg").open("wb") as file:
        for place in range(0, 40 << 20, 1 << 20):  # so many holes that the old format needs more headers
            file.seek(place)
            file.write(b"data")
    path = tmp_path / "a.tar"
    write_with_tar(path, {"a.jpg": b"x" * 600, "c.jpg": b"y" * 600}, "-S", "--sort=name", *options)
    found = [one for one in walk(Window(LocalFile(path))) if isinstance(one, Damage) or one.kind == b"0"]
    assert kept(found) == ["./a.jpg", "./c.jpg"]
    assert any("b.jpg" in one.detail and "sparse" in one.detail for one in found if isinstance(one, Damage))


def test_fields_that_are_no_numbers(walked):
    for field in (b"-0000000777\0", b"+0000000777\0", b"0x000000001\0", b"1_0        \0", b"\xff" * 12):
        found = walked(member("a.txt", b"a") + member("b.txt", b"b", size_field=field) + member("c.txt", b"c") + END)
        assert isinstance(found[-1], Entry), field
        assert found[-1].name == b"c.txt"
        assert any(isinstance(one, Damage) for one in found) or found[1].size in (0o777, 0o10)


def test_a_tar_made_to_keep_its_reader_busy_is_given_up(walked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar_headers, "_MAX_REREAD", 0)
    monkeypatch.setattr(LocalFile, "piece", 2048)
    data = b"".join(member("a.txt", b"x" * 100, size=50_000) + b"x" * 100 for _ in range(200))
    found = walked(data + END)
    assert found[-1].detail == "it is damaged in too many places"
    assert found[-1].stop == len(data + END)
