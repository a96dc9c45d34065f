"""Two processes of which one dies, freezes, stalls or differs: both end in limited time and say which and where."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import TIMEOUT_S, Case, complaints, run

FEW = (Case("kill", 1, 4, "step", launched=False),)
PLACES = ((1, "read"), (2, "step"), (5, "read"), (7, "step"))
MANY = (
    *(
        Case(kind, rank, *place)
        for kind in ("kill", "sleep", "no_memory", "fail")
        for rank in (0, 1)
        for place in PLACES
    ),
    *(Case("leave", rank, *place) for rank in (0, 1) for place in PLACES[1:3]),
    *(Case("freeze", rank, *place) for rank in (0, 1) for place in PLACES[1:3]),
    *(Case(kind, 0, 3, "save") for kind in ("kill_in_write", "fail", "no_memory", "sleep")),
    *(Case(kind, rank, 4, "evaluation") for kind in ("kill", "no_memory") for rank in (0, 1)),
    *(Case(kind, rank, 4, "step", launched=False) for kind in ("kill", "freeze", "sleep", "leave") for rank in (0, 1)),
    *(
        Case(kind, 1, 0, "start", launched=launched)
        for kind in ("other_seed", "fewer_steps")
        for launched in (True, False)
    ),
    *(Case(kind, 1, 0, "start", launched=False) for kind in ("other_out", "other_data", "other_run", "spoiled_run")),
    *(Case(kind, 1, 0, "start") for kind in ("other_out", "spoiled_run")),
)

Check = Callable[[Case], list[str]]


@pytest.fixture
def check(tiny_config: Path, tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Check:
    """Run a case, print its line of the table, and return what is wrong with it."""

    def run_case(case: Case) -> list[str]:
        settings = ("train.steps=8", "train.batch_size=24", "train.log_every=1", "train.save_every=3")
        settings += (f"train.timeout_s={TIMEOUT_S}", f"data.stall_timeout_s={TIMEOUT_S - 1}")
        zero_shot = (f"zero_shot.data=[{tiny_data}/val-*.tar]", f"zero_shot.class_names={tiny_data}/names.en.txt")
        arguments = ["pretrain", str(tiny_config), f"out={tmp_path}/run", *settings]
        arguments += [*zero_shot, "zero_shot.every=4"] if case.phase == "evaluation" else []
        if case.kind in ("other_run", "spoiled_run"):
            shutil.copytree(request.getfixturevalue("finished_run"), tmp_path / "run-finished")
        outcome = run(case, arguments, tmp_path)
        found = complaints(case, outcome)
        codes = ",".join(map(str, outcome.codes))
        print(f"\n{case!s:40} {outcome.seconds:5.1f} s  exit {codes:6} {'; '.join(found) or 'told'}", end="")
        if found:
            print(outcome.output)
        return found

    return run_case


@pytest.mark.parametrize("case", FEW, ids=str)
def test_fault_ends_all_in_limited_time(check: Check, case: Case):
    assert check(case) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_fault_ends_all_in_limited_time(check: Check, case: Case):
    assert check(case) == []
