"""CSV as programs write it: encodings, delimiters, line ends; what cannot be read is refused with line and byte."""

import codecs
from pathlib import Path
from typing import Any

import pytest

from data_tools.core.errors import DataError, UsageError
from data_tools.make.csv_rows import read_format, table_rows
from data_tools.make.options import MakeOptions, check_options
from data_tools.make.tables import Broken

LINES = 'image,caption\r\na.jpg,"two\r\nlines, ""x"""\r\nb.jpg,caf\u00e9 \ud55c\uae00\r\n'
ROWS = [{"image": "a.jpg", "caption": 'two\r\nlines, "x"'}, {"image": "b.jpg", "caption": "caf\u00e9 \ud55c\uae00"}]


def rows(path: Path, data: bytes, delimiter: str | None = None) -> list[Any]:
    path.write_bytes(data)
    return list(table_rows(read_format(path, delimiter), "image"))


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_delimiters(tmp_path: Path, mark: bytes, encoding: str, delimiter: str):
    text = LINES.replace(",", delimiter)
    wanted = [{name: value.replace(",", delimiter) for name, value in row.items()} for row in ROWS]
    assert rows(tmp_path / "t.csv", mark + text.encode(encoding)) == wanted


def test_line_ends_of_old_macs(tmp_path: Path):
    assert rows(tmp_path / "t.csv", b'image,caption\ra.jpg,"b\rc"\rb.jpg,x\r') == [
        {"image": "a.jpg", "caption": "b\rc"},
        {"image": "b.jpg", "caption": "x"},
    ]


def test_blanks_around_names_and_values(tmp_path: Path):
    wanted = [{"image": "a.jpg", "n": "0", "caption": "A dog, x"}, {"image": "b.jpg", "n": "1", "caption": "B | c"}]
    data = b'image| n | caption\na.jpg| 0|  A dog, x \nb.jpg | 1| "B | c"\n'
    assert rows(tmp_path / "t.csv", data) == wanted
    assert rows(tmp_path / "t.csv", b"image,caption\na.jpg, kept \n") == [{"image": "a.jpg", "caption": " kept "}]


def test_a_delimiter_that_is_given(tmp_path: Path):
    assert rows(tmp_path / "t.csv", b"image#caption\na#b,c\n", "#") == [{"image": "a", "caption": "b,c"}]
    assert rows(tmp_path / "t.csv", b"image\tcaption,x\na\tb\n", "tab") == [{"image": "a", "caption,x": "b"}]
    assert rows(tmp_path / "t.csv", b'image;"caption, title, text"\na;b\n')[0]["image"] == "a"  # known names count
    for bad in ("", "::", '"', "\n"):
        with pytest.raises(UsageError, match="is not one character"):
            check_options(MakeOptions(delimiter=bad))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("image,caption\na,\uac00\nb,\ub098\nc,x\n".encode("cp949"), "line 2, byte 3 is 0xB0, and 1 more of 3 rows"),
        ("image,caption\na,x\nb,caf\u00e9\nc,na\u00efve\n".encode("latin-1"), "line 3, byte 6 is 0xE9, and 1 more"),
        ("image,\uc124\uba85\na,x\n".encode("cp949"), "line 1, byte 7 is 0xBC"),
        ("image,caption\na,x\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("\ufeffimage,caption\na,x\n".encode("utf-32-le"), "UTF-32"),
        ("\ufeffimage,caption\na,x\n".encode("utf-16-le")[:-1], "truncated data after line"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, data: bytes, told: str):
    with pytest.raises(UsageError) as caught:
        rows(tmp_path / "t.csv", data)
    assert told in caught.value.what
    assert "iconv" in str(caught.value.hint)


def test_single_rows_are_reported_with_line_and_byte(tmp_path: Path):
    data = b'image,caption\nx\xe9.jpg,a name may be so\nb,"two\ncaf\xe9"\nc\nd,nul\0\ne,f,g\nf,fine\n'
    found = rows(tmp_path / "t.csv", data)
    assert found[0] == {"image": "x\udce9.jpg", "caption": "a name may be so"}
    assert found[1:-1] == [
        Broken("not-utf8", "line 4, byte 4 is 0xE9"),
        Broken("damaged", "line 5 has 1 columns, the first line 2"),
        Broken("not-utf8", "line 6, byte 6 is NUL"),
        Broken("damaged", "line 7 has 3 columns, the first line 2"),
    ]
    assert found[-1] == {"image": "f", "caption": "fine"}


def test_tables_without_rows_or_with_double_names(tmp_path: Path):
    for data, told in ((b"", "empty"), (b"\n", "empty"), (b"image, image\n", "duplicate column name")):
        with pytest.raises(DataError, match=told):
            rows(tmp_path / "t.csv", data)
