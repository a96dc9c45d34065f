"""Each step of a run belongs to one stage, and stages that no run can have are refused."""

import dataclasses
import re

import pytest

from mmvit.config.validate import validate
from mmvit.data.curriculum import Stage, stage_at, stage_problems

STAGES = [Stage(0.5, image_size=16), Stage(0.75, text_tokens=5), Stage(1.0, patch_dropout=0.5)]


def test_stages_share_the_steps():
    assert [STAGES.index(stage_at(step, 8, STAGES)) for step in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [STAGES.index(stage_at(step, 3, STAGES)) for step in range(3)] == [0, 0, 2]  # 1.5 and 2.25, rounded to even


def test_without_stages_nothing_changes():
    assert stage_at(5, 8, []) == Stage(1.0, None, None, 0.0)


def complaints(stages: list[Stage]) -> list[str]:
    of_each = [problem for stage in stages for problem in validate(Stage, dataclasses.asdict(stage), strict=True)[1]]
    return [problem.what for problem in (*of_each, *stage_problems(stages, 8))]


def test_good_stages_pass():
    assert complaints(STAGES) == complaints([]) == []


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ([Stage(0.5)], "end at"),
        ([Stage(0.5), Stage(0.5), Stage(1.0)], "end at"),
        ([Stage(0.6), Stage(0.4), Stage(1.0)], "end at"),
        ([Stage(0.0), Stage(1.0)], "end at"),
        ([Stage(float("nan")), Stage(1.0)], "end at"),
        ([Stage(1.0, patch_dropout=1.0)], "patch_dropout is 1.0"),
        ([Stage(0.5), Stage(1.0, image_size=20)], r"curriculum\[1\].image_size is 20"),
        ([Stage(1.0, image_size=0)], "image_size is 0"),
        ([Stage(1.0, text_tokens=2)], "text_tokens is 2"),
    ],
)
def test_bad_stages_are_refused(stages: list[Stage], complaint: str):
    assert [what for what in complaints(stages) if re.search(complaint, what)]
