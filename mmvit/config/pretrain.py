"""The config of a pretraining run."""

from dataclasses import dataclass, field

from data_tools.core.errors import UsageError
from mmvit.config.run import Ranges, RunConfig, one_of, value_or
from mmvit.data.captions import check_captions
from mmvit.data.curriculum import check_stages
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.vit import ViTConfig


@dataclass
class LossConfig:
    """What is minimised: the contrastive loss, and further losses by their weights."""

    kind: str = "softmax"  # softmax (CLIP) | sigmoid (SigLIP)
    layout: str = "auto"  # auto | global | rows | tiles | ring: how pairs are walked through; the numbers are the same
    joint_captions: bool = False  # all captions of an image in one softmax, where equal first captions are positives
    learn_logit_scale: bool = True
    max_logit_scale: float | None = 100.0
    captioning: float = 0.0  # weight of the CoCa loss; needs model.caption_depth
    token_classification: float = 0.0  # weight of the SuperClass loss; needs model.token_head
    distillation: float = 0.0  # weight of the teacher's similarities
    teacher: str = ""  # a model folder, or a folder that `mmvit embed` made of the training data


@dataclass
class ZeroShotConfig:
    """Zero-shot classification of labelled shards during training; nothing is evaluated where `data` is empty."""

    data: list[str] = field(default_factory=list)
    class_names: str = ""  # file, one name a line; the line number is the label
    templates: str = "simple"  # name or file
    every: int = 500  # steps
    limit: int | None = None  # images of the live figure; the last step always takes all


@dataclass
class PretrainConfig(RunConfig):
    """Everything that `mmvit pretrain` does."""

    out: str = "runs/pretrain"
    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)

    def check(self) -> None:
        """Raise UsageError for values that no run can have."""
        super().check()
        one_of("loss.kind", self.loss.kind, ("softmax", "sigmoid"))
        one_of("loss.layout", self.loss.layout, ("auto", "global", "rows", "tiles", "ring"))
        check_stages(self.curriculum, self.model.image.stride)
        self._check_losses()
        self._check_inputs()
        if self.data.repeats > 1:
            what = "data.repeats would make copies of an image negatives of one another"
            raise UsageError(what, where="data.repeats", hint="data.repeats=1; it is for supervised runs")
        for i, caption in enumerate(self.data.captions):
            check_captions(caption, where=f"data.captions[{i}]")
        if self.zero_shot.data and not self.zero_shot.class_names:
            raise UsageError("zero_shot.data has no class names", where="zero_shot.class_names", hint="name their file")
        if self.zero_shot.limit is not None and self.zero_shot.limit < 1:
            raise UsageError(
                f"zero_shot.limit is {self.zero_shot.limit}", where="zero_shot.limit", hint="null takes all"
            )

    def _ranges(self) -> Ranges:
        longest = max((stage.text_tokens or 0 for stage in self.curriculum), default=0)
        return super()._ranges() | {
            "longest curriculum text_tokens": (longest, 0, self.model.text.context_length),
            "loss.max_logit_scale": (value_or(self.loss.max_logit_scale, 1), 1, None),
            "loss.captioning": (self.loss.captioning, 0, None),
            "loss.token_classification": (self.loss.token_classification, 0, None),
            "loss.distillation": (self.loss.distillation, 0, None),
            "data.patch_budget": (value_or(self.data.patch_budget, 1), 1, None),
            "zero_shot.every": (self.zero_shot.every, 1, None),
            "number of data.captions": (len(self.data.captions), 1, None),
            "model.text.context_length": (self.model.text.context_length, 3, None),
        }

    def _check_losses(self) -> None:
        """Refuse a loss whose part of the model is not there, and a part that no loss would train."""
        pairs = [
            ("loss.captioning", bool(self.loss.captioning), "model.caption_depth", bool(self.model.caption_depth)),
            (
                "loss.token_classification",
                bool(self.loss.token_classification),
                "model.token_head",
                self.model.token_head,
            ),
            ("loss.distillation", bool(self.loss.distillation), "loss.teacher", bool(self.loss.teacher)),
        ]
        sigmoid = self.loss.kind == "sigmoid"
        bias = self.model.initial_logit_bias is not None
        pairs.append(("loss.kind=sigmoid", sigmoid, "model.initial_logit_bias", bias))
        for loss, wanted, part, there in pairs:
            if wanted and not there:
                raise UsageError(f"{loss} needs {part}, which is not set", where=part)
            if there and not wanted:
                raise UsageError(f"{part} is set, but without {loss} nothing uses it", where=part)

    def _check_inputs(self) -> None:
        """Refuse two ways of feeding the image tower at once."""
        ways = {
            "data.patch_budget": self.data.patch_budget is not None,
            "data.image_embeddings": bool(self.data.image_embeddings),
            "curriculum image_size": any(stage.image_size for stage in self.curriculum),
        }
        used = [name for name, there in ways.items() if there]
        dropped = any(stage.patch_dropout for stage in self.curriculum)
        if len(used) > 1 or (dropped and used[:1] and used[0] != "curriculum image_size"):
            what = " and ".join([*used, *(["curriculum patch_dropout"] if dropped else [])])
            raise UsageError(f"{what} exclude each other", where=used[0], hint="keep one of them")
        image = self.model.image
        alone = isinstance(image, ViTConfig) and not (
            image.stem_channels or image.stem_stages or image.position == "relative"
        )
        if self.data.patch_budget is not None and not alone:
            what = "data.patch_budget needs a ViT without a convolutional stem and without relative positions"
            hint = "model.image.stem_channels=[] model.image.stem_stages=[] model.image.position=learned"
            raise UsageError(what, where="data.patch_budget", hint=hint)
        if self.data.image_embeddings and (self.model.caption_depth or self.model.token_head):
            what = "data.image_embeddings hold nothing that a caption decoder or a token head could look at"
            raise UsageError(
                what, where="data.image_embeddings", hint="train on the pictures, or leave out those losses"
            )
