"""Error classes, each with an exit code; an error has a message, a location, a note and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from data_tools.core.secrets import hide_secrets

# Causes of corrupt or invalid samples, as used in reports and logs, and their descriptions.
CAUSES = {
    "damaged": "a part of the tar cannot be read",
    "truncated": "the tar is truncated",
    "double-key": "two different samples have the same key",
    "double-field": "the sample has a field twice, with different content",
    "dotted-name": "a dot inside the file name turns it into another field",
    "hash": "the bytes differ from those that were indexed",
    "no-image": "the sample has no image",
    "no-caption": "the sample has no caption",
    "empty-caption": "the caption is empty",
    "not-utf8": "a text is not UTF-8 or contains a NUL",
    "bad-json": "the metadata is not a JSON object",
    "bad-label": "the label is neither a class index nor a class name",
    "bad-image": "the image cannot be decoded",
    "no-embedding": "the stored embeddings have no row for the sample",
    "too-large": "the image has too many pixels, or a file too many bytes",
}

_REPAIR = "repair the shard without this sample: mmvit-data repair"


class MmvitError(Exception):
    """An error that a user can understand and fix; it shows URLs without their secrets.

    Args:
        what: what happened, one sentence.
        where: shard, key, byte, file or config key; shown with `str`.
        note: consequence (skipped, stopped, nothing lost).
        hint: how to fix it, preferably a command to copy.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, note: str | None = None, hint: str | None = None):
        self.what = hide_secrets(what)
        self.where = None if where is None else hide_secrets(str(where))
        self.note = note and hide_secrets(note)
        self.hint = hint and hide_secrets(hint)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.note:
            lines.append(f"  note: {self.note}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would be lost when a worker sends the error to its parent process.
        return _rebuild, (type(self), self.what, self.where, self.note, self.hint)


def _rebuild(kind: type[MmvitError], what: str, where: str | None, note: str | None, hint: str | None) -> MmvitError:
    return kind(what, where=where, note=note, hint=hint)


class UsageError(MmvitError, ValueError):
    """Wrong use or configuration; nothing was started."""

    exit_code = 2


class DataError(MmvitError):
    """Input data that cannot be used."""

    exit_code = 3


class SampleError(DataError):
    """A corrupt or invalid sample; a run skips it, counts it by `cause` and continues.

    Args:
        cause: one of `CAUSES`.
        what: what is wrong with it, one sentence.
        shard: path or `Location` of the tar.
        key: the sample's key in the tar; "" if unknown.
        hint: None for a sample of something else than a shard.
    """

    def __init__(
        self, cause: str, what: str, *, shard: object, key: str, note: str | None = None, hint: str | None = _REPAIR
    ):
        assert cause in CAUSES, cause
        self.cause = cause
        self.shard = str(shard)
        self.key = key
        where = f"{shard}, key {key!r}" if key else shard
        super().__init__(what, where=where, note=note, hint=hint)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_sample, (self.cause, self.what, self.shard, self.key, self.note, self.hint)


def _rebuild_sample(cause: str, what: str, shard: str, key: str, note: str | None, hint: str | None) -> SampleError:
    return SampleError(cause, what, shard=shard, key=key, note=note, hint=hint)


class CheckpointError(MmvitError):
    """A checkpoint, model folder or index that is damaged or does not match."""

    exit_code = 4


class WrongPathError(UsageError, CheckpointError):
    """A path where no model or embeddings are: wrong use, and one of the errors that loading them raises."""


class ResourceError(MmvitError):
    """Out of disk space, memory or time."""

    exit_code = 5


class DivergedError(MmvitError):
    """Training diverged."""

    exit_code = 6


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the closest of `choices`, or "" if none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f"did you mean '{by_lower[close[0]]}'?" if close else ""
