"""The settings with which a run resumes that differ from before: what they are, and what they do to the schedule."""

from collections.abc import Mapping
from typing import Any

from data_tools.core.secrets import hide_secrets
from mmvit.config import RunConfig
from mmvit.data.curriculum import stage_at
from mmvit.train.optim.schedule import schedule_factor, schedule_phase

STEPS = "train.steps"

Changes = Mapping[str, tuple[Any, Any]]  # by key: the value before, and now


def describe_changes(changes: Changes, config: RunConfig, step: int) -> str:
    """Return the changes, one per line, for a run that resumes after `step` steps; "" if there are none.

    Another number of steps changes rate and stage: the last ones before and the next ones are shown.
    """
    lines = table(changes)
    if STEPS in changes and step:
        lines += _schedule_lines(*changes[STEPS], config, step)
    return "\n".join(lines)


def table(changes: Changes) -> list[str]:
    """Return one line for each change."""
    return [hide_secrets(f"    {key}: {old} -> {new}") for key, (old, new) in changes.items()]


def _schedule_lines(before: int, now: int, config: RunConfig, step: int) -> list[str]:
    optim = config.optim
    rates = {"learning rate": optim.lr} | ({"learning rate of Muon": optim.muon_lr} if optim.name == "muon" else {})
    lines = []
    for name, peak in rates.items():
        ends = ((step - 1, before), (step, now))  # counted from 0
        old, new = (f"{peak * schedule_factor(*end, optim):.3g} ({schedule_phase(*end, optim)})" for end in ends)
        lines.append(f"    {name}: {old} at step {step} -> {new} at step {step + 1}")
    if stages := config.curriculum:
        old_stage, new_stage = stage_at(step - 1, before, stages), stage_at(step, now, stages)
        numbers = [stages.index(stage) + 1 if stage in stages else len(stages) for stage in (old_stage, new_stage)]
        lines.append(f"    stage of the curriculum: {numbers[0]} -> {numbers[1]} of {len(stages)}")
    lines.append(f"  note: the schedule is now that of a run of {now} steps from its start")
    if step == before:  # there is a model
        hint = f"to begin a new schedule with its model, start a new run: out=FOLDER train.init={config.out}/model"
        lines.append(f"  hint: {hint}")
    return lines
