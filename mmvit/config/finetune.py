"""The config of a supervised run."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mmvit.config.run import RunConfig, curriculum_problems
from mmvit.data.config import MixConfig
from mmvit.keys import Problem, key
from mmvit.models.config import ClassifierConfig
from mmvit.towers.config import ViTConfig


@dataclass
class ClassLossConfig:
    """The objective: cross-entropy with the labels, and with the predictions of a teacher."""

    kind: Literal["labels", "masked_patches"] = key(
        "labels", "task; masked_patches: predict the mean colour of hidden patches, without labels"
    )
    label_smoothing: float = key(0.0, "label smoothing", ge=0, lt=1)
    teacher: str = key("", "classifier of the same classes: model folder, timm:NAME or hf:NAME", "free", path=True)
    distillation: Literal["hard", "soft"] = key("hard", "hard: the teacher's best class; soft: its probabilities")
    weight: float = key(0.5, "weight of the teacher; that of the labels is 1 minus it", ge=0, le=1)
    temperature: float = key(3.0, "temperature of soft distillation", ge=1e-3, le=1000)
    reduction: Literal["batch", "element"] = key("batch", "what the soft divergence is divided by")


@dataclass
class ValidationConfig:
    """Labelled images to measure accuracy on during training; nothing is measured if `data` is empty."""

    data: list[str] = key([], "labelled shards or folders of classes", "free", path=True)
    every: int = key(500, "steps between two evaluations", "free", ge=1, le=10**9)
    limit: int | None = key(
        None, "images per evaluation during training; null: all. The last evaluation uses all", "free", ge=1, le=10**9
    )


@dataclass
class FinetuneConfig(RunConfig):
    """The config of `mmvit finetune`."""

    out: str = key("runs/finetune", "run folder", "free", path=True)
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    classes: str = key(
        "", "file of the class names, or names separated by commas; empty: taken from the data", "free", path=True
    )
    templates: str = key(
        "",
        "prompt templates of the zero-shot head to start with, made by train.init; empty: a head of zeros",
        path=True,
    )
    loss: ClassLossConfig = field(default_factory=ClassLossConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def problems(self) -> Iterator[Problem]:
        """Yield violations of the rules between keys; each key is valid by itself."""
        yield from super().problems()
        yield from curriculum_problems(self.curriculum, self.model.image)
        yield from self._start_problems()
        if self.loss.kind == "masked_patches":
            yield from self._masked_patches_problems()
        distilled = isinstance(self.model.image, ViTConfig) and self.model.image.distilled
        if distilled and not (self.loss.teacher or self.train.init or self.loss.kind == "masked_patches"):
            what = "a distillation token learns from a teacher, and loss.teacher is empty"
            hint = "loss.teacher=MODEL, or model.image.distilled=false"
            yield Problem("loss.teacher", what, hint, ("model.image", "train.init", "loss.kind"))
        for name, value in (
            ("data.patch_budget", self.data.patch_budget),
            ("data.image_embeddings", self.data.image_embeddings),
        ):
            if value:
                yield Problem(name, "supervised runs take whole images of one size", f"remove {name}")
        if not self.train.same_caption_positives:
            name = "train.same_caption_positives"
            yield Problem(name, "supervised runs read no captions", f"remove {name}")
        if any(stage.text_tokens for stage in self.curriculum):
            yield Problem("curriculum", "supervised runs read no captions", "remove text_tokens from curriculum")

    def _start_problems(self) -> Iterator[Problem]:
        """Yield settings that need a model to start from, or do not fit one."""
        if self.train.init_only:
            what = "train.init_only is for contrastive runs: supervised runs load all weights that fit"
            yield Problem("train.init_only", what, "train.init_only=[]")
        if self.templates and not self.train.init:
            what = "a zero-shot head needs a contrastive model, and train.init is empty"
            yield Problem("templates", what, "train.init=MODEL of mmvit pretrain", ("train.init",))
        if self.templates and self.model.head != "linear":
            what = "a zero-shot head is linear: its rows are embeddings of the class names"
            yield Problem("model.head", what, "model.head=linear", ("templates",))

    def _masked_patches_problems(self) -> Iterator[Problem]:
        unused = {
            "train.init": self.train.init,
            "train.freeze": self.train.freeze,
            "lora.rank": self.lora.rank,
            "loss.teacher": self.loss.teacher,
            "mix.mixup": self.mix.mixup,
            "mix.cutmix": self.mix.cutmix,
            "curriculum patch_dropout": any(stage.patch_dropout for stage in self.curriculum),
        }
        for name, value in unused.items():
            if value:
                what = f"{name} has no effect with loss.kind=masked_patches, which trains a whole ViT from scratch"
                hint = f"remove {name}, or loss.kind=labels"
                yield Problem(name.split()[0], what, hint, ("loss.kind",))
