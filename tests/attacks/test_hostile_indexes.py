"""An index with right hashes that lies about the tar gives an error, never a crash or bytes from elsewhere."""

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import CheckpointError, MmvitError, SampleError
from data_tools.tar.index import ShardIndex, build_index, index_path
from data_tools.tar.index_file import MAGIC
from mmvit.data.shards import IndexedShards

Change = Callable[[dict[str, Any], bytearray], None]
HUGE = 2**62


@pytest.fixture
def tar(hostile_tar: Callable[..., Path]) -> Path:
    path = hostile_tar([("a.jpg", b"one"), ("a.json", b"{}"), ("b.txt", b"two"), ("b.pkl", b"x")])
    build_index(path)
    return path


def forge(tar: Path, change: Change) -> None:
    """Change header and body of the index of `tar`, and make every hash right again."""
    data = index_path(tar).read_bytes()
    line = data[len(MAGIC) : data.index(b"\n", len(MAGIC))]
    head_size = len(MAGIC) + len(line) + 1
    header = json.loads(line)
    body = bytearray(data[head_size + -head_size % 64 :])
    change(header, body)
    header["body_sha256"] = hashlib.sha256(body).hexdigest()
    del header["header_sha256"]
    header["header_sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    head = MAGIC + json.dumps(header, sort_keys=True).encode() + b"\n"
    index_path(tar).write_bytes(head + bytes(-len(head) % 64) + body)


def use(tar: Path) -> None:
    """Do all that an index is for."""
    shards = IndexedShards([tar], require_caption=False)
    index = shards.reader.indexes[0]
    index.problems()
    index.scanned()
    shards.fingerprint()
    for i in range(len(shards)):
        fields = shards.fields(i)
        assert sum(map(len, fields.values())) < tar.stat().st_size
        with contextlib.suppress(SampleError):
            shards.read(i)


def header(name: str, value: object) -> Change:
    return lambda header, body: header.update({name: value})


def number(place: int, value: int) -> Change:
    """Change one of the numbers at the beginning of the body: 4 ends of keys, then 3 x 3 pairs of offset and size."""
    return lambda header, body: struct.pack_into("<q", body, 8 * place, value)


def append(header: dict[str, Any], body: bytearray, problems: bytes) -> None:
    header["problem_bytes"] += len(problems)
    body += problems


LIES: dict[str, Change] = {
    "more samples": header("num_samples", 4),
    "no samples": header("num_samples", 0),
    "huge number of samples": header("num_samples", HUGE),
    "negative number of samples": header("num_samples", -1),
    "samples of another type": header("num_samples", 3.0),
    "samples as a truth value": header("num_samples", True),
    "negative key bytes": header("key_bytes", -5),
    "fewer key bytes": header("key_bytes", 3),
    "huge tar": header("tar_size", 10**400),
    "a time of another type": header("tar_mtime_ns", "now"),
    "an unknown field": header("fields", ["jpg", "pkl", "txt"]),
    "fields in another order": header("fields", ["txt", "json", "jpg"]),
    "a field twice": header("fields", ["jpg", "jpg", "txt"]),
    "fields that are no names": header("fields", [["jpg"], {}, None]),
    "fewer fields": header("fields", ["jpg"]),
    "ignored of another type": header("ignored", {"x": "many"}),
    "problems of another type": header("problems", []),
    "one more name": header("extra", 1),
    "a key that ends before it begins": number(1, 6),
    "a key that ends behind the keys": number(3, 1000),
    "a key that ends at a huge place": number(3, HUGE),
    "a first key that does not begin": number(0, 1),
    "an offset behind the tar": number(4, 10**6),
    "a huge offset": number(4, HUGE),
    "a negative offset": number(4, -2),
    "a size beyond the tar": number(5, 20_000),
    "a huge size": number(5, HUGE),
    "a negative size": number(5, -1),
    "offset and size that overflow": lambda head, body: struct.pack_into("<qq", body, 32, 2**63 - 1, 2**63 - 1),
    "a list of problems that is none": lambda head, body: body.__setitem__(slice(-20, None), b"[1, 2]" + b"x" * 14),
    "a problem at an infinite place": lambda head, body: append(head, body, b'["x", 1e999, "", ""]'),
    "a list of problems that is too deep": lambda head, body: append(head, body, b"[" * 99_999),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_right_hashes(tar: Path, lie: str):
    use(tar)
    forge(tar, LIES[lie])
    with pytest.raises(CheckpointError, match="index is damaged") as caught:
        use(tar)
    assert caught.value.where == str(index_path(tar))
    assert caught.value.hint == f"mmvit-data index --rebuild {tar}"


def test_a_forged_index_that_is_true_is_read(tar: Path):
    before = list(ShardIndex(tar).keys())
    forge(tar, lambda head, body: None)
    use(tar)
    assert list(ShardIndex(tar).keys()) == before


def test_keys_that_are_not_text(tar: Path):
    def change(header: dict[str, Any], body: bytearray) -> None:
        place = len(body) - header["problem_bytes"] - header["key_bytes"]
        body[place : place + 4] = b"\xff\xfe\x80\0"

    forge(tar, change)
    use(tar)
    assert ShardIndex(tar).key(0).startswith("\ufffd")


def test_random_lies(tar: Path):
    """Each is refused, or gives bytes of the tar itself."""
    whole = index_path(tar).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        index_path(tar).write_bytes(whole)
        forge(tar, lambda head, body: body.__setitem__(rng.randrange(len(body)), rng.randrange(256)))
        try:
            use(tar)
        except MmvitError:
            refused += 1
    assert 50 < refused < 150


def test_an_index_that_is_no_file(tar: Path):
    index_path(tar).unlink()
    index_path(tar).mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        use(tar)
