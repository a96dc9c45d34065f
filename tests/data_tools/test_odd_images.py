"""A shard of images with odd metadata, and of files that are none: no verb ends in a traceback, all agree on sizes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.tar.writer import ShardWriter
from tests.support.image_files import (
    XMP_SEGMENT,
    chunk,
    exif,
    international,
    jpeg_with,
    png_with,
    segment,
    turned,
    webp_with,
    xmp,
)

# The drawing has 24 x 16 px.
UPRIGHT = {
    "head": jpeg_with(segment(0xE1, b"Exif\0\0II*\0")),
    "garbage": jpeg_with(segment(0xE1, b"Exif\0\0garbage!")),
    "resolution": jpeg_with(segment(0xE1, b"Exif\0\0" + exif((0x011A, 5, 0, b""), (0x0128, 3, 1, b"\0\2")))),
    "mirrored": jpeg_with(segment(0xE1, b"Exif\0\0" + turned(2))),
}
UPRIGHT_PNG = {"png": png_with(chunk(b"eXIf", b"garbage!")), "cut": png_with(after=chunk(b"eXIf", turned(6)))[:-20]}
SIDEWAYS = {
    "exif": jpeg_with(segment(0xE1, b"Exif\0\0" + turned(6))),
    "xmp": jpeg_with(segment(0xE1, XMP_SEGMENT + xmp(8, "tiff:Orientation='{}'"))),
}
SIDEWAYS_PNG = {
    "late": png_with(after=chunk(b"eXIf", turned(5))),
    "text": png_with(international(b"XML:com.adobe.xmp", xmp(6), packed=True)),
}
BAD = {"nothing": b"x", "start": b"\xff\xd8\xff", "frame": jpeg_with().replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\3")}
NUM_GOOD = 11


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shards") as writer:
        for name, data in (UPRIGHT | SIDEWAYS | BAD).items():
            writer.write(name, {"jpg": data, "txt": f"the file {name}"})
        for name, data in (UPRIGHT_PNG | SIDEWAYS_PNG).items():
            writer.write(name, {"png": data, "txt": f"the file {name}"})
        writer.write("webp", {"webp": webp_with((b"EXIF", turned(7))), "txt": "the file webp"})
    return writer.shards[0]


def test_all_verbs_read_odd_images_alike(
    tmp_path: Path, data_program: Callable[..., tuple[int, str, str]], shard: Path
):
    work = ("--workers", 1, "--json")
    code, output, errors = data_program("stats", shard, *work)
    assert (code, "Traceback" in errors) == (0, False), errors
    assert json.loads(output)["bad_samples"] == {"bad-image": len(BAD)}
    for where, number in (("width == 24", len(UPRIGHT | UPRIGHT_PNG)), ("width == 16 and height == 24", 5)):
        code, output, errors = data_program("filter", shard, "--where", where, "--out", tmp_path / where[:11], *work)
        assert code == 0, errors
        assert json.loads(output)["kept"] == number
    for verb, more, expected in (
        ("peek", ("--out", tmp_path / "sheet.png", "--json"), 0),
        ("dedup", ("--out", tmp_path / "unique", *work), 0),
        ("check", work, 3),
        ("repair", ("--out", tmp_path / "whole", *work), 0),
    ):
        code, output, errors = data_program(verb, shard, *more)
        assert (code, "Traceback" in errors) == (expected, False), (verb, errors)
    assert json.loads(output)["kept"] == NUM_GOOD
