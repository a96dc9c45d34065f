"""What the configs of all runs have in common."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_tools.core.errors import UsageError, did_you_mean
from mmvit.data.batches import DataConfig
from mmvit.data.curriculum import Stage
from mmvit.data.transforms import PreprocessConfig, check_augment

Number = int | float
Ranges = dict[str, tuple[Number, Number, Number | None]]  # value, smallest, largest


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
class RunConfig:
    """What all runs have."""

    out: str = ""
    seed: int = 0
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: list[Stage] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise UsageError for values that no run can have."""
        one_of("optim.name", self.optim.name, ("adamw", "stable_adamw", "muon", "lamb", "sgd"))
        one_of("optim.decay", self.optim.decay, ("cosine", "linear", "sqrt", "inverse_sqrt"))
        one_of("train.precision", self.train.precision, ("auto", "bf16", "bf16_params", "fp32"))
        one_of("train.checkpointing", self.train.checkpointing, ("none", "selective", "full"))
        one_of("data.decode", self.data.decode, ("fast", "exact"))
        for name in self.train.trackers:
            one_of("train.trackers", name, ("tensorboard", "trackio", "wandb"))
        for name in self.lora.targets:
            one_of("lora.targets", name, ("q", "k", "v", "out", "up", "down"))
        check_ranges(self._ranges())
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            what = f"data.weights has {len(self.data.weights)} entries and data.train {len(self.data.train)}"
            raise UsageError(what, where="data.weights", hint="give one weight for each entry of data.train, or none")
        check_augment(self.data.augment, "data.augment")
        if self.lora.rank and not self.train.init:
            what = "lora.rank adapts the towers of a finished model, and none is named"
            raise UsageError(what, where="train.init", hint="train.init=MODEL, the model/ folder of a run")
        if self.data.stall_timeout_s >= self.train.timeout_s:
            what = f"data.stall_timeout_s {self.data.stall_timeout_s} must be below train.timeout_s"
            raise UsageError(what, where="train.timeout_s", hint=f"train.timeout_s={self.data.stall_timeout_s + 30}")
        if not self.data.train:
            raise UsageError("no training data is named", where="data.train", hint="data.train=[FOLDER or SHARDS]")

    def _ranges(self) -> Ranges:
        return {
            "seed": (self.seed, 0, 2**32 - 1),
            "train.steps": (self.train.steps, 1, None),
            "train.batch_size": (self.train.batch_size, 1, None),
            "train.micro_batches": (self.train.micro_batches, 1, None),
            "train.keep_every": (value_or(self.train.keep_every, 1), 1, None),
            "train.timeout_s": (self.train.timeout_s, 1, None),
            "train.spike_factor": (value_or(self.train.spike_factor, 2), 1.5, None),
            "optim.lr": (self.optim.lr, 0, None),
            "smallest of optim.betas": (min(self.optim.betas, default=0), 0, 1),
            "largest of optim.betas": (max(self.optim.betas, default=0), 0, 0.999999),
            "optim.weight_decay": (self.optim.weight_decay, 0, None),
            "optim.clip_norm": (value_or(self.optim.clip_norm, 1), 1e-6, None),
            "optim.layer_decay": (value_or(self.optim.layer_decay, 1), 1e-6, 1),
            "optim.ema_decay": (value_or(self.optim.ema_decay, 0), 0, 0.9999999),
            "optim.eps": (self.optim.eps, 0, None),
            "optim.muon_lr": (self.optim.muon_lr, 0, None),
            "optim.muon_momentum": (self.optim.muon_momentum, 0, 0.9999999),
            "optim.muon_weight_decay": (self.optim.muon_weight_decay, 0, None),
            "lora.rank": (self.lora.rank, 0, None),
            "lora.alpha": (self.lora.alpha, 0, None),
            "data.cache_mb": (self.data.cache_mb, 0, None),
            "number of lora.targets": (len(self.lora.targets), 1, None),
            "train.log_every": (self.train.log_every, 1, None),
            "train.save_every": (self.train.save_every, 1, None),
            "train.keep_last": (self.train.keep_last, 1, None),
            "data.num_workers": (self.data.num_workers, 0, None),
            "data.prefetch_mb": (self.data.prefetch_mb, 1, None),
            "data.stall_timeout_s": (self.data.stall_timeout_s, 1, None),
            "data.max_bad_fraction": (self.data.max_bad_fraction, 0, 1),
            "data.repeats": (self.data.repeats, 1, self.train.batch_size),
            "number of optim.betas": (len(self.optim.betas), 2, 2),
            "optim.warmup_share": (self.optim.warmup_share, 0, 1),
            "optim.decay_share": (self.optim.decay_share, 0, 1),
        }


def check_ranges(ranges: Ranges) -> None:
    """Raise UsageError for the first value outside its bounds."""
    for key, (value, low, high) in ranges.items():
        if not (low <= value < math.inf) or (high is not None and value > high):  # so that NaN is refused too
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UsageError(f"{key} is {value}; it must be {wanted}", where=key)


def value_or(value: Number | None, default: Number) -> Number:
    """Return the value, or what stands for None."""
    return default if value is None else value


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise UsageError for a value that is none of the choices."""
    if value not in choices:
        hint = did_you_mean(value, choices) or f"choose from {', '.join(choices)}"
        raise UsageError(f"{key} is {value!r}", where=key, hint=hint)
