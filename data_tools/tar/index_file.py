r"""The format of an index, `NAME.tar.idx`: for each sample of a shard the offset, size and SHA-256 of its members.

Layout of version 2 (little-endian), whose opening time does not depend on the shard size:

    MMVIT-TAR-INDEX 2\n                  magic line
    {"body_sha256": ..., ...}\n          one line of JSON, see `_HEADER_KINDS`; `header_sha256` covers the rest of it
    zero bytes                           up to a multiple of 64
    body                                 arrays, one after the other, for n samples with F fields:
      key_offsets    i8 [n + 1]          key i is keys[key_offsets[i]:key_offsets[i + 1]]
      places         i8 [n, 2 F]         offset and size of each of the F fields; offset -1 = the sample lacks it
      sha256         u1 [n, F, 32]       of each member's bytes
      keys           u1 [key_bytes]      the UTF-8 keys, one after the other
      problems       u1 [problem_bytes]  one line of JSON per problem: [cause, offset, key, detail]

An index may come from somebody else, including its hashes: its content is validated before use.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_tools.tar.scan import FIELDS, Member, ScannedTar

MAGIC = b"MMVIT-TAR-INDEX 2\n"
_ANY_VERSION = b"MMVIT-TAR-INDEX "
MAX_HEAD_BYTES = 1 << 20
_ALIGN = 64
_MAX_COUNT = 1 << 60
_MAX_SUFFIXES = 100
_MAX_SUFFIX_LENGTH = 40
_HEADER_KINDS: dict[str, type] = {
    "body_sha256": str,
    "changed": int,  # samples that have changed since the tar was indexed; never on disk
    "content_sha256": str,  # of the keys and the members' bytes: equal for tars with the same samples in the same order
    "fields": list,  # sorted field names
    "header_sha256": str,
    "ignored": dict,  # suffix -> number of members that are not part of a sample, the 100 most frequent suffixes
    "key_bytes": int,
    "num_samples": int,
    "problem_bytes": int,
    "problems": dict,  # cause -> number of problems
    "tar_mtime_ns": int,
    "tar_size": int,
}


def index_bytes(scan: ScannedTar, changed: int = 0) -> bytes:
    """Return the content of the index file of a scanned tar."""
    keys = [key.encode() for key in scan.keys]
    fields = sorted({field for sample in scan.samples for field in sample})
    absent = Member(-1, 0, bytes(32))
    members = [sample.get(field, absent) for sample in scan.samples for field in fields]
    key_offsets = np.cumsum([0, *(len(key) for key in keys)])
    places = np.array([(member.offset, member.size) for member in members])
    digests = b"".join(member.sha256 for member in members)
    problems = "".join(json.dumps(problem, ensure_ascii=True) + "\n" for problem in scan.problems).encode()
    arrays = (key_offsets.astype("<i8").tobytes(), places.astype("<i8").tobytes(), digests, *keys, problems)
    body = b"".join(arrays)
    header: dict[str, Any] = {
        "body_sha256": hashlib.sha256(body).hexdigest(),
        "changed": changed,
        "content_sha256": hashlib.sha256(json.dumps([fields, scan.keys]).encode() + digests).hexdigest(),
        "fields": fields,
        "ignored": _shortened(scan.ignored),
        "key_bytes": int(key_offsets[-1]),
        "num_samples": len(keys),
        "problem_bytes": len(problems),
        "problems": dict(sorted(Counter(problem.cause for problem in scan.problems).items())),
        "tar_mtime_ns": scan.mtime_ns,
        "tar_size": scan.size,
    }
    header["header_sha256"] = _header_sha256(header)
    head = MAGIC + json.dumps(header, sort_keys=True).encode() + b"\n"
    return head + bytes(-len(head) % _ALIGN) + body


def read_header(head: bytes, file_size: int) -> dict[str, Any]:
    """Return the header of an index file that begins with `head`, with the additional key `body_offset`.

    Raises:
        ValueError: the header is invalid.
    """
    if head.startswith(_ANY_VERSION) and not head.startswith(MAGIC):
        version = head[len(_ANY_VERSION) :].partition(b"\n")[0][:20].decode("ascii", "replace")
        raise ValueError(f"it has version {version} of the format, and this program reads version 2")
    line, newline, _ = head[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line) if head.startswith(MAGIC) and newline else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not _has_kinds(header):
        raise ValueError("its header cannot be read")
    if header["header_sha256"] != _header_sha256(header):
        raise ValueError("its header does not match its hash")
    head_size = len(MAGIC) + len(line) + 1
    header["body_offset"] = head_size + -head_size % _ALIGN
    size = header["body_offset"] + sum(math.prod(shape) * width for width, shape in _layout(header).values())
    if file_size != size:
        raise ValueError(f"it has {file_size} bytes instead of {size}")
    return header


def read_body(header: Mapping[str, Any], data: bytes | mmap.mmap) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of an index file as views of `data`.

    Raises:
        ValueError: the body is invalid.
    """
    offset = header["body_offset"]
    if hashlib.sha256(memoryview(data)[offset:]).hexdigest() != header["body_sha256"]:
        raise ValueError("its body does not match its hash")
    arrays = {}
    for name, (width, shape) in _layout(header).items():
        arrays[name] = np.frombuffer(data, "<i8" if width == 8 else "u1", math.prod(shape), offset).reshape(shape)
        offset += width * math.prod(shape)
    ends, offsets, sizes = arrays["key_offsets"], arrays["places"][:, ::2], arrays["places"][:, 1::2]
    if ends[0] != 0 or ends[-1] != header["key_bytes"] or (np.diff(ends) < 0).any():
        raise ValueError("its keys cannot be read")
    end = header["tar_size"]
    if ((offsets < -1) | (offsets > end) | (sizes < 0) | (sizes > end - np.maximum(offsets, 0))).any():
        raise ValueError("it has offsets outside the tar")
    return arrays


def _has_kinds(header: dict[str, Any]) -> bool:
    """Return whether a header has the expected keys and types, and its numbers are in bounds."""
    if {name: type(value) for name, value in header.items()} != _HEADER_KINDS:
        return False
    counts = [header[name] for name, kind in _HEADER_KINDS.items() if kind is int and name != "tar_mtime_ns"]
    counts += [*header["ignored"].values(), *header["problems"].values()]
    return (
        all(type(count) is int and 0 <= count < _MAX_COUNT for count in counts)
        and header["num_samples"] > 0
        and header["fields"] == [field for field in sorted(FIELDS) if field in header["fields"]]
    )


def _shortened(ignored: Counter[str]) -> dict[str, int]:
    most: Counter[str] = Counter()
    for suffix, count in ignored.most_common(_MAX_SUFFIXES):
        most[suffix[:_MAX_SUFFIX_LENGTH]] += count
    if ignored.total() > most.total():
        most["(others)"] = ignored.total() - most.total()
    return dict(sorted(most.items()))


def _header_sha256(header: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in header.items() if name != "header_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _layout(header: Mapping[str, Any]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the bytes per element and the shape of each array of the body, in order."""
    n, num_fields = header["num_samples"], len(header["fields"])
    return {
        "key_offsets": (8, (n + 1,)),
        "places": (8, (n, 2 * num_fields)),
        "sha256": (1, (n, num_fields, 32)),
        "keys": (1, (header["key_bytes"],)),
        "problems": (1, (header["problem_bytes"],)),
    }
