"""A font is found for each text, and what no font has is told in the text itself."""

from pathlib import Path

import pytest
from PIL import ImageFont

from data_tools.core.errors import UsageError
from data_tools.examine import fonts
from data_tools.examine.fonts import FontSet

KOREAN = "\ube68\uac04 \uc9d1"


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_system_fonts", lambda: iter(()))


@pytest.mark.usefixtures("no_fonts")
def test_without_fonts_the_one_of_pillow_shows_latin_and_tells_the_rest():
    chosen = FontSet(14)
    assert chosen.fit("a red house")[1] == "a red house"
    assert chosen.fit("a\x01red\n\thouse ")[1] == "a red house"
    assert chosen.missing == set()
    assert chosen.fit(f"IKEA {KOREAN}!")[1] == "IKEA [2 Hangul] [1 Hangul]!"
    assert chosen.missing == {"Hangul"}


def test_a_font_of_this_machine_is_used_where_it_has_the_text(monkeypatch: pytest.MonkeyPatch):
    matplotlib = pytest.importorskip("matplotlib")
    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    monkeypatch.setattr(fonts, "_system_fonts", lambda: iter([Path("/no/font.ttf"), dejavu]))
    chosen = FontSet(14)
    russian = "\u0434\u043e\u043c"
    font, text = chosen.fit(russian)
    assert (font.getname()[0], text) == ("DejaVu Sans", russian)
    assert chosen.fit(KOREAN)[0].getname()[0] == "DejaVu Sans"  # no font has any of it: the first
    font, text = chosen.fit(f"{russian} {KOREAN}")  # the font that has most of it
    assert (font.getname()[0], text) == ("DejaVu Sans", f"{russian} [2 Hangul] [1 Hangul]")


def test_a_font_that_the_user_names_comes_first_and_must_be_one(tmp_path: Path):
    matplotlib = pytest.importorskip("matplotlib")
    serif = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSerif.ttf"
    assert FontSet(14, serif).fit("a")[0].getname()[0] == "DejaVu Serif"
    (tmp_path / "x.ttf").write_bytes(b"no font")
    with pytest.raises(UsageError, match="the font cannot be read"):
        FontSet(14, tmp_path / "x.ttf")


def test_fonts_are_searched_plain_ones_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["sub/NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "NotoColorEmoji.ttf", "Other.otf"]
    for name in [*names, "readme.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(fonts, "_FOLDERS", {})
    monkeypatch.setattr(fonts, "_OTHER_FOLDERS", (str(tmp_path), "/no/such/folder"))
    found = [path.name for path in fonts._system_fonts()]
    assert found == ["DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Other.otf"]


def test_a_missing_glyph_is_known_by_its_box():
    font = ImageFont.load_default(14)
    assert fonts._has(font, "a")
    assert not fonts._has(font, "\ube68")
