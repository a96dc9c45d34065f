"""One reader of headers: what it says of format, size and turn is what is delivered, whatever the metadata hold."""

import io
import time
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin

from data_tools.core.errors import DataError
from data_tools.sample.content import read_content
from data_tools.sample.decode import decode_image, open_jpeg, to_rgb
from data_tools.sample.image_header import ImageError, read_header
from tests.fuzz_images import SEEDS, examine, mutate
from tests.support.image_files import (
    XMP_SEGMENT,
    chunk,
    drawing,
    encoded,
    exif,
    hexadecimal,
    international,
    jpeg_with,
    png_with,
    segment,
    turned,
    webp_with,
    xmp,
)

EXIF = b"Exif\0\0"
UNDO: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.swapaxes(0, 1),
    6: lambda rows: np.rot90(rows, -1),
    7: lambda rows: rows[::-1, ::-1].swapaxes(0, 1),
    8: lambda rows: np.rot90(rows),
}
PLAIN = {"JPEG": jpeg_with(), "PNG": png_with(), "WEBP": webp_with(flags=0)}
IMAGES = {kind: np.asarray(decode_image(data)) for kind, data in PLAIN.items()}


def app1(body: bytes) -> bytes:
    return segment(0xE1, body)


def with_exif(block: bytes) -> dict[str, bytes]:
    """Return a file of each kind with a block of EXIF, at each place where it may lie."""
    text = hexadecimal(block)
    return {
        "jpeg": jpeg_with(app1(EXIF + block)),
        "jpeg, after a comment": jpeg_with(segment(0xFE, b"hello"), app1(EXIF + block)),
        "jpeg, before the frame": jpeg_with(app1(EXIF + block), before=0xC0),
        "jpeg, before the scan": jpeg_with(app1(EXIF + block), before=0xDA),
        "jpeg, with fill": jpeg_with(b"\xff\xff", app1(EXIF + block)),
        "jpeg, named twice": jpeg_with(app1(EXIF + EXIF + block)),
        "jpeg, in two segments": jpeg_with(app1(EXIF + block[:13]), app1(EXIF + block[13:])),
        "png": png_with(before=chunk(b"eXIf", block)),
        "png, after the pixels": png_with(after=chunk(b"eXIf", block)),
        "png, named": png_with(before=chunk(b"eXIf", EXIF + block)),
        "png, as text": png_with(before=chunk(b"tEXt", b"Raw profile type exif\0" + text)),
        "png, as text after the pixels": png_with(after=chunk(b"tEXt", b"Raw profile type exif\0" + text)),
        "png, as packed text": png_with(before=packed_text(b"Raw profile type exif", text)),
        "png, as international text": png_with(before=international(b"Raw profile type exif", text)),
        "webp": webp_with((b"EXIF", block)),
        "webp, named": webp_with((b"EXIF", EXIF + block)),
        "webp, after others": webp_with((b"ABCD", b"odd"), (b"EXIF", block), (b"XMP ", b"")),
    }


def packed_text(name: bytes, text: bytes) -> bytes:
    return chunk(b"zTXt", name + b"\0\0" + zlib.compress(text))


def with_xmp(packet: bytes) -> dict[str, bytes]:
    """Return a file of each kind with a packet of XMP."""
    name = b"XML:com.adobe.xmp"
    return {
        "jpeg": jpeg_with(app1(XMP_SEGMENT + packet)),
        "jpeg, before the scan": jpeg_with(app1(XMP_SEGMENT + packet), before=0xDA),
        "png": png_with(before=international(name, packet)),
        "png, after the pixels": png_with(after=international(name, packet)),
        "png, packed": png_with(before=international(name, packet, packed=True)),
        "webp": webp_with((b"XMP ", packet)),
    }


def check(data: bytes, orientation: int) -> None:
    """Compare header, exact and fast path with a turn of the image that was drawn; nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = read_header(data)
        expected = UNDO[orientation](IMAGES[header.format])
        found = np.asarray(decode_image(data))
        assert header.orientation == orientation
        assert header.size == expected.shape[1::-1]
        assert np.array_equal(found, expected)
        content = read_content({"jpg": data}, decode=True)
        assert (content.fault, content.width, content.height) == (None, *header.size)
        jpeg = open_jpeg(data)
        if orientation != 1 or header.format != "JPEG":
            assert jpeg is None
        else:
            assert np.abs(jpeg.decode().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_found_wherever_it_stands(orientation: int):
    files = [*with_exif(turned(orientation)).items(), *with_exif(turned(orientation, "<")).items()]
    for name, data in [*files, *with_xmp(xmp(orientation)).items()]:
        check(data, orientation)
        with Image.open(io.BytesIO(data)) as image:  # Pillow reads all of these
            assert np.array_equal(ImageOps.exif_transpose(image).convert("RGB"), decode_image(data)), name
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(to_rgb(image), decode_image(data)), name


@pytest.mark.parametrize(
    "form",
    [
        'tiff:Orientation="{}"',
        "tiff:Orientation='{}'",
        'tiff:Orientation = "{}"',
        "><tiff:Orientation>{}</tiff:Orientation",
        "><tiff:Orientation>\n {}\n</tiff:Orientation",
    ],
)
def test_xmp_may_be_written_in_any_form(form: str):
    for data in with_xmp(xmp(6, form)).values():
        check(data, 6)


INVALID = {
    "empty": b"",
    "head only": b"II*\0",
    "half a head": b"II*\0\x08\0",
    "garbage": b"garbage!",
    "cut in the entry": turned(6)[:15],
    "cut before the value": turned(6)[:18],
    "no entries": exif(),
    "directory beyond the end": turned(6)[:4] + b"\xff\xff\xff\xff" + turned(6)[8:],
    "more entries than there are": b"MM\0*\0\0\0\x08\xff\xff" + exif((1, 3, 1, b""))[10:],
    "value out of range": turned(9),
    "value zero": turned(0),
    "value of 65535": turned(65535),
    "a text": exif((0x0112, 2, 1, b"6")),
    "two numbers": exif((0x0112, 3, 2, b"\0\6\0\6")),
    "a huge count": exif((0x0112, 3, 2**32 - 1, b"\0\6")),
    "an unknown type": exif((0x0112, 99, 1, b"\0\6")),
    "a fraction": exif((0x0112, 5, 1, b"\0\0\0\x1a")) + b"\0\0\0\6\0\0\0\1",
    "a fraction by zero": exif((0x011A, 5, 1, b"\0\0\0\x1a"), (0x0128, 3, 1, b"\0\2")) + bytes(8),
    "an empty resolution": exif((0x011A, 5, 0, b""), (0x0128, 3, 1, b"\0\2")),
    "a directory that follows itself": turned(1)[:-4] + b"\0\0\0\x08",
}


@pytest.mark.parametrize("name", INVALID)
def test_exif_that_cannot_be_read_leaves_the_image_unturned(name: str):
    for data in with_exif(INVALID[name]).values():
        check(data, 1)


def test_xmp_that_cannot_be_read_leaves_the_image_unturned():
    for packet in (b"", b"\xff\xfe\0garbage", xmp(0), xmp(9), xmp(66), xmp("x"), xmp("9" * 9000), xmp("")):
        for data in with_xmp(packet).values():
            check(data, 1)


def test_exif_stands_before_xmp_where_it_can_be_read():
    packet = xmp(8)
    for block, orientation in ((turned(6), 6), (turned(1), 1), (b"garbage!", 8), (exif((1, 3, 1, b"")), 8)):
        for data in (
            jpeg_with(app1(XMP_SEGMENT + packet), app1(EXIF + block)),
            jpeg_with(app1(EXIF + block), app1(XMP_SEGMENT + packet)),
            png_with(international(b"XML:com.adobe.xmp", packet), chunk(b"eXIf", block)),
            webp_with((b"EXIF", block), (b"XMP ", packet)),
        ):
            check(data, orientation)
    text = chunk(b"tEXt", b"Raw profile type exif\0" + hexadecimal(turned(3)))
    check(png_with(text, chunk(b"eXIf", turned(6))), 6)
    check(png_with(text, chunk(b"eXIf", b"garbage!")), 3)


ODD_PARTS = {
    "a short JFIF segment": jpeg_with(segment(0xE0, b"JFIF")),
    "a short Adobe segment": jpeg_with(segment(0xEE, b"Adobe")),
    "a short profile": jpeg_with(segment(0xE2, b"ICC_PROFILE\0")),
    "half a Photoshop block": jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4")),
    "a garbled list of images": jpeg_with(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0\xff\xff")),
    "junk after a segment": jpeg_with(segment(0xE1, b"x"), b"junk", segment(0xED, b"x"), b"\0\xff\0junk"),
    "a segment shorter than its length": jpeg_with(b"\xff\xe1\0\0"),
    "a profile packed in an unknown way": png_with(chunk(b"iCCP", b"name\0\7what")),
    "a profile without a name": png_with(chunk(b"iCCP", b"")),
    "a text packed in an unknown way": png_with(chunk(b"zTXt", b"name\0\7what")),
    "a text of 100 MiB": png_with(packed_text(b"name", bytes(100 * 2**20))),
    "a packet of 100 MiB": png_with(packed_text(b"XML:com.adobe.xmp", bytes(100 * 2**20))),
    "a packet that does not unpack": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0garbage")),
    "a packet cut in its language": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0en")),
    "a profile that is no hexadecimal": png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzz")),
    "a short resolution": png_with(chunk(b"pHYs", b"\0")),
    "a wrong checksum": png_with(chunk(b"eXIf", turned(6), 1), chunk(b"tEXt", b"a\0b", 1)),
    "a wrong list of frames": png_with(chunk(b"acTL", bytes(8)) + chunk(b"fcTL", b"\0\0\0\x07" + bytes(22))),
    "cut in the last chunk": png_with(after=chunk(b"eXIf", turned(6)))[:-18],
    "a short transparent level": png_with(chunk(b"tRNS", b"\0")),
    "a WebP cut in its EXIF": webp_with((b"EXIF", turned(6)))[:-8],
    "EXIF without its flag": webp_with((b"EXIF", turned(6)), flags=0),
    "a length beyond the end": webp_with((b"EXIF", turned(6))).replace(b"EXIF\x1a\0\0\0", b"EXIF\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", ODD_PARTS)
def test_other_parts_never_cost_the_image(name: str):
    check(ODD_PARTS[name], 1)


def test_a_size_needs_the_header_only():
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.effect_noise((400, 300), 60).convert("RGB"), kind)
        assert read_header(data[: len(data) // 4])[:4] == (kind, 400, 300, 1)
        with pytest.raises(ImageError, match="image cannot be decoded"):
            read_header(data[:14])


@pytest.mark.parametrize(
    "data",
    [
        encoded(drawing(), "BMP"),
        b"",
        b"\xff\xd8\xff",
        jpeg_with().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        jpeg_with().replace(b"\xff\xc0\0\x11\x08\0\x10", b"\xff\xc0\0\x11\x08\0\0"),
        png_with().replace(b"\x08\x02\0\0\0", b"\x03\x02\0\0\0"),
        b"RIFF\x04\0\0\0WEBP",
    ],
    ids=["bmp", "empty", "jpeg-start", "12-bits", "no-height", "depth-of-3", "no-chunk"],
)
def test_what_has_no_size_is_refused_by_all(data: bytes):
    for read in (read_header, decode_image):
        with pytest.raises(ImageError, match="image cannot be decoded") as caught:
            read(data, "a.tar/key7")
        assert caught.value.where == "a.tar/key7"
    assert read_content({"jpg": data or b"x"}).fault.cause == "bad-image"


@pytest.mark.parametrize(
    "error",
    [
        *(OSError, SyntaxError, ValueError, TypeError, EOFError, KeyError, IndexError, OverflowError, AttributeError),
        *(
            ZeroDivisionError,
            RecursionError,
            AssertionError,
            NotImplementedError,
            RuntimeError,
            zlib.error,
            MemoryError,
        ),
        lambda text: UnicodeDecodeError("ascii", b"", 0, 1, text),
    ],
)
def test_whatever_a_decoder_raises_costs_the_sample_alone(
    monkeypatch: pytest.MonkeyPatch, error: Callable[..., object]
):
    def fail(*arguments: object) -> None:
        raise error("odd content")

    cause = "too-large" if error is MemoryError else "bad-image"
    for target, name in (
        (ImageFile.ImageFile, "load"),
        (JpegImagePlugin.JpegImageFile, "_open"),
        (PngImagePlugin.PngImageFile, "_open"),
    ):
        monkeypatch.setattr(target, name, fail)
        for data in (PLAIN["JPEG"], PLAIN["PNG"]):
            if target is ImageFile.ImageFile or target.format in read_header(data).format:
                with pytest.raises(DataError) as caught:
                    decode_image(data, where="a.tar/key7")
                assert (caught.value.cause, caught.value.where) == (cause, "a.tar/key7")
                assert read_content({"jpg": data}, decode=True).fault.cause == cause
        monkeypatch.undo()


def test_a_header_takes_linear_time():
    """Files of 1 MB that a slip would make take minutes: fill, tiny parts, overlapping tags, a block in many parts."""
    size = 1_000_000
    entry = b"\1\0" + b"\0\7" + size.to_bytes(4, "big") + bytes(4)
    files = (
        b"\xff\xd8" + b"\xff" * size,
        b"\xff\xd8" + b"\xff\0" * (size // 2),
        b"\xff\xd8" + (b"\xff\xfe\0\2" * (size // 4)),
        jpeg_with(*[app1(EXIF + bytes(60_000))] * (size // 60_000)),
        jpeg_with(app1(XMP_SEGMENT + b"tiff:Orientation" * 4_000)),
        png_with(b"".join([chunk(b"IDAT", b"")] * (size // 12))),
        png_with(chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + entry * (size // 12))),
        png_with(international(b"XML:com.adobe.xmp", (b"tiff:Orientation" + b" " * 984) * (size // 1000))),
        webp_with(*[(b"ABCD", b"")] * (size // 8)),
    )
    start = time.process_time()
    for data in files:
        try:
            header = read_header(data)
        except ImageError:
            continue
        assert len(header.head) <= len(data)
    assert time.process_time() - start < 5


def test_mutated_files_give_an_image_of_the_size_in_the_header_or_the_one_error():
    """300 of those that `python tests/fuzz_images.py` tries."""
    rng = np.random.default_rng(7)
    seeds = list(SEEDS.values())
    found = [examine(mutate(seeds[i % len(seeds)], rng)) for i in range(300)]
    assert 30 < sum(result == "delivered" for result in found) < 270
    assert {result for result in found if result.startswith("FAULT")} == set()
