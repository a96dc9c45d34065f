"""Scripts, words and languages of captions."""

import importlib.metadata

import pytest

from data_tools.sample import language
from data_tools.sample.language import count_words, detector_name, language_of, script_of

KOREAN = "\uac15 \uc606\uc5d0 \uc788\ub294 \ube68\uac04 \uc9d1"
JAPANESE = "\u5ddd\u306e\u8fd1\u304f\u306e\u8d64\u3044\u5bb6"
CHINESE = "\u6cb3\u8fb9\u7684\u7ea2\u623f\u5b50"
RUSSIAN = "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u0434\u043e\u043c \u0443 \u0440\u0435\u043a\u0438"
HINDI = "\u0928\u0926\u0940 \u0915\u0947 \u092a\u093e\u0938 \u0932\u093e\u0932 \u0918\u0930"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a red house", "Latin"),
        ("\u00fcber", "Latin"),
        ("\uff21\uff22", "Latin"),  # full width
        ("\U0001d5d5\U0001d5fc\U0001d5f9\U0001d5f1 \U0001d4ea", "Latin"),  # bold, script
        ("\u02b0\u00aa\u2115\ufb01", "Latin"),  # small h and a above the line, the set N, the ligature fi
        ("\uff76\uff85", "Kana"),  # half width
        ("\ufe70", "Arabic"),  # a mark of its own
        ("\u02bc", "none"),  # an apostrophe that counts as a letter, in any script
        (KOREAN, "Hangul"),
        (JAPANESE, "Kana"),
        ("\u30e9\u30fc\u30e1\u30f3", "Kana"),
        (CHINESE, "Han"),
        (RUSSIAN, "Cyrillic"),
        ("\u0645\u0646\u0632\u0644", "Arabic"),
        (HINDI, "Devanagari"),
        (f"photo {KOREAN}", "Hangul"),
        ("12 + 3 \U0001f600", "none"),
        ("123", "none"),
        ("", "none"),
    ],
)
def test_the_script_is_that_of_most_letters(text: str, script: str):
    assert script_of(text) == script


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red house", 3),
        ("  don't - stop,  now! ", 3),
        ("", 0),
        ("...", 0),
        (KOREAN, 5),
        (CHINESE, 6),
        (f"{CHINESE}\u3002", 6),
        (f"IKEA {CHINESE}", 7),
        (HINDI, 5),
    ],
)
def test_words_are_counted(text: str, words: int):
    assert count_words(text) == words


def test_languages_are_told_apart():
    pytest.importorskip("py3langid")
    texts = {
        "en": "a red house near the river with two children",
        "de": "ein rotes Haus am Fluss mit zwei Kindern",
        "fr": "une maison rouge au bord de la rivi\u00e8re avec deux enfants",
        "ko": KOREAN,
        "ja": JAPANESE,
        "zh": CHINESE,
        "ru": RUSSIAN,
    }
    assert {code: language_of(text) for code, text in texts.items()} == {code: code for code in texts}
    assert language_of("piano") == "und"
    assert detector_name().startswith(f"py3langid {importlib.metadata.version('py3langid')}")


def test_without_the_detector_there_is_no_language(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    language._detector.cache_clear()
    assert language_of("a red house near the river") is None
    assert detector_name() == "none"
    language._detector.cache_clear()
