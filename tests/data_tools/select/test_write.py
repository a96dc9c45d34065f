"""Selected samples become new shards: same bytes, right order, for any number of workers, also after a kill."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.core.errors import DataError, UsageError
from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.select.write import OutputOptions, SampleTable, write_samples
from data_tools.tar.index import index_path, open_indexes
from data_tools.tar.reader import ShardReader
from data_tools.tar.writer import ShardWriter

NUM = 23


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    write_synthetic(tmp_path / "in", SyntheticPhotos(32, 24), num_shards=3, num_samples=NUM, num_workers=1)
    return SampleTable(open_indexes(sorted((tmp_path / "in").glob("*.tar"))))


def options(folder: Path, **more: int | None) -> OutputOptions:
    return OutputOptions(folder, **{"shard_size": 5, "num_workers": 1, **more})


def samples_of(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    indexes = open_indexes(sorted(folder.glob("*.tar")))
    reader = ShardReader(indexes, verify=True)
    for shard, index in enumerate(indexes):
        for i in range(len(index)):
            yield index.key(i), reader.fields(shard, i)


def shard_bytes(folder: Path) -> list[bytes]:
    return [tar.read_bytes() for tar in sorted(folder.glob("*.tar"))]


def test_every_sample_once_and_untouched(table: SampleTable, tmp_path: Path):
    report = write_samples(table, np.arange(NUM), options(tmp_path / "out"), verb="reshard")
    assert list(samples_of(tmp_path / "out")) == list(samples_of(tmp_path / "in"))
    assert [len(index) for index in open_indexes(sorted((tmp_path / "out").glob("*.tar")))] == [5, 5, 5, 5, 3]
    assert (report.samples, report.shards, report.rejected, report.renamed) == (NUM, 5, {}, 0)
    assert report.bytes == sum(map(len, shard_bytes(tmp_path / "out")))
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""
    for tar in (tmp_path / "out").glob("*.tar"):
        assert index_path(tar).exists()


def test_values_that_a_writer_would_not_write_are_copied_as_they_are(tmp_path: Path):
    members = {"a.txt": b"\xff\xfe no text", "a.json": b"not json", "b.jpg": b"", "b.cls": b"x", "b.seg.png": b"1"}
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        for name, data in members.items():
            (tmp_path / "member").write_bytes(data)
            archive.add(tmp_path / "member", name)
    table = SampleTable(open_indexes([tmp_path / "odd.tar"]))
    report = write_samples(table, np.arange(2), options(tmp_path / "out"), verb="reshard")
    assert dict(samples_of(tmp_path / "out")) == {
        "a": {"txt": b"\xff\xfe no text", "json": b"not json"},
        "b": {"jpg": b"", "cls": b"x"},
    }
    assert report.not_copied == 1
    assert "1 other files were not copied" in report.describe()


def test_shuffle_is_a_formula_over_all_shards(table: SampleTable, tmp_path: Path):
    write_samples(table, np.arange(NUM), options(tmp_path / "out", shuffle=7), verb="reshard")
    draw = np.random.PCG64(np.random.SeedSequence((7, 0))).random_raw(NUM)
    expected = [f"{i:09d}" for i in np.argsort(draw, kind="stable")]
    keys = [key for key, _ in samples_of(tmp_path / "out")]
    assert keys == expected
    assert sorted(keys) == [table.key(i) for i in range(NUM)]
    write_samples(table, np.arange(NUM), options(tmp_path / "other", shuffle=8), verb="reshard")
    assert [key for key, _ in samples_of(tmp_path / "other")] != expected


def test_the_bytes_do_not_depend_on_the_workers(table: SampleTable, tmp_path: Path):
    chosen = np.array([0, 2, 3, 5, 8, 13, 14, 15, 16, 21])
    for workers in (1, 2):
        how = options(tmp_path / f"{workers}", shuffle=1, num_workers=workers, shard_size=3)
        write_samples(table, chosen, how, verb="reshard")
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "2")
    assert {key for key, _ in samples_of(tmp_path / "1")} == {table.key(i) for i in chosen.tolist()}


def test_a_duplicate_key_gets_the_number_of_its_shard(tmp_path: Path):
    for folder, keys in (("x", ["k", "only-x"]), ("y", ["k", "k-s2"]), ("z", ["k", "dir/k"])):
        with ShardWriter(tmp_path / folder) as writer:
            for key in keys:
                writer.write(key, {"txt": f"{folder} {key}"})
    table = SampleTable(open_indexes([tmp_path / folder / "shard-00000.tar" for folder in "xyz"]))
    report = write_samples(table, np.arange(6), options(tmp_path / "out"), verb="reshard")
    new = {fields["txt"].decode(): key for key, fields in samples_of(tmp_path / "out")}
    assert new == {
        **{"x k": "k", "x only-x": "only-x", "y k": "k-s1", "y k-s2": "k-s2"},
        **{"z k": "k-s2-s2", "z dir/k": "dir/k"},
    }
    assert report.renamed == 2
    assert table.full_key(0) == "x/shard-00000.tar/k"  # the shards have the same name
    report = write_samples(table, np.array([1, 2]), options(tmp_path / "less"), verb="reshard")
    assert report.renamed == 0


def test_what_cannot_be_read_is_listed_and_the_rest_is_written(table: SampleTable, tmp_path: Path):
    index = table.indexes[1]
    offset, size = index.locate(2)["jpg"]
    tar = tmp_path / "in" / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 1
    time = tar.stat()
    tar.write_bytes(data)
    os.utime(tar, ns=(time.st_atime_ns, time.st_mtime_ns))
    bad = int(table.starts[1]) + 2
    for workers in (1, 2):
        how = options(tmp_path / f"{workers}", num_workers=workers)
        report = write_samples(table, np.arange(NUM), how, verb="reshard")
        assert (report.samples, report.rejected) == (NUM - 1, {"hash": 1})
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "2")
    (line,) = (tmp_path / "1" / "rejected.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["shard"], entry["cause"], entry["key"]) == ("shard-00001.tar", "hash", table.key(bad))
    assert table.key(bad) not in {key for key, _ in samples_of(tmp_path / "1")}
    assert "skipped, listed in" in report.describe()
    with pytest.raises(DataError, match="none of the selected samples can be read"):
        write_samples(table, np.array([bad]), options(tmp_path / "none"), verb="reshard")


def test_samples_lost_before_indexing_are_listed(tmp_path: Path):
    write_synthetic(tmp_path / "in", SyntheticPhotos(32, 24), num_shards=1, num_samples=9, num_workers=1)
    tar = tmp_path / "in" / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    (index,) = open_indexes([tar])
    start = index.locate(4)["jpg"][0] - 512
    data[start : start + 512] = b"x" * 512
    index_path(tar).unlink()
    tar.write_bytes(data)
    table = SampleTable(open_indexes([tar]))
    report = write_samples(table, np.arange(len(table)), options(tmp_path / "out"), verb="reshard")
    assert 7 <= report.samples < 9
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert Counter(line["cause"] for line in lines) == report.rejected
    assert report.rejected


def test_a_killed_run_resumes(table: SampleTable, tmp_path: Path):
    how = options(tmp_path / "whole", shuffle=3)
    whole = write_samples(table, np.arange(NUM), how, verb="reshard")
    assert write_samples(table, np.arange(NUM), how, verb="reshard") == whole._replace(was_there=True)
    cut = options(tmp_path / "cut", shuffle=3)
    write_samples(table, np.arange(NUM), cut, verb="reshard")
    manifest = tmp_path / "cut" / "shards.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "report": None}))
    kept = (tmp_path / "cut" / "shard-00000.tar").stat().st_mtime_ns
    (tmp_path / "cut" / "shard-00001.tar").unlink()
    index_path(tmp_path / "cut" / "shard-00001.tar").unlink()
    index_path(tmp_path / "cut" / "shard-00002.tar").unlink()
    (tmp_path / "cut" / ".shard-00001.tar.tmp-99999999").write_bytes(b"half")
    again = write_samples(table, np.arange(NUM), cut, verb="reshard")
    assert again == whole._replace(folder=str(tmp_path / "cut"))
    assert (tmp_path / "cut" / "shard-00000.tar").stat().st_mtime_ns == kept
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "cut").glob(".*")] == []


@pytest.mark.parametrize(
    ("change", "differs"),
    [({"shuffle": 4}, "shuffle"), ({"shard_size": 6}, "shard_size"), ({"chosen": 22}, "chosen, samples")],
)
def test_another_selection_does_not_touch_the_folder(
    table: SampleTable, tmp_path: Path, change: dict[str, int], differs: str
):
    write_samples(table, np.arange(NUM), options(tmp_path / "out", shuffle=3), verb="reshard")
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").iterdir()}
    chosen = np.arange(change.pop("chosen", NUM))
    with pytest.raises(UsageError, match=f"finished work that differs in: {differs}") as caught:
        write_samples(table, chosen, options(tmp_path / "out", **{"shuffle": 3, **change}), verb="reshard")
    assert caught.value.hint == "choose another folder"
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").iterdir()}


def test_bad_options_write_nothing(table: SampleTable, tmp_path: Path):
    for bad in ({"shard_size": 0}, {"shuffle": -1}, {"shuffle": 2**32}):
        with pytest.raises(UsageError):
            write_samples(table, np.arange(NUM), options(tmp_path / "out", **bad), verb="reshard")
    with pytest.raises(DataError, match="nothing to write"):
        write_samples(table, np.arange(0), options(tmp_path / "out"), verb="reshard")
    with pytest.raises(UsageError, match="folder of the input shards") as caught:
        write_samples(table, np.arange(NUM), options(tmp_path / "in"), verb="reshard")
    assert "rm -r" not in str(caught.value)
    assert not (tmp_path / "out").exists()
