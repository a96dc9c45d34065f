"""What data_tools exports is there, under its own name, and loads nothing before it is asked for."""

import subprocess
import sys

import pytest

import data_tools


@pytest.mark.parametrize("name", data_tools.__all__)
def test_each_name_is_there(name: str):
    found = getattr(data_tools, name)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(data_tools)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'shards'"):
        _ = data_tools.shards


def test_nothing_is_loaded_at_first():
    code = "import sys, data_tools; print([m for m in sys.modules if m.startswith('data_tools.') or m == 'numpy'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
