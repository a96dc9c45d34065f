"""A single rank agrees with itself; several are started in tests/end_to_end/test_bad_data.py."""

import pytest
from accelerate import Accelerator

from data_tools.core.errors import DataError, SampleError, UsageError
from mmvit.train.safety.agree import Failure, check_agreement, gather_errors, main_first, on_main
from mmvit.train.safety.watch import Watch

ERROR = SampleError("bad-image", "what is wrong", shard="a.tar", key="x")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_errors_and_stop_requests_of_a_single_rank_are_its_own(accelerator: Accelerator):
    assert gather_errors(accelerator, [ERROR], stop_requested=True) == ([ERROR], True)
    assert gather_errors(accelerator, (), stop_requested=False) == ([], False)


@pytest.mark.parametrize("error", [DataError("no data"), OSError(28, "No space left on device")])
def test_main_rank_gives_its_result_or_its_error(accelerator: Accelerator, error: Exception):
    def fail() -> None:
        raise error

    assert on_main(accelerator, lambda: "found") == "found"
    with pytest.raises(type(error)) as caught:
        on_main(accelerator, fail)
    assert caught.value is error


@pytest.mark.parametrize(("is_main", "order"), [(True, ["opened", "agreed"]), (False, ["agreed", "opened"])])
def test_main_rank_goes_first(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator, is_main: bool, order: list):
    done = []

    def gather(accelerator: Accelerator, mine: list[Failure], stop_requested: bool) -> tuple[list[Failure], bool]:
        done.append("agreed")
        return mine, stop_requested

    monkeypatch.setattr("mmvit.train.safety.agree.gather_errors", gather)
    monkeypatch.setattr(Accelerator, "is_main_process", is_main)
    with main_first(accelerator, Watch(60.0), "opening"):
        done.append("opened")
    assert done == order


def test_error_of_the_main_rank_is_raised_by_all(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator):
    with pytest.raises(SampleError) as caught, main_first(accelerator, Watch(60.0), "opening"):
        raise ERROR
    assert caught.value is ERROR
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr("mmvit.train.safety.agree.gather_errors", lambda *_, **__: ([ERROR], False))
    opened = []
    with pytest.raises(SampleError), main_first(accelerator, Watch(60.0), "opening"):
        opened.append(1)
    assert not opened


def facts(**changed: str) -> dict[str, str]:
    return {"data": "abc", "step": "0", "config": "x" * 500} | changed


def test_ranks_that_agree_continue(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator):
    check_agreement(accelerator, facts())
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    monkeypatch.setattr("mmvit.train.safety.agree.gather_object", lambda mine: mine * 3)
    check_agreement(accelerator, facts())


def test_each_difference_is_named_with_its_rank_and_values(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator):
    """As ranks report them; real ones differ in tests/faults/ranks."""
    reports = [facts(), facts(), facts(data="def", config="y" * 500)]
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    monkeypatch.setattr("mmvit.train.safety.agree.gather_object", lambda mine: reports)
    with pytest.raises(UsageError) as caught:
        check_agreement(accelerator, reports[0])
    assert "rank 2: data is def, on rank 0 abc" in str(caught.value)
    assert "config is yyy" in str(caught.value)
    assert len(str(caught.value)) < 800
    assert "rank 1" not in str(caught.value)
    assert "step is" not in str(caught.value)
