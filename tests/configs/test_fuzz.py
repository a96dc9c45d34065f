"""Random values for random keys are refused, or make a run that can learn; `support/config_fuzz.py` tries thousands."""

from pathlib import Path

import pytest
from support.config_fuzz import MEMORY, Outcome, cannot_learn, make_data, trial

from data_tools.core.errors import UsageError
from mmvit.config import PretrainConfig, load_config
from mmvit.train.loop import check
from mmvit.train.start import size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    make_data(made)
    return made


def test_random_values_are_refused_or_can_be_trained(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(size, "machine_memory", lambda: MEMORY)
    outcomes = [trial(folder, seed) for seed in range(10)]
    assert {outcome.code for outcome in outcomes} - {3, 4} == {0, 2}  # 3 and 4: paths that name nothing
    assert [outcome.fault for outcome in outcomes if outcome.fault] == []


def test_accepted_run_that_cannot_learn_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(PretrainConfig, folder / "pretrain_vit.yaml")
    assert cannot_learn(config) == ""
    config.optim.lr = 0.0
    assert cannot_learn(config) == "a rate is not positive"
    monkeypatch.setattr("support.config_fuzz.load_config", lambda *arguments: config)
    monkeypatch.setattr("support.config_fuzz.load_finetune_config", lambda *arguments: config)
    monkeypatch.setattr("support.config_fuzz.loop.check", lambda config: "")
    assert trial(folder, 0).fault.endswith("accepted, but a rate is not positive")
    monkeypatch.setattr("support.config_fuzz.loop.check", lambda config: 1 / 0)
    assert isinstance(outcome := trial(folder, 0), Outcome)
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.fault


def test_model_that_is_larger_than_the_machine_is_refused_before_it_is_built(folder: Path, tmp_path: Path):
    wide = ["model.text.vocab_size=16000000", "model.text.width=65536", f"out={tmp_path}/run"]
    with pytest.raises(UsageError) as caught:
        check(load_config(PretrainConfig, folder / "pretrain_vit.yaml", wide))
    assert caught.value.exit_code == 2
    assert "does not fit the tokenizer" in str(caught.value)
    with pytest.raises(UsageError, match=r"the model has \d+\.\d G parameters and needs \d+\.\d GiB; this machine has"):
        check(load_config(PretrainConfig, folder / "pretrain_vit.yaml", wide[1:]))
