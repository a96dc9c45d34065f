"""Training batches by step number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_tools.decode import decode_image
from data_tools.errors import DataError, SampleError, UsageError
from mmvit.data.captions import Caption, CaptionConfig, caption_texts, draw_caption
from mmvit.data.order import MixedOrder, SampleOrder
from mmvit.data.shards import IndexedShards, RawSample
from mmvit.data.tokenizers import Tokenizer
from mmvit.data.transforms import AugmentConfig, Pixels, train_pixels, train_pixels_from_bytes


@dataclass
class DataConfig:
    """Training data: shards, the texts to take from them, random changes."""

    train: list[str] = field(default_factory=list)  # files, folders, brace ranges, URLs
    weights: list[float] = field(default_factory=list)  # of each entry of train: uses of a sample; none: one data set
    captions: list[CaptionConfig] = field(default_factory=lambda: [CaptionConfig()])
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    decode: str = "fast"  # fast: a JPEG no larger than its crop needs | exact: as Pillow does it
    verify: bool = True  # compare what is read with the hashes of the index: bit rot decodes without an error
    max_bad_fraction: float = 0.01  # of the samples; when more cannot be used, the run ends. One always may be bad
    num_workers: int = 1  # loader processes for each training process; 0 loads between the steps
    prefetch_mb: int = 2048  # memory for batches that are prepared ahead, of each training process
    stall_timeout_s: float = 300.0  # longest wait for a batch
    cache_mb: int = 0  # pictures, decoded exactly, that each loader process keeps in memory, for small data sets


MAX_BAD_IN_A_ROW = 100  # a sample and those that were to stand in for it


class Batch(NamedTuple):
    """One process's part of a global batch: b images with V texts each, cut to the longest text L."""

    images: UInt8[Tensor, "b 3 H W"]
    ids: Int[Tensor, "b V L"]
    groups: Int[Tensor, "b V"]  # equal where the bare text is equal
    keys: list[str]
    bad: Sequence[SampleError] = ()  # samples that others stand in for
    num_cut: int = 0  # captions that were too long for the text tower and lost their tail


class Decoded(NamedTuple):
    """A sample before anything random; the image's file is left out of `sample`."""

    sample: RawSample
    image: Image.Image


class Drawn(NamedTuple):
    """A sample as a step sees it."""

    key: str
    pixels: Pixels
    captions: list[Caption]


class TrainBatches(Dataset[Batch]):
    """The batch of any training step, a function of (seed, step) alone.

    `shards_per_set` is the number of shards of each data set that `config.weights` mixes.

    Batch `number` is micro-batch number % micro_batches of step number // micro_batches. Order, augmentation and
    captions depend on nothing else: not on workers, on the number of processes or on what was read before. Resuming at
    a step therefore needs no state.
    """

    def __init__(
        self,
        shards: IndexedShards,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        shards_per_set: Sequence[int] = (),
    ):
        if batch_size % (world_size * micro_batches):
            parts = f"{world_size} processes x {micro_batches} micro-batches"
            what = f"a batch of {batch_size} does not divide over {parts}"
            raise UsageError(what, where="train.batch_size")
        self.shards = shards
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.order = _order(shards.shard_sizes, shards_per_set, config.weights, seed)
        self.cache: dict[int, Decoded] = {}
        self.cache_room = config.cache_mb * 2**20  # bytes

    def positions(self, number: int) -> range:
        """Positions of this process's samples in the endless stream of epochs, for micro-batch `number`."""
        step, micro = divmod(number, self.micro_batches)
        share = self.batch_size // self.world_size // self.micro_batches
        start = step * self.batch_size + (self.rank * self.micro_batches + micro) * share
        return range(start, start + share)

    def __getitem__(self, number: int) -> Batch:
        """Read, decode, change and tokenise this process's samples of one micro-batch."""
        return self.load(number, lambda sample_id: None)

    def load(self, number: int, note: Callable[[int], None]) -> Batch:
        """Return a micro-batch; `note` is called with each sample before it is read."""
        mine = self.positions(number)
        epochs, sample_ids = self.order.ids(mine.start, mine.stop)
        images, texts, groups, keys, bad = [], [], [], [], []
        for epoch, sample_id in zip(epochs.tolist(), sample_ids.tolist(), strict=True):
            (key, pixels, captions), errors = self._good(epoch, sample_id, note)
            bad += errors
            images.append(pixels)
            texts += [caption.text for caption in captions]
            groups.append([_group(caption.bare) for caption in captions])
            keys.append(key)
        tokens = self.tokenizer.tokenize(texts)
        ids = tokens.ids.unflatten(0, (len(keys), -1))
        return Batch(torch.from_numpy(np.stack(images)), ids, torch.tensor(groups), keys, bad, tokens.num_cut)

    def _good(self, epoch: int, sample_id: int, note: Callable[[int], None]) -> tuple[Drawn, list[SampleError]]:
        """Return a sample, or the one that stands in for it where it is bad: drawn by (seed, epoch, sample) alone.

        So a batch keeps its size and stays a function of (seed, step), whatever the number of processes.
        """
        bad: list[SampleError] = []
        chosen = sample_id
        while True:
            note(chosen)
            try:
                return self._draw(chosen, np.random.default_rng((self.seed, epoch, sample_id))), bad
            except SampleError as error:
                bad.append(error)
            if len(bad) == MAX_BAD_IN_A_ROW:
                raise DataError(
                    f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used, the last one because {bad[-1].what}",
                    where=bad[-1].where,
                    mend="look at the shards: mmvit-data check SHARDS",
                )
            stand_in = np.random.SeedSequence((self.seed, epoch, sample_id, len(bad))).generate_state(1, np.uint64)
            chosen = int(stand_in[0]) % len(self.shards)

    def _draw(self, sample_id: int, rng: np.random.Generator) -> Drawn:
        """Read a sample, or take it from memory, and draw its crop, its changes and its texts."""
        decoded = self.cache.get(sample_id)
        sample = decoded.sample if decoded else self.shards.read(sample_id)
        try:
            candidates = [caption_texts(sample, caption) for caption in self.config.captions]
            if self.config.cache_mb and decoded is None:
                decoded = self._cached(sample_id, sample)
            if decoded:
                pixels = train_pixels(decoded.image, self.image_size, self.config.augment, rng)
            else:
                fast = self.config.decode == "fast"
                pixels = train_pixels_from_bytes(
                    sample.image, self.image_size, self.config.augment, rng, fast=fast, where=sample.key
                )
        except DataError as error:
            raise self.shards.error(getattr(error, "cause", "bad-image"), error.what, sample_id) from error
        drawn = [draw_caption(*choice, rng) for choice in zip(candidates, self.config.captions, strict=True)]
        return Drawn(sample.key, pixels, drawn)

    def _cached(self, sample_id: int, sample: RawSample) -> Decoded:
        """Decode a sample, exactly, and keep it where there is room."""
        decoded = Decoded(sample._replace(image=b""), decode_image(sample.image, where=sample.key))
        size = 3 * decoded.image.width * decoded.image.height
        if size <= self.cache_room:
            self.cache[sample_id] = decoded
            self.cache_room -= size
        return decoded


def _order(
    shard_sizes: Sequence[int], shards_per_set: Sequence[int], weights: Sequence[float], seed: int
) -> SampleOrder | MixedOrder:
    """Return the order of one data set, or of several whose shards follow each other."""
    if len(weights) < 2:
        return SampleOrder(sum(shard_sizes), seed, shard_sizes)
    sizes = iter(shard_sizes)
    return MixedOrder([list(islice(sizes, count)) for count in shards_per_set], weights, seed)


def _group(text: str) -> int:
    """A stable 63-bit name of a text."""
    return int.from_bytes(hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()) >> 1
