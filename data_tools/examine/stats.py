"""Counts and distributions of the content of shards, as numbers and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.sample.table import shard_metadata
from data_tools.tar.location import LocationLike
from data_tools.tar.open import open_file

# Row of the printed table: path in the numbers, unit, decimals.
_ROWS = {
    "samples per shard": (("samples_a_shard",), "", 0),
    "image width": (("pictures", "width"), " px", 0),
    "image height": (("pictures", "height"), " px", 0),
    "image width / height": (("pictures", "aspect"), "", 2),
    "image file": (("pictures", "bytes"), " bytes", 0),
    "caption characters": (("captions", "characters"), "", 0),
    "caption words": (("captions", "words"), "", 0),
    "samples a label": (("labels", "samples"), "", 0),
}
_COLUMNS = ("least", "median", "mean", "p95", "most")
_MOST_NAMED = 12


def shard_stats(
    tars: Sequence[LocationLike], *, num_workers: int | None = None, engine: str = "local"
) -> tuple[dict[str, Any], pa.Table]:
    """Return the numbers of `summarise`, with the size of the tars, and the table they were taken from.

    Args:
        tars: the shards, as from `data_tools.tar.expand.expand_shards`.
        num_workers: processes, see `run_tasks`.
        engine: see `run_tasks`.

    Raises:
        CheckpointError, DataError: as `shard_metadata`.
    """
    table = shard_metadata(tars, num_workers=num_workers, engine=engine)
    return {"bytes": sum(open_file(tar).size for tar in tars)} | summarise(table), table


def summarise(table: pa.Table) -> dict[str, Any]:
    """Return counts and distributions of a table of `shard_metadata`, as they are printed with --json.

    A distribution is {least, median, mean, p95, most}, None without values. Duplicates: `groups` of samples with equal
    content, and the `surplus`, that is, how many could go so that one of each group stays.
    """
    labels = Counter([*column_values(table, "label").tolist(), *column_values(table, "label_name").tolist()])
    per_shard = Counter(table.column("shard").to_pylist())
    return {
        "shards": len(per_shard),
        "samples": table.num_rows,
        "samples_a_shard": _spread(np.array(list(per_shard.values()))),
        "bad_samples": _counts(table, "bad"),
        "pictures": {
            "count": len(table) - table.column("width").null_count,
            "formats": _counts(table, "image_format"),
            "width": _spread(column_values(table, "width")),
            "height": _spread(column_values(table, "height")),
            "aspect": _spread(column_values(table, "aspect")),
            "bytes": _spread(column_values(table, "image_bytes")),
            "duplicates": _duplicates(table, "image_sha256"),
        },
        "captions": {
            "count": len(table) - table.column("caption").null_count,
            "characters": _spread(column_values(table, "caption_chars")),
            "words": _spread(column_values(table, "caption_words")),
            "scripts": _counts(table, "script"),
            "languages": _counts(table, "language"),
            "duplicates": _duplicates(table, "caption"),
        },
        "labels": {"count": labels.total(), "different": len(labels), "samples": _spread(np.array([*labels.values()]))},
    }


def column_values(table: pa.Table, column: str) -> NDArray[Any]:
    """Return the values of a column without the missing ones."""
    return np.asarray(table.column(column).drop_null())


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    """Return the values with their numbers, most first."""
    counts = {row["values"]: row["counts"] for row in table.column(column).drop_null().value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    median, p95 = np.percentile(values, [50, 95])
    found = (values.min(), median, values.mean(), p95, values.max())
    return {name: round(float(value), 3) for name, value in zip(_COLUMNS, found, strict=True)}


def _duplicates(table: pa.Table, column: str) -> dict[str, int]:
    several = [count for count in _counts(table, column).values() if count > 1]
    return {"groups": len(several), "samples": sum(several), "surplus": sum(several) - len(several)}


def describe(stats: dict[str, Any]) -> str:
    """Return the numbers of `shard_stats` as text."""
    pictures, captions, labels = stats["pictures"], stats["captions"], stats["labels"]
    lines = [headline(stats), "", *_spreads(stats)]
    lines += ["", f"images      {pictures['count']:,}: {_shares(pictures['formats'])}"]
    lines.append(f"captions    {captions['count']:,}: {_shares(captions['scripts'])}")
    if captions["languages"]:
        lines.append(f"languages   {_shares(captions['languages'])}")
    elif captions["count"]:
        lines.append('languages   not determined; pip install "mmvit[data]"')
    lines.append(f"labels      {labels['count']:,} samples have one, {labels['different']:,} different")
    lines += [
        f"duplicates  {_duplicates_text(pictures['duplicates'], 'image')}",
        f"            {_duplicates_text(captions['duplicates'], 'caption')}",
    ]
    if stats["bad_samples"]:
        lines.append(f"bad         {_shares(stats['bad_samples'])}: see mmvit-data check")
    return "\n".join(lines)


def headline(stats: dict[str, Any]) -> str:
    """Return the numbers of shards, samples and bytes as one line."""
    return f"shards: {stats['shards']:,}, samples: {stats['samples']:,}, size: {stats['bytes'] / 1e6:,.1f} MB"


def _spreads(stats: dict[str, Any]) -> list[str]:
    header = f"{'':24}" + "".join(f"{name:>12}" for name in ("least", "median", "mean", "95 %", "most"))
    lines = [header]
    for name, (path, unit, decimals) in _ROWS.items():
        spread: Any = stats
        for part in path:
            spread = spread[part]
        if spread is not None:
            lines.append(f"{name:24}" + "".join(f"{spread[column]:12,.{decimals}f}" for column in _COLUMNS) + unit)
    return lines


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    shown = [f"{name} {count:,} ({count / total:.1%})" for name, count in list(counts.items())[:_MOST_NAMED]]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f", {rest} more" if rest else "") if shown else "none"


def _duplicates_text(found: dict[str, int], what: str) -> str:
    if not found["groups"]:
        return f"no duplicate {what}s"
    return (
        f"{found['samples']:,} samples share {found['groups']:,} {what}{'s' if found['groups'] > 1 else ''}, byte for "
        f"byte (surplus: {found['surplus']:,})"
    )
