"""Local files are read by offset from any thread or process; secrets in URLs are never shown."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools.core.errors import DataError, UsageError
from data_tools.tar.byte_file import LocalFile
from data_tools.tar.location import beside, is_url, name_of, same_file, shown
from data_tools.tar.open import open_file

URL = "https://me:secret@example.org:8080/a%20b/train-000.tar?X-Sig=t0ken&n=1#part"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 1000)
    return tmp_path / "a.tar"


def test_reads_by_offset_up_to_the_end(path: Path):
    file = open_file(path)
    assert (file.size, file.mtime_ns) == (256_000, path.stat().st_mtime_ns)
    assert file.read(255, 3) == bytes([255, 0, 1])
    assert file.read(255_998, 10) == bytes([254, 255])
    assert file.read(256_000, 1) == file.read(300_000, 1) == file.read(5, 0) == b""


def test_threads_share_no_position(path: Path):
    file = open_file(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: file.read(i, 1)[0], range(5000))) == [i % 256 for i in range(5000)]


def test_a_descriptor_is_shared_and_closed_with_its_last_user(path: Path):
    with path.open("rb") as opened:
        file = LocalFile(opened.fileno())
    path.unlink()
    assert file.read(1, 2) == b"\1\2"
    fd = file._fd
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_what_is_missing_or_no_file(tmp_path: Path):
    for place in (tmp_path / "none.tar", tmp_path):
        with pytest.raises(DataError, match="does not exist") as caught:
            open_file(place)
        assert caught.value.where == str(place)


def test_which_texts_are_urls():
    assert is_url("http://h/a.tar")
    assert is_url("HTTPS://h/a.tar")
    assert is_url("s3://b/a.tar")
    assert not any(map(is_url, ("a.tar", "/x/a.tar", "D:\\a.tar", "a:b.tar", "http:/h/a.tar")))
    for spec in ("pipe:cat x", "ftp://h/a.tar", "file:///a.tar", "tar://a::http://h/b", "http://h/a.tar::x"):
        with pytest.raises(UsageError, match="local files"):
            is_url(spec)


def test_an_invalid_url():
    with pytest.raises(UsageError, match="not valid"):
        is_url("http://[host/a.tar")


def test_refusing_a_url_shows_nothing_secret():
    with pytest.raises(UsageError) as caught:
        is_url(URL.replace("https", "gopher"))
    assert "secret" not in str(caught.value)
    assert "t0ken" not in str(caught.value)


def test_parts_of_a_url():
    assert shown(URL) == "https://example.org:8080/a%20b/train-000.tar"
    assert shown(Path("/x/a?b.tar")) == "/x/a?b.tar"
    assert name_of(URL) == name_of(Path("/x/train-000.tar")) == "train-000.tar"
    assert beside("https://h/a.tar?sig=1", ".idx") == "https://h/a.tar.idx?sig=1"
    assert same_file(URL) == same_file(URL.replace("t0ken", "other").replace("secret", "new"))
    assert same_file("https://h/get?id=1") != same_file("https://h/get?id=2")
