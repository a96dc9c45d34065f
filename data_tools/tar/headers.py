"""Iterates over the members of a tar, and past damaged parts to the next intact member.

The standard library's reader treats a damaged header, or zero bytes inside the archive, as its end: everything after
it is lost silently. Here every byte of the file belongs to a member, to the end mark, or to a reported `Damage`.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from data_tools.tar.byte_file import ByteFile

_BLOCK = 512
_CHUNK = 1 << 20
_SEARCH = 1 << 16
_MAX_PADDING = 1 << 20  # a tar ends with zero bytes up to a full record: 10 KiB by default, more with `tar -b`
_MAX_REREAD = 1 << 28  # bytes, beyond 8 times the file: only a malicious tar takes more
_MAX_LONG = 1 << 20  # bytes of a long-name or pax header
_MAX_NAME = 4096  # bytes, the maximum length of a path
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 6s 82x 155s 12x")  # name, size, checksum, type, magic, prefix
_MAGICS = ((b"\0 ", 154), (b"ustar", 257))  # bytes in headers and their offsets; very old tars have only the first
_LONG = (b"L", b"K", b"x", b"g")  # headers that describe the next member, or all
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
_PAX_RECORD = re.compile(
    rb"([0-9]{1,8}) "
    rb"(atime|charset|comment|ctime|gid|gname|hdrcharset|linkpath|mtime|path|size|uid|uname|[^.=]*[.][^=]*)="
)
_PAX_NAMES = (b"path", b"size", b"GNU.sparse.name", b"GNU.sparse.size", b"GNU.sparse.major")


class Entry(NamedTuple):
    """One member: `offset` is that of its first header, `stop` that of the next member.

    `kind` is its type: "0" regular file, "5" folder, else a link, a device or another special type. Regular files have
    the SHA-256 of their data.
    """

    name: bytes
    offset: int
    stop: int
    data_offset: int
    size: int
    kind: bytes
    sha256: bytes


class Damage(NamedTuple):
    """Bytes from `offset` to `stop` that are not part of a member; `truncated` if the file ends too early."""

    offset: int
    stop: int
    detail: str
    truncated: bool = False


class Window:
    """Buffered reader for mostly sequential access in large pieces."""

    def __init__(self, file: ByteFile):
        self.file = file
        self.size = file.size
        self.bytes_read = 0
        self._start = 0
        self._data = b""

    def read(self, offset: int, size: int, step: int = 1) -> bytes:
        """Return up to `size` bytes from `offset`, fewer at the end of the file; or every `step`-th of them."""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._data):
            begin = self._load(offset, size)
        return self._data[begin : begin + size : step]

    def view(self, offset: int, size: int) -> memoryview:
        """Return the same bytes as `read`, without a copy."""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._data):
            begin = self._load(offset, size)
        return memoryview(self._data)[begin : begin + size]

    def _load(self, offset: int, size: int) -> int:
        self._data = self.file.read(offset, max(size, self.file.piece))
        self._start = offset
        self.bytes_read += len(self._data)
        return 0


def walk(window: Window) -> Iterator[Entry | Damage]:
    """Yield the members and the damaged parts of a tar in order.

    Damage may begin before the member that was yielded last, which is then part of it.
    """
    position = 0
    last: Entry | None = None
    after_damage = False
    while True:
        found = _member(window, position) or _no_member(window, position, last)
        if found is None:
            return
        if isinstance(found, Damage):
            if window.bytes_read > 8 * window.size + _MAX_REREAD:
                found = Damage(found.offset, window.size, "it is damaged in too many places")
            yield found
            if found.stop >= window.size:
                return
            last, after_damage = None, True
        else:
            if after_damage and _is_short_form(window, found):
                # The header with the full name may be lost: the short form can be the name of another member.
                yield Damage(found.offset, found.stop, f"the full name of member {_text(found.name)} is lost")
            else:
                yield found
            last, after_damage = found, False
        position = found.stop


def _member(window: Window, position: int) -> Entry | Damage | None:
    """Return the member that begins at `position`, or its damage; None if there is no header."""
    offset = position
    long: dict[bytes, bytes] = {}  # values of long-name and pax headers of the member
    while True:
        header = _parse(window, position)
        if header is None:
            missing = "the header after a long name is damaged"
            return _lost(window, offset, position, position + _BLOCK, missing) if position > offset else None
        name, size, kind = header
        data_offset = position + _BLOCK
        if kind not in _LONG:
            break
        values = _long_header(window, data_offset, size, kind)
        if values is None:
            return _lost(window, offset, data_offset, data_offset + size, "a header with a long name is damaged")
        if len(values.get(b"path", b"")) > _MAX_NAME:
            return _lost(window, offset, data_offset, data_offset + size, f"a name is longer than {_MAX_NAME} bytes")
        long |= values
        position = data_offset + size + -size % _BLOCK
    if long:
        sparse = any(key.startswith(b"GNU") for key in long)
        name = long.get(b"GNU.sparse.name") or long.get(b"path") or name
        size, kind = int(long.get(b"size") or size), b"S" if sparse else kind
    if kind in (b"\0", b"7"):
        kind = b"5" if kind == b"\0" and name.endswith(b"/") else b"0"  # very old tars have no type for folders
    end = data_offset + (0 if kind in _WITHOUT_DATA else size)
    stop = end + (data_offset - end) % _BLOCK
    sha256 = _sha256(window, data_offset, end) if kind == b"0" and end <= window.size else b""
    if end > window.size:
        wrong = "is truncated"
    elif kind == b"S":
        wrong = "is sparse, which cannot be read by offset: pack the files with tar without -S"
    elif kind == b"0" and not sha256:
        wrong = "contains other members: its size is wrong"
    elif window.read(end, stop - end).strip(b"\0"):
        wrong = "has bytes after its end: its size is wrong"
    else:
        return Entry(name, offset, stop, data_offset, size, kind, sha256)
    return _lost(window, offset, data_offset, end, f"member {_text(name)} {wrong}")


def _parse(window: Window, position: int) -> tuple[bytes, int, bytes] | None:
    """Return name, size and type of the header at `position`, None if there is none with a correct checksum."""
    header = window.read(position, _BLOCK)
    if len(header) < _BLOCK or not header[0]:
        return None
    name, octal_size, checksum, kind, magic, prefix = _HEADER.unpack(header)
    try:
        # The sum of all bytes, with spaces for the checksum itself. The lower half of Adler-32 has it, modulo 65521.
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(checksum) + 8 * ord(" ")
        if (int(checksum.strip(b" \0"), 8) - total) % 65521:
            return None
        size = int.from_bytes(octal_size[1:]) if octal_size[0] & 0x80 else int(octal_size.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    name = name.partition(b"\0")[0]
    if prefix[0] and magic == b"ustar\0":
        name = prefix.partition(b"\0")[0] + b"/" + name
    return None if size < 0 else (name, size, kind)


def _long_header(window: Window, offset: int, size: int, kind: bytes) -> dict[bytes, bytes] | None:
    """Return the values of a GNU or pax header for the next member, None if it is damaged."""
    data = window.read(offset, min(size, _MAX_LONG))
    if len(data) < size:
        return None
    if kind in (b"L", b"K"):
        path, end, rest = data.partition(b"\0")
        if not end or rest.strip(b"\0"):
            return None
        return {b"path": path} if kind == b"L" else {}
    values = {}
    place = 0
    while place < size and data[place]:
        record = _PAX_RECORD.match(data, place)
        stop = place + int(record[1]) if record else 0
        if record is None or not record.end() < stop <= size or data[stop - 1] != ord("\n"):
            return None
        if record[2] in _PAX_NAMES:
            values[record[2]] = data[record.end() : stop - 1]
        place = stop
    path, num_bytes = values.get(b"path", b""), values.get(b"size") or b"0"
    if data[place:].strip(b"\0") or b"\0" in path or not num_bytes.isdigit() or len(num_bytes) > 20:
        return None
    return values if kind == b"x" else {}


def _sha256(window: Window, offset: int, end: int) -> bytes:
    """Return the SHA-256 of a member's data, b"" if they contain other members, because then the size is wrong.

    An intact header at the very beginning of the data does not count: the member is itself a tar.
    """
    digest = hashlib.sha256()
    is_tar = False
    for start in range(offset, end, _CHUNK):
        size = min(_CHUNK, end - start)
        digest.update(window.view(start, size))
        found = None if is_tar or size < _BLOCK else _aligned_header(window, start, size)
        is_tar = is_tar or found == offset
        if found is not None and not is_tar:
            return b""
    return digest.digest()


def _aligned_header(window: Window, start: int, size: int) -> int | None:
    """Return the offset of the first intact header at a block boundary, counted from `start`."""
    magic, at = _MAGICS[0]
    firsts = window.read(start + at, size - at, _BLOCK)
    block = firsts.find(magic[:1])
    while block >= 0:
        place = start + block * _BLOCK
        if window.read(place + at, len(magic)) == magic and _parse(window, place) is not None:
            return place
        block = firsts.find(magic[:1], block + 1)
    return None


def _no_member(window: Window, position: int, last: Entry | None) -> Damage | None:
    """Return the damage at `position`, where there is no header; None for the end mark followed by zeros only."""
    left = window.size - position
    if left < _BLOCK:
        detail = "the archive ends without its end mark" if window.size else "the file is empty"
        return Damage(min(position, window.size), window.size, detail, truncated=True)
    zeros = _zeros(window, position)
    if zeros == left:
        if left > _MAX_PADDING:
            return Damage(position, window.size, f"its last {left} bytes are zeros")
        if left % _BLOCK:
            return Damage(position, window.size, "the archive ends within its end mark", truncated=True)
        return None
    if zeros and (last is None or not last.size or window.read(last.data_offset + last.size - 1, 1) != b"\0"):
        # A hole, or the end of one of several concatenated tars: the member before it is intact.
        return _lost(window, position, position, position, "zero bytes where a member should be")
    # The previous member is part of the damage: its size may be wrong, or its end damaged as well.
    start, search = (position, position) if last is None else (last.offset, last.data_offset)
    return _lost(window, start, search, position, "a header is damaged")


def _zeros(window: Window, position: int) -> int:
    """Return the number of zero bytes from `position` on."""
    for start in range(position, window.size, _SEARCH):
        chunk = window.read(start, _SEARCH)
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + len(chunk) - len(rest) - position
    return window.size - position


def _lost(window: Window, offset: int, search: int, end: int, detail: str) -> Damage:
    """Return the damage from `offset` to the next intact header after `search`, at any alignment.

    `end` is the end of the damaged member according to its header.
    """
    for start in range(search, window.size, _SEARCH):
        chunk = window.read(start, _SEARCH + _BLOCK)
        places = {match.start() - place for magic, place in _MAGICS for match in re.finditer(magic, chunk)}
        for place in sorted(places):
            if 0 <= place < _SEARCH and _parse(window, start + place) is not None:
                return Damage(offset, start + place, detail)
    return Damage(offset, window.size, detail, truncated=end > window.size)


def _is_short_form(window: Window, entry: Entry) -> bool:
    """Return whether a member's name looks truncated to the 100 bytes of its header, or written in ASCII with "?"."""
    field = window.read(entry.data_offset - _BLOCK, 100)
    return field.startswith(entry.name) and (b"\0" not in field or b"?" in field)


def _text(name: bytes) -> str:
    return repr(name[:_MAX_NAME].decode("utf-8", "backslashreplace"))
