"""A tokenizer trained on the captions of shards, and the account of what was read."""

import json
from pathlib import Path

import pytest
import tokenizers
from samples import write_tar

from data_tools.cli.app import app
from data_tools.core.errors import DataError, UsageError
from data_tools.core.program import run_program
from data_tools.make.tokenizer import END_OF_TEXT, PAD, START_OF_TEXT, ShardTexts, train_on_shards
from data_tools.tar.expand import expand_shards
from data_tools.tar.writer import ShardWriter

BAD = {
    "empty": {"txt": b" \n", "json": b'{"names": {"en": "", "ko": [" "]}}'},
    "latin": {"txt": b"caf\xe9", "json": b'{"names": "caf\xe9"}'},
    "none": {"cls": b"1"},
    "cut": {"json": b'{"names'},
    "half": {"json": b'{"names": "\\ud83d"}'},
    "other": {"json": b"[1]"},
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """30 samples in two shards with a caption each and three names, and one shard of samples without."""
    with ShardWriter(tmp_path / "shards", max_samples=20) as writer:
        for i in range(30):
            names = {"en": f"apple {i}", "ko": ["\uc0ac\uacfc", "\ube68\uac04 \uc0ac\uacfc"]}
            writer.write(f"k{i}", {"txt": f"a red apple number {i}", "json": {"names": names}})
    bad = {f"{key}.{field}": data for key, fields in BAD.items() for field, data in fields.items()}
    write_tar(tmp_path / "shards" / "bad.tar", bad)
    return tmp_path / "shards"


def test_all_texts_are_read_and_what_has_none_is_counted(shards: Path):
    texts = ShardTexts(expand_shards(shards))
    for _ in range(2):
        assert list(texts) == [f"a red apple number {i}" for i in range(30)]
        assert texts.skipped == {"empty-caption": 1, "not-utf8": 1, "no-caption": 4}
    names = ShardTexts(expand_shards(shards), "names")
    found = list(names)
    assert found[:3] == ["apple 0", "\uc0ac\uacfc", "\ube68\uac04 \uc0ac\uacfc"]
    assert len(found) == 90
    assert names.skipped == {"empty-caption": 1, "not-utf8": 1, "no-caption": 1, "bad-json": 3}


def test_blank_texts_beside_others_are_no_captions(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"json": {"names": ["", "one", " "]}})
    texts = ShardTexts(expand_shards(tmp_path), "names")
    assert list(texts) == ["one"]
    assert not texts.skipped


def test_lengths_are_those_of_the_written_tokenizer(shards: Path, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    report = train_on_shards(expand_shards(shards), path, 300)
    written = tokenizers.Tokenizer.from_file(str(path))
    lengths = sorted(len(written.encode(f"a red apple number {i}").ids) + 2 for i in range(30))
    assert report.mean_length == pytest.approx(sum(lengths) / 30)
    assert report.p99_length == lengths[29]
    assert (report.captions, report.vocab_size) == (30, written.get_vocab_size())
    assert [written.token_to_id(token) for token in (PAD, START_OF_TEXT, END_OF_TEXT)] == [0, 1, 2]


def test_one_in_a_hundred_captions_may_be_longer(tmp_path: Path):
    for name, num_long in (("one", 1), ("two", 2)):
        with ShardWriter(tmp_path / name) as writer:
            for i in range(100):
                writer.write(f"{i}", {"txt": "apple " * 50 if i < num_long else "apple"})
        report = train_on_shards(expand_shards(tmp_path / name), tmp_path / f"{name}.json", 300)
        assert report.p99_length == (3 if num_long == 1 else 52)


def test_shards_without_captions_are_refused(shards: Path, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="no sample has a caption") as caught:
        train_on_shards(expand_shards(shards / "bad.tar"), path)
    assert "4 x no-caption" in str(caught.value.note)
    assert not path.exists()


def test_a_file_is_not_overwritten(shards: Path, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match="the file exists"):
        train_on_shards(expand_shards(shards), path)
    assert path.read_text() == "mine"


def test_the_verb(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run_program(app, "mmvit-data", ["tokenizer", str(shards), *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    document = json.loads(run("--out", str(tmp_path / "a.json"), "--vocab-size", "300", "--source", "names", "--json"))
    assert document["captions"] == 90
    assert document["skipped"] == {"empty-caption": 1, "not-utf8": 1, "no-caption": 1, "bad-json": 3}
    assert (tmp_path / "a.json").is_file()
    words = run("--out", str(tmp_path / "new" / "b.json"))
    assert "30 captions read" in words
    assert "4 x no-caption" in words
    assert "mean" in words
