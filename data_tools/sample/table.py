"""One table of a shard's samples, written next to it as `NAME.tar.meta.parquet`.

Columns, one row a sample of the index, in its order:

    key            string   without the shard's name
    width, height  int32    px, as the image is delivered: turned by EXIF or XMP
    aspect         float32  width / height
    image_format   string   JPEG, PNG or WEBP
    image_bytes    int64
    caption        string   the txt field, else "caption" of the json field
    caption_chars  int32
    caption_words  int32    see `data_tools.sample.language.count_words`
    script         string   Latin, Hangul, Han, Kana, ...: of most letters of the caption
    language       string   ISO 639 code, "und" where it could be several; null without py3langid
    label          int64    the cls field, where it is a class index
    label_name     string   the cls field, where it is a class name
    image_sha256   string   hex
    phash          uint64   perceptual hash, null unless asked for
    bad            string   why the sample cannot be delivered, a cause of `data_tools.core.errors.CAUSES`; else null

What a sample lacks is null. The schema's metadata say which index, detector and hash the table was made with, so that a
stale one is noticed and made again.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from data_tools.core.errors import SampleError
from data_tools.core.files import write_atomic
from data_tools.core.mapped import read_parquet
from data_tools.core.names import as_text
from data_tools.core.progress import track
from data_tools.core.workers import run_tasks
from data_tools.sample.content import read_content
from data_tools.sample.decode import ImageError, decode_image
from data_tools.sample.language import count_words, detector_name, language_of, script_of
from data_tools.tar.index import ShardIndex, index_path, open_indexes
from data_tools.tar.location import Location, LocationLike
from data_tools.tar.reader import ShardReader

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "aspect": pa.float32(),
        "image_format": pa.string(),
        "image_bytes": pa.int64(),
        "caption": pa.string(),
        "caption_chars": pa.int32(),
        "caption_words": pa.int32(),
        "script": pa.string(),
        "language": pa.string(),
        "label": pa.int64(),
        "label_name": pa.string(),
        "image_sha256": pa.string(),
        "phash": pa.uint64(),
        "bad": pa.string(),
    }
)
_FORMAT = b"3"


class _Task(NamedTuple):
    shard: ShardIndex
    with_phash: bool


def metadata_path(tar: LocationLike) -> Path:
    """Return the path of the table of `tar`: next to its index."""
    path = index_path(tar)
    return path.with_name(f"{path.name.removesuffix('.idx')}.meta.parquet")


def shard_metadata(
    tars: Sequence[LocationLike], *, with_phash: bool = False, num_workers: int | None = None, engine: str = "local"
) -> pa.Table:
    """Return the tables of all shards as one, with the columns `shard` (the tar as it was given, a URL without its
    secrets) and `sample` (number).

    Tables that are missing or stale are made, in parallel, and written next to their shards.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        with_phash: also the perceptual hash, which needs each image decoded.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        CheckpointError, DataError: as `open_index`.
    """
    indexes = open_indexes(tars)
    tables = [_read_fresh(index, with_phash) for index in indexes]
    missing = [number for number, table in enumerate(tables) if table is None]
    tasks = [_Task(indexes[number], with_phash) for number in missing]
    done = run_tasks(_make_table, tasks, num_workers=num_workers, engine=engine)
    for task, table in track(done, len(tasks), "reading shards"):
        tables[missing[task]] = table
    return pa.concat_tables(
        table.replace_schema_metadata(None)
        .add_column(0, "shard", pa.array([as_text(str(Location(tar)))] * len(table), pa.string()))
        .add_column(1, "sample", pa.array(range(len(table)), pa.int64()))
        for tar, table in zip(tars, tables, strict=True)
        if table is not None
    )


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit pHash of an image: that of `imagehash.phash`, most significant bit first.

    Each bit says whether one of the 8 x 8 lowest frequencies of 32 x 32 grey pixels is over their median.
    Copies at another size or JPEG quality differ in a few bits, different images in about 32.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_cosines() @ grey @ _cosines().T).round(6)  # what is 0 in symmetrical images is so on every machine
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


@functools.cache
def _cosines() -> np.ndarray[Any, Any]:
    """Return the first 8 rows of the type-II cosine transform of length 32."""
    return 2 * np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)


def _stamp(index: ShardIndex, with_phash: bool) -> dict[bytes, bytes]:
    return {
        b"mmvit.format": _FORMAT,
        b"mmvit.index_sha256": index.header["body_sha256"].encode(),
        b"mmvit.language": detector_name().encode(),
        b"mmvit.phash": b"1" if with_phash else b"0",
    }


def _read_fresh(index: ShardIndex, with_phash: bool) -> pa.Table | None:
    """Return the table on disk where it holds all that is wanted, else None."""
    path = metadata_path(index.tar)
    wanted = _stamp(index, with_phash)
    try:
        table = read_parquet(path)
    except (OSError, pa.ArrowException):  # none, or a damaged one: it is made again, nothing is lost by that
        return None
    found = table.schema.metadata or {}
    more = {b"mmvit.phash": b"1"}  # no harm in it
    if detector_name() == "none":
        more[b"mmvit.language"] = found.get(b"mmvit.language", b"")
    fresh = all(found.get(name) in (value, more.get(name)) for name, value in wanted.items())
    return table if fresh and table.schema.equals(SCHEMA) else None


def _make_table(task: _Task) -> pa.Table:
    index = task.shard
    reader = ShardReader([index])
    rows = [_row(reader, index, i, task.with_phash) for i in range(len(index))]
    schema = SCHEMA.with_metadata(_stamp(index, task.with_phash))
    table = pa.Table.from_pylist(rows, schema)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    path = metadata_path(index.tar)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        logger.warning("%s cannot be written (%s); the next run will write it again", path, error.strerror)
    return table


def _row(reader: ShardReader, index: ShardIndex, i: int, with_phash: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"key": index.key(i)}
    try:
        fields = reader.fields(0, i)
    except SampleError as error:
        return row | {"bad": error.cause}
    content = read_content(fields, index.fields)
    row["bad"] = content.fault.cause if content.fault else None
    if content.label is not None:
        row["label_name" if isinstance(content.label, str) else "label"] = content.label
    caption = content.text
    if caption is not None:
        row |= {"caption": caption, "caption_chars": len(caption), "caption_words": count_words(caption)}
        row |= {"script": script_of(caption), "language": language_of(caption)}
    if content.image_field is not None:
        assert content.width is not None
        assert content.height is not None
        image = fields[content.image_field]
        row |= {"width": content.width, "height": content.height, "aspect": content.width / content.height}
        row |= {"image_format": content.image_format, "image_bytes": len(image)}
        row["image_sha256"] = index.digest(i, content.image_field).hex()
        if with_phash:
            row |= _phash(image, row["bad"])
    return row


def _phash(image: bytes, bad: str | None) -> dict[str, Any]:
    try:
        return {"phash": perceptual_hash(decode_image(image))}
    except ImageError as error:
        return {"bad": bad or error.cause}
