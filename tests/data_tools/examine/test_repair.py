"""A repair keeps every whole sample, lists the rest, and its result is clean."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from samples import picture, write_tar

from data_tools.cli.app import app
from data_tools.core.errors import DataError, UsageError
from data_tools.core.program import run_program
from data_tools.examine.check import check_shards, inspect_shard
from data_tools.examine.repair import describe, repair_shards
from data_tools.tar.expand import expand_shards
from data_tools.tar.index import open_index
from data_tools.tar.reader import ShardReader
from data_tools.tar.writer import ShardWriter


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two whole shards of 20 samples each."""
    with ShardWriter(tmp_path / "old", "train", max_samples=20) as writer:
        for i in range(40):
            writer.write(f"{i:03d}", {"jpg": picture(i), "txt": f"caption {i}", "json": {"i": i}, "cls": i})
    return writer.shards


def contents(tar: Path) -> dict[str, dict[str, bytes]]:
    index = open_index(tar)
    reader = ShardReader([index])
    return {index.key(i): reader.fields(0, i) for i in range(len(index))}


def rejected(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_whole_shards_are_kept_whole(shards: list[Path], tmp_path: Path):
    before = digests(tmp_path / "old")
    report = repair_shards(shards, tmp_path / "new", num_workers=1)
    assert (report.kept, rejected(tmp_path / "new")) == (40, [])
    assert digests(tmp_path / "old") == before
    new = expand_shards(str(tmp_path / "new"))
    assert [tar.name for tar in new] == ["train-00000.tar", "train-00001.tar"]
    assert [contents(tar) for tar in new] == [contents(tar) for tar in shards]
    assert list(contents(new[0])) == list(contents(shards[0]))
    assert "rejected: none" in describe(report) or "rejected: 0" in describe(report)


def test_what_is_not_whole_is_left_out_and_listed(tmp_path: Path):
    good = [("g1.jpg", picture(1)), ("g1.txt", b"\xef\xbb\xbf one \n")]
    apart = [("late.jpg", picture(2)), *[("g2.jpg", picture(3)), ("g2.txt", b"two")], ("late.txt", b"came late")]
    bad = [("html.jpg", b"<html>"), ("html.txt", b"x"), ("empty.jpg", picture(4)), ("empty.txt", b" ")]
    twice = [("g1.jpg", picture(1)), ("g1.txt", b"another text")]
    extra = [("g3.jpg", picture(5)), ("g3.txt", b"three"), ("g3.npy", b"array"), ("g3.pkl", b"pickle")]
    tar = write_tar(tmp_path / "a.tar", [*good, *apart, *bad, *twice, *extra])
    report = repair_shards([tar], tmp_path / "new")
    new = contents(tmp_path / "new" / "a.tar")
    assert list(new) == ["g1", "late", "g2", "g3"]
    assert new["g1"] == {"jpg": picture(1), "txt": b"one"}
    assert new["late"] == {"jpg": picture(2), "txt": b"came late"}
    lines = rejected(tmp_path / "new")
    assert {(line["key"], line["cause"]) for line in lines} == {
        *{("html", "bad-image"), ("empty", "empty-caption"), ("g1", "double-key")}
    }
    assert all(line["shard"] == str(tar) and line["offset"] > 0 and line["detail"] for line in lines)
    told = report.to_json()
    assert (told["kept"], told["left_out"]) == (4, 3)
    assert told["not_copied"] == {"npy": 1, "pkl": 1} or sum(told["not_copied"].values()) == 2
    checked = check_shards([tmp_path / "new" / "a.tar"])
    assert not checked.is_damaged
    assert checked.notices == []


def test_bit_rot_is_not_copied(shards: list[Path], tmp_path: Path):
    offset, size = open_index(shards[1]).locate(5)["jpg"]
    data = bytearray(shards[1].read_bytes())
    data[offset + size // 2] ^= 4
    shards[1].write_bytes(data)
    assert repair_shards(shards, tmp_path / "new", num_workers=1).kept == 39
    assert [(line["key"], line["cause"]) for line in rejected(tmp_path / "new")] == [("025", "hash")]


def test_a_sample_whose_header_is_damaged_is_saved_by_the_index(shards: list[Path], tmp_path: Path):
    whole = contents(shards[0])
    offset, _ = open_index(shards[0]).locate(5)["txt"]
    data = bytearray(shards[0].read_bytes())
    data[offset - 512 : offset] = bytes(512)
    shards[0].write_bytes(data)
    report = repair_shards(shards[:1], tmp_path / "new")
    assert contents(tmp_path / "new" / shards[0].name) == whole
    assert list(contents(tmp_path / "new" / shards[0].name)) == list(whole)
    assert [problem.key for problem in report.shards[0].left_out] == [""]


@pytest.mark.parametrize("seed", range(12))
def test_damaged_shards_are_accounted_for_and_mended(shards: list[Path], tmp_path: Path, seed: int):
    random = np.random.default_rng(seed)
    whole = [contents(tar) for tar in shards]
    for tar in shards:
        data = bytearray(tar.read_bytes())
        for _ in range(3):
            at = int(random.integers(len(data) - 600))
            size = int(random.integers(1, 512))
            data[at : at + size] = random.bytes(size) if random.random() < 0.7 else bytes(size)
        if random.random() < 0.3:
            del data[int(random.integers(len(data) // 2, len(data))) :]
        tar.write_bytes(data)
    found = [inspect_shard(tar).report for tar in shards]
    report = repair_shards(shards, tmp_path / "new", num_workers=1)
    assert not check_shards(sorted((tmp_path / "new").glob("*.tar")), num_workers=1).is_damaged
    for tar, shard, before, original in zip(shards, report.shards, found, whole, strict=True):
        kept = contents(tmp_path / "new" / tar.name)
        assert len(kept) == shard.kept == before.samples - before.bad
        assert all(original[key] == fields for key, fields in kept.items())  # never a wrong pair, a wrong byte
        listed = {problem.key for problem in shard.left_out}
        assert kept.keys() | listed >= original.keys()
        assert not kept.keys() & (listed - {p.key for p in shard.left_out if p.cause == "double-key"})
    assert len(rejected(tmp_path / "new")) == sum(len(shard.left_out) for shard in report.shards)


def test_nothing_is_ever_changed_in_place(shards: list[Path], tmp_path: Path):
    before = digests(tmp_path / "old")
    for out in (tmp_path / "old", tmp_path / "old" / ".." / "old"):
        with pytest.raises(UsageError, match="folder of the input shards"):
            repair_shards(shards, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        repair_shards(shards, tmp_path / "full")
    assert digests(tmp_path / "old") == before


def test_two_shards_of_one_name_are_refused(shards: list[Path], tmp_path: Path):
    other = tmp_path / "other" / shards[0].name
    other.parent.mkdir()
    other.write_bytes(shards[0].read_bytes())
    with pytest.raises(UsageError, match=r"2 shards are named train-00000\.tar"):
        repair_shards([*shards, other], tmp_path / "new")


def test_a_shard_without_a_whole_sample_is_told_and_not_written(shards: list[Path], tmp_path: Path):
    shards[0].write_bytes(bytes(10240))
    report = repair_shards(shards, tmp_path / "new", num_workers=1)
    assert [shard.kept for shard in report.shards] == [0, 20]
    assert [path.name for path in sorted((tmp_path / "new").glob("*.tar"))] == ["train-00001.tar"]
    assert "train-00000.tar: no intact sample" in describe(report)
    with pytest.raises(DataError, match="no shard contains an intact sample"):
        repair_shards(shards[:1], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("key", ["a\nb", "a//b"])
def test_a_key_that_would_not_read_back_gets_another_name(tmp_path: Path, key: str):
    files = [("a.jpg", picture(1)), ("a.txt", b"one"), (f"{key}.jpg", picture(2)), (f"{key}.txt", b"two")]
    tar = write_tar(tmp_path / "a.tar", files)
    repair_shards([tar], tmp_path / "new")
    new = contents(tmp_path / "new" / "a.tar")
    assert [fields["txt"] for fields in new.values()] == [b"one", b"two"]


def run(*arguments: object) -> int:
    """Run the program in this process, which saves its start."""
    with pytest.raises(SystemExit) as ended:
        run_program(app, "mmvit-data", [str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_program_repairs_what_the_check_complains_of(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = bytearray(shards[0].read_bytes())
    data[3000:3600] = bytes(600)
    shards[0].write_bytes(data)
    assert run("check", tmp_path / "old", "--workers", 1) == 3
    capsys.readouterr()
    assert run("repair", tmp_path / "old", "--out", tmp_path / "new", "--workers", 1, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kept"] + len({line["key"] for line in rejected(tmp_path / "new")} - {""}) == 40
    assert run("check", tmp_path / "new", "--workers", 1) == 0
