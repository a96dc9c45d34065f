"""The command-line program: one JSON document, exit codes, error messages."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from mmvit import __version__
from mmvit.cli import app
from mmvit.data.shards import IndexedShards

Program = Callable[..., "subprocess.CompletedProcess[str]"]
RunCli = Callable[..., tuple[int, str, str]]
VERBS = sorted(get_command(app).commands)
KOREAN = ["\uac1c", "\uace0\uc591\uc774"]  # dog, cat


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Path:
    return finished_run / "model"


@pytest.fixture(scope="module")
def pictures(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    shards = IndexedShards(sorted(tiny_data.glob("val-*.tar")))
    paths = [folder / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        path.write_bytes(shards.read(i).image)
    return paths


def checked_predictions(text: str, pictures: list[Path], names: list[str]) -> None:
    predictions = json.loads(text)
    assert [prediction["image"] for prediction in predictions] == [str(path) for path in pictures]
    for prediction in predictions:
        probabilities = [entry["probability"] for entry in prediction["classes"]]
        assert sorted(entry["name"] for entry in prediction["classes"]) == sorted(names)
        assert sum(probabilities) == pytest.approx(1)
        assert probabilities == sorted(probabilities, reverse=True)


def test_zero_shot_prints_one_json_document(mmvit: Program, model: Path, pictures: list[Path]):
    done = mmvit("zero-shot", model, *pictures, "--classes", "dog face,cat face,red apple", "--json")
    assert done.returncode == 0, done.stderr
    checked_predictions(done.stdout, pictures, ["dog face", "cat face", "red apple"])


def test_korean_names_and_templates(run_cli: RunCli, model: Path, pictures: list[Path], tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(KOREAN) + "\n", encoding="utf-8")
    for templates in ("korean", "emoji-korean"):
        code, out, err = run_cli("zero-shot", model, *pictures, "--classes", names, "--templates", templates, "--json")
        assert code == 0, err
        checked_predictions(out, pictures, KOREAN)
    assert KOREAN[0] in out  # as itself and not as \u escapes
    assert json.loads(out) != json.loads(run_cli("zero-shot", model, *pictures, "--classes", names, "--json")[1])


def test_top_and_table(run_cli: RunCli, model: Path, pictures: list[Path]):
    code, out, _ = run_cli("zero-shot", model, pictures[0], "--classes", "a,b,c,d", "--top", "2", "--json")
    assert code == 0
    assert len(json.loads(out)[0]["classes"]) == 2
    code, out, _ = run_cli("zero-shot", model, pictures[0], "--classes", "red apple,green apple")
    assert code == 0
    assert "red apple" in out
    assert "%" in out


def test_embed_and_search_print_one_json_document(mmvit: Program, model: Path, tiny_data: Path, tmp_path: Path):
    done = mmvit("embed", model, f"{tiny_data}/val-*.tar", "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path / 'e'}: 40 rows, 0 rejected"
    done = mmvit("search", tmp_path / "e", "--text", "a red fruit", "-k", "5", "--json")
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert all(hit["image_path"].startswith("val-00000.tar/") and hit["caption"] for hit in hits)


def test_doctor_prints_one_json_document(run_cli: RunCli):
    code, out, _ = run_cli("doctor", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["mmvit"]
    assert facts["precision"].startswith(("bf16", "fp32"))
    assert "torch" in run_cli("doctor")[1]


def test_unreadable_images(mmvit: Program, run_cli: RunCli, model: Path, pictures: list[Path], tmp_path: Path):
    files = {
        "cut.png": pictures[0].read_bytes()[:-30],
        "empty.png": b"",
        "text.png": b"no picture",
        "gif.png": gif(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "none.png", "."]:
        code, out, err = run_cli("zero-shot", model, pictures[1], tmp_path / name, "--classes", "a,b", "--json")
        assert (code, out) == (3, ""), name
        assert f"where: {tmp_path / name}" in err
        assert "hint:" in err
        assert "Traceback" not in err
    done = mmvit("zero-shot", model, tmp_path / "cut.png", "--classes", "a,b", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("mmvit: image cannot be decoded")
    assert "Traceback" not in done.stderr


def test_images_of_a_folder(
    run_cli: RunCli, model: Path, pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    latin = os.fsdecode(b"caf\xe9.png")
    for name in ("0.png", "deep/1.JFIF", latin, "._2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pictures[0].read_bytes())
    os.mkfifo(tmp_path / "pipe.png")
    command = ("zero-shot", model, tmp_path, "--classes", "a,b", "--json")
    code, out, err = run_cli(*command)
    assert code == 0, err
    assert [prediction["image"] for prediction in json.loads(out)] == [
        *(str(tmp_path / name) for name in ("0.png", r"caf\xe9.png", "deep/1.JFIF"))
    ]
    assert "skipped: 1 x hidden" in caplog.text
    assert "pipe.png: image cannot be read: it is not a file but a pipe" in caplog.text
    code, out, err = run_cli(*command, "--max-bad", 0.2)
    assert (code, out, "1 of 4 images" in err, "--max-bad 0.25" in err) == (3, "", True, True)


def gif() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "GIF")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dog\n\ncat\n", "line 2"),
        ("dog\ncat\ndog\n", "'dog' at line 1 and 3"),
        ("", "no class name"),
        ("\n", "no class name"),
    ],
)
def test_class_files_with_blank_or_double_lines(
    run_cli: RunCli, model: Path, pictures: list[Path], tmp_path: Path, content: str, message: str
):
    (tmp_path / "names.txt").write_text(content)
    code, out, err = run_cli("zero-shot", model, pictures[0], "--classes", tmp_path / "names.txt")
    assert (code, out) == (2, "")
    assert message in err
    assert str(tmp_path / "names.txt") in err
    assert "hint:" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "dog"], "no file of class names 'dog'"),
        (["--classes", "a,,b"], "entry 2"),
        (["--classes", "a,b", "--templates", "koraen"], "did you mean 'korean'?"),
        (["--classes", "a,b", "--top", "0"], "to 1"),
        ([], "--classes"),
    ],
)
def test_wrong_use_of_zero_shot(run_cli: RunCli, model: Path, pictures: list[Path], arguments: list[str], message: str):
    code, out, err = run_cli("zero-shot", model, pictures[0], *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(run_cli: RunCli, verb: str):
    code, out, err = run_cli(verb, "--help")
    assert (code, err) == (0, "")
    assert "Usage" in out


def test_help_lists_the_verbs_and_loads_nothing_heavy(mmvit: Program):
    assert (
        sorted(
            [
                "classify",
                "configs",
                "doctor",
                "embed",
                "finetune",
                "import",
                "inspect",
                "plot",
                "pretrain",
                "quickstart",
                "search",
                "status",
                "zero-shot",
            ]
        )
        == VERBS
    )
    done = mmvit("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    code = (
        "import sys, mmvit, mmvit.cli; print({'torch', 'numpy', 'PIL', 'omegaconf', 'accelerate'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_without_a_verb_ends_well(run_cli: RunCli, arguments: list[str]):
    code, out, err = run_cli(*arguments)
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)


def test_help_of_a_verb_in_other_words(run_cli: RunCli):
    whole = run_cli("embed", "--help")
    assert run_cli("help", "embed") == run_cli("embed", "-h") == whole
    code, out, err = run_cli("help", "emebd")
    assert (code, out) == (2, "")
    assert "did you mean 'mmvit embed'?" in err


def test_version(run_cli: RunCli):
    for option in ("--version", "-V"):
        assert run_cli(option) == (0, f"mmvit {__version__}\n", "")


def test_option_without_a_value_is_no_traceback(run_cli: RunCli, model: Path):
    for arguments in (["--classes"], ["--classes", "a,b", "--top", "x"], ["--classes", "a,b", "--json=1"]):
        code, out, err = run_cli("zero-shot", model, "a.png", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("mmvit: ")
        assert "mmvit zero-shot --help" in err


def test_debug_shows_the_traceback(mmvit: Program, run_cli: RunCli, tmp_path: Path):
    arguments = ("zero-shot", tmp_path, "a.png", "--classes", "a,b")
    assert "Traceback" not in run_cli(*arguments)[2]
    done = mmvit(*arguments, "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "not a model folder" in done.stderr


def test_missing_config(run_cli: RunCli):
    code, _, err = run_cli("pretrain", "quikstart")
    assert code == 2
    assert "did you mean 'quickstart'?" in err


def test_folder_that_may_not_be_written(run_cli: RunCli, model: Path, pictures: list[Path], tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, _, err = run_cli("embed", model, pictures[0], "--out", tmp_path / "file" / "e", "--modality", "image")
    assert code == 2
    assert "Traceback" not in err
    shutil.rmtree(tmp_path)
