"""Whatever an image file holds comes out as the RGB image that a viewer would show, or is refused by name."""

import io
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from data_tools.core.errors import CAUSES, DataError
from data_tools.sample import decode
from data_tools.sample.decode import MAX_BYTES, ImageError, Jpeg, decode_image, open_jpeg, read_image, to_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def drawing(size: tuple[int, int] = (6, 4)) -> Image.Image:
    values = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(values * 3)


def png(size: tuple[int, int], depth: int, colours: int, rows: bytes = b"", **chunks: bytes) -> bytes:
    """A PNG by hand: what Pillow reads but does not write."""
    head = struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0)
    parts = {"IHDR": head, **chunks, "IDAT": zlib.compress(rows, 1) if rows else b"", "IEND": b""}
    packed = [
        struct.pack(">I", len(d)) + k.encode() + d + struct.pack(">I", zlib.crc32(k.encode() + d))
        for k, d in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def jpeg_of_size(width: int, height: int, **options) -> bytes:
    """A JPEG that claims a size and holds the beginning of it."""
    data = bytearray(encoded(noise(), "JPEG", **options))
    frame = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of_size(width: int, height: int) -> bytes:
    """A WebP of one colour, which takes no bits at any size."""
    data = bytearray(encoded(Image.new("RGBA", (1, 1), "red"), "WEBP", lossless=True))
    start = data.index(b"VP8L") + 8
    assert data[start] == 0x2F  # its signature; 14 bits each of width - 1 and height - 1, and one of alpha follow
    data[start + 1 : start + 5] = struct.pack("<I", (width - 1) | (height - 1) << 14 | 1 << 28)
    return bytes(data)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "WEBP", "lossless": True}], ids=["png", "webp"])
def test_lossless_files_come_out_as_they_went_in(options: dict):
    assert (pixels(encoded(drawing(), **options)) == np.asarray(drawing())).all()


def test_a_jpeg_comes_out_about_as_it_went_in():
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    assert abs(pixels(encoded(image, "JPEG", quality=95)) - (200, 30, 90)).max() <= 3


def test_16_bit_grey_is_scaled_and_not_saturated():
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(levels)))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_16_bit_grey_with_a_transparent_level():
    rows = b"\0" + struct.pack(">3H", 0, 128 * 257, 65535)
    assert pixels(png((3, 1), 16, 0, rows, tRNS=struct.pack(">H", 0)))[0, :, 0].tolist() == [255, 128, 255]


@pytest.mark.parametrize(("colours", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["rgb", "rgba", "la"])
def test_16_bit_colours_keep_their_upper_8_bits(colours: int, channels: int):
    """And transparency, at half here, is laid on white."""
    values = [0x0A00, 0x80FF, 0xFE80][: 1 if channels == 2 else 3]
    alpha = [0x80FF] if channels in (2, 4) else []
    found = pixels(png((1, 1), 16, colours, b"\0" + struct.pack(f">{channels}H", *values, *alpha)))[0, 0]
    upper = np.array([0x0A, 0x80, 0xFE]) if channels > 2 else np.array([0x0A] * 3)
    share = 0x80 / 255 if alpha else 1
    assert np.abs(found - (share * upper + (1 - share) * 255)).max() <= 1


@pytest.mark.parametrize("full_scale", [1.0, 255.0, 65535.0])
def test_float_grey_is_scaled(full_scale: float):
    values = np.array([[0, 0.5, 1, np.nan, -1]], dtype=np.float32) * full_scale
    data = encoded(Image.fromarray(values), "TIFF")
    assert np.asarray(decode_image(data, formats=("TIFF",)))[0, :, 1].tolist() == [0, 128, 255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str):
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(0, 0, 0, 0), (0, 0, 0, 51), (0, 0, 0, 255)]):
        image.putpixel((x, 0), value)
    assert pixels(encoded(image.convert(mode)))[0].tolist() == [[255] * 3, [204] * 3, [0] * 3]


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image))[0].tolist() == [[10, 20, 30], [200, 0, 0]]
    assert pixels(encoded(image, transparency=0))[0].tolist() == [[255, 255, 255], [200, 0, 0]]


def test_a_palette_with_half_transparent_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, transparency=bytes([51, 255])))[0].tolist() == [[204] * 3, [200, 0, 0]]


def test_a_large_picture_is_converted_in_strips_without_a_seam(monkeypatch: pytest.MonkeyPatch):
    image = noise((50, 70)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    for data in (encoded(image), encoded(image.quantize(40)), encoded(noise((50, 70)).convert("L"))):
        whole = pixels(data)
        monkeypatch.setattr(decode, "_STRIP_PIXELS", 450)
        assert (pixels(data) == whole).all()
        monkeypatch.undo()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int):
    data = encoded(drawing(), kind, exif=turned(orientation), lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert expected.shape[:2] == ((4, 6) if orientation < 5 else (6, 4))
    assert (pixels(data) == expected).all()


def test_a_wrong_exif_entry_does_not_cost_the_picture():
    """An orientation, and a number that is written as text."""
    exif = turned(3)
    exif[ExifTags.Base.Make] = "maker"
    block = exif.tobytes()
    width = struct.pack(">H", ExifTags.Base.ImageWidth)
    wrong = block.replace(struct.pack(">H", ExifTags.Base.Make), width, 1)
    assert wrong != block
    expected = np.asarray(drawing().transpose(Image.Transpose.ROTATE_180))
    assert (pixels(encoded(drawing(), exif=wrong)) == expected).all()


@pytest.mark.parametrize("adobe", [True, False])
def test_a_cmyk_jpeg_keeps_its_colours(adobe: bool):
    """Inverted, as Adobe writes it; also where the segment that says so is lost."""
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)  # red
    start = data.index(b"\xff\xee\0\x0eAdobe")
    data = data if adobe else data[:start] + data[start + 16 :]
    assert abs(pixels(data) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.6, 0.95])
def test_a_cut_file_is_named(kind: str, keep: float):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(DataError, match="image cannot be decoded") as caught:
        decode_image(data[: int(keep * len(data))], where="a.tar/key7")
    assert caught.value.where == "a.tar/key7"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_gives_an_image_or_the_one_error(kind: str):
    rng = np.random.default_rng(1)
    exif = turned(6)
    exif[ExifTags.Base.Make] = "maker"
    data = encoded(drawing((32, 32)), kind, exif=exif)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "data",
    [
        png((10_000, 6_000), 8, 2),
        png((30_000, 30_000), 8, 2),
        png((1, 70_000), 8, 2),
        png((6_500, 6_500), 8, 6),
        jpeg_of_size(65_500, 65_500),
        jpeg_of_size(8_000, 6_000, progressive=True),
        jpeg_of_size(8_000, 6_000).replace(b"\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0", b"\0\x08\1\1\0\0\x3f\0"),
        jpeg_of_size(8_000, 6_000, exif=turned(6)),
    ],
    ids=["cap", "pillow-cap", "side", "transparent", "jpeg", "progressive", "channel-by-channel", "turned"],
)
def test_what_would_take_too_much_memory_is_refused_unread(data: bytes):
    for read in (decode_image, open_jpeg)[: 2 if data.startswith(b"\xff") else 1]:
        with pytest.raises(ImageError, match=r"image is too large: .* (is over|would take|exceeds limit)") as caught:
            read(data, where="a.tar/key7")
        assert (caught.value.cause, caught.value.where) == ("too-large", "a.tar/key7")


def test_a_large_photo_is_not_refused():
    """50 MP in one scan: read as far as it goes."""
    data = jpeg_of_size(8_160, 6_120)
    assert open_jpeg(data) == Jpeg(data, 8_160, 6_120, "image")


MEASURE = """
import sys
from pathlib import Path
from data_tools.sample.decode import ImageError, decode_image, open_jpeg

def peak():  # MiB; not of getrusage, which also knows the process before this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

files = sorted(Path(sys.argv[1]).iterdir())
decode_image(files[0].read_bytes())
start = peak()
for file in files[1:]:
    data = file.read_bytes()
    for read in (decode_image, lambda data: open_jpeg(data).decode() if open_jpeg(data) else None):
        try:
            read(data)
            answer = "read"
        except ImageError as error:
            answer = error.cause
        print(file.name, answer, round(peak() - start))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_bomb_takes_much_memory(tmp_path: Path):
    """Just under the limits, where all of it is decoded, and far over them."""
    at_limit = int((MAX_BYTES / 8) ** 0.5)  # side of a PNG, at 8 bytes a pixel
    long_text = b"a\0\0" + zlib.compress(bytes(400 * 2**20), 1)
    bombs = {
        "0": encoded(drawing()),
        "rgba.png": png((at_limit, at_limit), 8, 6, bytes((4 * at_limit + 1) * at_limit)),
        "progressive.jpg": jpeg_of_size(5_400, 5_400, progressive=True, subsampling=0),
        "turned.jpg": jpeg_of_size(6_000, 6_000, exif=turned(6)),
        "limit.webp": webp_of_size(4_280, 4_280),
        "over.webp": webp_of_size(16_383, 16_383),
        "profile.png": png((1, 1), 8, 2, bytes(4), iCCP=long_text),
        "text.png": png((1, 1), 8, 2, bytes(4), zTXt=long_text),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    answers = {line.split()[0]: line.split()[1:] for line in reversed(run.stdout.splitlines())}
    assert {name for name, (answer, _) in answers.items() if answer == "too-large"} == {"over.webp"}
    assert max(int(rise) for _, rise in answers.values()) <= 300, run.stdout


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO"])
def test_rare_formats_are_refused(kind: str):
    with pytest.raises(DataError, match="image cannot be decoded") as caught:
        decode_image(encoded(drawing((32, 32)), kind))
    assert "JPEG, PNG or WEBP" in caught.value.hint


def test_rare_formats_are_read_when_asked_for():
    data = encoded(drawing((32, 32)), "BMP")
    assert (np.asarray(decode_image(data, formats=("BMP", "GIF"))) == np.asarray(drawing((32, 32)))).all()
    with pytest.raises(ImageError, match="not a BMP or GIF image"):
        decode_image(encoded(drawing()), formats=("BMP", "GIF"))


def test_a_file_is_read_or_named(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(drawing()))
    assert (np.asarray(read_image(path)) == np.asarray(drawing())).all()
    path.write_bytes(b"no picture")
    for bad in (path, tmp_path / "missing.png", tmp_path):
        with pytest.raises(DataError, match="image cannot be") as caught:
            read_image(bad)
        assert caught.value.where == str(bad)


def test_what_is_no_picture_is_told_in_words():
    with pytest.raises(DataError) as caught:
        decode_image(b"no picture")
    assert caught.value.what == "image cannot be decoded: not a JPEG, PNG or WEBP image"


@pytest.mark.parametrize(("data", "cause"), [(b"no picture", "bad-image"), (png((9_999, 9_999), 8, 2), "too-large")])
def test_the_cause_stays_with_the_error(data: bytes, cause: str):
    """On its way from a loader process, too."""
    with pytest.raises(ImageError) as caught:
        decode_image(data, where="a.tar/key7")
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.cause == cause in CAUSES
    assert str(error) == str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_turned_once(kind: str):
    once = decode_image(encoded(drawing(), kind, exif=turned(6)))
    assert once.size == (4, 6)
    assert (np.asarray(to_rgb(once)) == np.asarray(once)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_metadata_stays_behind(kind: str):
    plain = decode_image(encoded(drawing(), kind, exif=turned(1), dpi=(72, 72), icc_profile=b"profile"))
    assert type(plain) is Image.Image
    assert not plain.info
    assert not plain.getexif()


def test_a_given_picture_is_left_as_it_is():
    image = drawing()
    image.info["comment"] = "mine"
    rgb = to_rgb(image)
    rgb.putpixel((0, 0), (255, 255, 255))
    assert image.getpixel((0, 0)) == (0, 3, 6)
    assert image.info == {"comment": "mine"}


PLAIN = {
    "photo": encoded(noise(), "JPEG"),
    "progressive": encoded(noise(), "JPEG", progressive=True),
    "grey": encoded(noise().convert("L"), "JPEG"),
    "upright": encoded(noise(), "JPEG", exif=turned(1)),
    "several": encoded(noise(), "MPO", save_all=True, append_images=[noise((32, 32))]),
    "rgb": encoded(noise(), "JPEG", keep_rgb=True),
    "odd": encoded(noise((61, 83)), "JPEG"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_jpeg_is_decoded_at_any_scale(name: str):
    jpeg = open_jpeg(PLAIN[name])
    exact = decode_image(PLAIN[name])
    assert (jpeg.width, jpeg.height) == exact.size
    assert np.abs(jpeg.decode().astype(int) - np.asarray(exact)).max() <= 1
    assert np.abs(jpeg.decode(rough=True).astype(int) - np.asarray(exact)).mean() <= 4
    for shrink in (2, 4, 8):
        small = np.asarray(exact.reduce(shrink)).astype(int)
        found = jpeg.decode(shrink)
        assert found.shape == small.shape
        inside = np.abs(found - small)[: exact.height // shrink, : exact.width // shrink]  # not the cut blocks
        assert inside.mean() <= 4


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise(), "PNG"),
        encoded(noise(), "WEBP"),
        encoded(noise().convert("CMYK"), "JPEG"),
        encoded(noise(), "JPEG", exif=turned(6)),
        encoded(
            noise(),
            "JPEG",
            xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF>',
        ),
        b"no picture",
    ],
    ids=["png", "webp", "cmyk", "turned", "turned-by-xmp", "nothing"],
)
def test_all_but_a_plain_jpeg_is_left_to_pillow(data: bytes):
    assert open_jpeg(data) is None


@pytest.mark.parametrize("shrink", [1, 4])
def test_a_jpeg_that_pillow_takes_in_spite_of_a_fault_is_taken(shrink: int):
    data = PLAIN["photo"]
    faulty = data[:-2] + b"\x12\x34" + data[-2:]  # too many bytes
    whole, found = open_jpeg(data).decode(shrink), open_jpeg(faulty).decode(shrink)
    assert found.shape == whole.shape
    assert np.abs(found.astype(int) - whole).mean() <= 4


def test_a_jpeg_that_is_cut_is_named():
    jpeg = open_jpeg(PLAIN["photo"][:-200], where="a.tar/key7")
    with pytest.raises(ImageError, match="truncated") as caught:
        jpeg.decode(2)
    assert (caught.value.cause, caught.value.where) == ("bad-image", "a.tar/key7")
