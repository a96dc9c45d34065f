"""`mmvit-data reshard`: merge, split, shuffle, select; text and JSON reports."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.tar.index import open_indexes

Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(data_program: Program) -> Program:
    return functools.partial(data_program, "reshard", "--workers", 1)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for seed, folder in enumerate(("a", "b")):
        photos = SyntheticPhotos(32, 24, seed=seed)
        write_synthetic(tmp_path / folder, photos, num_shards=2, num_samples=6, num_workers=1)
    return tmp_path


def keys_of(folder: Path) -> list[list[str]]:
    return [list(index.keys()) for index in open_indexes(sorted(folder.glob("*.tar")))]


def test_merge_and_split(shards: Path, run: Program):
    code, output, errors = run(shards / "a", shards / "b", "--out", shards / "one", "--shard-size", 100)
    assert (code, errors) == (0, "")
    ours = [f"{i:09d}" for i in range(6)]
    theirs = [f"{i:09d}-s{2 + i // 3}" for i in range(6)]
    assert keys_of(shards / "one") == [ours + theirs]
    assert "12 samples in 1 shards" in output
    assert "6 samples with duplicate keys were renamed" in output
    assert run(shards / "one", "--out", shards / "many", "--shard-size", 5)[0] == 0
    assert keys_of(shards / "many") == [(ours + theirs)[:5], (ours + theirs)[5:10], (ours + theirs)[10:]]
    code, output, _ = run(shards / "one", "--out", shards / "many", "--shard-size", 5)
    assert code == 0
    assert "already there" in output
    code, _, errors = run(shards / "one", "--out", shards / "many", "--shard-size", 4)
    assert code == 2
    assert "finished work that differs in: shard_size" in errors


def test_pick_by_keys_and_shuffle(shards: Path, run: Program):
    (shards / "keys.txt").write_text("shard-00001.tar/000000003\n000000004\nnobody\n")
    _, output, _ = run(shards / "a", "--out", shards / "some", "--keys", shards / "keys.txt")
    assert keys_of(shards / "some") == [["000000003", "000000004"]]
    assert "1 keys of the list match no sample" in output
    assert "nobody" in output
    assert (shards / "some" / "unknown_keys.txt").read_text() == "nobody\n"
    document = json.loads(run(shards / "a", "--out", shards / "mixed", "--shuffle", 5, "--json")[1])
    assert (document["samples"], document["unknown_keys"]) == (6, None)
    (mixed,) = keys_of(shards / "mixed")
    assert sorted(mixed) == [f"{i:09d}" for i in range(6)] != mixed


def test_errors_have_their_codes(shards: Path, run: Program):
    (shards / "keys.txt").write_text("nobody\n")
    assert run(shards / "a", "--out", shards / "a")[0] == 2
    assert run(shards / "none-*.tar", "--out", shards / "x")[0] == 3
    assert run(shards / "a", "--out", shards / "x", "--keys", shards / "keys.txt")[0] == 3
    assert run(shards / "a", "--out", shards / "x", "--keys", shards / "absent")[0] == 2
    assert not (shards / "x").exists()
