"""Photo-like JPEG images with captions, of any size and number, for load and speed tests.

An image is a random crop of one of a few base images: occluding objects, with sizes as in the "dead leaves" model of
photographs (Lee, Mumford, Huang, IJCV 2001), muted colours, smooth lighting, and on each object its own amount of
noise of about equal weight per octave (a 1/f spectrum). A sample thus costs little more than its encoding, and has
about as many bytes per pixel as a photograph. With the same version of Pillow the same arguments result in the same
bytes: pixels are computed in integers, and the only random numbers are raw outputs of PCG64.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from data_tools.core.errors import UsageError
from data_tools.core.output_folder import close_output, open_output
from data_tools.core.ownership import owned
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.tar.index import open_index
from data_tools.tar.writer import ShardWriter

_NUM_BASES = 8
_BASE_SCALE = 1.25  # of a base image relative to the crop: enough for thousands of different crops
_NUM_OBJECTS = 250
_OBJECT_RADII = (0.015, 0.5)  # of the shorter side
_OCTAVES = 9
_MAX_SIDE = 16_000  # px
_KOREAN_SHARE = 0.1
_MIN_WORDS, _MAX_WORDS = 3, 30

_ADJECTIVES = (
    "red green blue yellow small large old new wooden bright dark quiet busy empty broken colourful shiny rusty wet "
    "frozen sunny tall narrow round young striped white black golden soft"
)
_NOUNS = (
    "boat house dog cat bicycle bridge street mountain river garden tree car train window door chair table cup bird "
    "horse flower market beach tower child woman man lamp clock forest lake road field kitchen shop book bottle hat"
)
_PLACES = "near behind beside under above before outside facing"
_KOREAN_ADJECTIVES = (
    "\ube68\uac04 \ud30c\ub780 \ud558\uc580 \uac80\uc740 \uc791\uc740 \ud070 \ub0a1\uc740 \uc0c8\ub85c\uc6b4 "
    "\ubc1d\uc740 \uc5b4\ub450\uc6b4"
)
_KOREAN_NOUNS = (
    "\uc790\ub3d9\ucc28 \uace0\uc591\uc774 \uac15\uc544\uc9c0 \uc9d1 \ub098\ubb34 \uaf43 \ub2e4\ub9ac \uae30\ucc28 "
    "\uc758\uc790 \uc0c8 \uc790\uc804\uac70 \uc2dc\uacc4"
)
_KOREAN_PLACES = "\uc606\uc5d0 \uc704\uc5d0 \uc55e\uc5d0"  # next to, on, in front of
_KOREAN_THAT_IS = "\uc788\ub294"


class SyntheticPhotos(NamedTuple):
    """Images and captions by number: sample i depends only on the fields and i.

    Args:
        width: image width, px.
        height: image height, px.
        quality: JPEG quality, 1 .. 95.
        seed: 0 .. 2**32 - 1.
    """

    width: int
    height: int
    quality: int = 87
    seed: int = 0

    def jpeg(self, i: int) -> bytes:
        """Return image `i` as the bytes of a JPEG file."""
        draw = _Draw(self.seed, 1, i)
        base = _base_image(self.width, self.height, self.seed, draw.below(_NUM_BASES))
        left, top = draw.below(base.width - self.width + 1), draw.below(base.height - self.height + 1)
        image = base.crop((left, top, left + self.width, top + self.height))
        if draw.below(2):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        black, white = draw.below(24), 255 - draw.below(24)  # so that crops at the same position still differ
        image = image.point([black + value * (white - black) // 255 for value in range(256)] * 3)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()

    def caption(self, i: int) -> str:
        """Return caption `i`: 3 to 30 words in English or (one in ten) Korean."""
        draw = _Draw(self.seed, 2, i)
        num_words = _MIN_WORDS + draw.below(draw.below(_MAX_WORDS - _MIN_WORDS + 1) + 1)  # short captions are common
        korean = draw.below(10) < 10 * _KOREAN_SHARE
        adjectives = (_KOREAN_ADJECTIVES if korean else _ADJECTIVES).split()
        nouns = (_KOREAN_NOUNS if korean else _NOUNS).split()
        places = (_KOREAN_PLACES if korean else _PLACES).split()
        num_places, num_more = divmod(num_words - _MIN_WORDS, 4)
        thing = [draw.choice(adjectives) for _ in range(num_more + 1)] + [draw.choice(nouns)]
        others = [(draw.choice(adjectives), draw.choice(nouns), draw.choice(places)) for _ in range(num_places)]
        if korean:  # in Korean the places precede the thing
            before = [f"{adjective} {noun} {place} {_KOREAN_THAT_IS}" for adjective, noun, place in others]
            return " ".join([*before, draw.choice(adjectives), *thing])
        after = [f"{place} the {adjective} {noun}" for adjective, noun, place in others]
        return " ".join(["the", *thing, *after])


def write_synthetic(
    out: str | os.PathLike[str],
    photos: SyntheticPhotos,
    *,
    num_shards: int,
    num_samples: int,
    num_workers: int | None = None,
    engine: str = "local",
) -> dict[str, Any]:
    """Write samples 0 .. `num_samples` - 1 as `shard-00000.tar`, ..., evenly distributed, in this order.

    The bytes do not depend on the number of workers. A killed call resumes when it is repeated.

    Args:
        out: folder of the shards.
        photos: generator of the samples.
        num_shards: at least 1, at most `num_samples`.
        num_samples: number of samples in all shards.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Returns:
        samples, shards, bytes of the tars, and whether everything already existed (`was_there`).

    Raises:
        UsageError: a number is invalid, or the folder contains something else.
    """
    if not (1 <= photos.width <= _MAX_SIDE and 1 <= photos.height <= _MAX_SIDE and 1 <= photos.quality <= 95):
        raise UsageError(f"width and height must be 1 .. {_MAX_SIDE} px and the quality 1 .. 95, got {photos}")
    if not 1 <= num_shards <= num_samples or not 0 <= photos.seed < 2**32:
        raise UsageError(
            f"cannot write {num_samples} samples to {num_shards} shards with seed {photos.seed}",
            hint="use at least one sample per shard, and a seed of 0 .. 4294967295",
        )
    folder = Path(out)
    plan = {"verb": "synthetic", **photos._asdict(), "shards": num_shards, "samples": num_samples}
    with owned(folder):
        report = open_output(folder, plan)
        if report is not None:
            return report | {"was_there": True}
        ends = [(number + 1) * num_samples // num_shards for number in range(num_shards)]
        tasks = list(zip(range(num_shards), [0, *ends[:-1]], ends, strict=True))
        function = functools.partial(_write_shard, folder, photos)
        done = track(run_tasks(function, tasks, num_workers=num_workers, engine=engine), num_shards, "writing shards")
        report = {"samples": num_samples, "shards": num_shards, "bytes": sum(size for _, size in done)}
        close_output(folder, plan, report)
        return report | {"was_there": False}


def _write_shard(folder: Path, photos: SyntheticPhotos, task: tuple[int, int, int]) -> int:
    """Write one shard, unless it exists; return its size in bytes."""
    number, start, stop = task
    tar = folder / f"shard-{number:05d}.tar"
    if not tar.exists():  # shards are written atomically
        with ShardWriter(folder, max_samples=stop - start, first_number=number) as writer:
            for i in range(start, stop):
                writer.write(f"{i:09d}", {"jpg": photos.jpeg(i), "txt": photos.caption(i)})
    return open_index(tar).tar_size


class _Draw:
    """Random numbers that are stable across numpy versions: SeedSequence and raw outputs are guaranteed (NEP 19)."""

    def __init__(self, *numbers: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(numbers))

    def bytes(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        num = int(np.prod(shape))
        raw = np.asarray(self._bits.random_raw(num // 8 + 1), "<u8")
        return raw.view(np.uint8)[:num].reshape(shape)

    def below(self, stop: int) -> int:
        return int(self._bits.random_raw()) % stop

    def fraction(self) -> float:
        return int(self._bits.random_raw()) / 2**64

    def choice(self, words: list[str]) -> str:
        return words[self.below(len(words))]


@functools.lru_cache(maxsize=_NUM_BASES)
def _base_image(width: int, height: int, seed: int, number: int) -> Image.Image:
    draw = _Draw(seed, 0, number)
    size = (int(width * _BASE_SCALE) + 8, int(height * _BASE_SCALE) + 8)
    colours, texture = _draw_objects(size, draw)
    shade = _octaves(size, draw, decay=100 + draw.below(25))
    light = (shade * np.asarray(texture, np.int32)) >> 8
    pixels = np.asarray(colours, np.int32) + light[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_objects(size: tuple[int, int], draw: _Draw) -> tuple[Image.Image, Image.Image]:
    """Return an image of occluding objects, and one with the amount of noise of each object."""
    palette = _muted(draw.bytes((6, 3)))
    colours = Image.fromarray(_muted(draw.bytes((3, 4, 3))).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    texture = Image.new("L", size, 24)
    pen, texture_pen = ImageDraw.Draw(colours), ImageDraw.Draw(texture)
    smallest, largest = (share * min(size) for share in _OBJECT_RADII)
    for _ in range(_NUM_OBJECTS):
        # Radii with density r**-3 between the two bounds: with these sizes images look alike at every scale.
        share = draw.fraction()
        radius = int((smallest**-2 + share * (largest**-2 - smallest**-2)) ** -0.5)
        x, y = draw.below(size[0]), draw.below(size[1])
        flat = 1 + draw.below(3)
        box = (x - radius, y - radius // flat, x + radius, y + radius // flat)
        colour = tuple((palette[draw.below(len(palette))] + draw.below(64) - 32).clip(0, 255).tolist())
        strength = draw.below(256) ** 3 >> 16
        if draw.below(4):
            pen.ellipse(box, fill=colour)
            texture_pen.ellipse(box, fill=strength)
        else:
            pen.rectangle(box, fill=colour)
            texture_pen.rectangle(box, fill=strength)
    blur = ImageFilter.GaussianBlur(0.5 + min(size) / 3000)  # a lens has no hard edges
    return colours.filter(blur), texture.filter(blur)


def _muted(colours: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the colours with lower saturation, as in photographs."""
    wide = colours.astype(np.int64)
    return (wide + 2 * wide.mean(axis=-1, keepdims=True).astype(np.int64)) // 3


def _octaves(size: tuple[int, int], draw: _Draw, decay: int) -> NDArray[np.int32]:
    """Return a sum of noise octaves, each with half the cell size and `decay` percent of the weight of the previous."""
    total = np.zeros(size[::-1], np.int32)
    weight = 64
    for octave in range(_OCTAVES):
        cells = [max(2, -(-side * 2 ** (octave + 1) // max(size))) for side in size]
        if max(cells) > max(size):
            break
        grid = Image.fromarray(draw.bytes((cells[1], cells[0])))
        noise = np.asarray(grid.resize(size, Image.Resampling.BICUBIC), np.int32) - 128
        total += (noise * weight) >> 8
        weight = weight * decay // 100
    return total
