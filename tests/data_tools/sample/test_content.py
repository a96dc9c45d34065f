"""What a sample holds and what is wrong with it, field by field."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.core.errors import CAUSES
from data_tools.sample.content import find_texts, read_content


def picture(width: int = 40, height: int = 30, kind: str = "JPEG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(kind=kind, exif=exif)


GOOD = {"jpg": picture(), "txt": b"\xef\xbb\xbf a cat \n", "json": b'{"url": "x"}', "cls": b"7\n"}


def test_a_good_sample_is_read_whole():
    content = read_content(GOOD, decode=True)
    assert content == ("jpg", "JPEG", 40, 30, "a cat", {"url": "x"}, 7, None)
    assert content.text == "a cat"
    assert read_content({"png": picture(kind="PNG")}) == ("png", "PNG", 40, 30, None, None, None, None)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"jpg": None}, "no-image"),
        ({"jpg": b""}, "no-image"),
        ({"jpg": b"<html>404</html>"}, "bad-image"),
        ({"jpg": b"<html>404</html>", "txt": b" "}, "bad-image"),
        ({"jpg": picture()[:-400]}, "bad-image"),
        ({"txt": None}, "no-caption"),
        ({"txt": b" \n"}, "empty-caption"),
        ({"txt": b"caf\xe9"}, "not-utf8"),
        ({"txt": b"a\0b"}, "not-utf8"),
        ({"json": b"{"}, "bad-json"),
        ({"json": b"[1]"}, "bad-json"),
        ({"json": b"[" * 100_000}, "bad-json"),
        ({"json": b'{"a": "\\ud800"}'}, "bad-json"),
        ({"json": b'{"a": "\xe9"}'}, "not-utf8"),
        ({"cls": b"-1"}, "bad-label"),
        ({"cls": b" "}, "bad-label"),
        ({"cls": b"0.5"}, "bad-label"),
        ({"cls": b"cat\ndog"}, "bad-label"),
        ({"cls": b"1" * 19}, "bad-label"),
        ({"cls": "\u0663".encode()}, "bad-label"),
    ],
)
def test_each_fault_has_its_cause_and_leaves_the_other_fields_readable(change: dict[str, bytes | None], cause: str):
    fields = {field: data for field, data in (GOOD | change).items() if data is not None}
    content = read_content(fields, usual=GOOD, decode=True)
    assert content.fault is not None
    assert content.fault.cause == cause
    assert cause in CAUSES
    if "jpg" not in change:
        assert content.width == 40
    if "cls" not in change:
        assert content.label == 7


def test_a_caption_is_missing_only_where_others_have_one():
    assert read_content({"jpg": GOOD["jpg"], "cls": b"1"}, usual={"jpg", "cls"}).fault is None


def test_a_cut_picture_is_found_only_by_decoding():
    fields = {"jpg": picture()[:-400]}
    assert read_content(fields).fault is None
    assert read_content(fields, decode=True).fault is not None


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch):
    """By all the limits of the decoder, whether it is to be decoded or not."""
    monkeypatch.setattr("data_tools.sample.decode.MAX_PIXELS", 1000)
    monkeypatch.setattr("data_tools.sample.content.decode_image", lambda data: pytest.fail("it was decoded"))
    fault = read_content({"jpg": picture()}, decode=True).fault
    assert fault == ("too-large", ".jpg: image is too large: 40x30 px is over 1000 px, or a side over 65535")
    monkeypatch.undo()
    monkeypatch.setattr("data_tools.sample.decode.MAX_BYTES", 4000)
    assert read_content({"jpg": picture()}).fault.cause == "too-large"


def test_a_picture_too_large_to_decode_is_not_called_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_tools.sample.decode.MAX_SIDE", 35)
    fault = read_content({"jpg": picture()}, decode=True).fault
    assert fault is not None
    assert fault.cause == "too-large"


def test_the_text_may_stand_in_the_metadata():
    assert read_content({"json": b'{"caption": " a dog "}'}).text == "a dog"
    assert read_content({"json": b'{"caption": 3}'}).text is None
    assert read_content({"txt": b"a cat", "json": b'{"caption": "a dog"}'}).text == "a cat"


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("txt", {"": ["the caption"]}),
        ("text", {"": ["one"]}),
        ("list", {"": ["one", "", "two"]}),
        ("deep.er", {"": ["three"]}),
        ("names", {"en": ["cat"], "de": ["Katze", "Kater"], "ko": [""]}),
        ("names.de", {"": ["Katze", "Kater"]}),
        ("number", {}),
        ("none", {}),
        ("text.deeper", {}),
        ("list.0", {}),
        ("missing.path", {}),
    ],
)
def test_texts_are_found(source: str, texts: dict[str, list[str]]):
    meta: dict[str, Any] = {
        "text": " one\n",
        "list": ["one", " ", 2, None, ["x"], "two"],
        "deep": {"er": "three"},
        "names": {"en": "cat", "de": ["Katze ", "Kater"], "ko": " ", "fr": None, "id": 7},
        "number": 3,
        "none": None,
    }
    assert find_texts(source, " the caption ", meta) == texts


def test_a_sample_without_texts():
    assert find_texts("txt", None, None) == find_texts("names.en", "caption", None) == {}
