"""A contact sheet shows the samples it names, the bad ones too."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from data_tools.cli.app import app
from data_tools.core.errors import UsageError
from data_tools.core.program import run_program
from data_tools.examine import fonts
from data_tools.examine.peek import _wrapped, draw_sheet, peek_samples
from data_tools.tar.writer import ShardWriter

RED = (200, 30, 40)
KOREAN = "\ube68\uac04 \uc9d1"


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (120, 80)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    with ShardWriter(tmp_path / "shards", "train", max_samples=20) as writer:
        for i in range(50):
            writer.write(f"{i:03d}", {"png": picture((i, 100, 200)), "txt": f"caption {i}", "cls": i})
    return writer.shards


def write_shard(folder: Path, **fields: object) -> list[Path]:
    with ShardWriter(folder) as writer:
        writer.write("a", fields)
    return writer.shards


def sheet(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def test_the_draw_is_seeded_and_without_repeats(shards: list[Path]):
    samples, everyone = peek_samples(shards, 12, seed=1)
    names = [f"{sample.shard}/{sample.key}" for sample in samples]
    assert everyone == 50
    assert len(set(names)) == 12
    assert names == sorted(names)
    assert len({sample.shard for sample in samples}) > 1
    assert names == [f"{sample.shard}/{sample.key}" for sample in peek_samples(shards, 12, seed=1)[0]]
    assert names != [f"{sample.shard}/{sample.key}" for sample in peek_samples(shards, 12, seed=2)[0]]
    everything = [sample.key for sample in peek_samples(shards, 99)[0]]
    assert everything == [f"{i:03d}" for i in range(50)]


def test_samples_are_found_by_key(shards: list[Path]):
    samples, _ = peek_samples(shards, keys=["045", "train-00000.tar/007"])
    assert [(sample.shard, sample.key, sample.line) for sample in samples] == [
        ("train-00000.tar", "007", "caption 7"),
        ("train-00002.tar", "045", "caption 45"),
    ]
    by_path = f"{shards[0].parent}/train-00000.tar/007"
    assert [sample.key for sample in peek_samples(shards, keys=[by_path])[0]] == ["007"]
    for key in ("99", "train-00001.tar/007"):
        with pytest.raises(UsageError, match="no shard has the key") as raised:
            peek_samples(shards, keys=["045", key])
        assert "train-00000.tar/000" in str(raised.value)


def test_the_sheet_shows_the_pictures(shards: list[Path], tmp_path: Path):
    samples, _ = peek_samples(shards, 7)
    assert draw_sheet(tmp_path / "sheet.png", samples, "title") == set()
    pixels = sheet(tmp_path / "sheet.png")
    assert pixels.shape[1] == 2 * 24 + 6 * 200 + 5 * 16
    for sample in samples:
        colour = int(sample.key), 100, 200
        assert (pixels == colour).all(axis=2).sum() == pytest.approx(200 * 133, rel=0.01)


def test_bad_samples_have_a_cell_with_their_fault(tmp_path: Path):
    shards = write_shard(tmp_path / "a", png=b"<html>", txt="a cat")
    samples, _ = peek_samples(shards)
    assert samples[0].line == "bad-image: .png: image cannot be decoded: not a JPEG, PNG or WEBP image"
    draw_sheet(tmp_path / "sheet.png", samples, "title")
    assert (sheet(tmp_path / "sheet.png") == (0xA6, 0x1B, 0x1B)).all(axis=2).sum() > 800  # the frame and the text
    cut = write_shard(tmp_path / "b", png=picture(RED)[:-30], txt="a cat")
    assert peek_samples(cut)[0][0].line.startswith("bad-image")


@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 4000), (700, 700)])
def test_any_size_fits_its_cell(tmp_path: Path, size: tuple[int, int]):
    samples, _ = peek_samples(write_shard(tmp_path / "a", png=picture(RED, size), txt="x"))
    draw_sheet(tmp_path / "sheet.png", samples, "title")
    rows, columns = np.nonzero((sheet(tmp_path / "sheet.png") == RED).all(axis=2))
    assert 1 <= rows.max() - rows.min() + 1 <= 200
    assert 1 <= columns.max() - columns.min() + 1 <= 200


def test_a_script_without_a_font_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fonts, "_system_fonts", lambda: iter(()))
    samples, _ = peek_samples(write_shard(tmp_path / "a", png=picture(RED), txt=KOREAN))
    assert draw_sheet(tmp_path / "sheet.png", samples, "title") == {"Hangul"}
    assert samples[0].line == KOREAN  # printed as it is


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u0646\u0632\u0644 \u0623\u062d\u0645\u0631",
        "a\nb\tc\x01\x7f",
        "x" * 3000,
        "\u200d\ufe0f",
        "\U0001f600",
        "\ue000",
    ],
)
def test_any_caption_can_be_drawn(tmp_path: Path, text: str):
    samples, _ = peek_samples(write_shard(tmp_path / "a", png=picture(RED), txt=text))
    draw_sheet(tmp_path / "sheet.png", samples, text)
    assert sheet(tmp_path / "sheet.png").shape[0] < 400


def test_what_has_no_caption_shows_its_label(tmp_path: Path):
    assert peek_samples(write_shard(tmp_path / "a", png=picture(RED), cls=7))[0][0].line == "label 7"
    shards = write_shard(tmp_path / "b", png=picture(RED), json={"caption": "from the metadata"})
    assert peek_samples(shards)[0][0].line == "from the metadata"


def test_lines_are_broken_within_the_width():
    font = ImageFont.load_default(14)
    text = "a short line and averyveryveryveryveryverylongwordwithoutanyspace and an end"
    lines = _wrapped(text, font, 100, 20)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = _wrapped(text, font, 100, 2)
    assert len(cut) == 2
    assert cut[-1].endswith("...")
    assert font.getlength(cut[-1]) <= 100
    assert _wrapped("", font, 100, 2) == [""]


def run(*arguments: object) -> int:
    """Run the program in this process, which saves its start."""
    with pytest.raises(SystemExit) as ended:
        run_program(app, "mmvit-data", [str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_program_lists_what_the_sheet_shows(shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    peek = ("peek", shards[0].parent, "--out", tmp_path / "s.png")
    assert run(*peek, "-n", 5) == 0
    output = capsys.readouterr()
    lines = [line.split("\t") for line in output.out.splitlines()]
    assert output.err == ""
    assert len(lines) == 5
    assert all(place == f"train-0000{int(place[-3:]) // 20}.tar/{place[-3:]}" for place, _ in lines)
    assert run(*peek, "--key", "007", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    expected = {"shard": "train-00000.tar", "key": "007", "caption": "caption 7", "label": 7, "width": 120}
    assert document["samples"] == [expected | {"height": 80, "fault": None}]
    assert run(*peek, "--key", "nix") == 2
