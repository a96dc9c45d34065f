"""Names of files that are not UTF-8 are stored as valid text, printed as escapes, and found again."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.core.mapped import read_parquet
from data_tools.core.names import as_text, restore_name, store_name
from data_tools.core.program import escape_unprintable
from mmvit.terminal import print_hits, print_json, print_predictions

NAMES = [
    *(b"a.jpg", "caf\u00e9/\u1102.jpg".encode(), b"caf\xe9.jpg", b"\xb0\xa1\xb3\xaa.jpg", b"\xff\xfe", b"a\\b.jpg"),
    *(rb"caf\xe9.jpg", rb"\x5c", rb"\x5cxe9", b"\\\xe9", rb"\\xe9", rb"\udce9"),
]
ENCODINGS = ["utf-8", "ascii", "latin-1"]


@pytest.mark.parametrize("name", NAMES)
def test_stored_names_are_text_and_lead_back(name: bytes):
    stored = store_name(os.fsdecode(name))
    assert os.fsencode(restore_name(stored)) == name
    assert stored.encode().decode() == stored
    assert len({store_name(os.fsdecode(other)) for other in NAMES}) == len(NAMES)


def test_usual_names_stay_and_bytes_are_escaped():
    assert store_name("caf\u00e9\\a.jpg") == "caf\u00e9\\a.jpg"
    assert store_name(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"


def strict_streams(monkeypatch: pytest.MonkeyPatch, encoding: str) -> Callable[[], list[str]]:
    """Replace the streams by strict ones; returns a function that returns what they have got."""
    files = [io.TextIOWrapper(io.BytesIO(), encoding, "strict", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", files[0])
    monkeypatch.setattr(sys, "stderr", files[1])
    return lambda: [file.buffer.getvalue().decode(encoding) for file in files]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_strict_streams_print_any_name(encoding: str, monkeypatch: pytest.MonkeyPatch):
    printed = strict_streams(monkeypatch, encoding)
    name = os.fsdecode(b"caf\xe9 \xff.jpg") + "\u4e2d\U0001f600"
    with pytest.raises(UnicodeEncodeError):
        print(name)
    escape_unprintable()
    print(name)
    print(name, file=sys.stderr)
    print_predictions([{"image": name, "classes": [{"name": name, "probability": 0.5}]}])
    print_hits([{"rank": 1, "score": 0.5, "caption": name, "image_path": name}])
    assert [r"caf\udce9 \udcff.jpg" in text for text in printed()] == [True, True]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_stays_valid_on_any_stream(encoding: str, monkeypatch: pytest.MonkeyPatch):
    printed = strict_streams(monkeypatch, encoding)
    document = {"image": os.fsdecode(b"caf\xe9.jpg"), "name": "caf\u00e9 \u4e2d \U0001f600"}
    escape_unprintable()
    print_json(document)
    assert json.loads(printed()[0]) == document


def test_tables_are_read_whatever_they_are_called(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"t\xe9.parquet")
    table = pa.table({"name": [as_text(path.name)]})
    assert table["name"].to_pylist() == [r"t\udce9.parquet"]
    with path.open("wb") as file:
        parquet.write_table(table, file)
    assert read_parquet(path) == table
    path.write_bytes(b"")
    with pytest.raises(pa.ArrowInvalid):
        read_parquet(path)
