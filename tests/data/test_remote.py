"""Shards behind URLs give the bytes that local ones give, whatever the server and the network do, or a clear error."""

import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader, Dataset

from data_tools.core.errors import DataError, MmvitError, ResourceError, UsageError
from data_tools.tar import remote
from data_tools.tar.byte_file import UnindexableError
from data_tools.tar.expand import expand_shards
from data_tools.tar.index import index_path, open_index
from data_tools.tar.location import Location
from data_tools.tar.open import open_file
from data_tools.tar.writer import ShardWriter
from mmvit.data.shards import IndexedShards
from mmvit.data.source import RawSample

NUM_SAMPLES = 22
SECRETS = ("hunter2", "t0ken")

Serve = Callable[[Path], Any]


@pytest.fixture
def shards(tmp_path: Path, squares: IndexedShards) -> Path:
    return Path(shutil.copytree(squares.paths[0].path.parent, tmp_path / "shards"))


@pytest.fixture
def bare(shards: Path) -> Path:
    """Without indexes beside the shards."""
    for path in shards.glob("*.idx"):
        path.unlink()
    return shards


def names(server: Any) -> str:
    return f"{server.url}/shard-{{00000..00002}}.tar"


def read_all(shards: IndexedShards) -> list[RawSample]:
    return [shards.read(i) for i in range(len(shards))]


class Samples(Dataset[RawSample]):
    def __init__(self, shards: IndexedShards):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> RawSample:
        return self.shards.read(i)


@pytest.mark.parametrize("sidecar", [True, False])
def test_the_same_as_local_with_and_without_an_index_beside(shards: Path, serve: Serve, sidecar: bool):
    expected = IndexedShards(expand_shards(shards))
    samples = read_all(expected)
    if not sidecar:
        for path in shards.glob("*.idx"):
            path.unlink()
    server = serve(shards)
    opened = IndexedShards(expand_shards(names(server)), verify=True)
    assert read_all(opened) == samples
    assert opened.fingerprint() == expected.fingerprint()
    assert [opened.reader.indexes[i].num_samples for i in range(3)] == [9, 9, 4]


def test_one_request_a_sample_and_none_for_the_index_later(shards: Path, serve: Serve):
    server = serve(shards)
    IndexedShards(expand_shards(names(server)))
    server.requests.clear()
    opened = IndexedShards(expand_shards(names(server)))
    assert len(server.requests) == 3  # whether the shards are still the same
    read_all(opened)
    assert len(server.requests) == 3 + 3 + NUM_SAMPLES


def test_without_an_index_the_tar_is_read_once_and_the_log_says_so(
    bare: Path, serve: Serve, caplog: pytest.LogCaptureFixture
):
    server = serve(bare)
    tar = bare / "shard-00000.tar"
    with caplog.at_level(logging.INFO):
        index = open_index(f"{server.url}/{tar.name}?sig=t0ken")
    assert tar.stat().st_size < server.bytes_sent < 1.2 * tar.stat().st_size
    assert f"{server.url}/{tar.name} has no index next to it: its 0.0 MiB are read once" in caplog.text
    assert "t0ken" not in caplog.text
    path = index_path(index.tar)
    assert path.parent == Path(os.environ["XDG_CACHE_HOME"]) / "mmvit" / "indexes"
    assert path.is_file()
    assert path == index_path(f"{server.url}/{tar.name}?sig=renewed")
    assert path != index_path(f"{server.url}/get?name={tar.name}") != index_path(f"{server.url}/get?name=other.tar")


def test_large_pieces_are_read_while_indexing(tmp_path: Path, serve: Serve):
    with ShardWriter(tmp_path / "large") as writer:
        for i in range(90):
            writer.write(f"k{i}", {"png": os.urandom(100_000), "txt": "x"})
    Path(f"{writer.shards[0]}.idx").unlink()
    server = serve(tmp_path / "large")
    open_index(f"{server.url}/{writer.shards[0].name}")
    assert len(server.requests) <= 8


def test_in_loader_workers(shards: Path, serve: Serve):
    opened = IndexedShards(expand_shards(names(serve(shards))))
    expected = read_all(opened)  # connections are open when the workers are forked
    handler = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(Samples(opened), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    assert [RawSample(*sample) for sample in loader] == expected
    signal.signal(signal.SIGCHLD, handler)  # torch leaves its own behind, which raises in later tests
    assert read_all(opened) == expected  # and they still work


def test_in_a_process_that_is_spawned(shards: Path, serve: Serve):
    reader = IndexedShards(expand_shards(names(serve(shards)))).reader  # without torch: it is there sooner
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(reader.fields, (2, 3)) == reader.fields(2, 3)


def test_in_threads(shards: Path, serve: Serve):
    opened = IndexedShards(expand_shards(names(serve(shards))))
    order = [*range(NUM_SAMPLES)] * 8
    with ThreadPoolExecutor(8) as pool:
        assert [sample.key for sample in pool.map(opened.read, order)] == [opened.key(i) for i in order]


@pytest.mark.parametrize("fault", ["503", "429", "drop", "reset"])
def test_a_failure_that_passes_is_not_noticed(shards: Path, serve: Serve, fault: str):
    tar = shards / "shard-00002.tar"
    server = serve(shards)
    server.fault = lambda path, times: fault if times < 4 else ""
    assert read_all(IndexedShards([f"{server.url}/{tar.name}"])) == read_all(IndexedShards([tar]))


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        ("503", ResourceError, "4 times in a row: HTTP status 503"),
        ("drop", ResourceError, "4 times in a row: Client"),
        ("reset", ResourceError, "4 times in a row: ServerDisconnectedError"),
        ("stall", ResourceError, "4 times in a row: no response for 0.05 s"),
        ("404", DataError, "the shard does not exist"),
        ("403", DataError, r"denies access to the shard \(HTTP status 403\)"),
        ("401", DataError, r"denies access to the shard \(HTTP status 401\)"),
        ("other", UnindexableError, "does not support byte ranges"),
        ("to:/loop?sig=t0ken", ResourceError, "TooManyRedirects"),
        ("to:ftp://user:hunter2@127.0.0.1/x?t0ken", ResourceError, "NonHttpUrlRedirect"),
    ],
)
def test_a_failure_that_stays_is_named_and_tells_no_secret(
    shards: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[MmvitError], what: str
):
    monkeypatch.setenv("MMVIT_REMOTE_TIMEOUT_S", "0.05" if fault == "stall" else "20")
    server = serve(shards)
    url = f"{server.url}/shard-00000.tar?sig=t0ken".replace("//", "//user:hunter2@")
    opened = IndexedShards([url])
    file = open_file(url)
    for call in (lambda: open_file(url), lambda: file.read(0, 5000), lambda: opened.read(0)):
        server.fault = lambda path, times: fault
        with pytest.raises(kind, match=what) as caught:
            call()
        assert caught.value.where == f"{server.url}/shard-00000.tar"
        trace = "".join(traceback.format_exception(caught.value))
        assert not [secret for secret in SECRETS if secret in trace]
        server.fault = lambda path, times: ""
    assert read_all(opened)  # nothing is left broken


def test_a_server_without_ranges_is_not_made_to_send_the_file(shards: Path, serve: Serve):
    (shards / "large.tar").write_bytes(bytes(40 << 20))
    server = serve(shards)
    file = open_file(f"{server.url}/large.tar")
    server.ranges = False
    for call in (lambda: open_file(f"{server.url}/large.tar"), lambda: file.read(1 << 20, 1000)):
        with pytest.raises(UnindexableError, match="does not support byte ranges"):
            call()
    assert server.bytes_sent < 20 << 20  # what fits into the buffers of two sockets


def test_a_file_that_is_fetched_is_whole(tmp_path: Path, serve: Serve):
    for size in (0, 1, 70_001, 300_000):
        (tmp_path / "a.tar").write_bytes(os.urandom(size))
        file, broken = remote.fetch(Location(f"{serve(tmp_path).url}/a.tar"))
        assert (file.size, broken) == (size, "")
        assert file.read(0, size) == (tmp_path / "a.tar").read_bytes()


def test_a_missing_shard_is_named(shards: Path, serve: Serve):
    server = serve(shards)
    with pytest.raises(DataError, match="does not exist") as caught:
        IndexedShards(expand_shards(f"{server.url}/shard-{{00000..00003}}.tar"))
    assert caught.value.where == f"{server.url}/shard-00003.tar"


def test_no_server_at_all(tmp_path: Path, serve: Serve):
    server = serve(tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(ResourceError, match="Cannot connect"):
        open_file(f"{server.url}/a.tar")


def test_credentials_are_used(shards: Path, serve: Serve):
    server = serve(shards)
    query = "sig=a%2Fb%2Bc&n=t0ken"  # a signature holds for these very letters
    url = f"{server.url}/shard-00000.tar?{query}".replace("//", "//user:hunter2@")
    read_all(IndexedShards([url]))
    paths = {path for path, _, _ in server.requests}
    assert paths == {f"/shard-00000.tar?{query}", f"/shard-00000.tar.idx?{query}"}
    assert {authorization for _, _, authorization in server.requests} == {"Basic dXNlcjpodW50ZXIy"}


def test_bad_samples_tell_no_secret(tmp_path: Path, write_squares: Callable[..., list[Path]], serve: Serve):
    tar = write_squares(tmp_path / "shards")[0]
    url = f"{serve(tar.parent).url}/{tar.name}?sig=t0ken".replace("//", "//user:hunter2@")
    opened = IndexedShards([url], verify=True)
    data = bytearray(tar.read_bytes())
    offset, size = opened.reader.indexes[0].locate(3)["png"]
    data[offset + size // 2] ^= 1
    stat = tar.stat()
    tar.write_bytes(data)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError) as caught:
        opened.read(3)
    assert (caught.value.cause, caught.value.key) == ("hash", "key3")
    assert not [secret for secret in SECRETS if secret in f"{caught.value} {caught.value.shard} {opened.key(3)}"]


def test_the_proxy_of_the_environment_is_used(shards: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(shards)
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(DataError, match="does not exist"):
        open_file("http://example.invalid/shard-00000.tar")
    assert server.requests[0][0] == "http://example.invalid/shard-00000.tar"


def test_redirects_are_followed(shards: Path, serve: Serve):
    store, front = serve(shards), serve(shards)
    front.fault = lambda path, times: f"to:{store.url}{path}"
    assert read_all(IndexedShards(expand_shards(names(front)))) == read_all(IndexedShards(expand_shards(shards)))


@pytest.mark.parametrize("change", ["size", "etag", "time"])
def test_a_shard_that_changes_while_it_is_read(shards: Path, serve: Serve, change: str):
    server = serve(shards)
    server.headers = {"ETag": '"one"'} if change == "etag" else {}
    tar = shards / "shard-00000.tar"
    os.utime(tar, (1e9, 1e9))
    opened = IndexedShards([f"{server.url}/{tar.name}"])
    opened.read(0)
    if change == "size":
        tar.write_bytes(tar.read_bytes() + bytes(512))
        os.utime(tar, (1e9, 1e9))
    elif change == "etag":
        server.headers = {"ETag": '"two"'}
    else:
        os.utime(tar, (2e9, 2e9))
    with pytest.raises(DataError, match="changed on the server while it was read") as caught:
        opened.read(1)
    assert caught.value.where == f"{server.url}/{tar.name}"


def test_an_index_in_the_cache_is_compared_when_the_shard_changed(
    bare: Path, serve: Serve, caplog: pytest.LogCaptureFixture
):
    server = serve(bare)
    tar = bare / "shard-00000.tar"
    os.utime(tar, (1e9, 1e9))
    url = f"{server.url}/{tar.name}"
    old = open_index(url)
    offset, size = old.locate(3)["txt"]
    data = tar.read_bytes()
    tar.write_bytes(data[:offset] + b"x" * size + data[offset + size :])  # its size is the same
    os.utime(tar, (2e9, 2e9))
    with pytest.raises(DataError, match="hash"):
        IndexedShards([url]).read(3)
    assert "1 of 9 samples are missing or differ" in caplog.text


def test_what_stands_beside_the_shard_and_is_no_index(bare: Path, serve: Serve):
    server = serve(bare)
    for page in (b"<html>not found</html>" * 9, b""):  # some servers answer so to everything
        (bare / "shard-00000.tar.idx").write_bytes(page)
        index = open_index(f"{server.url}/shard-00000.tar")
        assert len(index) == 9
        index_path(index.tar).unlink()


def test_a_cache_that_cannot_be_written(shards: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    server = serve(shards)
    assert len(open_index(f"{server.url}/shard-00000.tar")) == 9
    assert server.bytes_sent < (shards / "shard-00000.tar").stat().st_size  # the index beside it was enough


def test_other_stores_go_through_fsspec(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data_tools.tar.remote._WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr("data_tools.tar.location.SCHEMES", ("memory",))
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    opened = IndexedShards(expand_shards("memory://bucket/shard-{00000..00002}.tar"))
    assert read_all(opened) == read_all(IndexedShards(expand_shards(shards)))
    with pytest.raises(DataError, match="does not exist"):
        open_file("memory://bucket/none.tar")
    file = open_file("memory://bucket/shard-00000.tar")
    assert file.read(file.size - 5, 99) == bytes(5)
    for error, kind in ((OSError("bucket?t0ken is gone"), ResourceError), (PermissionError("t0ken?"), DataError)):
        monkeypatch.setattr(type(store), "cat_file", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(kind) as caught:
            file.read(0, 5)
        assert "t0ken" not in str(caught.value)


def test_a_store_without_its_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setattr(remote, "_web", remote._web.__wrapped__)  # without what it remembers
    with pytest.raises(UsageError, match="a library is missing") as caught:
        open_file("https://127.0.0.1/a.tar")
    assert caught.value.hint == 'pip install "mmvit[remote]"'
    for scheme, library in (("gs", "gcsfs"), ("s3", "s3fs")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UsageError, match=rf"a library is missing: .*{library}") as caught:
            open_file(f"{scheme}://bucket/a.tar")
        assert caught.value.hint == f'pip install "{library}"'
