"""Mutates small image files and puts them through header reader and decoders: `python tests/fuzz_images.py [COUNT]`.

Run by hand; the default suite tries some 300. Whatever the bytes are, the result is an image of the size that the
header says, the same by the fast and the exact way, or an ImageError: no other exception, no warning, no hang.
"""

import argparse
import collections
import faulthandler
import multiprocessing
import struct
import sys
import time
import traceback
import warnings
import zlib

import numpy as np

from data_tools.sample.decode import decode_image, open_jpeg
from data_tools.sample.image_header import ImageError, read_header
from tests.support.image_files import (
    XMP_SEGMENT,
    chunk,
    drawing,
    encoded,
    exif,
    hexadecimal,
    international,
    jpeg_with,
    png,
    png_with,
    segment,
    turned,
    webp_with,
    xmp,
)

_PROFILE = bytes(40)
_RESOLUTION = exif((0x0112, 3, 1, b"\0\6"), (0x011A, 5, 1, b"\0\0\0\x32"), (0x0128, 3, 1, b"\0\3")) + bytes(8)
_EXIF = segment(0xE1, b"Exif\0\0" + _RESOLUTION)
_XMP = segment(0xE1, XMP_SEGMENT + xmp(8))
_ICC = segment(0xE2, b"ICC_PROFILE\0\1\1" + _PROFILE)
_RAMP = np.arange(64).reshape(8, 8, 1)

SEEDS = {
    "jpeg": jpeg_with(_EXIF, _XMP, _ICC),
    "jpeg, upright": jpeg_with(segment(0xE1, b"Exif\0\0" + turned(1, "<")), _ICC),
    "jpeg, plain": jpeg_with(),
    "jpeg, grey": jpeg_with(_XMP, image=drawing().convert("L")),
    "jpeg, CMYK": encoded(drawing().convert("CMYK"), "JPEG", exif=turned(3)),
    "jpeg, progressive": encoded(drawing(), "JPEG", progressive=True, exif=turned(5)),
    "jpeg, several": encoded(drawing(), "MPO", save_all=True, append_images=[drawing(8, 8)]),
    "png": png_with(chunk(b"eXIf", _RESOLUTION) + chunk(b"iCCP", b"p\0\0" + zlib.compress(_PROFILE))),
    "png, late": png_with(chunk(b"pHYs", bytes(9)), chunk(b"eXIf", turned(7))),
    "png, texts": png_with(
        international(b"XML:com.adobe.xmp", xmp(4)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexadecimal(turned(2)))),
    ),
    "png, 1 bit": png(_RAMP % 2, 1, 0, chunk(b"tRNS", b"\0\1")),
    "png, 2 bits": png(_RAMP % 4, 2, 0, chunk(b"tRNS", b"\0\2")),
    "png, 16 bits": png(_RAMP * 1000, 16, 0, chunk(b"tRNS", struct.pack(">H", 3000))),
    "png, RGB of 16 bits": png(np.repeat(_RAMP * 1000, 3, 2), 16, 2, chunk(b"tRNS", struct.pack(">3H", *[3000] * 3))),
    "png, palette": png(_RAMP % 16, 4, 3, chunk(b"PLTE", bytes(range(48))) + chunk(b"tRNS", bytes(range(0, 250, 50)))),
    "png, RGBA": encoded(drawing().convert("RGBA"), "PNG"),
    "png, animated": encoded(drawing(), "PNG", save_all=True, append_images=[drawing().rotate(90)]),
    "webp": webp_with((b"EXIF", _RESOLUTION), (b"XMP ", xmp(6))),
    "webp, lossy": encoded(drawing(), "WEBP", exif=turned(6), icc_profile=_PROFILE),
    "webp, plain": encoded(drawing(), "WEBP"),
    "webp, lossless": encoded(drawing(), "WEBP", lossless=True),
    "webp, transparent": encoded(drawing().convert("RGBA").rotate(30), "WEBP"),
    "webp, animated": encoded(drawing(), "WEBP", save_all=True, append_images=[drawing().rotate(90)], exif=turned(8)),
}


def mutate(seed: bytes, rng: np.random.Generator) -> bytes:
    """Return the file with some changes, most of them in its header; most PNGs get right checksums again."""
    data = bytearray(seed)
    reach = len(data) if rng.random() < 0.3 else min(len(data), 400)
    for _ in range(int(rng.integers(1, 6))):
        start = int(rng.integers(0, max(1, min(reach, len(data)))))
        length = int(rng.integers(1, 9))
        kind = rng.integers(0, 7)
        if kind == 0:
            data[start : start + 1] = bytes([data[start] ^ 1 << int(rng.integers(8))]) if data else b""
        elif kind == 1:
            data[start : start + length] = rng.bytes(length)
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            data[start:start] = rng.bytes(length)
        elif kind == 4:
            data[start : start + length] = (b"\0", b"\xff")[int(rng.integers(2))] * length
        elif kind == 5:
            place = int(rng.integers(0, len(seed)))
            data[start:start] = seed[place : place + int(rng.integers(1, 60))]
        elif rng.random() < 0.2:
            del data[start:]
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        return _mend_checksums(bytes(data))
    return bytes(data)


def _mend_checksums(data: bytes) -> bytes:
    mended, start = bytearray(data), 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(data[start + 4 : end]))
        start = end + 4
    return bytes(mended)


def examine(data: bytes) -> str:
    """Return "delivered", the cause of a refusal, or what is wrong, beginning with "FAULT"."""
    header = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                header = read_header(data)
            except ImageError:
                header = None
            image = decode_image(data)
            assert header is not None, "decoded without a header"
            assert image.size == header.size, f"{image.size} decoded, {header.size} in the header"
            if jpeg := open_jpeg(data):
                for shrink in (1, 8):
                    rows = jpeg.decode(shrink)
                    size = (-(-header.height // shrink), -(-header.width // shrink), 3)
                    assert rows.shape == size, f"{rows.shape} by the fast way, not {size}"
        return "delivered"
    except ImageError as error:
        return error.cause
    except Exception:
        return f"FAULT {traceback.format_exc()}"


def _run(task: tuple[int, int]) -> tuple[collections.Counter[tuple[str, str]], list[str], float]:
    number, count = task
    rng = np.random.default_rng(number)
    results: collections.Counter[tuple[str, str]] = collections.Counter()
    faults, slowest = [], 0.0
    names = list(SEEDS)
    for i in range(count):
        data = mutate(SEEDS[names[i % len(names)]], rng)
        faulthandler.dump_traceback_later(20, exit=True)
        start = time.perf_counter()
        result = examine(data)
        slowest = max(slowest, time.perf_counter() - start)
        faulthandler.cancel_dump_traceback_later()
        if result.startswith("FAULT"):
            faults.append(f"{data.hex()}\n{result}")
        results[names[i % len(names)], result.split()[0]] += 1
    return results, faults, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200_000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    part = 2_000
    tasks = [(number, min(part, options.count - number * part)) for number in range(-(-options.count // part))]
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    faults, slowest = [], 0.0
    with multiprocessing.Pool(options.processes) as pool:
        for results, more, seconds in pool.imap_unordered(_run, tasks):
            total += results
            faults += more
            slowest = max(slowest, seconds)
    outcomes = sorted({outcome for _, outcome in total})
    print(f"{'seed':24}" + "".join(f"{outcome:>12}" for outcome in outcomes))
    for name in [*SEEDS, "all"]:
        counts = [sum(total[key, outcome] for key in SEEDS if name in (key, "all")) for outcome in outcomes]
        print(f"{name:24}" + "".join(f"{count:12,}" for count in counts))
    print(f"slowest: {slowest:.2f} s; faults: {len(faults)}")
    for fault in faults[:10]:
        print(fault)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
