"""The config of a pretraining run."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mmvit.config.run import RunConfig, curriculum_problems
from mmvit.data.config import TokenizerConfig
from mmvit.keys import Problem, key
from mmvit.losses.layout import Layout
from mmvit.models.config import DualEncoderConfig
from mmvit.towers.config import ViTConfig


@dataclass
class LossConfig:
    """The objective: the contrastive loss, and further losses by their weights."""

    kind: Literal["softmax", "sigmoid"] = key("softmax", "contrastive loss; softmax: CLIP; sigmoid: SigLIP")
    layout: Layout = key("auto", "how the matrix of pairs is computed; the result is the same", "free")
    joint_captions: bool = key(
        False, "all captions of an image in one softmax; images of equal first captions are not negatives"
    )
    learn_logit_scale: bool = key(True, "train the logit scale")
    max_logit_scale: float | None = key(100.0, "maximum logit scale; null: no maximum", ge=1, le=10**4)
    captioning: float = key(0.0, "weight of the captioning loss (CoCa); needs model.caption_depth", ge=0, le=1000)
    token_classification: float = key(
        0.0, "weight of the token classification loss (SuperClass); needs model.token_head", ge=0, le=1000
    )
    distillation: float = key(0.0, "weight of the distillation of the teacher's similarities", ge=0, le=1000)
    teacher: str = key("", "model folder, or folder that `mmvit embed` made of the training data", "free", path=True)


@dataclass
class ZeroShotConfig:
    """Zero-shot classification of labelled shards during training; nothing is evaluated if `data` is empty."""

    data: list[str] = key([], "labelled shards", "free", path=True)
    class_names: str = key(
        "", "file with one class name per line; line n, counted from 0, is label n", "free", path=True
    )
    templates: str = key("simple", "prompt templates: name of a built-in set, or a file", "free", path=True)
    every: int = key(500, "steps between two evaluations", "free", ge=1, le=10**9)
    limit: int | None = key(
        None, "images per evaluation during training; null: all. The last evaluation uses all", "free", ge=1, le=10**9
    )


@dataclass
class PairsConfig:
    """Held-out pairs: loss, and recall in both directions; nothing is measured if `data` is empty."""

    data: list[str] = key([], "shards of pairs that are not trained on", "free", path=True)
    every: int = key(500, "steps between two evaluations", "free", ge=1, le=10**9)
    samples: int = key(
        5000, "maximum number of pairs, drawn from all; recall falls with their number", "free", ge=2, le=10**6
    )


@dataclass
class PretrainConfig(RunConfig):
    """The config of `mmvit pretrain`."""

    out: str = key("runs/pretrain", "run folder", "free", path=True)
    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    validation: PairsConfig = field(default_factory=PairsConfig)

    def problems(self) -> Iterator[Problem]:
        """Yield violations of the rules between keys; each key is valid by itself."""
        yield from super().problems()
        yield from curriculum_problems(self.curriculum, self.model.image)
        for i, stage in enumerate(self.curriculum):
            if (stage.text_tokens or 0) > self.model.text.context_length:
                name = f"curriculum[{i}].text_tokens"
                what = f"{name} is {stage.text_tokens}; it must be at most model.text.context_length, "
                yield Problem(name, f"{what}{self.model.text.context_length}", others=("model.text",))
        yield from self._loss_problems()
        yield from self._input_problems()
        if self.data.repeats > 1:
            what = "data.repeats would make copies of an image negatives of one another"
            yield Problem("data.repeats", what, "data.repeats=1; it is for supervised runs")
        if self.zero_shot.data and not self.zero_shot.class_names:
            yield Problem(
                "zero_shot.class_names", "zero_shot.data has no class names", "name their file", ("zero_shot.data",)
            )

    def _loss_problems(self) -> Iterator[Problem]:
        """Yield losses whose part of the model is missing, and parts that no loss trains."""
        loss, model = self.loss, self.model
        if self.train.batch_size == 1:
            what = "train.batch_size is 1; a contrastive loss compares each pair with the others of its batch"
            yield Problem("train.batch_size", what, "train.batch_size=2 or more")
        pairs = (
            ("loss.captioning", bool(loss.captioning), "model.caption_depth", bool(model.caption_depth)),
            ("loss.token_classification", bool(loss.token_classification), "model.token_head", model.token_head),
            ("loss.distillation", bool(loss.distillation), "loss.teacher", bool(loss.teacher)),
            (
                "loss.kind=sigmoid",
                loss.kind == "sigmoid",
                "model.initial_logit_bias",
                model.initial_logit_bias is not None,
            ),
        )
        for name, wanted, part, there in pairs:
            others = (name.partition("=")[0],)
            if wanted and not there:
                yield Problem(part, f"{name} needs {part}, which is not set", others=others)
            if there and not wanted:
                yield Problem(part, f"{part} is set, but without {name} nothing uses it", others=others)

    def _input_problems(self) -> Iterator[Problem]:
        """Yield combinations of inputs of the image tower that exclude each other."""
        ways = {
            "data.patch_budget": self.data.patch_budget is not None,
            "data.image_embeddings": bool(self.data.image_embeddings),
            "curriculum image_size": any(stage.image_size for stage in self.curriculum),
        }
        used = [name for name, there in ways.items() if there]
        dropped = any(stage.patch_dropout for stage in self.curriculum)
        if len(used) > 1 or (dropped and used[:1] and used[0] != "curriculum image_size"):
            what = " and ".join([*used, *(["curriculum patch_dropout"] if dropped else [])])
            others = ("data.patch_budget", "data.image_embeddings", "curriculum")
            yield Problem(used[0].split()[0], f"{what} exclude each other", "keep one of them", others)
        image = self.model.image
        alone = isinstance(image, ViTConfig) and not (
            image.stem_channels or image.stem_stages or image.position == "relative"
        )
        if self.data.patch_budget is not None and not alone:
            what = "data.patch_budget needs a ViT without a convolutional stem and without relative positions"
            hint = "model.image.stem_channels=[] model.image.stem_stages=[] model.image.position=learned"
            yield Problem("data.patch_budget", what, hint, ("model.image",))
        if self.data.image_embeddings and (self.model.caption_depth or self.model.token_head):
            what = "data.image_embeddings have no tokens for a caption decoder or a token head"
            hint = "train on the images, or remove those losses"
            heads = ("model.caption_depth", "model.token_head")
            yield Problem("data.image_embeddings", what, hint, heads)
