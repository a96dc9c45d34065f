"""A check finds what is wrong with a shard, says where, and changes nothing."""

import json
import os
from pathlib import Path

import pytest
import webdataset
from samples import picture, write_tar

from data_tools.cli.app import app
from data_tools.core.errors import CAUSES
from data_tools.core.program import run_program
from data_tools.examine.check import CheckReport, ShardReport, check_shards, describe
from data_tools.tar.index import index_path, open_index
from data_tools.tar.writer import ShardWriter

FIXTURES = Path(__file__).parent / "fixtures"


def sample(i: int) -> dict[str, bytes]:
    return {f"{i:03d}.jpg": picture(i), f"{i:03d}.txt": f"caption {i}".encode()}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A whole shard of ten samples with its index."""
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(10):
            writer.write(f"{i:03d}", {"jpg": picture(i), "txt": f"caption {i}"})
    return writer.shards[0]


def check_one(tar: Path, decode: bool = True) -> ShardReport:
    return check_shards([tar], decode=decode).shards[0]


def causes(report: ShardReport) -> list[tuple[str, str]]:
    return [(fault.cause, fault.key) for fault in report.faults]


def change(tar: Path, offset: int, data: bytes) -> None:
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def run(*arguments: object) -> int:
    """Run the program in this process, which saves its start."""
    with pytest.raises(SystemExit) as ended:
        run_program(app, "mmvit-data", [str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_whole_shard_has_no_fault_and_nothing_is_written(tar: Path):
    before = {path: path.stat().st_mtime_ns for path in tar.parent.iterdir()}
    report = check_shards([tar])
    assert report == CheckReport([ShardReport(str(tar), 10, 0, [], "equal")], [])
    assert not report.is_damaged
    index_path(tar).unlink()
    assert check_one(tar) == ShardReport(str(tar), 10, 0, [], "none")
    assert {path: path.stat().st_mtime_ns for path in tar.parent.iterdir()} == {tar: before[tar]}


@pytest.mark.parametrize("keep_time", [True, False])
def test_bit_rot_is_named_by_the_index(tar: Path, keep_time: bool):
    stat = tar.stat()
    offset, size = open_index(tar).locate(4)["jpg"]
    change(tar, offset + size // 2, b"\x55")
    if keep_time:
        os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = check_one(tar, decode=False)
    assert causes(report) == [("hash", "004")]
    assert (report.index_state, report.bad, report.is_damaged) == ("differs", 1, True)
    assert ".jpg" in report.faults[0].detail


def test_what_a_cut_shard_lost_is_named_by_the_index(tar: Path):
    first = min(offset for offset, _ in open_index(tar).locate(7).values())
    with tar.open("r+b") as file:
        file.truncate(first + 30)
    report = check_one(tar)
    assert report.samples == 7
    assert {key for _, key in causes(report)} >= {"007", "008", "009"}
    assert "truncated" in {cause for cause, _ in causes(report)}
    index_path(tar).unlink()
    assert "truncated" in {cause for cause, _ in causes(check_one(tar))}


def test_a_last_sample_that_became_zeros_is_seen_by_the_index(tar: Path):
    first = min(offset for offset, _ in open_index(tar).locate(9).values()) - 512
    change(tar, first, bytes(tar.stat().st_size - first))
    assert causes(check_one(tar)) == [("hash", "009")]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_damaged_header_costs_no_sample_where_there_is_an_index(tar: Path, with_index: bool):
    offset, _ = open_index(tar).locate(3)["txt"]
    change(tar, offset - 512, b"\xff" * 512)
    if not with_index:
        index_path(tar).unlink()
    report = check_one(tar)
    assert report.is_damaged
    assert (report.samples, report.bad) == (10 if with_index else 9, 0)
    assert "damaged" in {cause for cause, _ in causes(report)}
    assert not with_index or {key for _, key in causes(report)} == {""}


def test_a_last_header_that_became_zeros_is_damage_that_costs_nothing(tar: Path):
    offset, size = max(open_index(tar).locate(9).values())
    change(tar, offset - 512, bytes(512))
    assert offset + size < tar.stat().st_size
    report = check_one(tar)
    assert (report.samples, report.bad, report.is_damaged) == (10, 0, True)
    assert {cause for cause, _ in causes(report)} == {"damaged"}


@pytest.mark.parametrize(
    ("files", "cause", "key"),
    [
        ({"a.jpg": b"<html>", "a.txt": b"x"}, "bad-image", "a"),
        ({"a.jpg": picture(1)[:-300], "a.txt": b"x"}, "bad-image", "a"),
        ({"a.txt": b"x"}, "no-image", "a"),
        ({"a.jpg": picture(1)}, "no-caption", "a"),
        ({"a.jpg": picture(1), "a.txt": b" "}, "empty-caption", "a"),
        ({"a.jpg": picture(1), "a.txt": b"\xff"}, "not-utf8", "a"),
        ({"a.jpg": picture(1), "a.txt": b"a\0b"}, "not-utf8", "a"),
        ({"a.jpg": picture(1), "a.txt": b"x", "a.json": b"[]"}, "bad-json", "a"),
        ({"a.jpg": picture(1), "a.txt": b"x", "a.cls": b"-1"}, "bad-label", "a"),
        ({"a.v2.jpg": picture(1)}, "dotted-name", "a"),
    ],
)
def test_a_bad_sample_among_good_ones_is_named(tmp_path: Path, files: dict[str, bytes], cause: str, key: str):
    report = check_one(write_tar(tmp_path / "0.tar", sample(1) | files | sample(2)))
    assert causes(report) == [(cause, key)]
    assert cause in CAUSES
    assert report.faults[0].offset > 0


def test_pictures_are_decoded_unless_told_otherwise(tmp_path: Path):
    tar = write_tar(tmp_path / "0.tar", sample(1) | {"a.jpg": picture(1)[:-300], "a.txt": b"x"})
    assert causes(check_one(tar)) == [("bad-image", "a")]
    assert causes(check_one(tar, decode=False)) == []


@pytest.mark.parametrize("data", [b"", bytes(10240), b"\x1f\x8b gzip", b"<html>" * 1000])
def test_a_shard_that_cannot_be_read_is_a_row(tar: Path, data: bytes):
    bad = tar.with_name("train-00001.tar")
    bad.write_bytes(data)
    report = check_shards([tar, bad], num_workers=1)
    assert [shard.samples for shard in report.shards] == [10, 0]
    assert [shard.is_damaged for shard in report.shards] == [False, True]
    assert "train-00001.tar" in describe(report, ["x"])
    assert "mmvit-data repair" in describe(report, ["x"])
    alone = describe(check_shards([bad], num_workers=1), ["x"])
    is_compressed = data.startswith(b"\x1f")
    assert ("download the shards again" in alone) is not is_compressed
    assert ("hint: unpack the compressed shards as shown above" in alone) is is_compressed
    assert "mmvit-data repair" not in alone  # there is nothing whole in it
    assert ("gzip -d" in alone) is is_compressed


def test_a_damaged_index_is_a_fault_and_one_of_another_tar_too(tar: Path, tmp_path: Path):
    data = index_path(tar).read_bytes()
    index_path(tar).write_bytes(data[:-1] + b"?")
    report = check_one(tar)
    assert (report.index_state, report.faults, report.is_damaged) == ("damaged", [], True)
    assert "index --rebuild" in describe(CheckReport([report], []), [str(tar)])
    index_path(tar).write_bytes(data)
    write_tar(tar, sample(50) | sample(51))
    report = check_one(tar)
    assert causes(report) == [("hash", "")]
    assert "not the tar that was indexed" in report.faults[0].detail


def test_members_that_lie_apart_are_a_notice_with_its_consequence(tmp_path: Path):
    files = [("a.jpg", picture(1)), *sample(2).items(), ("a.txt", b"late")]
    report = check_shards([write_tar(tmp_path / "0.tar", files)])
    assert not report.is_damaged
    assert len(report.notices) == 1
    assert report.notices[0].startswith("non-adjacent, 1 x in 0.tar: ")
    assert "webdataset" in report.notices[0]


def test_missing_numbers_are_a_notice(tmp_path: Path):
    tars = [write_tar(tmp_path / f"train-{i:05d}.tar", sample(i)) for i in (0, 1, 3, 7)]
    report = check_shards(tars, num_workers=1)
    assert not report.is_damaged
    assert report.notices == [
        "missing: train-00002.tar; train-00001 and train-00003 are there",
        "missing: train-{00004..00006}.tar; train-00003 and train-00007 are there",
    ]
    assert check_shards(tars[:2], num_workers=1).notices == []


def test_the_counts_of_img2dataset_are_compared(tmp_path: Path):
    tar = write_tar(tmp_path / "00000.tar", sample(1) | sample(2))
    stats = tmp_path / "00000_stats.json"
    stats.write_text('{"successes": 2}')
    assert check_shards([tar]).notices == []
    stats.write_text('{"successes": 3}')
    assert check_shards([tar]).notices == ["00000_stats.json of img2dataset counts 3 samples, 00000.tar has 2"]
    stats.write_text("[]")
    assert check_shards([tar]).notices == ["00000_stats.json cannot be read"]


def test_shards_of_webdataset_itself(tmp_path: Path):
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i:03d}", "jpg": picture(i), "txt": f"caption {i}", "json": {"i": i}, "cls": i})
    report = check_shards(sorted(tmp_path.glob("*.tar")), num_workers=1)
    assert [(shard.samples, shard.faults) for shard in report.shards] == [(4, []), (4, []), (2, [])]
    assert report.notices == []


def test_shards_of_img2dataset_itself():
    report = check_shards(sorted((FIXTURES / "img2dataset").glob("*.tar")), num_workers=1)
    assert [shard.samples for shard in report.shards] == [6, 2]
    assert not report.is_damaged
    assert report.notices == []


def test_processes_give_the_same_report_and_many_whole_shards_are_one_line(tmp_path: Path):
    tars = [write_tar(tmp_path / f"{i:03d}.tar", sample(i)) for i in range(45)]
    change(tars[7], 600, b"\xff" * 40)
    report = check_shards(tars, num_workers=2)
    assert report == check_shards(tars, num_workers=1)
    text = describe(report, [str(tmp_path)])
    assert "007.tar" in text
    assert "008.tar" not in text
    assert "(44 more shards, intact)" in text


def test_the_program_says_where_what_and_how_to_mend(tar: Path, capsys: pytest.CaptureFixture[str]):
    assert run("check", tar.parent) == 0
    assert capsys.readouterr().err == ""
    offset, size = open_index(tar).locate(4)["jpg"]
    change(tar, offset + size // 2, b"\x55")
    assert run("check", tar.parent, "--no-decode") == 3
    output = capsys.readouterr().out
    assert "key '004': hash" in output
    assert f"mmvit-data repair {tar.parent} --out NEW_FOLDER" in output
    assert run("check", tar, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert (document["damaged"], document["causes"]) == (True, {"hash": 1})
    first = document["shards"][0]
    assert (first["bad_samples"], first["first_bad_byte"]) == (1, offset)
    assert first["problems"][0]["key"] == "004"


def test_long_lists_are_cut_in_words_and_whole_in_json(tmp_path: Path):
    files = sample(1) | {f"x{i:02d}.jpg": b"no" for i in range(20)} | {f"x{i:02d}.txt": b"x" for i in range(20)}
    report = check_shards([write_tar(tmp_path / "0.tar", dict(sorted(files.items())))])
    text = describe(report, ["0.tar"])
    assert "17 more of the cause bad-image" in text
    assert len(report.to_json()["shards"][0]["problems"]) == 20
