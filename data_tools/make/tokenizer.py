"""A tokenizer trained on the user's own captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.core.files import make_folder, write_atomic
from data_tools.core.progress import track
from data_tools.sample.content import FaultError, find_texts, read_caption, read_metadata
from data_tools.tar.index import open_indexes
from data_tools.tar.location import LocationLike
from data_tools.tar.reader import ShardReader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD = "<|pad|>"
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"

_BATCH = 10_000  # texts that are encoded at once


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016) on `texts`, write its `tokenizer.json` and return it.

    All 256 bytes are in the vocabulary, so that the tokenizer reads any text, and the trained merges keep the
    languages of the captions short: a Korean syllable costs CLIP's English vocabulary up to three tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START_OF_TEXT, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_atomic(path, tokenizer.to_str(pretty=True).encode())
    return tokenizer


class TokenizerReport(NamedTuple):
    """What a tokenizer was trained on; lengths are in tokens, start and end of text included."""

    captions: int
    skipped: dict[str, int]  # cause -> samples
    vocab_size: int
    mean_length: float
    p99_length: int  # 99 of 100 captions are at most as long


class ShardTexts:
    """The texts of all samples of some shards, read again in each pass.

    Args:
        shards: the tars.
        source: "txt", or a path into the metadata, as for `find_texts`; of several texts, all are taken.
    """

    def __init__(self, shards: Sequence[LocationLike], source: str = "txt"):
        self.source = source
        self.skipped: Counter[str] = Counter()  # cause -> samples without a text, of the last time
        self._reader = ShardReader(open_indexes(shards))

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        sizes = [len(index) for index in self._reader.indexes]
        places = ((shard, i) for shard, size in enumerate(sizes) for i in range(size))
        for shard, i in track(places, sum(sizes), "reading captions"):
            try:
                yield from self._texts(shard, i)
            except SampleError as error:
                self.skipped[error.cause] += 1

    def _texts(self, shard: int, i: int) -> list[str]:
        field = "txt" if self.source == "txt" else "json"
        fields = self._reader.fields(shard, i, (field,))
        try:
            found = find_texts(self.source, read_caption(fields), read_metadata(fields))
            texts = [text for texts in found.values() for text in texts if text]
            if not texts:
                raise FaultError("empty-caption" if found else "no-caption", f"there is no text in {self.source!r}")
        except FaultError as error:
            raise self._reader.error(*error.fault, shard, i) from error
        return texts


def train_on_shards(
    shards: Sequence[LocationLike], path: str | os.PathLike[str], vocab_size: int = 4096, source: str = "txt"
) -> TokenizerReport:
    """Train a tokenizer on the captions of shards, write it and report how long the captions are in its tokens.

    The captions are read twice and are never all in memory.

    Raises:
        UsageError: `path` exists.
        DataError: no sample has a caption.
    """
    if Path(path).exists():
        hint = "name another --out, or remove the file"
        raise UsageError("the file exists", where=str(path), note="nothing was overwritten", hint=hint)
    make_folder(Path(path).parent)
    texts = ShardTexts(shards, source)
    if next(iter(texts), None) is None:
        causes = ", ".join(f"{count} x {cause}" for cause, count in texts.skipped.items())
        hint = "select the source of the captions: --source txt, or a path into the JSON such as --source names.en"
        raise DataError("no sample has a caption", where=f"source {source!r}", note=causes, hint=hint)
    tokenizer = train_tokenizer(texts, Path(path), vocab_size)
    lengths = sorted(_count_lengths(tokenizer, texts).items())
    totals = list(accumulate(count for _, count in lengths))
    mean = sum(length * count for length, count in lengths) / totals[-1]
    p99 = next(length for (length, _), total in zip(lengths, totals, strict=True) if total >= 0.99 * totals[-1])
    return TokenizerReport(totals[-1], dict(texts.skipped), tokenizer.get_vocab_size(), mean, p99)


def _count_lengths(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """Return length in tokens, start and end of text included -> number of texts."""
    lengths: Counter[int] = Counter()
    left = iter(texts)
    tokenizer.encode_special_tokens = True  # a caption that spells one out, as in training
    while batch := list(islice(left, _BATCH)):
        lengths.update(len(row.ids) + 2 for row in tokenizer.encode_batch(batch, add_special_tokens=False))
    return lengths
