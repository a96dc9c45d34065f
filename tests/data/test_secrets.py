"""The password and the token of a URL are printed by no verb and no reader, and by none of their errors."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.cli.app import app
from data_tools.core.errors import MmvitError
from data_tools.core.program import run_program
from data_tools.tar.expand import expand_shards
from data_tools.tar.writer import ShardWriter
from mmvit.data.labels import open_labelled
from mmvit.data.shards import IndexedShards
from mmvit.data.source import Reading, SampleSource
from mmvit.data.streaming import StreamedShards, open_shards
from mmvit.retrieval.sources import open_source

SECRETS = ("hunter2", "t0ken")

Run = Callable[..., int]
Secret = Callable[[str], str]  # from a name to its URL with secrets


@pytest.fixture
def server(tmp_path: Path, write_squares: Callable[..., list[Path]], serve: Callable[[Path], Any]) -> Any:
    """Three shards of squares, one of which lost a sample, and one without any sample."""
    folder = tmp_path / "shards"
    write_squares(folder)
    tar = folder / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-6000])
    for index in folder.glob("*.idx"):
        index.unlink()
    (folder / "empty.tar").write_bytes(bytes(10240))
    with ShardWriter(folder / "labelled") as writer:
        for i in range(4):
            writer.write(f"k{i}", {"png": b"x", "cls": i % 2})
    return serve(folder)


@pytest.fixture
def url(server: Any) -> Secret:
    def secret(name: str) -> str:
        return f"{server.url.replace('//', '//me:hunter2@')}/{name}?sig=t0ken"

    return secret


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `mmvit-data` and return its exit code; what it printed and logged holds no secret."""
    caplog.set_level(logging.DEBUG, "data_tools")
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: object) -> int:
        capfd.readouterr()
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            run_program(app, "mmvit-data", [str(argument) for argument in arguments])
        told = "".join([*capfd.readouterr(), caplog.text])
        assert told
        assert_hidden(told)
        return int(ended.value.code or 0)

    return run


def assert_hidden(*told: object) -> None:
    for text in map(str, told):
        assert not [secret for secret in SECRETS if secret in text], text


NEW = Path("new")
VERBS: dict[str, tuple[list[object], int]] = {
    "index": (["index"], 0),
    "index as JSON": (["index", "--rebuild", "--json"], 0),
    "check": (["check"], 3),
    "check as JSON": (["check", "--json"], 3),
    "repair": (["repair", "--out", NEW / "repair"], 0),
    "stats": (["stats", "--picture", NEW / "stats.png"], 0),
    "peek": (["peek", "--out", NEW / "peek.png", "-n", 3], 0),
    "reshard": (["reshard", "--out", NEW / "reshard"], 0),
    "filter": (["filter", "--where", "width > 0", "--out", NEW / "filter"], 0),
    "dedup": (["dedup", "--out", NEW / "dedup", "--report", NEW / "dedup.jsonl"], 0),
    "tokenizer": (["tokenizer", "--out", NEW / "tokenizer.json", "--vocab-size", 300], 0),
}


QUICK = {"check", "repair", "filter"}  # a report, a writer, and the table of metadata


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=() if verb in QUICK else pytest.mark.slow) for verb in VERBS]
)
def test_verbs(url: Secret, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str):
    monkeypatch.chdir(tmp_path)
    NEW.mkdir()
    titles: list[str] = []
    monkeypatch.setattr("data_tools.examine.stats_picture.draw_stats", lambda *_, title: titles.append(title))
    monkeypatch.setattr("data_tools.examine.peek.draw_sheet", lambda path, samples, title, font: titles.append(title))
    arguments, code = VERBS[verb]
    assert run(*arguments, url("shard-{00000..00002}.tar")) == code
    assert_hidden(*titles)
    for file in [*NEW.rglob("*"), *(tmp_path / "cache").rglob("*")]:
        if file.is_file():
            assert not [secret for secret in SECRETS if secret.encode() in file.read_bytes()], file
    assert bool(titles) == (verb in ("stats", "peek"))


SPECS = {  # what is wrong -> exit code
    "none.tar": 3,
    "empty.tar": 3,
    "shard-{00002..00000}.tar": 2,
    "shard-{0..99999999}.tar": 2,
    "{shard-00000,shard-00000}.tar": 3,
    "gopher": 2,
    "file": 2,
    "brackets": 2,
    "chain": 2,
    "pipe": 2,
}


@pytest.mark.parametrize(
    ("verb", "wrong"), [("index", wrong) for wrong in SPECS] + [(verb, "none.tar") for verb in VERBS if verb != "index"]
)
def test_errors_of_verbs(url: Secret, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, wrong: str):
    monkeypatch.chdir(tmp_path)
    NEW.mkdir()
    code = run(*VERBS[verb][0], broken(url, wrong))
    assert code == SPECS[wrong]


def broken(url: Secret, wrong: str) -> str:
    whole = url("a.tar")
    return {
        "gopher": whole.replace("http", "gopher"),
        "file": whole.replace("http", "file"),
        "brackets": whole.replace("127", "[127"),
        "chain": f"zip://b.tar::{whole}",
        "pipe": f"pipe:curl -u me:hunter2 {whole}",
    }.get(wrong, url(wrong))


def test_a_key_and_a_condition_that_name_nothing(url: Secret, run: Run, tmp_path: Path):
    keys = tmp_path / "keys.txt"
    keys.write_text("none\n")
    tars = url("shard-{00000..00002}.tar")
    assert run("peek", "--out", tmp_path / "peek.png", "--key", "none", tars) == 2
    assert run("reshard", "--out", tmp_path / "new", "--keys", keys, tars) == 3
    assert run("filter", "--where", "height < 0", "--out", tmp_path / "new", tars) == 3
    assert run("dedup", "--threshold", 99, tars) == 2


def shown_by(shards: SampleSource, count: int) -> list[object]:
    """Return everything that a reader reports about its samples."""
    shown: list[object] = [shards, vars(shards), shards.shard(0), *shards.lost(), shards.fingerprint()]
    for i in range(count):
        try:
            shown.append(shards.read(i).key)
        except MmvitError as error:
            shown += traceback.format_exception(error)
    return [*shown, shards.key(0), shards.error("hash", "x", 0), shards.error("hash", "x", 0).shard]


def test_readers(server: Any, url: Secret, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    tars = url("shard-{00000..00002}.tar")
    shards = IndexedShards(expand_shards(tars), verify=True, require_caption=False)
    assert_hidden(*shown_by(shards, len(shards)), *shards.paths, *shards.reader.indexes, shards.reader.indexes[0].tar)
    source = open_source(tars)
    assert_hidden(source.key(0), source.fingerprint(), source.read(0))
    labelled = open_labelled([url("labelled/shard-00000.tar")], "a,b")
    assert_hidden(*shown_by(labelled.samples, 4))
    server.ranges = False
    streamed = open_shards(expand_shards(tars))
    assert isinstance(streamed, StreamedShards)
    streamed.begin(Reading(0, 0, 0, 1), lambda shard: None)
    assert_hidden(*shown_by(streamed, 20))
    assert "hint: copy the shards" in caplog.text
    assert_hidden(caplog.text)


def test_errors_of_readers(server: Any, url: Secret):
    def streamed(spec: str) -> None:
        shards = StreamedShards(expand_shards(spec))
        shards.begin(Reading(0, 0, 0, 1), lambda shard: None)
        for i in range(20):
            shards.read(i)

    def labelled(spec: str) -> None:
        open_labelled([spec])

    for opened in (lambda spec: IndexedShards(expand_shards(spec)), streamed, labelled, open_source):
        for wrong in (*SPECS, "a.json", "a.jpg", "a.txt"):
            for spec in (broken(url, wrong), f"{url('get')}&name={wrong}"):
                with pytest.raises(MmvitError) as caught:
                    opened(spec)
                assert_hidden(*traceback.format_exception(caught.value), caught.value.where, caught.value.hint)
