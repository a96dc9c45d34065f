"""From the bytes of an image file to format, size and orientation, and to a copy without metadata.

Sizes and pixels both come from here, so that they cannot disagree. The walk over the file never decodes pixels, never
reads out of bounds and takes linear time. Only what describes pixels goes on to a decoder, so that no metadata can cost
an image: what cannot be read (cut, garbage, out of range, wrong checksum) counts as absent.

The orientation is tag 274 of EXIF, else `tiff:Orientation` of XMP; without either it is 1, upright.

Sources: JPEG ITU-T T.81 appendix B; PNG 3rd edition; RFC 9649 (WebP); EXIF 2.32 section 4.6; XMP part 3. Where a file
has a part twice, and for tags, this follows Pillow.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from data_tools.core.errors import DataError

# Rare formats hold most decoder faults: only these get in, unless a caller asks for others.
FORMATS = ("JPEG", "PNG", "WEBP")

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_MAX_TEXT = 2**20  # bytes of a compressed text that are unpacked

# 0xFF, and a code that is neither a stuffed zero nor fill.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
_JPEG_ALONE = {0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}  # markers that no length follows
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_JPEG_SCAN = 0xDA
_JPEG_COMMENT = 0xFE
_XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_XMP_TEXT, _EXIF_TEXT = b"XML:com.adobe.xmp", b"Raw profile type exif"

_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA = 0x2C  # flags of VP8X: a profile, EXIF, XMP
_WEBP_METADATA_FLAGS = {b"EXIF": 0x08, b"XMP ": 0x04}  # libwebp reads them only where the flag is set

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([0-9]+)")
_EXIF_TYPES = (*range(1, 14), 16)  # of TIFF fields, those that there are
_EXIF_INTEGERS = {3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4}  # of those the integers, and their bytes


class ImageError(DataError):
    """An image that cannot be decoded; `cause` is its name in `errors.CAUSES`."""

    cause = "bad-image"


class ImageTooLargeError(ImageError):
    """An image that would take too much memory; refused by its header, before it is decoded."""

    cause = "too-large"


class Header(NamedTuple):
    """What the header of an image file says, `width` and `height` in px as they are stored.

    `channels` are those of the file. `one_scan` is False for a JPEG that is collected from several scans, None where it
    is cut before the first. Without metadata, the file is `head` and then its bytes from `tail` on.
    """

    format: str
    width: int
    height: int
    orientation: int
    channels: int
    one_scan: bool | None
    head: bytes
    tail: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px of the image as it is delivered, turned."""
        return (self.height, self.width) if self.orientation in _SIDEWAYS else (self.width, self.height)

    def without_metadata(self, data: bytes) -> bytes:
        """Return the file `data`, whose header this is, without its metadata."""
        return self.head + data[self.tail :]


@contextmanager
def refusals(where: str, formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    """Raise ImageError for whatever is raised inside: the one boundary between the content of image files and the rest.

    All exceptions, because no list of them is complete: the content of a file makes Pillow and its plugins raise what
    any slip in Python raises, such as struct.error, IndexError, KeyError, OverflowError, ZeroDivisionError,
    RecursionError, AssertionError or zlib.error, and one odd file must cost its sample and not the run. A fault of
    our own here would be taken for corrupt images, too, but not silently: it is counted, the error carries the name
    of the exception, and a run stops where it has too many of them.
    """
    names = f"{', '.join(formats[:-1])} or {formats[-1]}".removeprefix(" or ")
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large(str(error), where) from error
    except MemoryError as error:
        raise too_large("there is not enough memory to decode it", where) from error
    except Exception as error:
        what = (
            f"{error}" if isinstance(error, OSError | SyntaxError | ValueError) else f"{type(error).__name__}: {error}"
        )
        if isinstance(error, UnidentifiedImageError):  # whose text is a memory address
            what = f"not a {names} image"
        raise ImageError(
            f"image cannot be decoded: {what}",
            where=where,
            hint=f"replace it with an intact {names} file, or remove it",
        ) from error


def too_large(what: str, where: str) -> ImageTooLargeError:
    """Return the error for an image that is too large."""
    return ImageTooLargeError(f"image is too large: {what}", where=where, hint="shrink it, or remove it")


def format_of(data: bytes) -> str | None:
    """Return which of `FORMATS` a file claims to have; None for all others."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(_PNG_MAGIC):
        return "PNG"
    return "WEBP" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def read_header(data: bytes, where: str = "image") -> Header:
    """Read the header and the metadata of an image file; its beginning is enough for the size.

    Raises:
        ImageError: it is not a JPEG, PNG or WebP file, or its size cannot be read.
    """
    with refusals(where):
        image_format = format_of(data)
        if image_format is None:
            raise UnidentifiedImageError
        header = {"JPEG": _read_jpeg, "PNG": _read_png, "WEBP": _read_webp}[image_format](data)
        if not header.width or not header.height:
            raise ValueError(f"it has {header.width} x {header.height} px")
        return header


def find_orientation(exif: Iterable[bytes], xmp: Iterable[bytes]) -> int:
    """Return the orientation, 1 to 8: that of the first block of EXIF that has one, else of XMP."""
    for found in (*map(_exif_orientation, exif), *map(_xmp_orientation, xmp)):
        if found is not None:
            return found if 1 <= found <= 8 else 1
    return 1


def _exif_orientation(block: bytes) -> int | None:
    """Return the tag of the first directory as a number, 0 where it is none; None where there is no tag."""
    for _ in range(2):  # some writers put the name of the segment before it once too often
        block = block.removeprefix(b"Exif\0\0")
    if block[:4] not in (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0"):
        return None

    def number(start: int, size: int) -> int:
        return int.from_bytes(block[start : start + size], "little" if block.startswith(b"II") else "big")

    start = number(4, 4)
    for entry in range(start + 2, len(block) - 11, 12)[: number(start, 2)]:
        kind, count = number(entry + 2, 2), number(entry + 4, 4)
        if number(entry, 2) == _ORIENTATION and kind in _EXIF_TYPES and count:
            return number(entry + 8, _EXIF_INTEGERS.get(kind, 0)) if count == 1 else 0
    return None


def _xmp_orientation(packet: bytes) -> int | None:
    found = _XMP_ORIENTATION.search(packet)
    return int(found[1][:4]) if found else None


def _read_jpeg(data: bytes) -> Header:
    head, end = bytearray(b"\xff\xd8"), 2
    frame: tuple[int, bytes] | None = None
    one_scan = None
    exif: list[bytes] = []
    xmp = b""
    while found := _JPEG_MARKER.search(data, end):  # what lies between two segments is fill, or junk to be left out
        start, end = found.span()
        marker = data[start + 1]
        if marker < 0xC0:
            raise ValueError("no marker found")
        body = end + 2
        if marker not in _JPEG_ALONE:
            end = max(body, end + int.from_bytes(data[end:body], "big"))
        if end > len(data):
            break
        if marker == _JPEG_SCAN:
            one_scan = _is_whole_scan(frame, data[body - 2 : body + 1])
            break
        segment = data[body:end]
        if marker in _JPEG_FRAMES:
            frame = marker, segment
        elif marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif.append(segment[6:])  # a block of more than 64 KiB lies in several segments
        elif marker == 0xE1 and segment.startswith(_XMP_SEGMENT):
            xmp = segment[len(_XMP_SEGMENT) :]
        if not (marker == _JPEG_COMMENT or 0xE0 <= marker <= 0xEF) or _tells_colours(marker, segment):
            head += data[start:end]
    else:
        start = len(data)
    if frame is None or len(frame[1]) < 6:
        raise ValueError("the JPEG is cut before its size, or has none")
    bits, height, width, channels = struct.unpack(">BHHB", frame[1][:6])
    if bits != 8 or channels not in (1, 3, 4):
        raise ValueError(f"a JPEG of {channels} channels of {bits} bits")
    orientation = find_orientation([b"".join(exif)], [xmp])
    return Header("JPEG", width, height, orientation, channels, one_scan, bytes(head), start)


def _is_whole_scan(frame: tuple[int, bytes] | None, scan: bytes) -> bool:
    """Return whether the first scan has all the channels at full precision: it is then decoded as it is read."""
    channels = frame[1][5] if frame and len(frame[1]) > 5 else 0
    return frame is not None and frame[0] not in _JPEG_PROGRESSIVE and scan == bytes((0, 6 + 2 * channels, channels))


def _tells_colours(marker: int, segment: bytes) -> bool:
    """Return whether libjpeg asks this segment for the colour space."""
    if marker == 0xE0:
        return segment.startswith(b"JFIF\0") and len(segment) >= 14
    return marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12


def _read_png(data: bytes) -> Header:
    view, kept = memoryview(data), bytearray(_PNG_MAGIC)
    head = exif = b""
    texts = {_EXIF_TEXT: b"", _XMP_TEXT: b""}
    with_key = with_pixels = False
    start = len(_PNG_MAGIC)
    while start + 8 <= len(data):
        kind = data[start + 4 : start + 8]
        body, end = start + 8, start + 12 + int.from_bytes(data[start : start + 4], "big")
        if kind in _PNG_PIXELS:
            kept += view[start:end]
            with_pixels |= kind == b"IDAT"
            if kind == b"IHDR":
                head = data[body : end - 4]
        elif kind == b"tRNS" and not (with_key or with_pixels) and _is_intact(view[start:end]):
            with_key = True
            kept += _png_key(head, data[body : end - 4])
        elif kind == b"eXIf" and _is_intact(view[start:end]):
            exif = data[body : end - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name = data[body : body + 80].partition(b"\0")[0]
            if name in texts and _is_intact(view[start:end]):
                texts[name] = kind + data[body + len(name) + 1 : end - 4]
        if kind == b"IEND" or not kind.isalnum():
            break
        start = end
    if len(head) < 13:
        raise ValueError("the PNG is cut before its size, or has none")
    width, height, depth, colour = struct.unpack(">IIBB", head[:10])
    if depth not in _PNG_DEPTHS.get(colour, ()):
        raise ValueError(f"a PNG of colour type {colour} and {depth} bits")
    raw_exif, xmp = _text(texts[_EXIF_TEXT]), _text(texts[_XMP_TEXT])
    orientation = find_orientation([exif, unhex(raw_exif)], [xmp])
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    return Header("PNG", width, height, orientation, channels, True, bytes(kept), len(data))


def _is_intact(chunk: memoryview) -> bool:
    """Return whether a chunk of a PNG is whole and has the right checksum; libpng ignores others of this kind, too."""
    whole = len(chunk) == 12 + int.from_bytes(chunk[:4], "big")
    return whole and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _png_key(head: bytes, body: bytes) -> bytes:
    """Return the chunk tRNS as the specification has it; b"" where its length is wrong.

    A level has 16 bits, of which those above the depth are not used. Pillow compares them, too, and refuses a PNG
    whose chunk is too short.
    """
    depth, colour = (head[8], head[9]) if len(head) > 9 else (8, 0)
    if colour == 3:
        body = body[: 2 ** min(depth, 8)]
    elif len(body) != {0: 2, 2: 6}.get(colour):
        return b""
    else:
        levels = struct.unpack(f">{len(body) // 2}H", body)
        body = struct.pack(f">{len(levels)}H", *(level & (2 ** min(depth, 16) - 1) for level in levels))
    if not body:
        return b""
    return struct.pack(">I", len(body)) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))


def _text(chunk: bytes) -> bytes:
    """Return the text of a chunk of a PNG, given as its kind and what follows the name; b"" where it is no text."""
    kind, rest = chunk[:4], chunk[4:]
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] != b"\0"
        parts = rest[2:].split(b"\0", 2)  # language, translated name, text
        rest = rest[1:2] + parts[2] if len(parts) == 3 else b""
        if not packed:
            return rest[1:]
    if not packed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest[1:], _MAX_TEXT) if rest[:1] == b"\0" else b""
    except zlib.error:
        return b""


def unhex(text: bytes) -> bytes:
    """Return the block of a "Raw profile type exif": three lines of names and length, then hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _read_webp(data: bytes) -> Header:
    view, kept = memoryview(data), bytearray()
    metadata: dict[bytes, bytes] = {}
    size: tuple[int, int] | None = None
    flags, with_frame = 0, False
    start, end_of_file = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while start + 8 <= end_of_file:
        kind, length = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        body, end = start + 8, min(start + 8 + length + length % 2, end_of_file)
        if start == 12:
            size = _webp_size(kind, data[body : min(body + 10, end)])
            if size is None:
                break
            kept += view[start:end]
            if kind != b"VP8X":
                break
            flags = data[body]
            kept[8] = flags & ~_WEBP_METADATA
        elif kind in _WEBP_PIXELS and not (kind == b"ANMF" and with_frame):  # an animation gives its first frame
            kept += view[start:end]
            with_frame |= kind == b"ANMF"
        elif flags & _WEBP_METADATA_FLAGS.get(kind, 0) and body + length <= end_of_file:
            metadata.setdefault(kind, data[body : body + length])
        start = end
    if size is None:
        raise ValueError("the WebP is cut before its size, or has none")
    orientation = find_orientation([metadata.get(b"EXIF", b"")], [metadata.get(b"XMP ", b"")])
    head = b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP" + kept
    return Header("WEBP", *size, orientation, 4, True, head, len(data))


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    """Return width and height by the first chunk; None where it has none."""
    if kind == b"VP8X" and len(body) >= 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None
