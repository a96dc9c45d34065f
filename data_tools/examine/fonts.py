"""Find a font on this machine that can display a text in any script.

matplotlib falls back to other fonts letter by letter, but it is no dependency of the core, draws a contact sheet of 24
images in 7 s instead of 1 s, and leaves boxes for what no font has, where this names the script: "[2 Hangul]".
"""

from __future__ import annotations

import functools
import itertools
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

from data_tools.core.errors import UsageError
from data_tools.sample.language import script_of_letter

_FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}
_OTHER_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
# Parts of file names, tried in this order before all others: plain fonts of many scripts.
_PREFERRED = ("dejavusans.", "notosans-regular", "notosanscjk", "nanumgothic.", "malgun", "arialuni", "notosans")
_NEVER = ("emoji", "symbol", "bold", "italic", "oblique", "mono", "condensed", "light", "thin")
_INVISIBLE = ("Zs", "Cf", "Mn", "Me")  # alone they have no glyph, or fonts show nothing for them
_NOWHERE = "\U0010ffff"  # no font has it: what it draws is the font's box for a missing character


class FontSet:
    """The fonts of this machine; each text gets the first one that has all its characters.

    Args:
        size: px.
        first: a font file to prefer; None for none.

    Raises:
        UsageError: `first` is not a font.
    """

    def __init__(self, size: int, first: Path | None = None):
        self._size = size
        self._paths = list(_system_fonts())
        self._fonts: list[FreeTypeFont] = []  # those that were opened so far, in the order of preference
        self._has = functools.cache(_has)
        self.missing: set[str] = set()  # scripts that no font had
        if first is not None:
            try:
                self._fonts.append(ImageFont.truetype(first, size))
            except OSError as error:
                raise UsageError(f"the font cannot be read: {error}", where=str(first)) from error

    def fit(self, text: str) -> tuple[FreeTypeFont, str]:
        """Return a font and the text, in one line, as it can show it: [4 Hangul] for four letters that no font has.

        Where no font has all characters, the one that has most of them is taken.
        """
        text = " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())
        characters = sorted(set(text))
        best, most = None, -1
        for font in self._all_fonts():
            count = sum(self._has(font, character) for character in characters)
            if count > most:
                best, most = font, count
            if count == len(characters):
                return font, text
        assert best is not None
        return best, "".join(self._shown(best, text))

    def _shown(self, font: FreeTypeFont, text: str) -> Iterator[str]:
        for lacking, run in itertools.groupby(text, lambda c: None if self._has(font, c) else _script(c)):
            characters = "".join(run)
            if lacking is None:
                yield characters
            else:
                self.missing.add(lacking)
                yield f"[{len(characters)} {lacking}]"

    def _all_fonts(self) -> Iterator[FreeTypeFont]:
        """Yield the fonts, opening each one when it is first asked for; last the one that Pillow brings along."""
        yield from self._fonts
        while self._paths:
            try:
                font = ImageFont.truetype(self._paths.pop(0), self._size)
            except OSError:  # a format that FreeType does not know
                continue
            self._fonts.append(font)
            yield font
        default = ImageFont.load_default(self._size)
        assert isinstance(default, FreeTypeFont)
        yield default


def _system_fonts() -> Iterator[Path]:
    folders = [Path(folder).expanduser() for folder in _FOLDERS.get(sys.platform, _OTHER_FOLDERS)]
    files = sorted(path for folder in folders for path in folder.rglob("*.[to]t[fc]"))
    plain = [path for path in files if not any(word in path.name.lower() for word in _NEVER)]
    yield from sorted(plain, key=lambda path: _rank(path.name.lower()))


def _rank(name: str) -> int:
    return next((i for i, part in enumerate(_PREFERRED) if part in name), len(_PREFERRED))


def _has(font: FreeTypeFont, character: str) -> bool:
    """Return whether the font draws the character, and not its box for a missing one; Pillow has no way to ask."""
    if unicodedata.category(character) in _INVISIBLE:
        return True
    drawn, box = font.getmask(character), font.getmask(_NOWHERE)
    return drawn.size != box.size or bytes(drawn) != bytes(box)


def _script(character: str) -> str:
    return script_of_letter(character) or "signs"
