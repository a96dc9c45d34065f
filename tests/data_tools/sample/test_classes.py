"""Class names that are numbers keep their number; what is renumbered is said."""

from typing import Any

import pytest

from data_tools.core.errors import UsageError
from data_tools.sample.classes import as_integer, class_numbers, describe_numbers, find_class, order_classes


@pytest.mark.parametrize(
    ("label", "number"),
    [
        *((7, 7), (7.0, 7), ("7", 7), ("007", 7), (" 7 ", 7), ("7.0", 7), ("7.", 7), ("-1", -1), (-2, -2), ("+3", 3)),
        *((7.5, None), ("7.5", None), ("1e3", None), ("", None), ("cat", None), (True, None), (None, None)),
        *((float("nan"), None), (float("inf"), None), ("\u0667", None), ("1,000", None), ("1_0", None)),
    ],
)
def test_integers(label: Any, number: int | None):
    assert as_integer(label) == number


def test_numbers_are_kept_and_gaps_filled():
    assert order_classes([str(i) for i in range(12)]) == tuple(str(i) for i in range(12))
    assert order_classes({"003", "1"}) == ("0", "1", "2", "003")
    assert order_classes({"b", "a", "10"}) == ("10", "a", "b")
    assert order_classes([]) == ()


@pytest.mark.parametrize("names", [["-1", "0"], ["1000000", "2"], ["7", "07"]])
def test_numbers_that_no_class_can_have(names: list[str]):
    with pytest.raises(UsageError, match="--classnames FILE"):
        order_classes(names)


def test_a_label_is_found_by_name_then_by_number():
    numbers = class_numbers(["cat", "dog", "5", "0"])
    assert [find_class(label, numbers) for label in ("dog", "5", "0", 0, "1", "001", "4", -1, "x")] == [
        *(1, 2, 3, 0, 1, 1, None, None, None)
    ]


def test_what_is_renumbered_is_said():
    assert describe_numbers(["0", "1", "2"], {"0", "1", "2"}) == ["class numbers are kept: 0 to 2"]
    assert describe_numbers(["0", "1", "2"], {"0", "2"}) == [
        "class numbers are kept: 0 to 2; no sample for 1 of them: 1"
    ]
    (line,) = describe_numbers(["10", "2", "cat"], {"10", "2", "cat"})
    assert line.startswith("renumbered: '10' is class 0, '2' is class 1;")
    assert describe_numbers(["cat", "dog"], {"cat"}) == []
