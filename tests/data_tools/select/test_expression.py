"""Conditions have the semantics of Python, nothing else is run, and errors show the position."""

import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.core.errors import UsageError
from data_tools.select.expression import Expression

ROWS = [
    {"width": 100, "aspect": 0.5, "caption": "A red cat", "language": "en", "score": 0.5, "flag": True},
    {"width": 256, "aspect": 1.5, "caption": "dog", "language": "ko", "score": None, "flag": False},
    {"width": 500, "aspect": 3.0, "caption": None, "language": None, "score": 0.1, "flag": None},
    {"width": None, "aspect": None, "caption": "", "language": "und", "score": math.nan, "flag": True},
]
TYPES = {"width": pa.int32(), "aspect": pa.float32(), "caption": pa.string(), "language": pa.string()}
TABLE = pa.Table.from_pylist(ROWS, pa.schema({**TYPES, "score": pa.float32(), "flag": pa.bool_()}))


def rows(text: str) -> list[int]:
    return [i for i, holds in enumerate(Expression(text).mask(TABLE)) if holds]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width >= 256", [1, 2]),
        ("width >= 256 and aspect < 3", [1]),
        ("width >= 256 or caption == 'A red cat'", [0, 1, 2]),
        ("not width >= 256", [0]),  # what is not known is not chosen either way
        ("100 < width <= 500", [1, 2]),
        ("100 < width < 500 > aspect", [1]),
        ("width != 256", [0, 2]),
        ("language == 'en'", [0]),
        ("language in ('en', 'ko')", [0, 1]),
        ("language not in ['en', 'ko']", [3]),
        ("width in {100, 500.0}", [0, 2]),
        ("width in (1, -100)", []),
        ("'cat' in caption", [0]),
        ("'cat' not in caption", [1, 3]),
        ("'CAT' in caption", []),
        ("contains(lower(caption), 'red') and startswith(caption, 'A') and endswith(caption, 't')", [0]),
        (r"matches(caption, '^[a-z]+$')", [1]),
        ("caption is None", [2]),
        ("caption is not None and width is not None", [0, 1]),
        ("width / 2 == 128", [1]),
        ("width / 3 > 33.3 and width / 3 < 33.4", [0]),
        ("width * 2 - 12 > 501", [2]),
        ("-width < -300", [2]),
        ("width / 0 > 1", [0, 1, 2]),  # infinity, as with any float
        ("score > 0.28", [0]),
        ("score <= 0.28", [2]),
        ("flag", [0, 3]),
        ("not flag", [1]),
        ("flag == True", [0, 3]),
        ("flag or width == 500", [0, 2, 3]),
        ("True", [0, 1, 2, 3]),
        ("1 > 2", []),
        ("width\n>= 256", [1, 2]),
    ],
)
def test_conditions(text: str, expected: list[int]):
    assert rows(text) == expected


@pytest.mark.parametrize(
    ("text", "what", "at", "hint"),
    [
        ("widht > 3", "unknown column 'widht'", 0, "did you mean 'width'?"),
        ("aspect > 1 and zzz > 3", "unknown column 'zzz'", 15, "choose from: width"),
        ("width > '256'", "cannot compare a number with a text", 8, "write 256 without quotes"),
        ("caption > 3", "cannot compare a text with a number", 10, "write '3' in quotes"),
        ("'\u00e9\u00e9' in caption and caption > 3", "cannot compare a text with a number", 30, "in quotes"),
        ("flag > 3", "cannot compare a condition with a number", 7, None),
        ("width = 3", "invalid syntax", 6, "write == to compare"),
        ("width > 3 && flag", "invalid syntax", 11, "write and for &&"),
        ("width >", "invalid syntax", 7, None),
        ("caption", "expected a condition, got a text", 0, "compare it"),
        ("flag and width", "expected a condition, got a number", 9, "compare it"),
        ("caption + 'x' == 'y'", "expected a number, got a text", 0, None),
        ("width in (1, 'x')", "expected a number, got a text", 13, None),
        ("width in (1, aspect)", "only numbers and texts", 13, None),
        ("width in caption", "expected a text in quotes", 0, None),
        ("width is 3", "only None is allowed after is", 9, "write == or !="),
        ("width == None", "None cannot be used as a value", 9, "COLUMN is None"),
        ("contians(caption, 'x')", "unknown function 'contians'", 0, "did you mean 'contains'?"),
        ("contains(caption)", "contains takes 2 arguments", 0, "contains(COLUMN, TEXT)"),
        ("contains(width, 'x')", "expected a text", 9, None),
        ("matches(caption, '(')", "missing )", 0, None),
        ("width > 99999999999999999999999", "too large", 8, None),
        ("caption == '\\ud800'", "not a valid text", 11, None),
        ("width ** 2 > 3", "unsupported syntax", 0, "--help"),
        ("(lambda: 1)()", "unknown function", 0, None),
        ("caption.upper() == 'X'", "unknown function 'caption.upper'", 0, None),
        ("[x for x in caption]", "unsupported syntax", 0, None),
        ("(width := 3) > 2", "unsupported syntax", 1, None),
        ("__import__('os').system('true')", "unknown function", 0, None),
        ("width > 3; width", "invalid syntax", 9, None),
        ("flag if flag else flag", "unsupported syntax", 0, None),
        ("f'{width}' == 'x'", "unsupported syntax", 0, None),
    ],
)
def test_errors_show_the_position(text: str, what: str, at: int, hint: str | None):
    with pytest.raises(UsageError) as caught:
        Expression(text).mask(TABLE.slice(0, 0))  # raised even for an empty table
    assert what in caught.value.what
    shown, pointer = caught.value.where.split("\n")
    assert shown == text
    assert pointer == " " * (len("  where: ") + at) + "^"
    assert (caught.value.hint or "").count(hint or "") >= 1


@pytest.mark.parametrize("text", ["", "  ", "x" * 20_000, "(" * 5000 + ")" * 5000, "a\0b", "-" * 9000 + "1 > 2"])
def test_what_cannot_be_read_at_all(text: str):
    with pytest.raises(UsageError):
        Expression(text).mask(TABLE)


def test_counts_by_condition():
    condition = Expression("width >= 256 and (flag or score > 1) and 1 < 2")
    assert list(condition.count_failed(TABLE)) == [
        *(("width >= 256", 2, 1), ("flag or score > 1", 2, 2), ("1 < 2", 0, 0)),
    ]
    assert condition.names == {"width", "flag", "score"}
    assert Expression("lower(caption) == 'x'").names == {"caption"}


COMPARED = st.tuples(st.sampled_from("ab"), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.integers(-3, 3))
CONDITIONS = st.recursive(
    COMPARED.map(lambda parts: f"{parts[0]} {parts[1]} {parts[2]}"),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda text: f"(not {text})"),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(CONDITIONS)
def test_conditions_match_python(text: str):
    pairs = [(a, b) for a in range(-3, 4) for b in range(-3, 4)]
    table = pa.table({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]})
    code = compile(text, "test", "eval")
    assert Expression(text).mask(table).tolist() == [eval(code, {"a": a, "b": b}) for a, b in pairs]
