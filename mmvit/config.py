"""One run's configuration: composed from the dataclasses beside the code, loaded, overridden, checked, saved."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_tools.errors import UsageError, did_you_mean
from mmvit.data.batches import DataConfig
from mmvit.data.captions import check_captions
from mmvit.data.curriculum import Stage, check_stages
from mmvit.data.prompts import configs_folder
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.data.transforms import PreprocessConfig
from mmvit.models.dual_encoder import DualEncoderConfig

Config = TypeVar("Config")


@dataclass
class OptimConfig:
    """Optimiser and schedule. Muon takes the hidden matrices and AdamW the rest; each other one takes everything."""

    name: str = "adamw"  # adamw | stable_adamw | muon | lamb | sgd
    lr: float = 5e-4  # peak, at the global batch; with muon that of AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # sgd takes the first as its momentum
    eps: float = 1e-6
    weight_decay: float = 0.2  # not on norms, biases, positions, tokens, logit scale
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.01
    layer_decay: float | None = None  # rate of a block over the rate of the block above it; null: all learn alike
    clip_norm: float | None = 1.0
    warmup_share: float = 0.05  # share of the steps over which the rate rises
    decay: str = "cosine"  # cosine | linear | sqrt | inverse_sqrt
    decay_share: float = 1.0  # share of the steps, at their end, over which the rate falls to 0; 0 keeps it constant
    ema_decay: float | None = None  # of the averaged weights, which are then evaluated and exported


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
class LoraConfig:
    """Low-rank adapters, trained in the place of the matrices that they adapt, and merged into the exported model."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the adapters are scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["q", "v"])  # any of q, k, v, out, up, down


@dataclass
class TrainConfig:
    """Length, size and bookkeeping of a run."""

    steps: int = 10_000
    batch_size: int = 256  # global: over all processes and micro-batches
    micro_batches: int = 1  # parts in which each process takes its share, exactly as one (GradCache)
    precision: str = "auto"  # auto | bf16 | bf16_params | fp32; auto takes bf16 where the machine has units for it
    same_caption_positives: bool = True  # equal captions in a batch are positives, not negatives
    init: str = ""  # model folder to start from
    init_only: list[str] = field(default_factory=list)  # parameters to take from it, such as image_*; none: all
    freeze: list[str] = field(default_factory=list)  # parameters that are not trained, such as image_tower.*
    checkpointing: str = "none"  # none | selective | full: activations computed again in the backward pass
    compile: bool = False  # compile each block
    spike_factor: float | None = 20.0  # a step whose loss or gradient is so many times the usual one is skipped
    log_every: int = 10  # steps
    trackers: list[str] = field(default_factory=list)  # tensorboard, trackio, wandb, beside log.jsonl
    save_every: int = 500  # steps
    keep_last: int = 2  # checkpoints
    keep_every: int | None = None  # steps; checkpoints at multiples of it are kept for ever
    timeout_s: float = 330.0  # longest standstill of a process before all end; above data.stall_timeout_s


@dataclass
class ZeroShotConfig:
    """Zero-shot classification of labelled shards during training; nothing is evaluated where `data` is empty."""

    data: list[str] = field(default_factory=list)
    class_names: str = ""  # file, one name a line; the line number is the label
    templates: str = "simple"  # name or file
    every: int = 500  # steps
    limit: int | None = None  # images of the live figure; the last step always takes all


@dataclass
class PretrainConfig:
    """Everything that `mmvit pretrain` does."""

    out: str = "runs/pretrain"
    seed: int = 0
    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: list[Stage] = field(default_factory=list)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)

    def check(self) -> None:
        """Raise UsageError for values that no run can have."""
        _one_of("optim.name", self.optim.name, ("adamw", "stable_adamw", "muon", "lamb", "sgd"))
        _one_of("optim.decay", self.optim.decay, ("cosine", "linear", "sqrt", "inverse_sqrt"))
        _one_of("loss.kind", self.loss.kind, ("softmax", "sigmoid"))
        _one_of("loss.layout", self.loss.layout, ("auto", "global", "rows", "tiles", "ring"))
        _one_of("train.precision", self.train.precision, ("auto", "bf16", "bf16_params", "fp32"))
        _one_of("train.checkpointing", self.train.checkpointing, ("none", "selective", "full"))
        for name in self.train.trackers:
            _one_of("train.trackers", name, ("tensorboard", "trackio", "wandb"))
        for name in self.lora.targets:
            _one_of("lora.targets", name, ("q", "k", "v", "out", "up", "down"))
        check_stages(self.curriculum, self.model.image.patch_size)
        self._check_losses()
        self._check_inputs()
        _one_of("data.decode", self.data.decode, ("fast", "exact"))
        _one_of("model.image.pool", self.model.image.pool, ("class", "mean", "attention"))
        self._check_ranges()
        for i, caption in enumerate(self.data.captions):
            check_captions(caption, where=f"data.captions[{i}]")
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            what = f"data.weights has {len(self.data.weights)} entries and data.train {len(self.data.train)}"
            raise UsageError(what, where="data.weights", mend="give one weight for each entry of data.train, or none")
        strength = self.data.augment.rand_augment
        if strength is not None and not (len(strength) == 2 and strength[0] >= 1 and 0 <= strength[1] <= 30):
            mend = "give the number of changes and their magnitude from 0 to 30, such as [2, 9], or null"
            raise UsageError(f"data.augment.rand_augment is {strength}", where="data.augment.rand_augment", mend=mend)
        if self.zero_shot.data and not self.zero_shot.class_names:
            raise UsageError("zero_shot.data has no class names", where="zero_shot.class_names", mend="name their file")
        if self.zero_shot.limit is not None and self.zero_shot.limit < 1:
            raise UsageError(
                f"zero_shot.limit is {self.zero_shot.limit}", where="zero_shot.limit", mend="null takes all"
            )
        if not self.data.train:
            raise UsageError("no training data is named", where="data.train", mend="data.train=[FOLDER or SHARDS]")

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
            raise UsageError(f"{what} exclude each other", where=used[0], mend="keep one of them")
        if self.data.patch_budget is not None and self.model.image.stem_channels:
            what = "data.patch_budget goes with no convolutional stem, which looks beyond the borders of patches"
            raise UsageError(what, where="data.patch_budget", mend="model.image.stem_channels=[]")
        if self.lora.rank and not self.train.init:
            what = "lora.rank adapts the towers of a finished model, and none is named"
            raise UsageError(what, where="train.init", mend="train.init=MODEL, the model/ folder of a run")
        if self.data.stall_timeout_s >= self.train.timeout_s:
            what = f"data.stall_timeout_s {self.data.stall_timeout_s} must be below train.timeout_s"
            raise UsageError(what, where="train.timeout_s", mend=f"train.timeout_s={self.data.stall_timeout_s + 30}")
        if self.data.image_embeddings and (self.model.caption_depth or self.model.token_head):
            what = "data.image_embeddings hold nothing that a caption decoder or a token head could look at"
            raise UsageError(
                what, where="data.image_embeddings", mend="train on the pictures, or leave out those losses"
            )

    def _check_ranges(self) -> None:
        longest = max((stage.text_tokens or 0 for stage in self.curriculum), default=0)
        ranges = {
            "seed": (self.seed, 0, 2**32 - 1),
            "train.steps": (self.train.steps, 1, None),
            "train.batch_size": (self.train.batch_size, 1, None),
            "train.micro_batches": (self.train.micro_batches, 1, None),
            "train.keep_every": (_or(self.train.keep_every, 1), 1, None),
            "train.timeout_s": (self.train.timeout_s, 1, None),
            "train.spike_factor": (_or(self.train.spike_factor, 2), 1.5, None),
            "optim.lr": (self.optim.lr, 0, None),
            "smallest of optim.betas": (min(self.optim.betas, default=0), 0, 1),
            "largest of optim.betas": (max(self.optim.betas, default=0), 0, 0.999999),
            "optim.weight_decay": (self.optim.weight_decay, 0, None),
            "optim.clip_norm": (_or(self.optim.clip_norm, 1), 1e-6, None),
            "optim.layer_decay": (_or(self.optim.layer_decay, 1), 1e-6, 1),
            "optim.ema_decay": (_or(self.optim.ema_decay, 0), 0, 0.9999999),
            "optim.eps": (self.optim.eps, 0, None),
            "optim.muon_lr": (self.optim.muon_lr, 0, None),
            "optim.muon_momentum": (self.optim.muon_momentum, 0, 0.9999999),
            "optim.muon_weight_decay": (self.optim.muon_weight_decay, 0, None),
            "loss.max_logit_scale": (_or(self.loss.max_logit_scale, 1), 1, None),
            "loss.captioning": (self.loss.captioning, 0, None),
            "loss.token_classification": (self.loss.token_classification, 0, None),
            "loss.distillation": (self.loss.distillation, 0, None),
            "lora.rank": (self.lora.rank, 0, None),
            "lora.alpha": (self.lora.alpha, 0, None),
            "data.cache_mb": (self.data.cache_mb, 0, None),
            "longest curriculum text_tokens": (longest, 0, self.model.text.context_length),
            "number of lora.targets": (len(self.lora.targets), 1, None),
            "data.patch_budget": (_or(self.data.patch_budget, 1), 1, None),
            "train.log_every": (self.train.log_every, 1, None),
            "train.save_every": (self.train.save_every, 1, None),
            "train.keep_last": (self.train.keep_last, 1, None),
            "zero_shot.every": (self.zero_shot.every, 1, None),
            "data.num_workers": (self.data.num_workers, 0, None),
            "data.prefetch_mb": (self.data.prefetch_mb, 1, None),
            "data.stall_timeout_s": (self.data.stall_timeout_s, 1, None),
            "data.max_bad_fraction": (self.data.max_bad_fraction, 0, 1),
            "data.augment.flip": (self.data.augment.flip or 0, 0, 1),
            "number of data.captions": (len(self.data.captions), 1, None),
            "number of optim.betas": (len(self.optim.betas), 2, 2),
            "optim.warmup_share": (self.optim.warmup_share, 0, 1),
            "optim.decay_share": (self.optim.decay_share, 0, 1),
            "model.text.context_length": (self.model.text.context_length, 3, None),
        }
        for key, (value, low, high) in ranges.items():
            if not (low <= value < math.inf) or (high is not None and value > high):  # so that NaN is refused too
                wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UsageError(f"{key} is {value}; it must be {wanted}", where=key)


def load_config(cls: type[Config], source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (a path, or a name under configs/), apply `key=value` overrides, check keys and types."""
    path = find_config(source)
    try:
        tree = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config cannot be read: {error}", where=str(path)) from error
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            mend = f"quote the whole argument if it has braces: '{key}=...'"
            raise UsageError(f"{key} is given {keys.count(key)} times", where=key, mend=mend)
    for override in overrides:
        tree = _override(tree, override)
    return from_tree(cls, OmegaConf.to_container(tree), where=str(path))


def _override(tree: Any, override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r} is not key=value", mend="for example train.batch_size=512")
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        mend = "quote a value with braces, brackets or colons as YAML wants it"
        raise UsageError(f"override {override!r} cannot be read: {reason}", where=key, mend=mend) from error


def from_tree(cls: type[Config], tree: Any, where: str) -> Config:
    """Make the dataclass `cls` of plain dicts and lists; raises UsageError naming the key that does not fit."""
    tree = _checked(cls, tree, where)
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), tree)))
    except OmegaConfBaseException as error:
        key = f" {error.full_key}" if getattr(error, "full_key", None) else ""
        raise UsageError(f"config value{key} does not fit: {str(error).splitlines()[0]}", where=where) from error


def to_yaml(config: Any) -> str:
    """Write a config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def find_config(source: str | Path) -> Path:
    """Return the file itself, or the one of that name under configs/; raises UsageError with the nearest name."""
    path = Path(source)
    builtin = configs_folder() / f"{str(source).removesuffix('.yaml')}.yaml"
    for candidate in (path, builtin):
        if candidate.is_file():
            return candidate
    names = [str(file.relative_to(configs_folder()).with_suffix("")) for file in configs_folder().rglob("*.yaml")]
    hint = did_you_mean(str(source), names) or f"built-in configs: {', '.join(sorted(names))}"
    raise UsageError(f"there is no config {str(source)!r}", mend=hint)


def _or(value: int | float | None, default: int | float) -> int | float:
    return default if value is None else value


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(
            f"{key} is {value!r}", where=key, mend=did_you_mean(value, choices) or f"choose from {', '.join(choices)}"
        )


def _checked(cls: Any, tree: Any, where: str, prefix: str = "") -> Any:
    """Return the tree with each single value for a list made a list of one; UsageError for a key that is none."""
    if not isinstance(tree, dict):
        what = f"config value {prefix[:-1]}" if prefix else "the config"
        raise UsageError(f"{what} does not fit: {tree!r:.50} is no mapping of keys to values", where=where)
    kinds: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(cls)}
    checked = {}
    for key, value in tree.items():
        if key not in kinds:
            hint = did_you_mean(str(key), kinds) or f"keys here: {', '.join(kinds)}"
            raise UsageError(f"unknown config key {prefix}{key}", where=where, mend=hint)
        kind = kinds[key]
        if get_origin(kind) is list:
            items = value if isinstance(value, list) else [value]
            (item_kind,) = get_args(kind)
            value = [
                _checked(item_kind, item, where, f"{prefix}{key}[{i}].") if is_dataclass(item_kind) else item
                for i, item in enumerate(items)
            ]
        checked[key] = _checked(kind, value, where, f"{prefix}{key}.") if is_dataclass(kind) else value
    return checked
