"""The account of what a run could not use: once each, over crashes, with a limit."""

import json
import pickle
from pathlib import Path

import pytest

from data_tools.core.errors import DataError, SampleError
from data_tools.tar.location import Location
from data_tools.tar.shard_names import ShardNames
from mmvit.train.record.bad_samples import FILE, BadSamples

NAMES = ShardNames([Location(path) for path in ("d/a.tar", "d/b.tar", "web/00000.tar", "clean/00000.tar")])


def error(key: str, cause: str = "bad-image", shard: str = "a.tar") -> SampleError:
    return SampleError(cause, f"what is wrong with {key}", shard=shard, key=key)


def account(folder: Path, start_step: int = 0, limit: int = 100, active: bool = True) -> BadSamples:
    return BadSamples(folder, NAMES, start_step=start_step, limit=limit, active=active)


def rows(folder: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    return [(line["step"], line["key"], line["cause"]) for line in lines]


def test_each_sample_has_one_line(tmp_path: Path):
    bad = account(tmp_path)
    bad.add(1, [error("x"), error("y", "hash"), error("x")])
    bad.add(2, [])
    bad.add(9, [error("x"), error("x", shard="b.tar"), error("z")])  # x of a.tar comes again in the next epoch
    assert rows(tmp_path) == [(1, "x", "bad-image"), (1, "y", "hash"), (9, "x", "bad-image"), (9, "z", "bad-image")]
    first = json.loads((tmp_path / FILE).read_text().splitlines()[0])
    assert first == {"step": 1, "shard": "a.tar", "key": "x", "cause": "bad-image", "what": "what is wrong with x"}
    assert bad.summary() == "3 bad-image, 1 hash"
    assert bad.numbers() == {"bad_samples": 4, "bad_causes": {"bad-image": 3, "hash": 1}}


def test_equal_keys_of_equally_named_shards_are_distinguished(tmp_path: Path):
    """Also where the data had another place when the account was begun."""
    (tmp_path / FILE).write_text(
        '{"step": 1, "shard": "/before/web/00000.tar", "key": "x", "cause": "hash", "what": ""}\n'
    )
    bad = account(tmp_path, start_step=5)
    bad.add(6, [error("x", shard="now/web/00000.tar"), error("x", shard="now/clean/00000.tar")])
    assert rows(tmp_path) == [(1, "x", "hash"), (6, "x", "bad-image")]
    assert json.loads((tmp_path / FILE).read_text().splitlines()[1])["shard"] == "now/clean/00000.tar"


def test_losses_without_a_key_are_distinguished(tmp_path: Path):
    """Of a stretch of a tar that cannot be read, nobody knows the keys."""
    bad = account(tmp_path)
    for what in ("bytes 512 to 1024", "bytes 4096 to 5120", "bytes 512 to 1024"):
        bad.add(0, [SampleError("damaged", what, shard="a.tar", key="")])
    assert bad.counts == {"damaged": 2}
    assert len(rows(tmp_path)) == 2


def test_nothing_bad_leaves_no_file(tmp_path: Path):
    bad = account(tmp_path)
    bad.add(1, [])
    bad.sync()
    assert not list(tmp_path.iterdir())
    assert (bad.summary(), bad.numbers()) == ("", {})


def test_a_resumed_run_keeps_the_same_counts(tmp_path: Path):
    bad = account(tmp_path)
    for step, key in ((0, "lost"), (2, "x"), (4, "y"), (5, "z")):
        bad.add(step, [error(key)])
    whole = (tmp_path / FILE).read_bytes()
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"step": 6, "sha')  # a crash in the middle of a line
    resumed = account(tmp_path, start_step=4)
    assert rows(tmp_path) == [(0, "lost", "bad-image"), (2, "x", "bad-image"), (4, "y", "bad-image")]
    assert resumed.counts == {"bad-image": 3}
    resumed.add(0, [error("lost")])
    resumed.add(5, [error("z"), error("x")])
    assert (tmp_path / FILE).read_bytes() == whole


def test_other_ranks_count_and_write_nothing(tmp_path: Path):
    account(tmp_path).add(3, [error("x")])
    before = (tmp_path / FILE).read_bytes()
    other = account(tmp_path, start_step=3, active=False)
    other.add(4, [error("x"), error("y")])
    assert other.counts.total() == 2
    earlier = account(tmp_path, start_step=2, active=False)
    assert earlier.counts.total() == 0
    assert (tmp_path / FILE).read_bytes() == before


def test_more_than_the_limit_end_the_run(tmp_path: Path):
    bad = account(tmp_path, limit=2)
    bad.add(1, [error("x"), error("y", "hash")])
    bad.add(2, [error("x")])
    with pytest.raises(DataError, match=r"3 invalid samples \(2 bad-image, 1 hash\)") as caught:
        bad.add(3, [error("z")])
    assert caught.value.exit_code == 3
    assert caught.value.where == str(tmp_path / FILE)
    assert "at most 2 are allowed" in caught.value.note
    assert "data.max_bad_fraction" in caught.value.hint
    assert len(rows(tmp_path)) == 3  # all are told
    with pytest.raises(DataError):  # also after a resume
        account(tmp_path, start_step=3, limit=2).add(4, [])


def test_an_error_survives_the_way_from_another_process():
    sent = error("x", "hash")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is SampleError
    assert [received.cause, received.shard, received.key, str(received)] == ["hash", "a.tar", "x", str(sent)]
