"""`mmvit-data filter`: samples that satisfy a condition become shards, the keys of the others a list."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.core.errors import DataError, UsageError
from data_tools.demo.synthetic import SyntheticPhotos
from data_tools.select.filter import filter_samples
from data_tools.select.write import OutputOptions
from data_tools.tar.index import index_path, open_indexes
from data_tools.tar.location import Location
from data_tools.tar.writer import ShardWriter

Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tars(tmp_path: Path) -> list[Location]:
    """Eight samples in two shards: widths 10, 20, ... 80, captions of 1 .. 8 words, the last without a caption."""
    with ShardWriter(tmp_path / "in", max_samples=4) as writer:
        for i in range(8):
            picture = SyntheticPhotos(10 * (i + 1), 40).jpeg(i)
            caption = {"txt": " ".join(["word"] * (i + 1))} if i < 7 else {}
            writer.write(f"k{i}", {"jpg": picture, **caption, "cls": i % 3})
    return [*writer.shards]


def scores_file(path: Path, **columns: list[object]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def kept_by(tars: list[Location], out: Path, where: str, **more: object) -> list[str]:
    report = filter_samples(tars, where, output=OutputOptions(out, 1000, num_workers=1), num_workers=1, **more)
    (index,) = open_indexes(sorted(out.glob("*.tar")))
    assert (report.kept, report.kept + report.dropped) == (len(index), 8)
    return list(index.keys())


def test_kept_and_dropped(tars: list[Location], tmp_path: Path):
    assert kept_by(tars, tmp_path / "out", "width >= 30 and caption_words < 7 and label != 2") == ["k3", "k4"]
    dropped = (tmp_path / "out" / "dropped.txt").read_text().splitlines()
    assert dropped == [f"shard-0000{i // 4}.tar/k{i}" for i in (0, 1, 2, 5, 6, 7)]


def test_counts_and_unknown_values(tars: list[Location]):
    report = filter_samples(tars, "width >= 30 and caption_words < 7", num_workers=1)
    assert (report.kept, report.dropped, report.written) == (4, 4, None)
    assert report.failed == {"width >= 30": 2, "caption_words < 7": 2}
    assert report.unknown == {"width >= 30": 0, "caption_words < 7": 1}
    assert "        2 fail  caption_words < 7  (1 have no value)" in report.describe()


def test_scores_are_joined_by_either_key(tars: list[Location], tmp_path: Path):
    keys = ["k0", "shard-00001.tar/k5", "k6", "shard-00000.tar/k6", "nobody", "k7"]
    scores = scores_file(tmp_path / "s.parquet", key=keys, score=[0.9, 0.8, 0.1, 0.9, 0.9, None], other=[1] * 6)
    assert kept_by(tars, tmp_path / "out", "score > 0.28", scores=scores) == ["k0", "k5"]
    kept = kept_by(tars, tmp_path / "more", "score > 0.28 or label == 1", scores=scores)
    assert kept == ["k0", "k1", "k4", "k5", "k7"]
    report = filter_samples(tars, "score > 0.28", scores=scores, num_workers=1)
    assert report.unknown == {"score > 0.28": 5}


def test_mistakes_are_reported_before_a_shard_is_read(tars: list[Location], tmp_path: Path):
    for tar in tars:
        index_path(tar).unlink()
    scores = scores_file(tmp_path / "s.parquet", key=["k0"], score=[0.9])
    with pytest.raises(UsageError, match=r"unknown column 'widht'"):
        filter_samples(tars, "widht > 3")
    with pytest.raises(UsageError, match=r"cannot compare a number with a text"):
        filter_samples(tars, "score > 'x'", scores=scores)
    with pytest.raises(UsageError, match="uses no score column"):
        filter_samples(tars, "width > 3", scores=scores)
    with pytest.raises(UsageError, match="unknown column 'phash'"):  # it is there only after dedup
        filter_samples(tars, "phash > 3")
    double = scores_file(tmp_path / "double.parquet", key=["k0"], width=[3])
    with pytest.raises(UsageError, match=r"samples already have the columns \['width'\]"):
        filter_samples(tars, "width > 3", scores=double)
    twice = scores_file(tmp_path / "twice.parquet", key=["k0", "k0"], score=[1, 2])
    with pytest.raises(UsageError, match="duplicate or missing keys"):
        filter_samples(tars, "score > 3", scores=twice)
    nameless = scores_file(tmp_path / "nameless.parquet", keys=["k0"], score=[1])
    with pytest.raises(UsageError, match="no column 'key'") as caught:
        filter_samples(tars, "score > 3", scores=nameless)
    assert caught.value.hint == "did you mean 'keys'?"
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(UsageError, match="scores cannot be read"):
        filter_samples(tars, "score > 3", scores=tmp_path / "text.parquet")
    assert not index_path(tars[0]).exists()


def test_nothing_left_and_nothing_scored(tars: list[Location], tmp_path: Path):
    with pytest.raises(DataError, match="no sample satisfies the condition"):
        kept_by(tars, tmp_path / "out", "width > 1000")
    scores = scores_file(tmp_path / "s.parquet", key=["a", "b"], score=[0.9, 0.5])
    with pytest.raises(DataError, match="no score matches a sample") as caught:
        kept_by(tars, tmp_path / "out", "score > 0", scores=scores)
    assert "shard-00000.tar/k0" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_program(tars: list[Location], tmp_path: Path, data_program: Program):
    run = functools.partial(data_program, "filter", tmp_path / "in", "--workers", 1)
    code, output, _ = run("--where", "width > 30", "--dry-run", "--json")
    assert (code, json.loads(output)["kept"]) == (0, 5)
    code, output, errors = run("--where", "width > 30", "--out", tmp_path / "out", "--shuffle", 1)
    assert (code, errors) == (0, "")
    assert "5 samples kept, 3 dropped" in output
    assert "5 samples in 1 shards" in output
    code, _, errors = run("--where", "width > '30'", "--out", tmp_path / "out")
    assert code == 2
    assert "\n                 ^\n" in errors
    assert run("--where", "width > 30")[0] == 2


def test_label_compared_with_a_text_points_to_the_class_names():
    for where in ("label == 'cat'", "width > 3 and label != 'cat'"):
        with pytest.raises(UsageError) as error:
            filter_samples([], where)
        assert error.value.hint == "write label_name to compare it with a text"
