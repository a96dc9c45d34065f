"""What a task hands to a run, and what a step takes and returns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from mmvit.checkpoint import Checkpoint
from mmvit.data.batches import Batch, TrainBatches
from mmvit.data.source import SampleSource
from mmvit.layers.drop_path import DrawKey
from mmvit.layers.patch_embedding import Patches
from mmvit.train.safety.learning import Chance

# Images, token ids and the patches to keep, as a model sees them; `Part.inputs` without what costs nothing.
FlopInputs = tuple[Tensor | Patches, Tensor | None, Tensor | None]


class Part(NamedTuple):
    """A micro-batch on the device: the arguments of the model, the targets of its output, and what is drawn for it."""

    inputs: tuple[Any, ...]
    targets: Any
    draws: DrawKey | None = None


class StepResult(NamedTuple):
    """What a step yields, equal on all ranks."""

    losses: dict[str, float]  # of the global batch, weighted, by name
    grad_norm: float
    skipped: str | None  # why the weights were not updated

    @property
    def loss(self) -> float:
        """The sum of the losses."""
        return sum(self.losses.values())


@runtime_checkable
class Objective(Protocol):
    """The weighted losses; each value is this rank's share, whose mean over ranks is that of the global batch.

    Losses between samples need all rows of a step at once (`between`, where `compares` is true). Losses within samples
    may be computed for one micro-batch after the other (`within`): they are divided by the totals of the step.
    """

    compares: bool

    def totals(self, parts: Sequence[Part]) -> Any:
        """Count over all micro-batches of a step and all ranks."""

    def between(self, rows: Any, targets: Any) -> dict[str, Tensor]:
        """Return the losses that compare samples, by name and weighted; `rows` are all rows of this rank."""
        ...

    def within(self, rows: Any, part: Part, totals: Any) -> dict[str, Tensor]:
        """Return the losses of single samples, by name and weighted; their values add up over the micro-batches."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Measures the model on held-out data.

    Attributes:
        every: steps between two evaluations.
    """

    every: int

    def check(self) -> None:
        """Raise UsageError or DataError if the held-out data cannot be measured. Only the main rank calls this."""
        ...

    def measure(self, model: Any, last: bool, before_each_batch: Callable[[], None]) -> dict[str, float]:
        """Return the figures of a finished model, of all held-out data if `last`. Only the main rank calls this."""
        ...


class TaskParts(NamedTuple):
    """All that distinguishes one task from another; what a task does not have is None.

    Attributes:
        source: the training samples.
        model: float32 weights on the device, as the run begins with them.
        batches: the micro-batches of this rank.
        part: moves a micro-batch of a step, counted from 0, to the device and computes its targets.
        flop_inputs: what `FlopCounter.sample_flops` takes, for a micro-batch of a step.
        objective: the losses.
        fresh_model: builds a model without adapters, to load merged weights into.
        export: writes a finished model to a model folder. Only the main rank calls this.
        identity: fingerprints of the files that the result depends on, in addition to the training data.
        check_checkpoint: raises CheckpointError if a checkpoint belongs to another run.
        evaluators: measure the model on held-out data.
        after_update: changes the weights after each update.
        figures: returns what is logged of the model. All ranks call this.
        chance: the loss of a model that has learned nothing.
        scale_bounds: lowest and highest value of a trained logit scale.
    """

    source: SampleSource
    model: nn.Module
    batches: TrainBatches
    part: Callable[[int, Batch], Part]
    flop_inputs: Callable[[int, Batch], FlopInputs]
    objective: Objective
    fresh_model: Callable[[], nn.Module]
    export: Callable[[Any, Path], None]
    identity: dict[str, str]
    check_checkpoint: Callable[[Checkpoint], None] | None = None
    evaluators: tuple[Evaluator, ...] = ()
    after_update: Callable[[], None] | None = None
    figures: Callable[[], dict[str, float]] | None = None
    chance: Chance | None = None
    scale_bounds: tuple[float, float] | None = None
