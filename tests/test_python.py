"""The public names of the package exist, are listed, and are those that the reference page names."""

import pydoc
import re
from pathlib import Path

import pytest

import data_tools
import mmvit

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python.md"


@pytest.mark.parametrize("package", [mmvit, data_tools])
def test_public_names_exist_and_are_listed(package: object):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(package, "nothing")  # noqa: B009


def test_the_reference_page_names_what_exists():
    named = set(re.findall(r"\b(?:mmvit|data_tools)(?:\.\w+)+", PAGE.read_text(encoding="utf-8")))
    assert len(named) >= 12
    assert [name for name in sorted(named) if pydoc.locate(name) is None] == []
