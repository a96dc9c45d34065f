"""One walk over a folder of images: make, finetune and embed find the same files in it."""

from collections import Counter
from pathlib import Path

import pytest

from data_tools.core.folders import READABLE, image_files, is_readable, walk_folders
from data_tools.make.folder_rows import Tally, image_rows
from mmvit.data.folders import list_class_folders
from mmvit.retrieval.sources import open_source

FOUND = ["cat/a.JPG", "cat/b.jfif", "cat/deep/d.webp", "cat/link.png", "dog/e.jpe"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    others = ("cat/._a.jpg", ".trash/f.jpg", "dog/notes.txt", "dog/table.csv")
    for name in (*FOUND, *others):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "cat/link.png":
            (root / name).write_bytes(b"x")
    (root / "cat" / "link.png").symlink_to(root / "cat" / "a.JPG")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g.jpg").write_bytes(b"x")
    (root / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    return root


def test_all_callers_find_the_same_files(root: Path):
    aside: Counter[str] = Counter()
    assert sorted(f"{folder}{name}" for folder, names in image_files(root, aside) for name in names) == FOUND
    assert aside == {"hidden": 2, "link to a folder": 1, ".txt": 1, ".csv": 1}
    assert sorted(list_class_folders(root).files) == FOUND
    source = open_source(str(root))
    assert [source.key(i) for i in range(len(source))] == [str(root / name) for name in FOUND]
    tally = Tally(Counter(), Counter(), Counter(), [])
    assert sorted(str(row.image) for row in image_rows(root, "classes", tally)) == FOUND
    assert tally.images == {"cat": 4, "dog": 1}
    assert (tally.aside["hidden"], tally.aside["link to a folder"], tally.aside[".csv"]) == (2, 1, 1)


def test_folders_are_sorted_and_relative(root: Path):
    aside: Counter[str] = Counter()
    assert [folder for folder, _ in walk_folders(root, aside)] == ["", "cat/", "cat/deep/", "dog/"]
    assert aside == {"hidden": 2, "link to a folder": 1}


def test_suffixes_in_any_case():
    assert all(is_readable(f"a{suffix.upper()}") for suffix in READABLE)
    assert not any(map(is_readable, ("a.gif", "jpg", ".jpg", "a.jpg.txt")))
