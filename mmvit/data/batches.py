"""Training batches by step number."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_tools.errors import MmvitError
from mmvit.data.captions import CaptionConfig, caption_text, draw_caption
from data_tools.decode import decode_image
from mmvit.data.order import SampleOrder
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import Tokenizer
from mmvit.data.transforms import AugmentConfig, train_pixels


@dataclass
class DataConfig:
    """Training data: shards, the texts to take from them, random changes."""

    train: list[str] = field(default_factory=list)  # files, folders, brace ranges
    captions: list[CaptionConfig] = field(default_factory=lambda: [CaptionConfig()])
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: int = 1  # loader processes for each training process; 0 loads between the steps
    cache_mb: int = 0  # decoded samples that each loader process keeps in memory, for small data sets


class Batch(NamedTuple):
    """One process's part of a global batch: b images with V texts each, cut to the longest text L."""

    images: UInt8[Tensor, "b 3 H W"]
    ids: Int[Tensor, "b V L"]
    groups: Int[Tensor, "b V"]  # equal where the bare text is equal
    keys: list[str]


class Decoded(NamedTuple):
    """A sample before anything random: its key, RGB image and bare texts."""

    key: str
    image: Image.Image
    texts: list[str]


class TrainBatches(Dataset[Batch]):
    """The batch of any training step, a function of (seed, step) alone.

    Order, augmentation and captions depend on nothing else: not on workers, on the number of processes or on what
    was read before. Resuming at a step therefore needs no state.
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
    ):
        self.shards = shards
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.order = SampleOrder(len(shards), seed, shard_sizes=shards.shard_sizes)
        self.cache: dict[int, Decoded] = {}
        self.cache_room = config.cache_mb * 2**20  # bytes

    def positions(self, step: int) -> range:
        """Positions of this process's samples in the endless stream of epochs."""
        share = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * share
        return range(start, start + share)

    def __getitem__(self, step: int) -> Batch:
        """Read, decode, change and tokenise this process's samples of one step."""
        mine = self.positions(step)
        epochs, ids = self.order.ids(mine.start, mine.stop)
        images, texts, groups, keys = [], [], [], []
        for epoch, sample_id in zip(epochs.tolist(), ids.tolist(), strict=True):
            rng = np.random.default_rng((self.seed, epoch, sample_id))
            key, image, bare = self._decoded(sample_id)
            images.append(train_pixels(image, self.image_size, self.config.augment, rng))
            texts += [
                draw_caption(text, caption, rng) for text, caption in zip(bare, self.config.captions, strict=True)
            ]
            groups.append([_group(text) for text in bare])
            keys.append(key)
        tokens = self.tokenizer(texts).unflatten(0, (len(keys), -1))
        return Batch(torch.from_numpy(np.stack(images)), tokens, torch.tensor(groups), keys)

    def _decoded(self, sample_id: int) -> "Decoded":
        """Read and decode a sample, or take it from memory."""
        if sample_id in self.cache:
            return self.cache[sample_id]
        sample = self.shards.read(sample_id)
        image = decode_image(sample.image, where=sample.key)
        decoded = Decoded(sample.key, image, [caption_text(sample, caption) for caption in self.config.captions])
        size = 3 * image.width * image.height
        if size <= self.cache_room:
            self.cache[sample_id] = decoded
            self.cache_room -= size
        return decoded


def _group(text: str) -> int:
    """A stable 63-bit name of a text."""
    return int.from_bytes(hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()) >> 1


class _Guarded(Dataset["Batch | MmvitError"]):
    """Hands an error over as a value: the loader would rebuild a raised one from its traceback's text."""

    def __init__(self, batches: TrainBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | MmvitError:
        try:
            return self.batches[step]
        except MmvitError as error:
            return error


def iterate_batches(batches: TrainBatches, steps: Sequence[int], num_workers: int) -> Iterator[Batch]:
    """Yield the batches of `steps` in order, prepared ahead by worker processes.

    Raises:
        DataError: a sample cannot be used; it is named.
    """
    loader = DataLoader(
        _Guarded(batches),
        batch_size=None,  # an item is a whole batch already
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, MmvitError):
            raise batch
        yield Batch(*batch)
