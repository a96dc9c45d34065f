"""The config of a supervised run."""

from dataclasses import dataclass, field

from data_tools.core.errors import UsageError
from mmvit.config.run import Ranges, RunConfig, one_of, value_or
from mmvit.data.curriculum import check_stages
from mmvit.data.mixing import MixConfig, check_mix
from mmvit.models.classifier import ClassifierConfig
from mmvit.towers.vit import ViTConfig


@dataclass
class ClassLossConfig:
    """What is minimised: cross-entropy with the labels, and with what a teacher says."""

    kind: str = "labels"  # labels | masked_patches: the mean colour of hidden patches, without labels
    label_smoothing: float = 0.0
    teacher: str = ""  # a classifier that mmvit trained, timm:NAME or hf:NAME, of the same classes
    distillation: str = "hard"  # hard: its best class | soft: its probabilities
    weight: float = 0.5  # of the teacher; 1 minus it is that of the labels
    temperature: float = 3.0  # of soft distillation
    reduction: str = "batch"  # batch | element: what the soft divergence is divided by


@dataclass
class ValidationConfig:
    """Labelled pictures to measure accuracy on; nothing is measured where `data` is empty."""

    data: list[str] = field(default_factory=list)
    every: int = 500  # steps
    limit: int | None = None  # images of the live figure; the last step always takes all


@dataclass
class FinetuneConfig(RunConfig):
    """Everything that `mmvit finetune` does."""

    out: str = "runs/finetune"
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    classes: str = ""  # file of the class names, or names with commas; empty: as the data name them
    templates: str = ""  # start with the zero-shot head that train.init makes of these; empty: with a head of zeros
    wise_ft: float | None = None  # share of the trained weights in the exported model, the rest as the run began
    loss: ClassLossConfig = field(default_factory=ClassLossConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """Raise UsageError for values that no run can have."""
        super().check()
        one_of("model.head", self.model.head, ("linear", "hidden"))
        one_of("loss.kind", self.loss.kind, ("labels", "masked_patches"))
        one_of("loss.distillation", self.loss.distillation, ("hard", "soft"))
        one_of("loss.reduction", self.loss.reduction, ("batch", "element"))
        check_stages(self.curriculum, self.model.image.stride)
        check_mix(self.mix, "mix")
        if self.train.init_only:
            what = "train.init_only is for contrastive runs: here all that fits is taken"
            raise UsageError(what, where="train.init_only", hint="train.init_only=[]")
        if self.templates and not self.train.init:
            what = "a zero-shot head needs a contrastive model, and none is named"
            raise UsageError(what, where="templates", hint="train.init=MODEL of mmvit pretrain")
        if self.templates and self.model.head != "linear":
            what = "a zero-shot head is linear: its rows are embeddings of the class names"
            raise UsageError(what, where="model.head", hint="model.head=linear")
        if self.loss.kind == "masked_patches":
            self._check_masked_patches()
        if self.wise_ft is not None and not self.train.init:
            what = "wise_ft mixes the trained weights with those of a finished model, and none is named"
            raise UsageError(what, where="wise_ft", hint="train.init=MODEL")
        distilled = isinstance(self.model.image, ViTConfig) and self.model.image.distilled
        if distilled and not (self.loss.teacher or self.train.init or self.loss.kind == "masked_patches"):
            what = "a distillation token learns from a teacher, and none is named"
            raise UsageError(what, where="loss.teacher", hint="loss.teacher=MODEL, or model.image.distilled=false")
        if self.data.patch_budget or self.data.image_embeddings:
            raise UsageError("supervised runs take whole pictures of one size", where="data.patch_budget")
        if any(stage.text_tokens for stage in self.curriculum) or not self.train.same_caption_positives:
            key = "train.same_caption_positives" if not self.train.same_caption_positives else "curriculum text_tokens"
            raise UsageError("supervised runs read no captions", where=key, hint=f"leave out {key}")

    def _check_masked_patches(self) -> None:
        unused = {
            "train.init": self.train.init,
            "train.freeze": self.train.freeze,
            "lora.rank": self.lora.rank,
            "loss.teacher": self.loss.teacher,
            "mix.mixup": self.mix.mixup,
            "mix.cutmix": self.mix.cutmix,
            "curriculum patch_dropout": any(stage.patch_dropout for stage in self.curriculum),
        }
        for key, value in unused.items():
            if value:
                what = f"{key} has no effect with loss.kind=masked_patches, which trains a whole ViT from scratch"
                raise UsageError(what, where=key.split()[0], hint=f"leave out {key}, or loss.kind=labels")

    def _ranges(self) -> Ranges:
        return super()._ranges() | {
            "loss.label_smoothing": (self.loss.label_smoothing, 0, 1),
            "loss.weight": (self.loss.weight, 0, 1),
            "loss.temperature": (self.loss.temperature, 1e-3, None),
            "wise_ft": (value_or(self.wise_ft, 0), 0, 1),
            "validation.every": (self.validation.every, 1, None),
            "validation.limit": (value_or(self.validation.limit, 1), 1, None),
        }
