"""What a training step looks like: smaller images, shorter texts and fewer patches early in a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from data_tools.core.errors import UsageError


@dataclass
class Stage:
    """A part of the run. None: as the model has it. The last stage must end at 1."""

    until: float = 1.0  # share of the steps at which the stage ends
    image_size: int | None = None  # px; positions are resampled
    text_tokens: int | None = None  # longest text, the framing tokens included
    patch_dropout: float = 0.0  # share of the patches that the image tower does not see


def stage_at(step: int, num_steps: int, stages: Sequence[Stage]) -> Stage:
    """Return the stage of `step` (from 0) in a run of `num_steps`; without stages, one that changes nothing."""
    return next((stage for stage in stages if step < round(stage.until * num_steps)), Stage())


def check_stages(stages: Sequence[Stage], patch_size: int) -> None:
    """Raise UsageError unless the stages follow each other up to 1 and hold values that a step can have."""
    ends = [stage.until for stage in stages]
    if ends and not (ends[-1] == 1 and all(before < end for before, end in pairwise([0, *ends]))):
        hint = "let until rise from stage to stage up to 1, such as 0.5, 0.8, 1"
        raise UsageError(f"the stages end at {ends}", where="curriculum", hint=hint)
    for i, stage in enumerate(stages):
        if not 0 <= stage.patch_dropout < 1:
            what = f"curriculum[{i}].patch_dropout is {stage.patch_dropout}"
            raise UsageError(what, where="curriculum", hint="give a share from 0 to below 1")
        size = stage.image_size
        if size is not None and (size < 1 or size % patch_size):
            what = f"curriculum[{i}].image_size is {size}"
            raise UsageError(what, where="curriculum", hint=f"give a multiple of the patch size, {patch_size} px")
        if stage.text_tokens is not None and stage.text_tokens < 3:
            what = f"curriculum[{i}].text_tokens is {stage.text_tokens}"
            raise UsageError(what, where="curriculum", hint="3 hold one word between the framing tokens")
