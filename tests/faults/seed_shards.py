"""Small shards of real images, made by different writers: what the mutations start from."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

Fields = dict[str, bytes]
IMAGES = ("jpg", "png", "webp")


class Extent(NamedTuple):
    """One member of a tar: its headers begin at `start`, the next member at `stop`."""

    name: str
    start: int
    data: int
    size: int
    stop: int


class Seed(NamedTuple):
    """A whole shard: the bytes of the tar, what is in it, and where."""

    name: str
    data: bytes
    samples: dict[str, Fields]
    extents: list[Extent]

    def key_of(self, extent: Extent) -> str:
        return extent.name.rsplit(".", 1)[0]

    def span(self, key: str) -> list[tuple[int, int]]:
        return [(extent.start, extent.stop) for extent in self.extents if self.key_of(extent) == key]


def make_seeds(folder: Path) -> list[Seed]:
    """Write the shards into `folder`; equal every time, but for the mtime that webdataset writes."""
    rng = random.Random(0)
    seeds = []
    for name, write in WRITERS.items():
        samples = dict(_samples(name, rng))
        path = folder / f"{name}.tar"
        write(path, samples)
        with tarfile.open(path) as archive:
            infos = [info for info in archive if info.isreg()]
        extents = [
            Extent(info.name, info.offset, info.offset_data, info.size, info.offset_data + -(-info.size // 512) * 512)
            for info in infos
        ]
        if name.startswith("tar-"):  # it names members by the folder they were packed from
            samples = {f"./{key}": fields for key, fields in samples.items()}
        seeds.append(Seed(name, path.read_bytes(), samples, extents))
    return seeds


def _samples(writer: str, rng: random.Random) -> Iterator[tuple[str, Fields]]:
    if writer == "pictures":  # one member a sample: nothing but the image tells that it is there
        yield from ((f"{i:05d}", {"jpg": _picture("jpg", rng)}) for i in range(12))
        return
    for i in range(9):
        key = KEYS.get(writer, "{i:05d}").format(i=i)
        picture = IMAGES[i % 3] if writer != "webdataset" else "jpg"
        fields = {picture: _picture(picture, rng), "txt": f"image {i} of {writer}: {rng.random()}".encode()}
        if not (writer == "missing" and i % 4 == 1):
            fields["json"] = json.dumps({"i": i, "noise": "x" * rng.randrange(900)}).encode()
        if not (writer == "missing" and i % 5 == 2):
            fields["cls"] = str(i + 100).encode()
        yield key, fields


KEYS = {
    "pax-long": "folder/" + "long" * 30 + "/{i:05d}",
    "gnu-long": "folder/" + "long" * 30 + "/{i:05d}",
    "pax-unicode": "\u00e9t\u00e9/\uac1c{i:03d}",
    "tar-gnu": "a/b{i}",
    "tar-pax": "\uac1c" * 12 + "/" + "b" * 90 + "{i}",
}


def _picture(kind: str, rng: random.Random) -> bytes:
    side = rng.randrange(12, 40)
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (side, side + 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise // 2 + 60).save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind])
    return file.getvalue()


def _members(samples: dict[str, Fields]) -> Iterator[tuple[str, bytes]]:
    for key, fields in samples.items():
        for field, data in fields.items():
            yield f"{key}.{field}", data


def _by_tarfile(tar_format: int, apart: bool = False):
    def write(path: Path, samples: dict[str, Fields]) -> None:
        members = list(_members(samples))
        if apart:  # as `find | tar` does on some file systems
            random.Random(1).shuffle(members)
        with tarfile.open(path, "w", format=tar_format) as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return write


def _by_webdataset(path: Path, samples: dict[str, Fields]) -> None:
    import webdataset

    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for key, fields in samples.items():
            writer.write({"__key__": key, **fields})


def _by_tar(tar_format: str):
    def write(path: Path, samples: dict[str, Fields]) -> None:
        source = path.with_suffix(".source")
        for name, data in _members(samples):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        command = ["tar", "--sort=name", f"--format={tar_format}", "--mtime=@0", "-cf", path, "-C", source, "."]
        subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})

    return write


WRITERS = {
    "ustar": _by_tarfile(tarfile.USTAR_FORMAT),
    "pax-long": _by_tarfile(tarfile.PAX_FORMAT),
    "pax-unicode": _by_tarfile(tarfile.PAX_FORMAT),
    "gnu-long": _by_tarfile(tarfile.GNU_FORMAT),
    "missing": _by_tarfile(tarfile.GNU_FORMAT),
    "pictures": _by_tarfile(tarfile.PAX_FORMAT),
    "apart": _by_tarfile(tarfile.USTAR_FORMAT, apart=True),
    "webdataset": _by_webdataset,
    "tar-gnu": _by_tar("gnu"),
    "tar-pax": _by_tar("pax"),
    "tar-v7": _by_tar("v7"),
}
