"""What training and evaluation read samples from, whatever stores them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

from data_tools.core.errors import SampleError
from data_tools.tar.scan import IMAGE_FIELDS

Label = int | str  # a class index, or a class name
OTHER_FIELDS = ("txt", "json", "cls")  # what a sample has besides its image


class RawSample(NamedTuple):
    """One sample as it is stored: `key` is "shard.tar/key", `image` the encoded file, `label` the class.

    `image` is empty where it was left out.
    """

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] | None
    label: Label | None


class Reading(NamedTuple):
    """What one of several readers (workers of all ranks) reads of a stream.

    Attributes:
        seed: of the run.
        first: micro-batch with which this run of the program begins; equal for all readers.
        reader: number of this reader, from 0.
        num_readers: how many read the same stream.
    """

    seed: int
    first: int
    reader: int
    num_readers: int


@runtime_checkable  # tests check the types of arguments
class SampleSource(Protocol):
    """Samples by number: indexed shards, labelled shards or files, or a stream.

    A stream does not know how many samples it has. It is asked for its next sample by the number 0, and its errors are
    named by the number of the shard until a sample has come.
    """

    num_samples: int | None  # None: a stream
    shard_sizes: Sequence[int]  # how many numbers each shard has; a stream has one number

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return sample `i`; `image=False` reads everything but its image. Raise SampleError if it is invalid."""

    def key(self, i: SupportsIndex) -> str:
        """Return the key of sample `i`; for a stream, of the last sample."""

    def error(self, cause: str, what: str, i: SupportsIndex) -> SampleError:
        """Return an error that names sample `i`; it may read the index."""

    def shard(self, i: SupportsIndex) -> str:
        """Name the shard of sample `i` without reading anything."""

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) that changes when the samples do."""

    def lost(self) -> list[SampleError]:
        """Return the samples that are known to be lost and are never delivered."""
        return []

    def begin(self, reading: Reading, note: Callable[[int], None]) -> Callable[[int], None]:
        """Prepare this process for reading; only a stream has to.

        Return the function to call with each number before it is read. It passes on to `note` the number by which
        `error` and `shard` name what is being read.
        """
        return note


def raw_sample(
    key: str,
    fields: Mapping[str, bytes],
    fault: Callable[[str, str], SampleError],
    *,
    image: bool,
    require_caption: bool,
) -> RawSample:
    """Return the sample that is stored in `fields`.

    Args:
        key: of the sample.
        fields: the stored bytes by field.
        fault: makes the error of a cause and a text.
        image: whether an image is required; False leaves it empty.
        require_caption: False takes "" where there is no caption.

    Raises:
        SampleError: no image, an empty caption, text that is not UTF-8 or holds NUL, bad metadata or label.
    """
    data = next((fields[field] for field in IMAGE_FIELDS if field in fields), None)
    if image and not data:
        what = "the image is an empty file" if data is not None else f"its fields are: {' '.join(fields) or 'none'}"
        raise fault("no-image", f"the sample has no image: {what}")
    caption = _caption(fields, fault, require_caption)
    return RawSample(key, data or b"", caption, _meta(fields, fault), read_label(fields, fault))


def read_label(fields: Mapping[str, bytes], fault: Callable[[str, str], SampleError]) -> Label | None:
    """Return the class in `cls`, an index or a name; None where there is no `cls`."""
    if "cls" not in fields:
        return None
    text = _text(fields, "cls", fault).strip()
    if not text:
        raise fault("bad-label", "the label is empty")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else text


def _caption(fields: Mapping[str, bytes], fault: Callable[[str, str], SampleError], required: bool) -> str:
    caption = _text(fields, "txt", fault).strip() if "txt" in fields else ""
    if not caption and required:
        if "txt" in fields:
            raise fault("empty-caption", "the caption is empty")
        raise fault("no-caption", "the sample has no caption")
    return caption


def _meta(fields: Mapping[str, bytes], fault: Callable[[str, str], SampleError]) -> dict[str, Any] | None:
    if "json" not in fields:
        return None
    try:
        text = _text(fields, "json", fault)
        meta = json.loads(text)
        if "\\u" in text:  # escapes can spell what no text may hold: half a surrogate pair, or NUL
            if "\\u0000" in text:
                raise ValueError("it holds a NUL character")
            json.dumps(meta, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise fault("bad-json", f"the metadata is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise fault("bad-json", f"the metadata is a {type(meta).__name__} instead of an object")
    return meta


def _text(fields: Mapping[str, bytes], field: str, fault: Callable[[str, str], SampleError]) -> str:
    try:
        text = fields[field].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault("not-utf8", f".{field} is not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise fault("not-utf8", f".{field} holds a NUL character")
    return text
