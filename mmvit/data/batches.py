"""Training batches by step number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.sample.content import FaultError, Label
from data_tools.sample.decode import decode_image
from data_tools.tar.expand import expand_shards
from mmvit.data.captions import Caption, caption_texts, draw_caption, text_places
from mmvit.data.config import DataConfig as DataConfig
from mmvit.data.curriculum import Stage, stage_at
from mmvit.data.order import MixedOrder, RepeatedOrder, SampleOrder
from mmvit.data.patches import PatchBudget, pack_patches
from mmvit.data.source import RawSample, Reading, SampleSource, some_samples
from mmvit.data.stored import StoredEmbeddings
from mmvit.data.tokenizers import Tokenizer, Tokens
from mmvit.data.transforms import Pixels, Size, train_pixels, train_pixels_from_bytes
from mmvit.layers.patch_embedding import Patches

Vector = Float32[np.ndarray, "E"]
_NO_TOKENS = Tokens(torch.empty(0, 0, dtype=torch.long), 0)
_LOOK_UPS = 50  # samples that are tried before the first step
MAX_BAD_IN_A_ROW = 100  # a sample and its replacements


class Teacher(NamedTuple):
    """Stored embeddings, by another model, of a batch's images and of the captions in their `txt`."""

    image: Float[Tensor, "b T"]
    text: Float[Tensor, "b T"]


class Batch(NamedTuple):
    """One rank's part of a global batch: b images with V texts each, cut to the longest text L."""

    images: Tensor | Patches  # uint8 [b, 3, H, W], patches, or stored embeddings [b, E]
    ids: Int[Tensor, "b V L"]
    groups: Int[Tensor, "b V"]  # equal where the bare text is equal
    keys: list[str]
    positions: Int[Tensor, "b"]  # in the endless stream of samples: equal for every layout, and never repeated
    bad: Sequence[SampleError] = ()  # samples that were replaced
    num_cut: int = 0  # captions that were truncated to the length of the text tower or of the step
    teacher: Teacher | None = None
    labels: Int[Tensor, "b"] | None = None  # classes, where images have these instead of texts


class Decoded(NamedTuple):
    """A decoded sample before random changes; `sample` does not keep the image file."""

    sample: RawSample
    image: Image.Image


class Drawn(NamedTuple):
    """An augmented sample; `teacher` holds the teacher's embeddings of its image and text."""

    key: str
    image: Pixels | Vector
    captions: list[Caption]
    teacher: tuple[Vector, Vector] | None
    label: Label | None


@dataclass(frozen=True)
class BatchSplit:
    """Which part of each global batch a rank loads, and in how many micro-batches."""

    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1


class TrainBatches(Dataset[Batch]):
    """The batch of any training step, a function of (seed, step) alone.

    Batch `number` is micro-batch number % micro_batches of step number // micro_batches. Order, augmentation and
    captions depend on nothing else: not on workers, on the number of ranks or on what was read before. Resuming at a
    step therefore needs no state.

    Args:
        source: the samples. Batches of a stream depend on the number of workers and ranks, and on where a run begins.
        config: how they are processed.
        tokenizer: of the text tower; None: images come with their classes instead of texts.
        image_size: side of the images, px, unless a stage or `config` sets another.
        batch_size: of the global batch.
        num_steps: of the whole run, of which the stages are shares.
        seed: of order, augmentation and captions.
        split: this rank's part.
        stages: sizes of images and lengths of texts in the course of the run.
        patch_size: of the image tower, px; needed for `config.patch_budget` only.
        teacher: embeddings that are added to every batch.

    Raises:
        UsageError: a batch that does not divide, or more samples in it than there are; a stage's image size where
            images have none; stored embeddings that lack a side; data sets of a stream that are to be mixed.
        DataError: stored embeddings of other samples.
        CheckpointError: a folder that holds no embeddings.
    """

    def __init__(
        self,
        source: SampleSource,
        config: DataConfig,
        tokenizer: Tokenizer | None,
        *,
        image_size: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        split: BatchSplit = BatchSplit(),
        stages: Sequence[Stage] = (),
        patch_size: int | None = None,
        teacher: StoredEmbeddings | None = None,
    ):
        if batch_size % (split.world_size * split.micro_batches):
            parts = f"{split.world_size} ranks x {split.micro_batches} micro-batches"
            what = f"a batch of {batch_size} is not divisible by {parts}"
            raise UsageError(what, where="train.batch_size")
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.captions = config.captions if tokenizer else []
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.split = split
        self.stages = stages
        self.budget = PatchBudget(config.patch_budget, patch_size or 0) if config.patch_budget else None
        assert patch_size or not self.budget
        self.stored_images = StoredEmbeddings(config.image_embeddings) if config.image_embeddings else None
        self.teacher = teacher
        self._check_sides()
        self._check_samples()
        order = _order(source.shard_sizes, config, seed, batch_size)
        self.order = RepeatedOrder(order, config.repeats, batch_size) if config.repeats > 1 else order
        self.cache: dict[int, Decoded] = {}
        self.cache_room = config.cache_mb * 2**20 if source.num_samples else 0  # bytes; a stream brings each once

    @property
    def share(self) -> int:
        """Samples of this rank in a micro-batch."""
        return self.batch_size // self.split.world_size // self.split.micro_batches

    @property
    def num_bytes(self) -> int:
        """Memory of the images of the largest micro-batch."""
        if self.stored_images:
            return 4 * self.stored_images.dim * self.share
        if self.budget:
            return 3 * self.budget.num_patches * self.budget.patch_size**2 * self.share
        return 3 * max(stage.image_size or self.image_size for stage in [*self.stages, Stage()]) ** 2 * self.share

    def positions(self, number: int) -> range:
        """Return the positions of this rank's samples in the endless stream of epochs, for micro-batch `number`."""
        step, micro = divmod(number, self.split.micro_batches)
        start = step * self.batch_size + (self.split.rank * self.split.micro_batches + micro) * self.share
        return range(start, start + self.share)

    def __getitem__(self, number: int) -> Batch:
        """Read, decode, augment and tokenise this rank's samples of one micro-batch."""
        return self.load(number, lambda sample_id: None)

    def load(self, number: int, note: Callable[[int], None]) -> Batch:
        """Return a micro-batch; `note` is called with what is being read, see `SampleSource.begin`."""
        note = self.source.begin(self._reading(number), note)
        stage = stage_at(number // self.split.micro_batches, self.num_steps, self.stages)
        size = self.budget or stage.image_size or self.image_size
        mine = self.positions(number)
        epochs, sample_ids = self.order.ids(mine.start, mine.stop)
        samples: list[Drawn] = []
        bad: list[SampleError] = []
        for epoch, sample_id in zip(epochs.tolist(), sample_ids.tolist(), strict=True):
            sample, errors = self._good(epoch, sample_id, size, note)
            samples.append(sample)
            bad += errors
        texts = [caption.text for sample in samples for caption in sample.captions]
        tokens = self.tokenizer.tokenize(texts, stage.text_tokens) if self.tokenizer else _NO_TOKENS
        images = [sample.image for sample in samples]
        rows = [sample.teacher for sample in samples if sample.teacher]
        return Batch(
            pack_patches(images, self.budget) if self.budget else _stacked(images),
            tokens.ids.view(len(samples), len(self.captions), tokens.ids.shape[1]),
            torch.tensor([[_group(caption.bare) for caption in sample.captions] for sample in samples]).long(),
            [sample.key for sample in samples],
            torch.tensor(mine),
            bad,
            tokens.num_cut,
            Teacher(*map(_stacked, zip(*rows, strict=True))) if rows else None,
            None if self.tokenizer else _labels(samples),
        )

    def try_sample(self, sample_id: int) -> None:
        """Read, decode and augment a sample; raise SampleError if it is invalid."""
        self._draw(sample_id, self.budget or self.image_size, np.random.default_rng(self.seed))

    def check_samples(self) -> None:
        """Raise DataError if none of some samples can be used; one that can is enough."""
        for i in some_samples(self.source, _LOOK_UPS):
            try:
                self.try_sample(i)
            except SampleError as error:
                last, hint = error, self._hint(error, i)
            else:
                return
        raise DataError(
            f"none of {_LOOK_UPS} samples can be used, the last one because {last.what}",
            where=last.where,
            note="nothing was started",
            hint=hint,
        )

    def _check_sides(self) -> None:
        """Raise UsageError for sizes and stored embeddings that contradict each other."""
        if self.config.patch_budget and self.config.image_embeddings:
            what = "data.image_embeddings leaves no image to which data.patch_budget could apply"
            raise UsageError(what, where="data.patch_budget", hint="set one of them to null")
        unsized = "data.patch_budget" if self.budget else "data.image_embeddings" if self.stored_images else ""
        if unsized and any(stage.image_size for stage in self.stages):
            what = f"a stage has an image_size, and with {unsized} images have none"
            raise UsageError(what, where="curriculum", hint=f"remove image_size, or {unsized}")
        for name, stored, kinds in (
            ("data.image_embeddings", self.stored_images, {"img"}),
            ("loss.teacher", self.teacher, {"img", "text"}),
        ):
            if stored and not kinds <= set(stored.kinds):
                what = f"the embeddings in {stored.folder} are of {stored.manifest['modality']}s only"
                raise UsageError(what, where=name, hint="embed with --modality both")

    def _check_samples(self) -> None:
        """Raise UsageError for a batch with a sample twice or streams that are mixed; check stored embeddings."""
        num_samples = self.source.num_samples
        if num_samples is None:
            if self.config.weights:
                raise UsageError("data sets that are streamed cannot be mixed", where="data.weights")
            return
        if self.batch_size > num_samples:
            raise UsageError(
                f"a global batch of {self.batch_size} is larger than the data set of {num_samples} samples",
                where="train.batch_size",
                note="a batch would contain the same sample twice; nothing was started",
                hint=f"train.batch_size={num_samples} or less, or more data",
            )
        for stored in (self.stored_images, self.teacher):
            if stored:
                stored.check_made_of(self.source)

    def _reading(self, number: int) -> Reading:
        """Return which reader of a stream this process is, where micro-batch `number` is its first."""
        worker = get_worker_info()
        mine, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Worker w begins with the w-th number of the run: the run's first one is the same for all of them.
        readers = self.split.rank * num_workers + mine, self.split.world_size * num_workers
        return Reading(self.seed, number - mine, *readers)

    def _hint(self, error: SampleError, sample_id: int) -> str:
        """Return what to do about a sample that cannot be used: where a caption is missing, where there are texts."""
        if error.cause not in ("no-caption", "empty-caption"):
            return "check the data; for shards: mmvit-data check SHARDS"
        sample = self.source.read(sample_id, image=False)
        places = [*(["txt"] if sample.caption else []), *text_places(sample.meta)]
        there = f"this sample has texts in {', '.join(places)}" if places else "this sample has no texts"
        return f"data.captions=[{{source: {places[0] if places else 'txt'}}}] names where the captions are; {there}"

    def _good(
        self, epoch: int, sample_id: int, size: Size, note: Callable[[int], None]
    ) -> tuple[Drawn, list[SampleError]]:
        """Return a sample, or if it is invalid its replacement: drawn by (seed, epoch, sample) alone.

        So a batch keeps its size and stays a function of (seed, step), whatever the number of ranks.
        """
        bad: list[SampleError] = []
        chosen = sample_id
        while True:
            note(chosen)
            try:
                return self._draw(chosen, size, np.random.default_rng((self.seed, epoch, sample_id))), bad
            except SampleError as error:
                bad.append(error)
            if len(bad) == MAX_BAD_IN_A_ROW:
                raise DataError(
                    f"{MAX_BAD_IN_A_ROW} samples in a row are invalid, the last one because {bad[-1].what}",
                    where=bad[-1].where,
                    hint=self._hint(bad[-1], chosen),
                )
            stand_in = np.random.SeedSequence((self.seed, epoch, sample_id, len(bad))).generate_state(1, np.uint64)
            chosen = int(stand_in[0]) % sum(self.source.shard_sizes)

    def _draw(self, sample_id: int, size: Size, rng: np.random.Generator) -> Drawn:
        """Read a sample, or take it from memory, and draw its crop, its changes and its texts."""
        decoded, teacher = self.cache.get(sample_id), None
        sample = decoded.sample if decoded else self.source.read(sample_id, image=self.stored_images is None)
        try:
            candidates = [caption_texts(sample, caption) for caption in self.captions]
            if self.teacher:
                row = self.teacher.row(sample.key)
                teacher = self.teacher.image(row), self.teacher.text(row)
            if self.stored_images:
                image = self.stored_images.image(self.stored_images.row(sample.key))
            else:
                image = self._pixels(sample_id, sample, decoded, size, rng)
        except FaultError as error:
            raise self.source.error(*error.fault, sample_id) from error
        except DataError as error:
            raise self.source.error(getattr(error, "cause", "bad-image"), error.what, sample_id) from error
        drawn = [draw_caption(*choice, rng) for choice in zip(candidates, self.captions, strict=True)]
        return Drawn(sample.key, image, drawn, teacher, sample.label)

    def _pixels(
        self, sample_id: int, sample: RawSample, decoded: Decoded | None, size: Size, rng: np.random.Generator
    ) -> Pixels:
        augment, fast = self.config.augment, self.config.decode == "fast"
        if self.config.cache_mb and decoded is None:
            decoded = self._cached(sample_id, sample)
        if decoded:
            return train_pixels(decoded.image, size, augment, rng)
        return train_pixels_from_bytes(sample.image, size, augment, rng, fast=fast, where=sample.key)

    def _cached(self, sample_id: int, sample: RawSample) -> Decoded:
        """Decode a sample exactly and cache it if there is room."""
        decoded = Decoded(sample._replace(image=b""), decode_image(sample.image, where=sample.key))
        size = 3 * decoded.image.width * decoded.image.height
        if size <= self.cache_room:
            self.cache[sample_id] = decoded
            self.cache_room -= size
        return decoded


def _order(shard_sizes: Sequence[int], config: DataConfig, seed: int, batch_size: int) -> SampleOrder | MixedOrder:
    """Return the order of one data set, or of several whose shards follow each other."""
    if len(config.weights) < 2:
        return SampleOrder(sum(shard_sizes), seed, shard_sizes)
    sizes = iter(shard_sizes)
    of_each = [list(islice(sizes, len(expand_shards(spec)))) for spec in config.train]
    order = MixedOrder(of_each, config.weights, seed)
    order.check_batch(batch_size)
    return order


def _labels(samples: Sequence[Drawn]) -> Tensor | None:
    """Return the classes of samples; None where a sample has no class index."""
    labels = [sample.label for sample in samples]
    return torch.tensor(labels) if all(isinstance(label, int) for label in labels) else None


def _stacked(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def _group(text: str) -> int:
    """A stable 63-bit name of a text."""
    return int.from_bytes(hashlib.blake2b(text.casefold().encode(), digest_size=8).digest()) >> 1
