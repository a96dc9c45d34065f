"""The config keys that all runs have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from mmvit.config.validate import refuse, validate
from mmvit.data.config import DataConfig, PreprocessConfig
from mmvit.data.curriculum import Stage, stage_problems
from mmvit.keys import Problem, key
from mmvit.towers.config import TowerConfig


@dataclass
class OptimConfig:
    """Optimizer and schedule. Muon updates the hidden matrices, AdamW the rest; the others update everything."""

    name: Literal["adamw", "stable_adamw", "muon", "lamb", "sgd"] = key("adamw", "optimizer")
    lr: float = key(5e-4, "peak learning rate at the global batch size; with muon that of AdamW", ge=1e-12, le=100)
    betas: list[float] = key(
        [0.9, 0.98], "Adam's betas; sgd uses the first as momentum", ge=0, le=0.999999, min_length=2, max_length=2
    )
    eps: float = key(1e-6, "Adam's epsilon", ge=1e-16, le=1)
    weight_decay: float = key(
        0.2, "weight decay; not on norms, biases, positions, tokens and logit scale", ge=0, le=100
    )
    muon_lr: float = key(0.02, "peak learning rate of Muon", ge=1e-12, le=100)
    muon_momentum: float = key(0.95, "momentum of Muon", ge=0, le=0.9999999)
    muon_weight_decay: float = key(0.01, "weight decay of Muon", ge=0, le=100)
    layer_decay: float | None = key(
        None, "ratio of a block's learning rate to the next block's; null: no decay", ge=1e-6, le=1
    )
    clip_norm: float | None = key(1.0, "maximum gradient norm; null: no clipping", "logged", ge=1e-6, le=1e9)
    warmup_share: float = key(0.05, "fraction of the steps over which the learning rate rises", ge=0, le=1)
    decay: Literal["cosine", "linear", "sqrt", "inverse_sqrt"] = key("cosine", "shape of the learning rate decay")
    decay_share: float = key(
        1.0, "fraction of the steps, at the end, over which the learning rate falls to 0; 0: constant", ge=0, le=1
    )
    ema_decay: float | None = key(
        None, "decay of the EMA weights, which are evaluated and exported; null: no EMA", ge=0, le=0.9999999
    )

    def problems(self) -> Iterator[Problem]:
        """Yield a weight decay that would overshoot: each update multiplies the weights by 1 - lr * weight decay."""
        pairs = [("lr", self.lr, "weight_decay", self.weight_decay)]
        if self.name == "muon":
            pairs.append(("muon_lr", self.muon_lr, "muon_weight_decay", self.muon_weight_decay))
        for lr_name, lr, name, decay in pairs:
            if lr * decay >= 1:
                what = f"{name} is {decay}; with {lr_name}={lr} it must be below {1 / lr:g}"
                yield Problem(name, what, "the weights would grow or change sign in each step", (lr_name,))


@dataclass
class LoraConfig:
    """Low-rank adapters, trained in place of the matrices that they adapt and merged into the exported model."""

    rank: int = key(0, "rank of the adapters; 0: no adapters", ge=0, le=65536)
    alpha: float = key(16.0, "the adapters are scaled by alpha / rank", ge=1e-3, le=1e6)
    targets: list[Literal["q", "k", "v", "out", "up", "down"]] = key(["q", "v"], "matrices to adapt", min_length=1)


@dataclass
class TrainConfig:
    """Length, size and bookkeeping of a run."""

    steps: int = key(10_000, "number of steps", "logged", ge=1, le=10**9)
    batch_size: int = key(256, "global batch size, over all ranks and micro-batches", ge=1, le=2**24)
    micro_batches: int = key(
        1, "micro-batches per rank; the result does not change (GradCache)", "logged", ge=1, le=2**24
    )
    precision: Literal["auto", "bf16", "bf16_params", "fp32"] = key(
        "auto", "precision; auto: bf16 if the machine has hardware units for it"
    )
    same_caption_positives: bool = key(
        True, "equal captions in a batch are not negatives: softmax leaves them out, sigmoid takes them for positives"
    )
    init: str = key("", "model folder to start from", "logged", path=True)
    init_only: list[str] = key([], "patterns of parameters to load from train.init; empty: all", "logged")
    freeze: list[str] = key([], "patterns of the parameters that are not trained, such as image_tower.*")
    checkpointing: Literal["none", "selective", "full"] = key(
        "none", "activations that are recomputed in the backward pass", "free"
    )
    compile: bool = key(False, "compile each block with torch.compile", "free")
    spike_factor: float | None = key(
        20.0,
        "skip steps whose loss or gradient norm exceeds this multiple of the median; null: never",
        "logged",
        ge=1.5,
        le=1000000000.0,
    )
    log_every: int = key(10, "steps between two lines of the log", "free", ge=1, le=10**9)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = key(
        [], "experiment trackers, in addition to log.jsonl", "free"
    )
    save_every: int = key(500, "steps between two checkpoints", "free", ge=1, le=10**9)
    keep_last: int = key(2, "number of newest checkpoints to keep", "free", ge=1, le=10**9)
    keep_every: int | None = key(
        None, "keep the checkpoints at multiples of this many steps; null: only the newest", "free", ge=1, le=10**9
    )
    timeout_s: float = key(
        330.0,
        "end the run when a rank makes no progress for this many seconds; must exceed data.stall_timeout_s",
        "free",
        ge=1,
        le=10**6,
    )


@dataclass
class RunConfig:
    """The config keys of all runs."""

    out: str = key("", "run folder", "free", path=True)
    seed: int = key(0, "seed of weights, order and augmentation", ge=0, le=2**32 - 1)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: list[Stage] = key(
        [], "stages with their own image size, text length and patch dropout; empty: one stage"
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wise_ft: float | None = key(
        None, "fraction of the trained weights in the exported model, the rest being those of train.init", ge=0, le=1
    )

    def check(self) -> None:
        """Raise one UsageError for all invalid values; configs from `load_config` are valid already."""
        refuse(validate(type(self), asdict(self), strict=True)[1])

    def problems(self) -> Iterator[Problem]:
        """Yield violations of the rules between keys; each key is valid by itself."""
        data, train = self.data, self.train
        if not self.out:
            yield Problem("out", "out is empty; it must name the run folder", "out=runs/NAME")
        if not data.train:
            yield Problem("data.train", "no training data is given", "data.train=[FOLDER or SHARDS]")
        if data.weights and len(data.weights) != len(data.train):
            what = f"data.weights has {len(data.weights)} entries and data.train {len(data.train)}"
            hint = "set one weight for each entry of data.train, or none"
            yield Problem("data.weights", what, hint, others=("data.train",))
        if data.repeats > train.batch_size:
            what = f"data.repeats is {data.repeats}; it must be at most train.batch_size, {train.batch_size}"
            yield Problem("data.repeats", what, others=("train.batch_size",))
        if self.lora.rank and not train.init:
            what = "lora.rank adapts the towers of a finished model, and train.init is empty"
            yield Problem("train.init", what, "use train.init=MODEL, the model/ folder of a run", others=("lora.rank",))
        if self.wise_ft is not None and not train.init:
            what = "wise_ft interpolates with the weights of train.init, which is empty"
            yield Problem("wise_ft", what, "train.init=MODEL", ("train.init",))
        if data.stall_timeout_s >= train.timeout_s:
            what = f"data.stall_timeout_s {data.stall_timeout_s} must be below train.timeout_s"
            hint = f"train.timeout_s={data.stall_timeout_s + 30}"
            yield Problem("train.timeout_s", what, hint, others=("data.stall_timeout_s",))


def curriculum_problems(stages: Sequence[Stage], image: TowerConfig) -> Iterator[Problem]:
    """Yield problems of the stages for an image tower."""
    patch_size = 1
    if any(stage.image_size for stage in stages):  # the stride of a timm model takes a while to find out
        try:
            patch_size = image.stride
        except ValueError as error:
            yield Problem("model.image.kind", str(error))
    yield from stage_problems(stages, patch_size)
