"""Everyone who reads samples has the same verdict on odd ones: one table, all readers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_samples import ODD_SAMPLES, odd_fields, uid, whole_fields
from samples import write_tar

from data_tools.cli.app import app
from data_tools.core.errors import SampleError
from data_tools.core.program import run_program
from data_tools.examine.check import check_shards
from data_tools.examine.peek import peek_samples
from data_tools.examine.repair import repair_shards
from data_tools.examine.stats import summarise
from data_tools.make.run import MakeOptions, make_shards
from data_tools.make.tokenizer import ShardTexts
from data_tools.sample.decode import ImageError, decode_image
from data_tools.sample.table import shard_metadata
from data_tools.select.filter import filter_samples
from data_tools.select.find import find_samples
from data_tools.select.write import OutputOptions, SampleTable
from data_tools.tar.index import open_indexes
from mmvit.data.batches import DataConfig, TrainBatches
from mmvit.data.labels import LabelledShards
from mmvit.data.shards import IndexedShards
from mmvit.data.source import RawSample, Reading
from mmvit.data.streaming import StreamedShards
from mmvit.data.tokenizers import Tokenizer
from mmvit.retrieval.sources import ShardSource

KEYS = {f"{number:03d}": name for number, name in enumerate(ODD_SAMPLES)}
WHOLE = ("901", "902")  # samples without a fault, which show what the shard's samples have
ALL = ("image", "txt", "json", "cls")
LACKS_CAPTION = ("no-caption", "empty-caption")  # no fault for those who take no caption

Verdicts = Mapping[str, str | None]  # key -> cause


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    samples = {f"{number:03d}": odd_fields(number, odd) for number, odd in enumerate(ODD_SAMPLES.values())}
    samples |= {key: whole_fields(int(key)) for key in WHOLE}
    return write_tar(
        folder / "00000.tar", {f"{key}.{field}": data for key, one in samples.items() for field, data in one.items()}
    )


def expected(*read: str, with_captions: bool = True, without: tuple[str, ...] = ()) -> Verdicts:
    """Return the verdict on each sample of one who reads these fields."""
    ignored = () if with_captions else LACKS_CAPTION
    return {
        key: odd.cause if odd.field in read and odd.cause not in ignored else None
        for key, name in KEYS.items()
        if name not in without
        for odd in [ODD_SAMPLES[name]]
    }


def verdicts(bad: Mapping[str, str | None]) -> Verdicts:
    """Return the verdict on each odd sample; the whole ones must be whole."""
    assert not set(bad) & set(WHOLE)
    return {key: bad.get(key) for key in KEYS}


def cause_of(read: Callable[[], object]) -> str | None:
    try:
        read()
    except (SampleError, ImageError) as error:
        return error.cause
    return None


def decoded(sample: RawSample) -> None:
    decode_image(sample.image)


def test_check_repair_and_make(tar: Path, tmp_path: Path):
    report = check_shards([tar], num_workers=1).shards[0]
    assert verdicts({fault.key: fault.cause for fault in report.faults}) == expected(*ALL)
    assert report.bad == sum(odd.cause is not None for odd in ODD_SAMPLES.values())

    repair_shards([tar], tmp_path / "repaired", num_workers=1)
    lines = (tmp_path / "repaired" / "rejected.jsonl").read_text().splitlines()
    left_out = {row["key"]: row["cause"] for row in map(json.loads, lines)}
    assert verdicts(left_out) == expected(*ALL)
    repaired = [tmp_path / "repaired" / tar.name]
    assert not check_shards(repaired, num_workers=1).is_damaged
    old, new = IndexedShards([tar], require_caption=False), IndexedShards(repaired)
    place = {old.key(i): i for i in range(len(old))}
    assert [new.read(i) for i in range(len(new))] == [old.read(place[new.key(i)]) for i in range(len(new))]

    make_shards(tar.parent, tmp_path / "made", MakeOptions(kind="img2dataset"), num_workers=1)
    lines = (tmp_path / "made" / "rejected.jsonl").read_text().splitlines()
    rejected = {row["source"].rpartition("/")[2]: row["cause"] for row in map(json.loads, lines)}
    assert verdicts(rejected) == expected("image", "txt", "json")


def test_make_of_files(tmp_path: Path):
    (tmp_path / "files").mkdir()
    for number, (key, name) in enumerate(KEYS.items()):
        for field, data in odd_fields(number, ODD_SAMPLES[name]).items():
            (tmp_path / "files" / f"{key}.{field}").write_bytes(data)
    make_shards(tmp_path / "files", tmp_path / "made", MakeOptions(), num_workers=1)
    lines = (tmp_path / "made" / "rejected.jsonl").read_text().splitlines()
    rejected = {Path(row["source"]).stem: row["cause"] for row in map(json.loads, lines)}
    without = ("caption only in the json", "image missing")  # make takes that caption, and sees no such sample
    wanted = expected("image", "txt", "json", without=without)
    assert {key: rejected.get(key) for key in wanted} == wanted
    assert not check_shards(sorted((tmp_path / "made").glob("*.tar")), num_workers=1).is_damaged


def test_stats_filter_peek_and_find(tar: Path, tmp_path: Path):
    table = shard_metadata([tar], num_workers=1)
    bad = {row["key"]: row["bad"] for row in table.to_pylist() if row["bad"]}
    assert verdicts(bad) == expected(*ALL)
    assert summarise(table)["labels"]["different"] == 6

    samples, _ = peek_samples([tar], count=1000)
    assert verdicts({one.key: one.content.fault.cause for one in samples if one.content.fault}) == expected(*ALL)

    filter_samples([tar], "bad is None", output=OutputOptions(tmp_path / "kept", num_workers=1), num_workers=1)
    dropped = {line.rpartition("/")[2] for line in (tmp_path / "kept" / "dropped.txt").read_text().splitlines()}
    assert dropped == {key for key, cause in expected(*ALL).items() if cause}
    for where, number in (("label == 7", 2), ("label_name == 'dog'", 2), ("label is None and label_name is None", 9)):
        assert filter_samples([tar], where, num_workers=1).kept == number, where

    uids = [uid(number) for number in range(len(KEYS))]
    np.save(tmp_path / "uids.npy", np.array([(int(one[:16], 16), int(one[16:], 16)) for one in uids], "u8,u8"))
    numbered = SampleTable(open_indexes([tar]))
    found = {numbered.key(int(i)) for i in find_samples(numbered, tmp_path / "uids.npy", num_workers=1).chosen}
    assert found == {key for key, cause in expected("json").items() if cause is None}


def test_values_are_the_same(tar: Path):
    """Of whole samples, all who read a field read the same from it."""
    shards = IndexedShards([tar], require_caption=False)
    rows = shard_metadata([tar], num_workers=1).to_pylist()
    samples, _ = peek_samples([tar], count=1000)
    for i, (row, peeked) in enumerate(zip(rows, samples, strict=True)):
        odd = ODD_SAMPLES.get(KEYS.get(row["key"], ""))
        if odd is None or odd.cause is not None or odd.field == "image":
            continue
        number = int(row["key"])
        read = shards.read(i)
        assert (peeked.content.caption, peeked.content.meta, peeked.content.label) == (
            read.caption,
            read.meta,
            read.label,
        )
        assert (row["caption"], row["label"] if row["label_name"] is None else row["label_name"]) == (
            read.caption,
            read.label,
        )
        value = {"cls": read.label, "txt": read.caption, "json": read.meta}[odd.field]
        wanted = odd.value
        if odd.field == "json":
            wanted = {"uid": uid(number), "names": "a name"} | odd.value
        assert value == wanted


@pytest.mark.parametrize(("source", "field"), [("txt", "txt"), ("names", "json")])
def test_tokenizer(tar: Path, source: str, field: str):
    texts = ShardTexts([tar], source)
    keys = list(open_indexes([tar])[0].keys())
    bad = {key: cause_of(lambda i=i: texts._texts(0, i)) for i, key in enumerate(keys)}
    assert verdicts({key: cause for key, cause in bad.items() if cause}) == expected(field)


def test_indexed_streamed_and_embedded_samples(tar: Path):
    shards = IndexedShards([tar])
    keys = list(shards.reader.indexes[0].keys())
    bad = {key: cause_of(lambda i=i: decoded(shards.read(i))) for i, key in enumerate(keys)}
    assert verdicts({key: cause for key, cause in bad.items() if cause}) == expected(*ALL)

    source = ShardSource([tar])
    bad = {key: cause_of(lambda i=i: decode_image(source.read(i).image or b"")) for i, key in enumerate(keys)}
    assert verdicts({key: cause for key, cause in bad.items() if cause}) == expected(*ALL, with_captions=False)

    stream = StreamedShards([tar])
    stream.begin(Reading(seed=0, first=0, reader=0, num_readers=1), lambda shard: None)
    seen: dict[str, str | None] = {}
    for _ in range(10_000):
        cause = cause_of(lambda: decoded(stream.read(0)))
        seen[stream.key(0).partition("/")[2]] = cause
        if len(seen) == len(keys):
            break
    assert verdicts({key: cause for key, cause in seen.items() if cause}) == expected(*ALL)


def test_training_batches(tar: Path, square_words: Tokenizer):
    shards = IndexedShards([tar], require_caption=False)
    batches = TrainBatches(shards, DataConfig(), square_words, image_size=16, batch_size=5, num_steps=20, seed=0)
    errors = [error for number in range(-(-len(shards) // 5)) for error in batches[number].bad]
    assert verdicts({error.key: error.cause for error in errors}) == expected(*ALL)


@pytest.mark.parametrize("name", ODD_SAMPLES)
def test_labelled_samples(name: str, tmp_path: Path):
    """Labels of one data set are all numbers or all names: each odd sample is beside one of its own kind."""
    odd = ODD_SAMPLES[name]
    is_name = isinstance(odd.value, str) and odd.field == "cls"
    neighbour = whole_fields(1) | ({"cls": b"cat"} if is_name else {})
    files = {"odd": odd_fields(0, odd), "whole": neighbour}
    path = write_tar(tmp_path / "a.tar", {f"{key}.{field}": one[field] for key, one in files.items() for field in one})
    names = ["cat", odd.value] if is_name else [str(number) for number in range(10)]
    shards = LabelledShards(IndexedShards([path], require_caption=False), names)
    cause = cause_of(lambda: decoded(shards.read(0)))
    assert cause == (None if odd.cause in LACKS_CAPTION else odd.cause)
    if cause is None:
        label: Any = odd.value if odd.field == "cls" else 3
        assert shards.read(0).label == (1 if is_name else label)


def test_class_names_are_whole_for_the_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Shards that differ in nothing but class names instead of numbers."""
    files = {f"{i}.{field}": data for i in range(4) for field, data in whole_fields(i).items()}
    files |= {f"{i}.cls": name for i, name in enumerate((b"dog", b"cat", b"golden retriever\n", b"dog"))}
    write_tar(tmp_path / "a.tar", files)

    def run(*arguments: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            run_program(app, "mmvit-data", [*map(str, arguments), "--json"])
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    assert run("check", tmp_path)["damaged"] is False
    assert run("repair", tmp_path, "--out", tmp_path / "new")["kept"] == 4
    assert run("stats", tmp_path / "new")["labels"] == run("stats", tmp_path)["labels"]
    assert run("stats", tmp_path)["labels"]["different"] == 3
    labels = {sample["label"] for sample in run("peek", tmp_path, "--out", tmp_path / "p.png")["samples"]}
    assert labels == {"dog", "cat", "golden retriever"}
    shards = IndexedShards([tmp_path / "new" / "a.tar"])
    assert [shards.label(i) for i in range(4)] == ["dog", "cat", "golden retriever", "dog"]
