"""What is only guessed decides no caption: tables are read, doubtful folders refused with a command that works."""

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.core.errors import DataError, UsageError
from data_tools.make.options import MakeOptions
from data_tools.make.run import make_shards
from data_tools.tar.index import open_indexes
from data_tools.tar.reader import ShardReader

Tree = Callable[..., Path]

FLICKR = "image,caption\n0.jpg,A dog .\n0.jpg,A hound\n1.jpg,A cat\n"


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files below `in`: images, and texts by name."""

    def write(*images: str, **texts: str) -> Path:
        for i, name in enumerate([*images, *texts]):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(texts[name].encode() if name in texts else picture(i))
        return tmp_path / "in"

    return write


def made(source: Path, out: Path, **options: Any) -> list[tuple[str, str]]:
    """Return caption and source of each sample."""
    make_shards(source, out, MakeOptions(**options), num_workers=1)
    reader = ShardReader(open_indexes(sorted(out.glob("*.tar"))))
    fields = [reader.fields(0, i) for i in range(len(reader.indexes[0]))]
    return [
        (each.get("txt", b"").decode(), re.search(r'"source": "(.*?)"', each["json"].decode())[1]) for each in fields
    ]


@pytest.mark.parametrize("folder", ["Images", "photos of dogs", "flickr/flickr"])
def test_captions_txt_is_found_with_its_images(tmp_path: Path, tree: Tree, folder: str):
    source = tree(f"{folder}/0.jpg", f"{folder}/1.jpg", **{"captions.txt": FLICKR, "readme.txt": "x"})
    wanted = [("A dog .", "0.jpg"), ("A hound", "0.jpg"), ("A cat", "1.jpg")]
    assert made(source, tmp_path / "out") == wanted
    assert made(source / "captions.txt", tmp_path / "table") == wanted
    report = make_shards(source, tmp_path / "out", MakeOptions(), num_workers=1)
    assert "captions: found in captions.txt" in report.notes
    assert f"images: found in {source / folder}" in report.notes


def test_results_csv_with_bars_and_images_next_to_it(tmp_path: Path, tree: Tree):
    text = "image_name| comment_number| comment\n0.jpg| 0| A dog, a hound\n1.jpg| 0|  A cat\n"
    source = tree("set/images/0.jpg", "set/images/1.jpg", **{"set/texts/results.csv": text})
    assert made(source / "set" / "texts" / "results.csv", tmp_path / "out") == [
        ("A dog, a hound", "0.jpg"),
        ("A cat", "1.jpg"),
    ]


def test_images_in_several_folders_are_not_chosen(tmp_path: Path, tree: Tree):
    source = tree("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", **{"captions.txt": FLICKR})
    with pytest.raises(UsageError, match=r"(?s)in 2 folders: .*a, .*b.*--image-root"):
        made(source, tmp_path / "out")
    assert len(made(source, tmp_path / "out", image_root=source / "b")) == 3


@pytest.mark.parametrize("name", ["Images", "IMG", "jpg", "Train", "val2017", "PetImages", "data", "flickr30k_images"])
def test_doubtful_folders_are_refused(tmp_path: Path, tree: Tree, name: str):
    source = tree(f"{name}/0.jpg", "cat/1.jpg")
    with pytest.raises(UsageError, match=f"'{name}' is ") as caught:
        made(source, tmp_path / "out")
    assert "--kind classes" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert Counter(text for text, _ in made(source, tmp_path / "out", kind="classes")) == {name: 1, "cat": 1}


@pytest.mark.parametrize(
    ("images", "text", "inner"),
    [
        (["PetImages/cat/0.jpg", "PetImages/dog/0.jpg"], "", "PetImages"),
        (["my set/images/cat/0.jpg", "my set/images/dog/0.jpg"], "", "my set/images"),
        (["train/cat/0.jpg", "train/dog/0.jpg", "test/cat/0.jpg"], "", "train"),
        (["a/one/0.jpg", "b/one/0.jpg"], "a/captions.csv", "a/captions.csv"),
        (["x/0.jpg", "y/0.jpg"], "labels.csv", "labels.csv"),
        (["archive/Images/0.jpg"], "archive/captions.txt", "archive"),
    ],
)
def test_the_command_of_the_hint_works(tmp_path: Path, tree: Tree, images: list[str], text: str, inner: str):
    source = tree(*images, **({text: "file,text\n0.jpg,one\n"} if text else {}))
    with pytest.raises(UsageError) as caught:
        made(source, tmp_path / "out")
    commands = [shlex.split(found) for found in re.findall(r"mmvit-data make .*? OUT", str(caught.value.hint))]
    assert str(source / inner) in [command[2] for command in commands]
    for number, command in enumerate(commands):
        if text != "labels.csv":  # its images are in two folders
            assert made(Path(command[2]), tmp_path / f"out{number}")


def test_texts_next_to_class_folders_are_no_secret(tmp_path: Path, tree: Tree):
    source = tree("cat/0.jpg", "dog/0.jpg", **{"README.txt": "x", "classes.txt": "cat\ndog\n", "LICENSE": "x"})
    assert [text for text, _ in made(source, tmp_path / "out", in_order=True)] == ["cat", "dog"]
    (source / "annotations.json").write_text("{}")
    with pytest.raises(UsageError, match=r"the captions may be in annotations\.json"):
        made(source, tmp_path / "new")
    with pytest.raises(UsageError, match="only one class folder, 'dog'"):
        made(tree("../one/dog/0.jpg").parent / "one", tmp_path / "new")


def test_a_table_next_to_a_folder_of_images_is_named(tmp_path: Path, tree: Tree):
    source = tree("Images/0.jpg", **{"captions.txt": FLICKR})
    with pytest.raises(UsageError) as caught:
        made(source / "Images", tmp_path / "out")
    assert f"mmvit-data make {source / 'captions.txt'} OUT" in str(caught.value.hint)


def test_coco_captions_with_images_next_to_the_annotations(tmp_path: Path, tree: Tree):
    images = [
        {"id": 7, "file_name": "a.jpg", "width": 8},
        {"id": 3, "file_name": "b.jpg"},
        {"id": 5, "file_name": "c.jpg"},
    ]
    said = [(3, "B one"), (7, "A"), (3, "B two"), (9, "nobody")]
    entries = [{"image_id": number, "id": i, "caption": text} for i, (number, text) in enumerate(said)]
    text = json.dumps({"info": {}, "images": images, "annotations": entries})
    names = [f"{folder}/{name}.jpg" for folder, name in (("train2017", "a"), ("train2017", "b"), ("val2017", "x"))]
    source = tree(*names, **{"annotations/captions_train2017.json": text, "annotations/instances.json": "{}"})
    with pytest.raises(UsageError) as caught:
        made(source, tmp_path / "out")
    table = source / "annotations" / "captions_train2017.json"
    assert f"mmvit-data make {table} OUT" in str(caught.value.hint)
    assert made(table, tmp_path / "out") == [("A", "a.jpg"), ("B one", "b.jpg")]
    causes = [json.loads(line)["cause"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert causes == ["no-image", "no-image"]
    with pytest.raises(DataError, match="does not hold captions as COCO does"):
        made(source / "annotations" / "instances.json", tmp_path / "new", kind="coco")
    with pytest.raises(UsageError, match=r"\.json is not a supported source"):
        made(source / "annotations" / "instances.json", tmp_path / "new")
