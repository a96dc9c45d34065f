"""The curriculum: smaller images, shorter texts and fewer patches early in a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmvit.keys import Problem, key


@dataclass
class Stage:
    """A stage of the curriculum; null uses the setting of the model. The last stage must end at 1."""

    until: float = key(1.0, "fraction of the steps at which the stage ends", gt=0, le=1)
    image_size: int | None = key(None, "side of an image, px; null: that of the model", ge=1, le=2**14)
    text_tokens: int | None = key(
        None, "maximum text length in tokens, start and end included; null: the model's", ge=3, le=2**16
    )
    patch_dropout: float = key(0.0, "fraction of the image patches that are dropped", ge=0, lt=1)


def stage_at(step: int, num_steps: int, stages: Sequence[Stage]) -> Stage:
    """Return the stage of `step` (from 0) in a run of `num_steps`; without stages, one that changes nothing."""
    return next((stage for stage in stages if step < round(stage.until * num_steps)), Stage())


def stage_problems(stages: Sequence[Stage], patch_size: int) -> Iterator[Problem]:
    """Yield problems of stages: ends that do not rise to 1, and sizes that the patch size does not divide."""
    ends = [stage.until for stage in stages]
    if ends and not (ends[-1] == 1 and all(before < end for before, end in pairwise([0, *ends]))):
        hint = "until must rise from stage to stage up to 1, such as 0.5, 0.8, 1"
        yield Problem("curriculum", f"the stages of curriculum end at {ends}", hint)
    for i, stage in enumerate(stages):
        if stage.image_size is not None and stage.image_size % patch_size:
            name = f"curriculum[{i}].image_size"
            hint = f"use a multiple of the patch size, {patch_size} px"
            yield Problem(name, f"{name} is {stage.image_size}", hint, others=("model.image",))
