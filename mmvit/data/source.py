"""What training and evaluation read samples from, whatever stores them."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

from data_tools.core.errors import SampleError
from data_tools.sample.content import FaultError, Label, find_image, read_caption, read_label, read_metadata
from data_tools.tar.shard_names import ShardNames

OTHER_FIELDS = ("txt", "json", "cls")  # what a sample has besides its image


class RawSample(NamedTuple):
    """One stored sample: `key` as from `SampleSource.key`, `image` the encoded file, `label` the class.

    `image` is empty if it was not read. `caption` is None if the sample has no `txt`, "" if it is blank.
    """

    key: str
    image: bytes
    caption: str | None
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
    names: ShardNames

    def read(self, i: SupportsIndex, *, image: bool = True) -> RawSample:
        """Return sample `i`; `image=False` reads everything but its image. Raise SampleError if it is invalid."""

    def key(self, i: SupportsIndex) -> str:
        """Return "NAME/key" of sample `i`, unique over all data sets; for a stream, of the last sample."""

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


def some_samples(source: SampleSource, num: int) -> list[int]:
    """Return the numbers of some samples, the same in each call; none of a stream.

    They are drawn: what is wrong with samples may be periodic, and hits all or none of those at equal distances.
    """
    among = source.num_samples or 0
    return sorted(random.Random(among).sample(range(among), min(num, among)))


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
        require_caption: False also takes samples without a caption.

    Raises:
        SampleError: no image, or what `data_tools.sample.content` finds wrong.
    """
    try:
        data = fields[find_image(fields)] if image else b""
        caption = read_caption(fields, require_caption)
        return RawSample(key, data, caption, read_metadata(fields), read_label(fields))
    except FaultError as error:
        raise fault(*error.fault) from error
