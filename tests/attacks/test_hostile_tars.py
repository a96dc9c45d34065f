"""No member of a tar runs code, is followed, or is written where its name says; each is told or ignored."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_tools.core.errors import DataError, SampleError
from data_tools.examine.check import check_shards
from data_tools.examine.repair import repair_shards
from data_tools.tar.index import build_index, open_index
from mmvit.data.shards import IndexedShards

HostileTar = Callable[..., Path]


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def header(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def problems(tar: Path) -> dict[str, str]:
    return {problem.cause: problem.detail for problem in build_index(tar).problems()}


@pytest.mark.parametrize("field", ["pkl", "pickle", "pyd", "pth", "PT", "seg.pickle"])
def test_pickles_are_told_and_never_opened(hostile_tar: HostileTar, canary: Path, field: str):
    attack = pickle.dumps(Payload(canary))
    tar = hostile_tar([(f"good.{field}", attack)])
    sample = IndexedShards([tar]).read(0)
    assert (sample.image, sample.caption) == (b"picture", "a caption")
    assert not canary.exists()
    assert problems(tar)["unsafe"] == f"'good.{field}' is a pickle, which runs code when it is loaded"
    pickle.loads(attack)
    assert canary.exists(), "the attack has no effect, whoever loads it"


def test_a_pickle_under_the_name_of_a_picture_or_metadata(hostile_tar: HostileTar, canary: Path):
    attack = pickle.dumps(Payload(canary))
    tar = hostile_tar([("bad.jpg", attack), ("bad.txt", attack), ("bad.json", attack), ("bad.cls", attack)])
    with pytest.raises(SampleError) as caught:
        IndexedShards([tar]).read(1)
    assert caught.value.key == "bad"
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../{0}.jpg", "a/../../{0}.jpg", "/{1}.jpg", "{1}/../{0}.jpg", ".."])
def test_names_that_leave_the_folder(hostile_tar: HostileTar, canary: Path, name: str):
    name = name.format(canary.name, canary)
    tar = hostile_tar([(name, b"picture")])
    before = sorted(canary.parent.iterdir())
    index = build_index(tar)
    assert list(index.keys()) == ["good"]
    assert problems(tar)["unsafe"] == f"{name!r} would be extracted outside the target folder"
    assert sum(index.ignored.values()) == 1
    assert sorted(canary.parent.iterdir()) == sorted([*before, Path(f"{tar}.idx")])


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/hostname"),
        (tarfile.LNKTYPE, "good.txt"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_devices_and_pipes_are_not_followed(hostile_tar: HostileTar, kind: bytes, target: str):
    tar = hostile_tar([header("good.json", kind, target), header("link.txt", kind, target), ("link.jpg", b"picture")])
    index = build_index(tar)
    assert index.locate(0).keys() == {"jpg", "txt"}
    assert index.locate(1).keys() == {"jpg"}
    assert problems(tar)["unsafe"] == "'link.txt' is a link or a device"
    with pytest.raises(SampleError, match="no caption"):
        IndexedShards([tar]).read(1)


def test_a_shard_that_is_a_loop_of_links_or_no_file(tmp_path: Path):
    (tmp_path / "a.tar").symlink_to(tmp_path / "b.tar")
    (tmp_path / "b.tar").symlink_to(tmp_path / "a.tar")
    os.mkfifo(tmp_path / "pipe.tar")  # opening it would wait for ever
    (tmp_path / "folder.tar").mkdir()
    for name in ("a.tar", "pipe.tar", "folder.tar"):
        with pytest.raises(DataError, match="does not exist") as caught:
            open_index(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
        assert caught.value.hint


def test_keys_with_control_characters_stay_data(hostile_tar: HostileTar):
    key = "\x1b[31m<script>\n\u202e"
    tar = hostile_tar([(f"{key}.jpg", b"picture"), (f"{key}.txt", b"caption")])
    assert list(build_index(tar).keys()) == ["good", key]
    with pytest.raises(SampleError) as caught:
        raise IndexedShards([tar]).error("hash", "what", 1)
    assert "\x1b" not in str(caught.value)
    assert "\n\u202e" not in str(caught.value)


def test_the_tools_write_nothing_of_it_anywhere(hostile_tar: HostileTar, canary: Path, tmp_path: Path):
    attack = pickle.dumps(Payload(canary))
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    tar = hostile_tar(
        [
            ("real.png", picture.getvalue()),
            ("real.txt", b"a caption"),
            ("real.pkl", attack),
            (f"../{canary.name}.jpg", b"picture"),
            (str(canary), b"picture"),
            header("link.jpg", tarfile.SYMTYPE, str(canary)),
            header(f"../{canary.name}", tarfile.DIRTYPE),
        ]
    )
    assert check_shards([tar], num_workers=1).shards[0].samples == 2
    assert repair_shards([tar], tmp_path / "out", num_workers=1).kept == 1  # the other image is none
    assert {path.name for path in tmp_path.iterdir()} <= {"hostile.tar", "hostile.tar.idx", "out"}
    assert all(path.suffix in (".tar", ".idx", ".jsonl") for path in (tmp_path / "out").iterdir())
