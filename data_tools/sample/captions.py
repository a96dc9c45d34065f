"""The texts that stand for a sample: its caption, or what its metadata holds at a path."""

from __future__ import annotations

from functools import reduce
from typing import Any


def find_texts(source: str, caption: str | None, meta: dict[str, Any] | None) -> dict[str, list[str]]:
    """Return language -> texts, stripped, blank ones too; the language is "" where the texts name none.

    Args:
        source: "txt", or a path into the metadata such as "names.ko", where a text, a list of texts or an object of
            language -> text or list may stand. What is no text counts as missing.
        caption: the text of the sample's `.txt`; None where it has none.
        meta: the object of its `.json`; None where it has none.
    """
    value: Any = caption
    if source != "txt":
        value = reduce(lambda node, name: node.get(name) if isinstance(node, dict) else None, source.split("."), meta)
    by_language = value if isinstance(value, dict) else {"": value}
    found = {
        language: [text.strip() for text in (entry if isinstance(entry, list) else [entry]) if isinstance(text, str)]
        for language, entry in by_language.items()
    }
    return {language: texts for language, texts in found.items() if texts}
