"""Small files that unfold to large ones cost little memory and time, and say so: peak rise at most 300 MiB each."""

import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from samples import write_tar

from data_tools.tar.index import build_index, index_path

Measure = Callable[..., list[tuple[int, str]]]
Results = dict[str, tuple[int, str]]
MAX_MIB = 300

DECODE = """
import PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
from data_tools.sample.decode import decode_image
from data_tools.core.errors import DataError

def run(path):
    try:
        print(decode_image(path.read_bytes()).size)
    except DataError as error:
        print(error)
"""
READ = """
from data_tools.core.errors import MmvitError
from mmvit.data.shards import IndexedShards

def run(path):
    try:
        shards = IndexedShards([path])
        for i in range(len(shards)):
            try:
                print("read:", shards.read(i).caption)
            except MmvitError as error:
                print(error)
        for error in shards.lost():
            print("lost:", error)
    except MmvitError as error:
        print(error)
"""


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunk(*one) for one in chunks) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Return the zlib stream of so many zero bytes: the packed form of 1 MiB again and again."""
    packer = zlib.compressobj(9)
    head = packer.compress(bytes(size % (1 << 20))) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (size % 65521) << 16 | 1
    return head + block * (size >> 20) + b"\x03\0" + struct.pack(">I", adler)


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return re.sub(rb"(\xff\xc0..\x08)....", lambda match: match[1] + struct.pack(">HH", height, width), file.getvalue())


def webp(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (16, 16)).save(file, "WEBP", lossless=True)
    data = file.getvalue()
    place = data.index(b"VP8L") + 9
    size = struct.unpack("<I", data[place : place + 4])[0] >> 28 << 28 | (height - 1) << 14 | (width - 1)
    return data[:place] + struct.pack("<I", size) + data[place + 4 :]


def pictures() -> dict[str, bytes]:
    pixels = (b"IDAT", zeros(8 * 25))
    return {
        "png": png(30_000, 30_000, (b"IDAT", zeros(1 << 20))),
        "png below the limit": png(7000, 7000, (b"IDAT", zeros(7000 * 28_001)), colour=6),
        "png with a text": png(8, 8, (b"zTXt", b"a\0\0" + zeros(1 << 29)), pixels),
        "png with a profile": png(8, 8, (b"iCCP", b"a\0\0" + zeros(1 << 29)), pixels),
        "png with a negative chunk": png(8, 8)[:33] + b"\xff\xff\xff\xffIDAT" + bytes(100),
        "jpeg": jpeg(65_500, 65_500),
        "jpeg below the limit": jpeg(7070, 7070),
        "webp": webp(16_383, 16_383),
        "webp below the limit": webp(7070, 7070),
    }


def measured(measure: Measure, code: str, folder: Path, files: dict[str, bytes | None]) -> Results:
    """Write the files that are not there yet, and run the code on each of them."""
    paths = [folder / f"{name}.tar" for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        if data is not None:
            path.write_bytes(data)
    return dict(zip(files, measure(code, paths), strict=True))


@pytest.fixture(scope="module")
def decoded(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> Results:
    files = pictures()
    assert max(map(len, files.values())) < 1 << 20
    return measured(measure, DECODE, tmp_path_factory.mktemp("pictures"), files)


@pytest.mark.parametrize("name", pictures())
def test_pictures(decoded: Results, name: str):
    rise, said = decoded[name]
    assert rise <= MAX_MIB, said
    assert ("image" in said and "where: image" in said) or said.strip() in {"(7000, 7000)", "(7070, 7070)", "(8, 8)"}


TEXTS = {
    "open brackets": ("json", b"[" * 1_000_000, "the metadata is not JSON"),
    "deep objects": ("json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "the metadata is not JSON"),
    "many lists": ("json", b"[" + b"[]," * 1_300_000 + b"1]", "list instead of an object"),
    "a long number": ("json", b'{"a": ' + b"9" * 1_000_000 + b"}", "the metadata is not JSON"),
    "long metadata": ("json", b'{"a": "' + b"x" * (5 << 20) + b'"}', ".json has 5242889 bytes, more than 4194304"),
    "a long caption": ("txt", b"x" * (2 << 20), ".txt has 2097152 bytes, more than 1048576"),
    "a long label": ("cls", b"1" * (2 << 20), ".cls has 2097152 bytes, more than 1048576"),
    "a label of 10,000 digits": ("cls", b"1" * 10_000, "is neither a class index nor a class name"),
}
SPARSE = "an image of 200 MiB"


@pytest.fixture(scope="module")
def texts(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("texts")
    for name, (field, data, _) in TEXTS.items():
        write_tar(folder / f"{name}.tar", {"a.jpg": b"x", "a.txt": b"a caption", f"a.{field}": data, "b.txt": b"y"})
    picture = tarfile.TarInfo("a.jpg")
    picture.size = 200 << 20
    with (folder / f"{SPARSE}.tar").open("wb") as file:
        file.write(picture.tobuf())
        file.seek(picture.size, 1)  # a hole: no disk is used
        file.write(write_tar(folder / "rest.tar", {"a.txt": b"a caption", "b.txt": b"y"}).read_bytes())
    return measured(measure, READ, folder, dict.fromkeys([*TEXTS, SPARSE]))


@pytest.mark.parametrize("name", [*TEXTS, SPARSE])
def test_texts_and_large_files(texts: Results, name: str):
    rise, said = texts[name]
    assert rise <= MAX_MIB, said
    assert (TEXTS[name][2] if name in TEXTS else ".jpg has 209715200 bytes, more than 134217728") in said
    assert "key 'a'" in said
    assert "hint: " in said


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def tars() -> dict[str, bytes]:
    """Return tars whose headers claim what is not there, each between two members of a good sample."""
    records = b"".join(b"25 GNU.sparse.name=abcde\n" for _ in range(40_000))
    negative = tarfile.TarInfo("a.txt").tobuf()
    negative = negative[:124] + b"-0000001000\0" + negative[136:]
    negative = negative[:148] + b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:]) + 256) + negative[156:]
    inside = {
        "a member of 8 EB": member("a.txt", 2**63),
        "a member of -512 bytes": negative,
        "a long name of 8 EB": member("a", 2**63, b"L"),
        "a pax header of 8 EB": member("a", 2**63, b"x"),
        "a pax header of 64 MiB": member("a", 1 << 26, b"x") + bytes(1 << 26),
        "a pax header of many records": member("a", len(records), b"x") + records.ljust(-(-len(records) // 512) * 512),
        "a pax record of a long number": member("a", 6000, b"x") + (b"9" * 6000).ljust(6144, b"\0"),
        "a pax size of a long number": member("a", 6000, b"x") + (b"6000 size=" + b"9" * 5989 + b"\n").ljust(6144),
        "many pax headers": (member("x", 25, b"x") + b"25 GNU.sparse.size=00000\n".ljust(512, b"\0")) * 20_000,
        "members within members": b"".join(member("a.txt", 2**20 - i * 512) for i in range(2000)),
    }
    picture = member("good.jpg", 7) + b"picture".ljust(512, b"\0")
    caption = member("good.txt", 9) + b"a caption".ljust(512, b"\0")
    return {name: picture + data + caption + bytes(1024) for name, data in inside.items()}


@pytest.fixture(scope="module")
def read(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return measured(measure, READ, tmp_path_factory.mktemp("tars"), tars())


@pytest.mark.parametrize("name", tars())
def test_headers_that_claim_much(read: Results, name: str):
    rise, said = read[name]
    assert rise <= MAX_MIB, said
    assert "lost: " in said
    assert "bytes " in said
    assert "hint: " in said


def test_an_index_that_claims_huge_arrays(tmp_path: Path, measure: Measure):
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"x", "a.txt": b"a caption"})
    build_index(tar)
    magic, line, rest = index_path(tar).read_bytes().split(b"\n", 2)
    header = json.loads(line) | {"num_samples": 1 << 50}
    index_path(tar).write_bytes(b"\n".join((magic, json.dumps(header, sort_keys=True).encode(), rest)))
    [(rise, said)] = measure(READ, [tar])
    assert rise <= MAX_MIB
    assert "the shard index is damaged" in said
