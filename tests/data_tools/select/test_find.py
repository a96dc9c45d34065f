"""Samples are selected by key, by shard and key, or by the uids of DataComp."""

from pathlib import Path

import numpy as np
import pytest

from data_tools.core.errors import DataError, UsageError
from data_tools.select.find import find_samples
from data_tools.select.write import SampleTable
from data_tools.tar.index import open_indexes
from data_tools.tar.writer import ShardWriter

UIDS = [f"{high:016x}{low:016x}" for high, low in ((5, 9), (2**63 + 1, 0), (5, 1), (0, 2**64 - 1), (2**64 - 1, 7))]


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder, max_samples=3) as writer:
            for i, uid in enumerate(UIDS):
                more = {} if folder == "a" else {"json": {"uid": uid}}
                writer.write(f"dir/{i}" if i == 4 else f"{i}", {"txt": f"{folder}{i}", **more})
    return SampleTable(open_indexes([tmp_path / folder / f"shard-0000{i}.tar" for folder in "ab" for i in range(2)]))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def uid_file(path: Path, uids: list[str]) -> Path:
    np.save(path, np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], "u8,u8"))
    return path


def test_lines_name_samples(table: SampleTable, tmp_path: Path):
    lines = ["\ufeff1", "", f"{tmp_path}/b/shard-00000.tar/0 ", "shard-00001.tar/3", "dir/4", "dir/4", "nobody", "9"]
    named = find_samples(table, written(tmp_path / "keys", "\r\n".join(lines)))
    expected = ["a/shard-00000.tar/1", "a/shard-00001.tar/3", "a/shard-00001.tar/dir/4"]
    expected += ["b/shard-00000.tar/0", "b/shard-00000.tar/1", "b/shard-00001.tar/3", "b/shard-00001.tar/dir/4"]
    assert [table.full_key(sample) for sample in named.chosen] == expected
    assert named.unknown == ["nobody", "9"]


@pytest.mark.parametrize("workers", [1, 2])
def test_uids_name_samples(table: SampleTable, tmp_path: Path, workers: int):
    wanted = [UIDS[4], UIDS[0], "7" + "0" * 31, UIDS[1], UIDS[0]]  # not sorted, one twice, one nobody's
    named = find_samples(table, uid_file(tmp_path / "uids.npy", wanted), num_workers=workers)
    assert named.chosen.tolist() == [5, 6, 9]
    assert named.unknown == ["7" + "0" * 31]
    everyone = find_samples(table, uid_file(tmp_path / "all.npy", sorted(UIDS)))
    assert (everyone.chosen.tolist(), everyone.unknown) == ([5, 6, 7, 8, 9], [])


def test_uids_that_are_none_are_passed_over(tmp_path: Path):
    with ShardWriter(tmp_path / "c") as writer:
        for i, meta in enumerate([{"uid": UIDS[0]}, {"uid": "xyz"}, {"uid": 5}, {}, [1], {"uid": "ab"}]):
            writer.write(f"{i}", {"json": meta})
    table = SampleTable(open_indexes(writer.shards))
    assert find_samples(table, uid_file(tmp_path / "uids.npy", UIDS)).chosen.tolist() == [0]


def test_lists_that_name_nobody_or_cannot_be_read(table: SampleTable, tmp_path: Path):
    with pytest.raises(DataError, match=r"none of the 2 keys .* 'x'") as caught:
        find_samples(table, written(tmp_path / "keys", "x\ny\n"))
    assert "shard-00000.tar/0" in caught.value.hint
    with pytest.raises(DataError, match="list of keys is empty"):
        find_samples(table, written(tmp_path / "keys", "\n"))
    with pytest.raises(DataError, match="none of the 1 keys"):
        find_samples(table, uid_file(tmp_path / "uids.npy", ["0" * 32]))
    with pytest.raises(UsageError, match="cannot be read"):
        find_samples(table, tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="cannot be read"):
        find_samples(table, tmp_path / "latin")
    written(tmp_path / "text.npy", "no array")
    with pytest.raises(UsageError, match="cannot be read"):
        find_samples(table, tmp_path / "text.npy")
    np.save(tmp_path / "flat.npy", np.arange(4))
    with pytest.raises(UsageError, match="array of int64"):
        find_samples(table, tmp_path / "flat.npy")
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):  # a pickle, which is never opened
        find_samples(table, tmp_path / "object.npy")
