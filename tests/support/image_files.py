"""Image files made by hand, part by part: metadata that no library would write, and colour types that Pillow cannot."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"


def drawing(width: int = 24, height: int = 16) -> Image.Image:
    """An image without any symmetry: blue on the left, brighter to the bottom."""
    rows = np.zeros((height, width, 3), dtype=np.uint8)
    rows[..., 1] = np.linspace(0, 250, height, dtype=np.uint8)[:, None]
    rows[:, : width // 2, 2] = 250
    return Image.fromarray(rows)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(samples: np.ndarray, depth: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of samples [H, W, channels], with chunks before and after those of the pixels."""
    height, width, channels = samples.shape
    assert channels == PNG_CHANNELS[colour]
    rows = samples.reshape(height, width * channels)
    bits = np.unpackbits(rows.astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=-1)[..., 16 - depth :]
    packed = np.packbits(bits.reshape(height, -1), axis=-1)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(lines)) + after + chunk(b"IEND", b"")


def png_with(before: bytes = b"", after: bytes = b"") -> bytes:
    """The drawing as a PNG with chunks before and after those of the pixels."""
    return png(np.asarray(drawing()), 8, 2, before, after)


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(*segments: bytes, before: int | None = None, image: Image.Image | None = None) -> bytes:
    """The drawing, or another image, as a JPEG with segments after its start, or before its first marker `before`."""
    data = encoded(image or drawing(), "JPEG", quality=95)
    place = 2 if before is None else data.index(bytes((0xFF, before)))
    return data[:place] + b"".join(segments) + data[place:]


def webp_with(*chunks: tuple[bytes, bytes], flags: int = 0x0C, image: Image.Image | None = None) -> bytes:
    """The drawing, or another image, as an extended WebP with chunks after its pixels."""
    image = image or drawing()
    frame = encoded(image, "WEBP", lossless=True)[12:]
    size = b"".join((side - 1).to_bytes(3, "little") for side in image.size)
    parts = [(b"VP8X", bytes((flags, 0, 0, 0)) + size), *chunks]
    packed = [kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in parts]
    body = b"WEBP" + packed[0] + frame + b"".join(packed[1:])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif(*entries: tuple[int, int, int, bytes], order: str = ">", next_at: int = 8) -> bytes:
    """A block of EXIF: entries of tag, type, count and the four bytes of value or place."""
    head = b"MM\0*" if order == ">" else b"II*\0"
    packed = [struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
    return head + struct.pack(f"{order}IH", next_at, len(entries)) + b"".join(packed) + bytes(4)


def turned(orientation: int, order: str = ">") -> bytes:
    """A block of EXIF with an orientation."""
    return exif((0x0112, 3, 1, struct.pack(f"{order}H", orientation)), order=order)


def xmp(orientation: object, form: str = 'tiff:Orientation="{}"') -> bytes:
    """A packet of XMP with an orientation."""
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {form.format(orientation)}/></rdf:RDF></x:xmpmeta>'
    ).encode()


def international(name: bytes, text: bytes, packed: bool = False) -> bytes:
    """A chunk iTXt."""
    return chunk(b"iTXt", name + (b"\0\1\0\0\0" + zlib.compress(text) if packed else b"\0\0\0\0\0" + text))


def hexadecimal(block: bytes) -> bytes:
    """A block of EXIF as ImageMagick writes it into a text."""
    return b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
