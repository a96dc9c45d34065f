"""The number format of a run: what the machine has, what overrides it, and two runs of different formats in a row."""

import pytest
import torch

from data_tools.core.errors import UsageError
from mmvit.config import PretrainConfig
from mmvit.doctor import examine
from mmvit.train.device.precision import choose_precision, has_bf16_units
from mmvit.train.run import open_accelerator

CPU = torch.device("cpu")


def test_the_environment_overrides_the_detection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MMVIT_BF16_UNITS", raising=False)
    for abilities, units in (({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda abilities=abilities: abilities)
        assert has_bf16_units(CPU) is units
        for value in "01":
            with monkeypatch.context() as patch:
                patch.setenv("MMVIT_BF16_UNITS", value)
                assert has_bf16_units(CPU) is (value == "1")
    monkeypatch.setenv("MMVIT_BF16_UNITS", "yes")
    with pytest.raises(UsageError, match="MMVIT_BF16_UNITS is 'yes'"):
        has_bf16_units(CPU)


@pytest.mark.parametrize(("value", "precision"), [("0", "fp32"), ("1", "bf16")])
def test_auto_takes_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, value: str, precision: str):
    monkeypatch.setenv("MMVIT_BF16_UNITS", value)
    assert choose_precision("auto", CPU)[0] == precision
    assert choose_precision("fp32", CPU)[0] == "fp32"
    doctor = examine()["precision"]
    assert doctor.startswith(f"{precision}: ")
    assert doctor.endswith(f"bfloat16 units (MMVIT_BF16_UNITS={value})")


@pytest.mark.parametrize("requested", ["bf16", "bf16_params"])
def test_bf16_by_name_is_refused_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch, requested: str):
    monkeypatch.setenv("MMVIT_BF16_UNITS", "1")
    assert choose_precision(requested, CPU)[0] == requested
    monkeypatch.setenv("MMVIT_BF16_UNITS", "0")
    with pytest.raises(UsageError, match="no bfloat16 units"):
        choose_precision(requested, CPU)


def test_gpu_without_bf16_units_gets_fp32_and_says_that_fp16_is_not_supported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    gpu = torch.device("cuda")
    assert choose_precision("auto", gpu) == ("fp32", "Tesla T4 has no bfloat16 units; fp16 is not supported")
    with pytest.raises(UsageError, match="Tesla T4 has no bfloat16 units") as caught:
        choose_precision("bf16", gpu)
    assert caught.value.hint == "use train.precision=auto or fp32; fp16 is not supported"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision("auto", gpu) == ("bf16", "Tesla T4 has bfloat16 units")


def test_runs_of_different_precision_follow_each_other_in_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MMVIT_BF16_UNITS", "1")
    config = PretrainConfig(out="nowhere")
    config.data.train = ["nowhere"]
    found = []
    for config.train.precision in ("fp32", "auto", "bf16", "bf16_params", "fp32"):
        accelerator = open_accelerator(config)
        with accelerator.autocast():
            dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        found.append((accelerator.mixed_precision, dtype))
    fp32, bf16 = ("no", torch.float32), ("bf16", torch.bfloat16)
    assert found == [fp32, bf16, bf16, fp32, fp32]
