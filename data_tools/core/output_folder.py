"""Checks whether a folder may be written: it is new, unfinished work of the same kind, or finished.

A folder of shards records in `shards.json` what it will contain, so that killed work is completed by running it again;
other folders are only written when they are new.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from data_tools.core.files import fsync_tree, make_folder, rename_synced, temporary_name, write_atomic

MANIFEST = "shards.json"
SOMETHING_ELSE = "the output folder contains other files"


def is_free(folder: Path, *, replaced: bool = False) -> bool:
    """Return whether a folder may be written as a new one: it does not exist, or is empty.

    Hidden files, which killed writes leave, do not count, except where the folder will be `replaced` as a whole.
    """
    if replaced and folder.is_symlink():
        return False
    if not folder.exists():
        return True
    return folder.is_dir() and all(child.name.startswith(".") and not replaced for child in folder.iterdir())


def check_free(
    folder: Path, what: str = SOMETHING_ELSE, *, replaced: bool = False, hint: str = "choose another folder"
) -> None:
    """Raise UsageError, with `what` as its message, unless `is_free`."""
    if not is_free(folder, replaced=replaced):
        raise occupied(folder, what, hint)


def check_apart(folder: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError if one of the input files is in the output folder."""
    resolved = folder.resolve()
    if any(path.resolve().parent == resolved for path in inputs):
        what = "the new shards cannot be written to the folder of the input shards"
        raise occupied(folder, what, "choose another folder", "nothing was written; shards are never changed in place")


@contextlib.contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder next to `final`; on success sync and rename it, on an exception remove it.

    `final` must not exist yet, or be an empty folder: a non-empty folder is never overwritten.

    Raises:
        UsageError: `final` exists and is not an empty folder (raised before anything is written).
    """
    target = Path(final).absolute()
    hint = "choose another folder, or remove this one"
    check_free(target, "the output folder exists and is not empty", replaced=True, hint=hint)
    make_folder(target.parent)
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier attempt of this process that could not be removed
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        rename_synced(temporary, target)  # POSIX rename replaces an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def open_output(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Create the folder for `plan`, or resume one with an equal plan; return its report if the work is finished.

    Raises:
        UsageError: the folder holds something else, or what another plan made, or its tars are not those that were
            there when it was finished; nothing is written.
    """
    wanted = json.loads(json.dumps(plan))
    if is_free(folder):
        make_folder(folder)
        _write(folder, wanted, None)
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        there, report, tars = dict(manifest["plan"]), manifest["report"], manifest.get("tars")
    except (OSError, ValueError, TypeError, KeyError):
        raise occupied(folder, SOMETHING_ELSE) from None
    different = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
    if "verb" in different:
        raise occupied(folder, f"the output folder contains what mmvit-data {there.get('verb')} wrote")
    if different:
        state = "finished" if report else "unfinished"
        what = f"the output folder contains {state} work that differs in: {', '.join(different)}"
        raise occupied(folder, what, _or(f"if nobody completes this one: rm -r {folder}", not report))
    if report and tars and tars != (now := _tars(folder)):
        what = f"the output folder was finished with {_told(tars)}, and now has {_told(now)}"
        lost = now["bytes"] < tars["bytes"]
        raise occupied(folder, what, _or(f"to make it again: rm -r {folder}", lost))
    return dict(report) if report else None


def close_output(folder: Path, plan: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Mark the folder as finished, and remove what killed processes left in it."""
    for left in folder.glob(".*.tmp-*"):
        left.unlink(missing_ok=True)
    _write(folder, plan, report)


def _write(folder: Path, plan: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    manifest = {"plan": plan, "report": report, "tars": _tars(folder)}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def _tars(folder: Path) -> dict[str, int]:
    sizes = [tar.stat().st_size for tar in folder.glob("*.tar")]
    return {"count": len(sizes), "bytes": sum(sizes)}


def _or(other: str, is_other: bool) -> str:
    return "choose another folder" + (f", or {other}" if is_other else "")


def _told(tars: Mapping[str, int]) -> str:
    return f"{tars['count']} tars of {tars['bytes']} bytes"


def occupied(
    folder: Path,
    what: str,
    hint: str = "choose another folder",
    note: str = "nothing was written or overwritten",
) -> UsageError:
    """Return the error of a folder that may not be written."""
    return UsageError(what, where=folder, note=note, hint=hint)
