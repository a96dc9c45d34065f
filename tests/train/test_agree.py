"""A lone process agrees with itself; several are started in tests/end_to_end/test_bad_data.py."""

import pytest
from accelerate import Accelerator

from data_tools.errors import DataError, SampleError
from mmvit.train.agree import gather_errors, on_main

ERROR = SampleError("bad-image", "what is wrong", shard="a.tar", key="x")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_errors_and_wishes_of_a_lone_process_are_its_own(accelerator: Accelerator):
    assert gather_errors(accelerator, [ERROR], wished=True) == ([ERROR], True)
    assert gather_errors(accelerator, (), wished=False) == ([], False)


@pytest.mark.parametrize("error", [DataError("no data"), OSError(28, "No space left on device")])
def test_main_process_gives_its_result_or_its_error(accelerator: Accelerator, error: Exception):
    def fail() -> None:
        raise error

    assert on_main(accelerator, lambda: "found") == "found"
    with pytest.raises(type(error)) as caught:
        on_main(accelerator, fail)
    assert caught.value is error
