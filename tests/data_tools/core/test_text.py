"""Texts of the command line that are not UTF-8 are refused in one sentence, wherever they would end up."""

import json

import pytest
import typer

from data_tools.core.errors import UsageError
from data_tools.core.program import run_program
from data_tools.core.text import check_text, text_fault

BAD = b"caf\xe9".decode(errors="surrogateescape")  # as Python reads an argument in Latin-1


@pytest.mark.parametrize(
    ("text", "fault"), [("caf\u00e9 \U0001f34e", ""), (BAD, "UTF-8"), ("a\0b", "NUL"), ("\ud800", "UTF-8")]
)
def test_faults_of_texts(text: str, fault: str):
    assert fault in text_fault(text)
    assert bool(text_fault(text)) == bool(fault)


def test_bad_text_is_shown_escaped():
    with pytest.raises(UsageError, match=r"the class name 'caf\\udce9' is not valid UTF-8") as caught:
        check_text(BAD, "class name", "names")
    json.dumps(str(caught.value), ensure_ascii=False).encode()


def test_argument_that_is_not_utf8_ends_a_program_in_one_sentence(capsys: pytest.CaptureFixture[str]):
    app = typer.Typer(add_completion=False)

    @app.command()
    def write(text: str) -> None:
        text.encode()

    for arguments, code in ((["fine"], 0), ([BAD], 2)):
        with pytest.raises(SystemExit) as ended:
            run_program(app, "program", arguments)
        assert (ended.value.code or 0) == code
    assert capsys.readouterr().err == "program: the argument 'caf\\udce9' is not valid UTF-8\n"
    with pytest.raises(UnicodeEncodeError):  # a fault of ours
        run_program(typer_of_fault(), "program", ["fine"])


def typer_of_fault() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def write(text: str) -> None:
        "\ud800".encode()

    return app
