"""The program `mmvit-data`, run in the process of the test."""

from collections.abc import Callable

import pytest

from data_tools.cli.app import app
from data_tools.core.program import run_program


@pytest.fixture
def data_program(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `mmvit-data` with some arguments; returns exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_program(app, "mmvit-data", [str(argument) for argument in arguments])
        output = capfd.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run
