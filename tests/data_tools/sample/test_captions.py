"""The texts of a sample, from its caption or its metadata."""

from typing import Any

import pytest

from data_tools.sample.captions import find_texts


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
