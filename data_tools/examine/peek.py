"""A contact sheet: images of shards with their captions."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont

from data_tools.core.errors import SampleError, UsageError
from data_tools.core.files import write_atomic
from data_tools.examine.fonts import FontSet
from data_tools.sample.content import Content, Fault, read_content
from data_tools.sample.decode import ImageError, decode_image
from data_tools.tar.find import find_keys
from data_tools.tar.index import ShardIndex, open_indexes
from data_tools.tar.location import LocationLike
from data_tools.tar.reader import ShardReader

_COLUMNS = 6
_CELL, _GAP, _MARGIN = 200, 16, 24  # px
_MOST_ENLARGED = 3  # times
_TITLE_SIZE, _CAPTION_SIZE, _KEY_SIZE = 20, 14, 11  # px
_MAX_LINES = 4
_INK, _GREY, _RED, _PAPER, _BACK = "#1a1a1a", "#777777", "#a61b1b", "#ffffff", "#f1f1f1"


class Peeked(NamedTuple):
    """One sample of a sheet; `image` is None where there is none or it cannot be decoded."""

    shard: str
    key: str
    content: Content
    image: Image.Image | None

    @property
    def line(self) -> str:
        """The fault, the caption on one line, or the label if there is no caption."""
        if self.content.fault:
            return f"{self.content.fault.cause}: {self.content.fault.detail}"
        if self.content.text:
            return " ".join(self.content.text.split())
        return "" if self.content.label is None else f"label {self.content.label}"

    def to_json(self) -> dict[str, Any]:
        """Return the sample as part of a JSON document."""
        content, fault = self.content, self.content.fault
        return {
            **{"shard": self.shard, "key": self.key, "caption": content.text, "label": content.label},
            **{"width": content.width, "height": content.height, "fault": fault._asdict() if fault else None},
        }


def peek_samples(
    tars: Sequence[LocationLike], count: int = 24, seed: int = 0, keys: Sequence[str] = ()
) -> tuple[list[Peeked], int]:
    """Return samples in the order of the shards, and the number of all samples.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        count: how many samples to draw, each at most once.
        seed: of the drawing.
        keys: these samples instead, as "key" or "shard.tar/key".

    Raises:
        UsageError: a key is in none of the shards.
        CheckpointError, DataError: as `open_indexes`.
    """
    indexes = open_indexes(tars)
    reader = ShardReader(indexes)
    everyone = sum(map(len, indexes))
    if keys:
        places = _find(indexes, keys)
    else:
        starts = [0]
        for index in indexes:
            starts.append(starts[-1] + len(index))
        chosen = sorted(random.Random(seed).sample(range(everyone), min(count, everyone)))
        places = [
            (shard, number - starts[shard])
            for shard in range(len(indexes))
            for number in chosen
            if starts[shard] <= number < starts[shard + 1]
        ]
    return [_read(reader, *place) for place in places], everyone


def _find(indexes: Sequence[ShardIndex], keys: Sequence[str]) -> list[tuple[int, int]]:
    places, unknown = find_keys(indexes, keys)
    if unknown:
        example = f"{indexes[0].tar.name}/{indexes[0].key(0)}"
        hint = f"keys look like {indexes[0].key(0)!r}, or {example!r} to select the shard too"
        raise UsageError(f"no shard has the key {unknown[0]!r}", hint=hint)
    return places


def _read(reader: ShardReader, shard: int, i: int) -> Peeked:
    index = reader.indexes[shard]
    name, key = index.tar.name, index.key(i)
    try:
        fields = reader.fields(shard, i)
    except SampleError as error:
        return Peeked(name, key, Content(fault=Fault(error.cause, error.what)), None)
    content = read_content(fields, index.fields)
    image = None
    if content.image_field is not None:
        try:
            image = decode_image(fields[content.image_field])
            image.thumbnail((1024, 1024))  # a sheet of many large images stays small in memory
        except ImageError as error:
            content = content._replace(fault=content.fault or Fault(error.cause, error.what))
    return Peeked(name, key, content, image)


def draw_sheet(path: Path, samples: Sequence[Peeked], title: str, font: Path | None = None) -> set[str]:
    """Draw the samples as a PNG and return the scripts that no font of this machine could show.

    Args:
        path: of the PNG.
        samples: of `peek_samples`.
        title: above the images.
        font: a font file to prefer; None chooses among those of this machine, for each caption one that has its script.

    Raises:
        UsageError: `font` is not a font.
    """
    titles, captions, small = (FontSet(size, font) for size in (_TITLE_SIZE, _CAPTION_SIZE, _KEY_SIZE))
    cells = [_Cell(sample, captions, small) for sample in samples]
    rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    head = _MARGIN + 2 * _TITLE_SIZE
    heights = [max(cell.height for cell in row) + _GAP for row in rows]
    width = 2 * _MARGIN + min(_COLUMNS, max(len(cells), 3)) * (_CELL + _GAP) - _GAP
    sheet = Image.new("RGB", (width, head + sum(heights) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font, title = titles.fit(title)
    draw.text((_MARGIN, _MARGIN), _wrapped(title, title_font, width - 2 * _MARGIN, 1)[0], _INK, title_font)
    y = head
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            cell.draw(sheet, draw, _MARGIN + column * (_CELL + _GAP), y)
        y += height
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_atomic(path, picture.getvalue())
    return captions.missing | titles.missing


class _Cell:
    """An image, its caption in a few lines, its key."""

    def __init__(self, sample: Peeked, captions: FontSet, small: FontSet):
        self.picture = _fitted(sample.image) if sample.image else None
        self.is_bad = sample.content.fault is not None
        self.font, text = captions.fit(sample.line)
        self.lines = _wrapped(text, self.font, _CELL, _MAX_LINES)
        self.small, key = small.fit(f"{sample.shard.removesuffix('.tar')}/{sample.key}")
        self.key = _wrapped(key, self.small, _CELL, 1)[0]
        self.line_height = round(1.35 * _CAPTION_SIZE)
        self.height = _CELL + 6 + len(self.lines) * self.line_height + round(1.6 * _KEY_SIZE)

    def draw(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        """Draw the cell with its upper left corner at x, y."""
        frame = (x, y, x + _CELL - 1, y + _CELL - 1)
        draw.rectangle(frame, _BACK)
        if self.picture is not None:
            left, top = x + (_CELL - self.picture.width) // 2, y + (_CELL - self.picture.height) // 2
            sheet.paste(self.picture, (left, top))
        if self.is_bad:
            draw.rectangle(frame, outline=_RED, width=2)
        y += _CELL + 6
        for line in self.lines:  # placed by their base line, because fonts differ in their ascent
            draw.text((x, y + _CAPTION_SIZE), line, _RED if self.is_bad else _INK, self.font, anchor="ls")
            y += self.line_height
        draw.text((x, y + 2 + _KEY_SIZE), self.key, _GREY, self.small, anchor="ls")


def _fitted(image: Image.Image) -> Image.Image:
    scale = min(_CELL / image.width, _CELL / image.height, _MOST_ENLARGED)
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text: str, font: FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Return lines of at most `width` px, broken at spaces or, where a word is too long or has no spaces, anywhere."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if font.getlength(lines[-1] + word.rstrip()) <= width:
            lines[-1] += word
            continue
        if font.getlength(word.rstrip()) <= width:
            lines.append(word)
            continue
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > max_lines:
        last = lines[max_lines - 1].rstrip()
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last}..."]
    return [line.rstrip() for line in lines]
