"""Local files are read by offset from any thread or process; a location is printed without its secrets."""

import hashlib
import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.tar.byte_file import LocalFile
from data_tools.tar.location import Location, without_secrets
from data_tools.tar.open import open_file

URL = "https://me:secret@example.org:8080/a%20b/train-000.tar?X-Sig=t0ken&n=1#part"
SHOWN = "https://example.org:8080/a%20b/train-000.tar"


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
    assert all(Location(text).is_remote for text in ("http://h/a.tar", "HTTPS://h/a.tar", "s3://b/a.tar"))
    local = ("a.tar", "/x/a.tar", "D:\\a.tar", "a:b.tar", "http:/h/a.tar", Path("http://h/a.tar"))
    assert not any(Location(place).is_remote for place in local)
    for spec in ("pipe:cat x", "ftp://h/a.tar", "file:///a.tar", "tar://a::http://h/b", "http://h/a.tar::x"):
        with pytest.raises(UsageError, match="local files"):
            Location(spec)


def test_an_invalid_url():
    with pytest.raises(UsageError, match="not valid"):
        Location("http://[host/a.tar")


@pytest.mark.parametrize(
    "text",
    [
        URL.replace("https", "gopher"),
        f"zip://a.tar::{URL}",
        f"pipe:curl -u me:secret {URL}",
        f"see {URL} and {URL}",
        "https://me:secret@[h/a.tar?t0ken",
    ],
)
def test_refusing_a_url_shows_nothing_secret(text: str):
    told = without_secrets(text)
    if "see" not in text:
        with pytest.raises(UsageError) as caught:
            Location(text)
        told = str(caught.value)
    assert "secret" not in told
    assert "t0ken" not in told


def test_however_a_location_is_printed_no_secret_is(caplog: pytest.LogCaptureFixture):
    location = Location(URL)
    logging.getLogger("test").warning("%s %r %s", location, location, [location])
    error = SampleError("hash", "x", shard=location, key="k")
    printed = [f"{location} {location!r} {location!s:>60} {(location,)}", caplog.text, str(error), error.shard]
    printed += [str(DataError("x", where=location)), repr({location: location})]
    with pytest.raises(AssertionError) as caught:
        _ = location.path
    printed.append(str(caught.value))
    for text in printed:
        assert SHOWN in text
        assert "secret" not in text
        assert "t0ken" not in text
    assert location.url == URL


def test_a_location_is_a_value():
    for place in (URL, Path("/x/train-000.tar")):
        location = Location(place)
        assert location == Location(location) == pickle.loads(pickle.dumps(location))
        assert len({location, Location(place)}) == 1
        assert location != Location("b.tar")
        with pytest.raises(AttributeError):
            location.is_remote = False


def test_parts_of_a_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert str(Location(URL)) == SHOWN
    assert str(Location(Path("/x/a?b.tar"))) == "/x/a?b.tar"
    assert Location("/x/a.tar").path == Path("/x/a.tar")
    assert Location(URL).name == Location(Path("/x/train-000.tar")).name == "train-000.tar"
    assert Location("https://h/a.tar?sig=1").next_to(".idx").url == "https://h/a.tar.idx?sig=1"
    assert Location("x/a.tar").next_to(".idx") == Location("x/a.tar.idx")
    monkeypatch.chdir(tmp_path)
    assert Location("a.tar").file_id == Location(tmp_path / "b" / ".." / "a.tar").file_id != Location("b.tar").file_id


def test_the_same_file_behind_two_urls():
    assert Location(URL).file_id == Location(URL.replace("t0ken", "other").replace("secret", "new")).file_id
    assert Location("https://h/get?id=1").file_id != Location("https://h/get?id=2").file_id
    # Names of index files in the caches of users start with it.
    assert Location("https://h/a.tar?x").file_id == hashlib.sha256(b"https://h/a.tar").hexdigest()
