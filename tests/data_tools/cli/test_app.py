"""The program `mmvit-data`: quick help, one JSON document, errors in words with their exit code."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import typer

from data_tools.core.program import as_user_error, run_program
from data_tools.tar.writer import ShardWriter


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "data_tools", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shards", max_samples=2) as writer:
        for i in range(3):
            writer.write(f"{i}", {"txt": "x", "cls": i})
    return tmp_path / "shards"


def test_help_lists_the_verbs_and_loads_nothing_heavy():
    code = "import sys, data_tools.cli.app; print({'torch', 'numpy', 'PIL', 'emoji', 'webdataset'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    start = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - start < 5  # 0.3 s on an idle machine; the bound is for a busy one
    assert done.returncode == 0
    assert "emoji" in done.stdout
    assert "index" in done.stdout


def test_index_prints_one_json_document(shards: Path):
    done = run("index", str(shards), "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert document["samples"] == 3
    assert [row["samples"] for row in document["shards"]] == [2, 1]
    assert document["shards"][0]["fields"] == ["cls", "txt"]


def test_index_rebuilds_a_damaged_index(shards: Path):
    index = shards / "shard-00000.tar.idx"
    index.write_bytes(b"damaged")
    done = run("index", str(shards))
    assert done.returncode == 4
    assert "the shard index is damaged" in done.stderr
    assert run("index", "--rebuild", str(shards)).stdout.endswith("2 shards, 3 samples\n")
    assert run("index", str(shards)).returncode == 0


def test_errors_are_words_with_an_exit_code(tmp_path: Path):
    done = run("index", str(tmp_path / "none-*.tar"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("mmvit-data: no shards found")
    for part in ("where:", "hint:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("index", "--debug", str(tmp_path / "none-*.tar")).stderr

    done = run("emoji", str(tmp_path / "out"), "--held-out", "Sam")
    assert done.returncode == 2
    assert "did you mean 'Sams'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("emoij").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("stats", "--picture", "file/x.png"), "the folder cannot be created"),
        (("stats", "--picture", "shards"), "is a folder"),
        (("peek", "--out", "x.jpg"), "x.png"),
        (("dedup", "--report", "shards"), "is a folder"),
        (("repair", "--out", "file/out"), "the folder cannot be created"),
        (("reshard", "--out", "file/out"), "the folder cannot be created"),
        (("tokenizer", "--out", "file/out.json"), "the folder cannot be created"),
    ],
)
def test_an_output_that_cannot_be_is_told_before_the_work(
    shards: Path, data_program: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], told: str
):
    (shards.parent / "file").touch()
    before = sorted(shards.parent.rglob("*"))
    *options, name = arguments
    code, output, errors = data_program(*options, shards.parent / name, shards)
    assert (code, output) == (2, "")
    assert told in errors
    assert sorted(shards.parent.rglob("*")) == before


def test_what_the_system_refuses_is_told_and_a_bug_is_not_hidden():
    full = as_user_error(OSError(28, "No space left on device", "/data/x.tar"))
    assert (full.exit_code, full.where) == (5, "/data/x.tar")
    assert as_user_error(PermissionError(13, "Permission denied", "/data/x")).exit_code == 2
    assert as_user_error(MemoryError()).exit_code == 5
    assert as_user_error(FileNotFoundError(2, "No such file", "x")) is None

    def app(args: list[str], prog_name: str, standalone_mode: bool) -> None:
        raise FileNotFoundError(2, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        run_program(app, "program", [])


def test_ctrl_c_while_the_program_starts_is_no_traceback():
    def app(args: list[str], prog_name: str, standalone_mode: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_program(app, "program", [])
    assert ended.value.code == 130


def test_ctrl_c_in_a_verb_and_an_exit_code_of_its_own():
    app = typer.Typer()

    @app.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    @app.command()
    def damaged() -> None:
        raise typer.Exit(3)

    for verb, code in (("interrupted", 130), ("damaged", 3)):
        with pytest.raises(SystemExit) as ended:
            run_program(app, "program", [verb])
        assert ended.value.code == code


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"]])
def test_help_ends_well(data_program: Callable[..., tuple[int, str, str]], arguments: list[str]):
    code, out, err = data_program(*arguments)
    assert (code, err) == (0, "")
    assert "reshard" in out
    assert data_program("help", "reshard") == data_program("reshard", "-h") == data_program("reshard", "--help")


def test_the_version(data_program: Callable[..., tuple[int, str, str]]):
    assert data_program("-V") == data_program("--version") == (0, f"mmvit {metadata.version('mmvit')}\n", "")
