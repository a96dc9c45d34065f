"""A folder of shards that tells what it is to hold, so that work which was killed is completed by running it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from data_tools.core.files import make_folder, write_atomic

MANIFEST = "shards.json"


def open_output(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the folder for `plan`, or take up one of an equal plan; return its report where the work is finished.

    Raises:
        UsageError: the folder holds something else, or what another plan made, or its tars are not those that were
            there when it was finished; nothing is written.
    """
    wanted = json.loads(json.dumps(plan))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        make_folder(folder)
        _write(folder, wanted, None)
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        there, report, tars = dict(manifest["plan"]), manifest["report"], manifest.get("tars")
    except (OSError, ValueError, TypeError, KeyError):
        raise _occupied(folder, "the output folder holds something else") from None
    different = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
    if "verb" in different:
        raise _occupied(folder, f"the output folder holds what mmvit-data {there.get('verb')} wrote")
    if different:
        state = "finished" if report else "unfinished"
        what = f"the output folder holds {state} work that differs in: {', '.join(different)}"
        raise _occupied(folder, what, "" if report else f", or if nobody completes this one: rm -r {folder}")
    if report and tars and tars != (now := _tars(folder)):
        what = f"the output folder was finished with {_told(tars)}, and now has {_told(now)}"
        lost = now["bytes"] < tars["bytes"]
        raise _occupied(folder, what, f", or to make it again: rm -r {folder}" if lost else "")
    return dict(report) if report else None


def close_output(folder: Path, plan: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Say that the folder is finished, and remove what killed processes left in it."""
    for left in folder.glob(".*.tmp-*"):
        left.unlink(missing_ok=True)
    _write(folder, plan, report)


def _write(folder: Path, plan: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    manifest = {"plan": plan, "report": report, "tars": _tars(folder)}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def _tars(folder: Path) -> dict[str, int]:
    sizes = [tar.stat().st_size for tar in folder.glob("*.tar")]
    return {"count": len(sizes), "bytes": sum(sizes)}


def _told(tars: Mapping[str, int]) -> str:
    return f"{tars['count']} tars of {tars['bytes']} bytes"


def _occupied(folder: Path, what: str, or_else: str = "") -> UsageError:
    note = "nothing was written or overwritten"
    return UsageError(what, where=str(folder), note=note, hint=f"choose another folder{or_else}")
