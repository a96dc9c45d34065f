"""The lines of the log of a run, read without torch."""

import json
import logging
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
CHANGED = "changed"  # in a line of its own: the settings with which the run resumed

logger = logging.getLogger(__name__)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `log.jsonl`, without an incomplete last line that a crash left."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the readable lines of a JSON lines file; warn about others, such as zeros after a power failure."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows, damaged = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            damaged += line.endswith(b"\n")
    if damaged:
        logger.warning("%d damaged lines of %s were skipped", damaged, path)
    return rows
