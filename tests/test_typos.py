"""Wrong inputs get the right first hint, and before anything slow is imported; `tests/typos.py` has all of them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typos import PROGRAMS, TYPOS, Outcome, Typo, first_hint, make_place

from data_tools.cli.app import app as data_app
from data_tools.cli.words import MMVIT_VERBS, DataVerbs
from data_tools.core.program import run_program
from mmvit.cli import app
from mmvit.interop import convert, source
from mmvit.words import MmvitVerbs

APPS = {"mmvit": app, "mmvit-data": data_app}
QUICK = TYPOS[4::10]
# Of each kind one: a verb, an option, a config, a key, a value, data, a model, embeddings, a run.
LIGHT = (
    *("train x", "embed a b -o c", "pretrain clip_vit_b61", "finetune finetune/swin_t data.tarin=x", "configs"),
    *("pretrain my.yaml train.steps=x", "pretrain my.yaml data.train=dta", "finetune my.yaml train.init=runs/y"),
    *("zero-shot runs/y photo.jpg --classes a,b", "classify runs/x photo.jpg", "search em --text x", "status runs/x"),
    *("embed runs/x dta --out e", "import openai/clip m", "plot runs/y", "pretrain my.yaml --print-config"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typos")
    make_place(folder)
    return folder


def check(typo: Typo, capfd: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(typo.command)
    with pytest.raises(SystemExit) as ended:
        run_program(APPS[program], program, arguments)
    assert Outcome(int(ended.value.code or 0), 0, capfd.readouterr().err).fault(typo) == ""


@pytest.mark.parametrize("typo", QUICK, ids=lambda typo: typo.command)
def test_typo_gets_the_right_hint(
    typo: Typo, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    check(typo, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("typo", TYPOS, ids=lambda typo: typo.command)
def test_each_typo_gets_the_right_hint(
    typo: Typo, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    check(typo, capfd)


def test_wrong_hints_and_exit_codes_are_faults():
    typo = Typo("mmvit train", "mmvit pretrain")
    assert first_hint("mmvit: x\n  where: y\n  hint: one\n  hint: two\n") == "one"
    assert Outcome(2, 0.1, "x\n  hint: mmvit pretrain CONFIG").fault(typo) == ""
    assert Outcome(1, 0.1, "x\n  hint: mmvit pretrain CONFIG").fault(typo) == "exit code 1 instead of 2"
    assert "without 'mmvit pretrain'" in Outcome(2, 0.1, "x\n  hint: mmvit plot\n  hint: mmvit pretrain").fault(typo)
    assert len({typo.command for typo in TYPOS}) == 100
    assert {typo.command.split()[0] for typo in TYPOS} == set(PROGRAMS)


def test_a_mistake_is_found_before_torch_is_imported(place: Path):
    code = (
        "import sys\nfrom data_tools.core.program import run_program\nfrom mmvit.cli import app\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n        run_program(app, 'mmvit', line.split())\n"
        "    except SystemExit:\n        pass\n"
        "    if 'torch' in sys.modules:\n        sys.exit(line)\n"
    )
    command = [sys.executable, "-c", code, *LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    assert (done.returncode, done.stderr.count("mmvit: ")) == (0, len(LIGHT) - 3), done.stderr  # three are right


def test_hints_name_verbs_and_options_that_there_are():
    assert set(MMVIT_VERBS) == set(get_command(app).commands)
    assert set(convert.LIBRARIES) == set(source.LIBRARIES)
    for group, program in ((MmvitVerbs, app), (DataVerbs, data_app)):
        verbs = get_command(program).commands
        named = re.findall(rf"(?<![-\w]){group.program} ([a-z][a-z-]*)", " ".join(group.words.values()))
        assert named
        assert set(named) <= set(verbs)
        options = {option for verb in verbs.values() for each in verb.params for option in each.opts}
        assert {ours for each in group.options.values() for ours in each} <= options


def test_a_word_of_another_library_goes_before_a_near_verb():
    ours, data = get_command(app), get_command(data_app)
    assert isinstance(ours, MmvitVerbs)
    assert isinstance(data, DataVerbs)
    assert "mmvit finetune CONFIG" in ours.verb_hint("train")  # and not only pretrain, which is near
    assert ours.verb_hint("make") == "mmvit-data make, of the other program"
    assert ours.verb_hint("Zero_Shot") == "did you mean 'mmvit zero-shot'?"
    assert data.verb_hint("train") == "mmvit pretrain, of the other program"
    assert data.verb_hint("quux").startswith("the verbs are emoji, digits")
