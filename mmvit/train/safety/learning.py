"""Signs that a run learns nothing: a loss or a logit scale that does not move, no gradient, batches without content."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmvit.data.batches import Batch

MAX_PATIENCE, MIN_PATIENCE = 200, 20  # steps
TOLERANCE = 0.01  # relative, of the loss of a model that knows nothing
MIN_OBSERVED = 3  # logged steps in a row without a gradient: the first has none in a tower whose head starts at zero


class Chance(NamedTuple):
    """The loss of a model that gives the same output for all inputs.

    Attributes:
        name: of the loss in the log.
        value: of the loss.
        text: the value as a formula, such as "ln(batch)".
    """

    name: str
    value: float
    text: str


class Observed(NamedTuple):
    """What is known of a logged step in addition to its loss and its gradient norm.

    Attributes:
        logit_scale: None if there is none.
        dead: parts of the model whose gradient is exactly zero.
        batch: what is wrong with the batch, by symptom, as from `batch_symptoms`.
    """

    logit_scale: float | None = None
    dead: Sequence[str] = ()
    batch: Mapping[str, str] = {}


class Learning:
    """Collects the steps of a run and reports a symptom when it appears; one that stays is not reported again.

    Args:
        num_steps: of the run.
        chance: None if the loss has no such value.
        scale_bounds: lowest and highest logit scale; None if there are none.
        warmup: steps in which a loss may stay where it is.
        active: names of the symptoms that were reported before a resume.
    """

    def __init__(
        self,
        num_steps: int,
        chance: Chance | None = None,
        scale_bounds: tuple[float, float] | None = None,
        *,
        warmup: float = 0.0,
        active: Iterable[str] = (),
    ):
        self.patience = min(MAX_PATIENCE, max(MIN_PATIENCE, num_steps // 10))
        self.chance = chance
        self.scale_bounds = scale_bounds or (0.0, math.inf)
        self.warmup = warmup
        self.active = set(active)
        self._losses: deque[float] = deque(maxlen=self.patience)
        self._grad_norms: deque[float] = deque(maxlen=MIN_OBSERVED)
        self._since: dict[str, tuple[int, int]] = {}  # of a state that lasts: its first step, and observations

    def add(self, step: int, losses: Mapping[str, float], grad_norm: float) -> None:
        """Add a step, counted from 1, with its losses by name."""
        self._grad_norms.append(grad_norm)
        if self.chance is not None and step > self.warmup:
            self._losses.append(losses.get(self.chance.name, math.nan))

    def symptoms(self, step: int, observed: Observed) -> list[str]:
        """Return the messages of the symptoms that are new at a logged step."""
        verdicts = {
            "chance": self._at_chance(step),
            "no_gradient": self._no_gradient(),
            "dead_tower": self._dead(step, observed.dead),
            "logit_scale": self._at_bound(step, observed.logit_scale),
            **{name: observed.batch.get(name, "") for name in BATCH_SYMPTOMS},
        }
        new = [text for name, text in verdicts.items() if text and name not in self.active]
        self.active -= {name for name, text in verdicts.items() if text == ""}
        self.active |= {name for name, text in verdicts.items() if text}
        return new

    def _at_chance(self, step: int) -> str | None:
        if self.chance is None or len(self._losses) < self.patience:
            return None  # not known
        _, value, text = self.chance
        if not all(abs(loss - value) <= TOLERANCE * value for loss in self._losses):
            return ""
        return (
            f"the loss is at {text} = {value:.4g} for {self.patience} steps, after {step} steps: nothing is learned\n"
            "  likely causes: texts or labels that do not belong to their images, images that are all alike, "
            "optim.lr far too high or too low, frozen parameters"
        )

    def _no_gradient(self) -> str | None:
        if len(self._grad_norms) < MIN_OBSERVED:
            return None
        if any(self._grad_norms):
            return ""
        return (
            "the gradient is exactly zero: nothing is learned\n"
            "  likely causes: a batch in which all samples are positives of one another, a loss whose weight is 0, "
            "parameters that the loss does not reach"
        )

    def _dead(self, step: int, dead: Sequence[str]) -> str | None:
        _, observed = self._lasting("dead_tower", ",".join(dead), step)
        if not dead:
            return ""
        if observed < MIN_OBSERVED:
            return None
        return (
            f"the gradient of {' and '.join(dead)} is exactly zero: it learns nothing\n"
            "  likely causes: inputs that are all alike, weights that are zero or not finite, "
            "a loss that does not use it"
        )

    def _at_bound(self, step: int, scale: float | None) -> str | None:
        low, high = self.scale_bounds
        bound = ""
        if scale is not None:
            bound = "lowest" if scale <= low * 1.0001 else "highest" if scale >= high / 1.0001 else ""
        first, _ = self._lasting("logit_scale", bound, step)
        if not bound:
            return ""
        if step - first < self.patience:
            return None
        cause = {
            "highest": "this is usual late in a long run; early, optim.lr is too high, or the pairs are too easy",
            "lowest": "texts that do not belong to their images, or optim.lr is too high",
        }
        return (
            f"the logit scale is at its {bound} value, {scale:.4g}, since step {first}\n  likely causes: {cause[bound]}"
        )

    def _lasting(self, name: str, state: str, step: int) -> tuple[int, int]:
        """Return the first step of a state, and the number of logged steps in a row that had it."""
        key = f"{name}:{state}"
        first, count = self._since.get(key, (step, 0))
        self._since = {other: value for other, value in self._since.items() if not other.startswith(f"{name}:")}
        self._since[key] = first, count + 1
        return self._since[key]


BATCH_SYMPTOMS = ("equal_captions", "equal_images", "constant_images")


def batch_symptoms(parts: Sequence[Batch]) -> dict[str, str]:
    """Return what is wrong with the samples of a step, by symptom."""
    groups = torch.cat([part.groups for part in parts])
    found = {}
    if groups.numel() and len(groups) > 1 and bool((groups == groups[0]).all()):
        found["equal_captions"] = (
            f"all {len(groups)} captions of a batch are equal: nothing is learned from them\n"
            "  likely causes: a folder's name or a placeholder as caption, data.captions with a source or a template "
            "that does not depend on the sample"
        )
    images = [(part.images if isinstance(part.images, Tensor) else part.images.pixels).flatten(1) for part in parts]
    total = sum(map(len, images))
    if total > 1 and all(bool((rows == images[0][0]).all()) for rows in images):
        found["equal_images"] = (
            f"all {total} images of a batch are equal: nothing is learned from them\n"
            "  likely causes: the same placeholder for all images, or data.augment settings that leave nothing of them"
        )
    elif all(isinstance(part.images, Tensor) and part.images.ndim == 4 for part in parts):
        constant = sum(_num_constant(part) for part in parts)
        if 2 * constant >= total:
            found["constant_images"] = (
                f"{constant} of {total} images of a batch have a single colour\n"
                "  likely causes: placeholders instead of images, or data.augment settings that leave nothing of them"
            )
    return found


def _num_constant(part: Batch) -> int:
    """Return the number of images whose pixels all equal the first one."""
    assert isinstance(part.images, Tensor)
    channels = part.images.flatten(2)
    return int((channels == channels[:, :, :1]).flatten(1).all(dim=1).sum())


def dead_towers(model: nn.Module) -> list[str]:
    """Return the trained towers of a model whose gradient is exactly zero; gradients must not be sharded."""
    dead = []
    for name, child in model.named_children():
        trained = [parameter for parameter in child.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        if not (name.endswith("_tower") and trained):
            continue
        if not gradients or not torch.stack(torch._foreach_norm(gradients, math.inf)).any():
            dead.append(name)
    return dead
