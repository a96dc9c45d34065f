"""Progress of a loop: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_LINE_EVERY_S = 5.0


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items and show progress on standard error."""
    return _bar(items, total, label) if sys.stderr.isatty() else _lines(items, total, label)


def _bar(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class RateColumn(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.speed or 0:.0f}/s")

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        RateColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total, description=label)


def _lines(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    start = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= _LINE_EVERY_S or (done == total and shown > start):  # short work needs no line
            shown = now
            rate = done / max(now - start, 1e-9)
            left = (total - done) / rate
            print(f"{label}: {done}/{total}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)
