"""The numbers of a data set, in JSON, in words and as an image."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cli.app import app
from data_tools.core.errors import UsageError
from data_tools.core.program import run_program
from data_tools.examine import stats_picture
from data_tools.examine.stats import describe, shard_stats
from data_tools.examine.stats_picture import draw_stats
from data_tools.sample import table as metadata
from data_tools.tar.writer import ShardWriter


def picture(seed: int, size: tuple[int, int], kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, kind)
    return buffer.getvalue()


def read_png(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def write_shards(folder: Path, samples: list[dict[str, Any]], max_samples: int = 1000) -> list[Path]:
    with ShardWriter(folder, max_samples=max_samples) as writer:
        for i, fields in enumerate(samples):
            writer.write(f"{i:03d}", fields)
    return writer.shards


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(metadata, "language_of", lambda text: "de" if "rot" in text else "en")
    samples = [
        {"jpg": picture(0, (400, 300)), "txt": "a red house", "cls": 0},
        {"jpg": picture(1, (300, 400)), "txt": "a red house", "cls": 0},
        {"png": picture(2, (200, 200), "PNG"), "txt": "rotes Haus am Fluss", "cls": 1},
        {"jpg": picture(0, (400, 300)), "txt": "another text of seven words in all"},
        {"jpg": b"broken", "txt": "text"},
    ]
    return write_shards(tmp_path / "shards", samples, max_samples=3)


def test_the_numbers_are_right(shards: list[Path]):
    numbers, table = shard_stats(shards, num_workers=1)
    assert (numbers["shards"], numbers["samples"], len(table)) == (2, 5, 5)
    assert numbers["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert numbers["samples_a_shard"] == {"least": 2, "median": 2.5, "mean": 2.5, "p95": 2.95, "most": 3}
    assert numbers["bad_samples"] == {"bad-image": 1}
    pictures, captions = numbers["pictures"], numbers["captions"]
    assert pictures["formats"] == {"JPEG": 3, "PNG": 1}
    assert (pictures["count"], pictures["width"]["median"], pictures["height"]["most"]) == (4, 350, 400)
    assert pictures["aspect"] == {"least": 0.75, "median": 1.167, "mean": 1.104, "p95": 1.333, "most": 1.333}
    assert pictures["duplicates"] == {"groups": 1, "samples": 2, "surplus": 1}
    assert captions["duplicates"] == {"groups": 1, "samples": 2, "surplus": 1}
    assert (captions["words"]["least"], captions["characters"]["most"]) == (1, 34)
    assert captions["scripts"] == {"Latin": 5}
    assert captions["languages"] == {"en": 4, "de": 1}
    assert numbers["labels"]["different"] == 2
    assert numbers["labels"]["samples"]["most"] == 2


def test_the_text_report_has_the_same_numbers(shards: list[Path]):
    text = describe(shard_stats(shards, num_workers=1)[0])
    for part in (
        "shards: 2, samples: 5, size: 0.1 MB",
        "JPEG 3 (75.0%), PNG 1 (25.0%)",
        "en 4 (80.0%), de 1 (20.0%)",
        "3 samples have one, 2 different",
        "2 samples share 1 image, byte for byte (surplus: 1)",
        "bad-image 1",
    ):
        assert part in text
    row = next(line for line in text.splitlines() if line.startswith("image width  "))
    assert row.split()[2:] == ["200", "350", "325", "400", "400", "px"]


def test_a_shard_without_pictures_and_captions_is_told_and_drawn(tmp_path: Path):
    numbers, table = shard_stats(write_shards(tmp_path / "labels", [{"cls": 1}]), num_workers=1)
    assert describe(numbers).startswith("shards: 1, samples: 1, size: ")
    draw_stats(tmp_path / "s.png", numbers, table, "labels")
    assert read_png(tmp_path / "s.png").shape == (902, 1320, 3)


def test_without_a_detector_the_scripts_are_drawn(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "language_of", lambda text: None)
    numbers, table = shard_stats(shards, num_workers=1)
    assert numbers["captions"]["languages"] == {}
    assert 'pip install "mmvit[data]"' in describe(numbers)
    titles: list[str] = []
    begin = stats_picture._begin

    def record(axes: Any, title: str, count: int) -> bool:
        titles.append(title)
        return begin(axes, title, count)

    monkeypatch.setattr(stats_picture, "_begin", record)
    draw_stats(tmp_path / "x.png", numbers, table, "x")
    assert titles == ["Caption length", "Image size", "Scripts of the captions", "Aspect ratio"]


def test_the_picture_shows_the_distributions(tmp_path: Path):
    random = np.random.default_rng(0)
    samples = []
    for i in range(60):
        size = int(random.integers(40, 400)), int(random.integers(40, 400))
        samples.append({"jpg": picture(i, size), "txt": "word " * int(random.integers(1, 30))})
    numbers, table = shard_stats(write_shards(tmp_path / "a", samples), num_workers=1)
    draw_stats(tmp_path / "stats.png", numbers, table, "sixty images")
    drawn = read_png(tmp_path / "stats.png")
    quarters = [drawn[100:450, :660], drawn[100:450, 660:], drawn[500:, :660], drawn[500:, 660:]]
    assert all((quarter != 255).any(axis=2).mean() > 0.02 for quarter in quarters)


def test_matplotlib_is_asked_for_in_words(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    numbers, table = shard_stats(shards, num_workers=1)
    with pytest.raises(UsageError, match="matplotlib") as raised:
        draw_stats(tmp_path / "x.png", numbers, table, "x")
    assert raised.value.hint == 'pip install "mmvit[data]"'


def run(*arguments: object) -> int:
    """Run the program in this process, which saves its start."""
    with pytest.raises(SystemExit) as ended:
        run_program(app, "mmvit-data", [str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_program_prints_one_json_document_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    drawn = []
    monkeypatch.setattr(stats_picture, "draw_stats", lambda path, numbers, table, title: drawn.append((path, title)))
    write_shards(tmp_path / "a", [{"jpg": picture(0, (40, 30)), "txt": "a red house"}])
    assert run("stats", tmp_path / "a", "--picture", tmp_path / "s.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pictures"]["width"]["median"] == 40
    assert drawn == [(tmp_path / "s.png", str(tmp_path / "a"))]
