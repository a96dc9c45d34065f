"""Small data sets of drawn squares, whole or with broken images, and the batches of them."""

import io
import re
import threading
from collections.abc import Callable, Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.make.tokenizer import train_tokenizer
from data_tools.tar.writer import ShardWriter
from mmvit.data.batches import DataConfig, TrainBatches
from mmvit.data.captions import CaptionConfig
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer
from mmvit.data.transforms import AugmentConfig, eval_pixels
from mmvit.eval.encoder import Encoder
from mmvit.retrieval import store
from mmvit.retrieval.sources import open_source

NUM_SQUARES = 22
COLOURS = ("red", "green", "blue", "Red")


def draw_square(i: int) -> bytes:
    image = Image.new("RGB", (24 + i, 30), COLOURS[i % 4].lower())
    image.paste((0, 0, 0), (i % 9, 3, i % 9 + 8, 12))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def drawing() -> Callable[[int], bytes]:
    return draw_square


@pytest.fixture(scope="session")
def write_squares() -> Callable[..., list[Path]]:
    """Write key0, key1, ... into shards of nine; the images of `broken` are cut."""

    def write(folder: Path, broken: Collection[int] = (), num_samples: int = NUM_SQUARES) -> list[Path]:
        with ShardWriter(folder, max_samples=9) as writer:
            for i in range(num_samples):
                png = draw_square(i)[:-30] if i in broken else draw_square(i)
                meta = {"names": {"long": f"a {COLOURS[i % 4]} square number {i}"}}
                writer.write(f"key{i}", {"png": png, "txt": COLOURS[i % 4], "json": meta})
        return writer.shards

    return write


@pytest.fixture(scope="session")
def squares(write_squares: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    return IndexedShards(write_squares(tmp_path_factory.mktemp("squares")))


@pytest.fixture(scope="session")
def digits() -> list[tuple[int, bytes]]:
    """The handwritten digits of the validation split, as (digit, PNG), in their order."""
    from sklearn.datasets import load_digits

    from data_tools.demo.digits import _png, val_rows

    data = load_digits()
    return [(int(data.target[row]), _png(data.images[row])) for row in np.flatnonzero(val_rows(data.target, 0))]


@pytest.fixture(scope="session")
def square_words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["a photo of a red green blue square number"], path, vocab_size=300)
    return build_tokenizer(TokenizerConfig("file", str(path)), 40)


@pytest.fixture(scope="session")
def batches_of(square_words: Tokenizer) -> Callable[..., TrainBatches]:
    """Batches with two captions an image and all that is random; `data` are values of the DataConfig."""

    def build(shards: IndexedShards, data: dict[str, object] | None = None, **changes: object) -> TrainBatches:
        captions = [CaptionConfig(templates=["{}", "a photo of a {}"]), CaptionConfig("names.long")]
        config = DataConfig(captions=captions, augment=AugmentConfig(rotate=20.0, shift=0.1, brightness=0.2))
        for name, value in (data or {}).items():
            setattr(config, name, value)
        settings = {"image_size": 16, "batch_size": 8, "num_steps": 40, "seed": 5} | changes
        return TrainBatches(shards, config, square_words, **settings)

    return build


class MeanColours(Encoder):
    """Stands in for a model: mean colours of an image's halves, and lengths of a text."""

    batch_size, fingerprint, logit_scale = 4, "c" * 64, 50.0

    def __init__(self) -> None:
        """It has no weights."""

    @property
    def embed_dim(self) -> int:
        return 6

    def preprocess(self, image: Image.Image) -> Any:
        return eval_pixels(image, 8)

    def encode_pixels(self, pixels: Any) -> torch.Tensor:
        halves = torch.from_numpy(np.stack(pixels)).float().unflatten(2, (2, 4))  # [B, 3, 2, 4, 8]
        return torch.nn.functional.normalize(halves.mean(dim=(3, 4)).flatten(1) + 1)

    def encode_text(self, texts: Any) -> torch.Tensor:
        return torch.tensor([[len(text), *text.encode()[:5].ljust(5)] for text in texts]) / 100


@pytest.fixture(scope="session")
def embed() -> Callable[..., Path]:
    """Store embeddings as `mmvit embed` does, in parts of seven rows."""

    def write(source: str, out: Path, modality: str | None = None) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "PART_SIZE", 7)
            store.embed_source(MeanColours(), out.parent / "model", open_source(source), out, modality)
        return out

    return write


@pytest.fixture(scope="session")
def embedded_squares(squares: IndexedShards, embed: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return embed(str(squares.paths[0].path.parent), tmp_path_factory.mktemp("embedded") / "squares")


class ShardServer(ThreadingHTTPServer):
    """Serves a folder over HTTP on this machine, and misbehaves as its attributes say."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ranges = True
        self.length = True
        # Of a path with query and how often these bytes were asked for: "503", "drop", "stall", "to:URL", ...
        self.fault: Callable[[str, int], str] = lambda path, times: ""
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str, str]] = []  # path with query, range, authorization
        self.bytes_sent = 0
        self.closing = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave in the middle of an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ShardServer

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        asked = self.headers.get("Range", "") if server.ranges else ""
        request = (self.path, self.headers.get("Range", ""), self.headers.get("Authorization", ""))
        server.requests.append(request)
        fault = server.fault(self.path, server.requests.count(request))
        if fault == "stall":
            server.closing.wait()
            return
        if fault == "reset":
            self.close_connection = True
            return
        if fault.startswith("to:"):
            self._answer(302, b"", {"Location": fault[3:]})
            return
        file = server.folder / path.lstrip("/")
        if fault.isdigit() or not file.is_file():
            self._answer(int(fault or 404), b"an error page", {})
            return
        data = file.read_bytes()
        headers = {"Last-Modified": self.date_time_string(int(file.stat().st_mtime))} | server.headers
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if match is None:
            self._answer(200, data, headers, fault)
            return
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        if fault == "other":
            start, stop = start + 1, stop + 1
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._answer(206, data[start:stop], headers, fault)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if fault == "drop":
            body, self.close_connection = body[: len(body) // 2], True
        for place in range(0, len(body), 1 << 16):
            self.wfile.write(body[place : place + (1 << 16)])
            self.server.bytes_sent += len(body[place : place + (1 << 16)])

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], ShardServer]]:
    """Start servers that end with the test; indexes go to a cache of its own, repeated requests do not wait."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("data_tools.tar.remote._WAITS_S", (0.001, 0.001, 0.001))
    servers: list[ShardServer] = []

    def start(folder: Path) -> ShardServer:
        servers.append(ShardServer(folder))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
