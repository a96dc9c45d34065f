"""The error classes: exit codes, parts of the message, pickling from a worker."""

import pickle

import pytest

from data_tools.core import errors
from data_tools.core.errors import UsageError


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.MmvitError, 1),
        (errors.UsageError, 2),
        (errors.DataError, 3),
        (errors.CheckpointError, 4),
        (errors.ResourceError, 5),
        (errors.DivergedError, 6),
    ],
)
def test_exit_codes_and_pickling(kind: type[errors.MmvitError], code: int):
    error = kind("it broke", where="a.tar, key 'k'", note="stopped", hint="mmvit-data index a.tar")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.exit_code) == (kind, code)
    assert (again.what, again.where, again.note, again.hint) == (error.what, error.where, error.note, error.hint)
    assert str(again).splitlines() == [
        "it broke",
        "  where: a.tar, key 'k'",
        "  note: stopped",
        "  hint: mmvit-data index a.tar",
    ]


def test_message_has_no_empty_parts():
    assert str(errors.UsageError("it broke")) == "it broke"


def test_did_you_mean():
    assert errors.did_you_mean("Sam", ["Appl", "Sams"]) == "did you mean 'Sams'?"
    assert errors.did_you_mean("sams", ["Appl", "Sams"]) == "did you mean 'Sams'?"
    assert errors.did_you_mean("zebra", ["Appl", "Sams"]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'https://user:SECRET@host/a.tar?token=SECRET' is no number", "'https://host/a.tar' is no number"),
        ("x/https:/user:SECRET@host/a.csv#SECRET", "x/https:/host/a.csv"),
        ("--out a s3://key:SECRET@bucket/{0..1}.tar b", "--out a s3://bucket/{0..1}.tar b"),
        ("did you mean 'a@b'? see a/b#c", "did you mean 'a@b'? see a/b#c"),
    ],
)
def test_no_part_of_an_error_shows_the_secrets_of_a_url(text: str, shown: str):
    error = UsageError(text, where=text, note=text, hint=text)
    assert (error.what, error.where, error.note, error.hint) == (shown,) * 4
    assert "SECRET" not in repr(error) + str(error)
