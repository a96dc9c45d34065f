"""The config keys of data, images and texts. Nothing here imports torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from data_tools.core.errors import UsageError
from mmvit.data.prompts import check_template
from mmvit.keys import Problem, key
from mmvit.models.config import CLIP_MEAN, CLIP_STD

_TIMM_NOTATION = re.compile(r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*")


@dataclass
class CaptionConfig:
    """One text of each sample: its source, and the templates that it may be inserted into.

    The source is a text, a list of texts, or an object of language -> text or list; of several, one is drawn at random.
    """

    source: str = key("txt", "txt, or a path into the sample's JSON such as names.ko")
    templates: list[str] = key([], "templates with one {}, one is drawn at random; empty: the text unchanged")
    weights: dict[str, float] = key(
        {}, "language: relative frequency; empty: all languages equally often", ge=0, le=10**9
    )

    def problems(self) -> Iterator[Problem]:
        """Yield templates and weights that no caption can have."""
        for template in self.templates:
            try:
                check_template(template, where="templates")
            except UsageError as error:
                yield Problem("templates", error.what, error.hint)
        if self.weights and self.source == "txt":
            yield Problem("weights", "weights are for texts by language", "name their JSON path in source")
        elif self.weights and not (min(self.weights.values()) >= 0 and any(self.weights.values())):
            hint = "use numbers of at least 0, and not 0 for all languages"
            yield Problem("weights", f"weights is {self.weights}", hint)


@dataclass
class PreprocessConfig:
    """The normalization of images; stored with every model."""

    mean: list[float] = key(
        list(CLIP_MEAN), "mean of red, green and blue, of 1", ge=0, le=1, min_length=3, max_length=3
    )
    std: list[float] = key(list(CLIP_STD), "standard deviation of each", ge=1e-3, le=10, min_length=3, max_length=3)


@dataclass
class AugmentConfig:
    """Random augmentation of training images; null disables a transform. The default is CLIP's: a random square crop.

    An image that keeps its aspect ratio is not cropped; all other transforms apply to it too.
    """

    crop_area: list[float] | None = key(
        [0.9, 1.0],
        "random square crop: smallest and largest fraction of the area; null: off",
        gt=0,
        le=1,
        min_length=2,
        max_length=2,
        ascending=True,
    )
    zoom: list[float] | None = key(
        None,
        "smallest and largest zoom factor; pixels from outside are white",
        ge=0.01,
        le=100,
        min_length=2,
        max_length=2,
        ascending=True,
    )
    rotate: float | None = key(None, "maximum rotation in either direction, degrees", ge=0, le=180)
    shift: float | None = key(None, "maximum shift in either direction, fraction of the side", ge=0, lt=1)
    brightness: float | None = key(None, "maximum relative change", ge=0, le=1)
    contrast: float | None = key(None, "maximum relative change", ge=0, le=1)
    saturation: float | None = key(None, "maximum relative change", ge=0, le=1)
    hue: float | None = key(None, "maximum shift in either direction, fraction of the colour circle", ge=0, le=0.5)
    flip: float | None = key(None, "probability of a horizontal flip", ge=0, le=1)
    rand_augment: list[int] | None = key(
        None,
        "RandAugment: number of changes, magnitude (0 to 30); usual: [2, 9]",
        ge=0,
        le=30,
        min_length=2,
        max_length=2,
    )
    timm_augment: str | None = key(None, "RandAugment in timm's notation; DeiT and Swin: rand-m9-mstd0.5-inc1")
    erase: float | None = key(
        None, "probability that a rectangle of 1/50 to 1/3 of the area becomes noise (random erasing)", ge=0, le=1
    )

    def problems(self) -> Iterator[Problem]:
        """Yield problems of the augmentation settings."""
        strength = self.rand_augment
        if strength is not None and not (strength[0] >= 1 and 0 <= strength[1] <= 30):
            hint = "set the number of changes and their magnitude from 0 to 30, such as [2, 9], or null"
            yield Problem("rand_augment", f"rand_augment is {strength}", hint)
        if self.timm_augment is not None and not _TIMM_NOTATION.fullmatch(self.timm_augment):
            hint = "write it as timm does, such as rand-m9-mstd0.5-inc1, or null"
            yield Problem("timm_augment", f"timm_augment is {self.timm_augment!r}", hint)


@dataclass
class DataConfig:
    """Training data: shards, captions and augmentation."""

    train: list[str] = key([], "training shards: files, folders, brace ranges, URLs", "free", path=True)
    weights: list[float] = key(
        [], "relative use of a sample, for each entry of train; empty: one data set", gt=0, le=10**6
    )
    repeats: int = key(
        1,
        "copies of a sample in a batch, each with its own augmentation (repeated augmentation; DeiT: 3)",
        ge=1,
        le=1000,
    )
    captions: list[CaptionConfig] = key([CaptionConfig()], "texts of each sample", min_length=1)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    decode: Literal["fast", "exact"] = key(
        "fast", "JPEG decoding; fast: no larger than the crop needs; exact: pixel for pixel as Pillow"
    )
    verify: bool = key(True, "compare the bytes read with the hashes of the index", "logged")
    max_bad_fraction: float = key(
        0.01,
        "fail (exit code 3) if more than this fraction of the samples is invalid; one is tolerated",
        "free",
        ge=0,
        le=1,
    )
    num_workers: int = key(1, "data loader workers per rank; 0: load between the steps", "free", ge=0, le=1024)
    prefetch_mb: int = key(2048, "memory for prefetched batches, MB per rank", "free", ge=1, le=2**24)
    stall_timeout_s: float = key(300.0, "maximum wait for a batch, seconds", "free", ge=1, le=10**6)
    patch_budget: int | None = key(
        None,
        "maximum patches of an image that keeps its aspect ratio; null: images are cropped to a square",
        ge=1,
        le=2**16,
    )
    image_embeddings: str = key(
        "", "folder that `mmvit embed` made of the training data, instead of images", "free", path=True
    )
    # With a cache all images are decoded exactly, which is why it changes the pixels.
    cache_mb: int = key(0, "cache of decoded images, MB per worker; for small data sets", ge=0, le=2**24)


@dataclass
class MixConfig:
    """Mixup and CutMix; DeiT and Swin use 0.8 and 1.0."""

    mixup: float = key(0.0, "Mixup: the weight of one image is drawn from Beta(this, this); 0 is off", ge=0, le=100)
    cutmix: float = key(0.0, "CutMix: the area of the exchanged rectangle is drawn likewise; 0 is off", ge=0, le=100)
    switch: float = key(0.5, "fraction of the pairs with CutMix, if both are enabled", ge=0, le=1)
    prob: float = key(1.0, "fraction of the pairs that are mixed", ge=0, le=1)


@dataclass
class TokenizerConfig:
    """The tokenizer: CLIP's byte-pair encoding, or any of the tokenizers library.

    The three tokens apply to kind "file". A token that is null is searched in the template of the file, then in the
    special tokens of the folder, then among common names.
    """

    kind: Literal["clip", "file"] = key(
        "clip", "clip: CLIP's byte-pair encoding; file: a tokenizer of the tokenizers library"
    )
    path: str = key("", "for kind file: a tokenizer.json, or the folder of a transformers tokenizer", "free", path=True)
    start: str | None = key(None, 'token before each text; "" for none; null: detected')
    end: str | None = key(None, "token after each text; null: detected")
    pad: str | None = key(None, "padding token; null: detected, otherwise the end token")
