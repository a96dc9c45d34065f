"""The configs that come with mmvit: listed, printed, and told from files and from those of the other verb."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.core.errors import DataError, UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, builtin_configs, check_files, find_config, load_config

RunCli = Callable[..., tuple[int, str, str]]


def test_list_names_each_config_with_its_first_line(run_cli: RunCli):
    code, out, err = run_cli("configs")
    assert (code, err) == (0, "")
    configs = builtin_configs()
    assert {"quickstart", "pretrain/clip_vit_b32", "finetune/digits_vit"} <= {each.name for each in configs}
    assert [each.name for each in configs if each.name not in out or not each.about or each.about not in out] == []
    digits = next(each for each in configs if each.name == "finetune/digits_vit")
    assert digits.hardware == "2 CPU cores, about two minutes or less"
    assert digits.command == "mmvit finetune finetune/digits_vit"
    assert json.loads(run_cli("configs", "--json")[1])[0]["name"] == configs[0].name


def test_one_is_printed(run_cli: RunCli):
    assert run_cli("configs", "quickstart") == (0, find_config("quickstart").read_text("utf-8"), "")
    code, out, err = run_cli("configs", "quikstart")
    assert (code, out) == (2, "")
    assert "did you mean 'quickstart'?" in err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("clip_vit_b32", "did you mean 'pretrain/clip_vit_b32'?"),
        ("ViT-B-32", "did you mean 'pretrain/clip_vit_b32'?"),
        ("run/x.yaml", "did you mean runs?"),
        ("my.yml", "did you mean my.yaml?"),
        ("runs/x", "pass runs/x/config.yaml"),
        ("runs", "pass a YAML file; mmvit configs lists the built-in ones"),
        ("quux", "mmvit configs lists the built-in ones"),
    ],
)
def test_missing_config_gets_a_hint(name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.yaml").touch()
    (tmp_path / "my.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        find_config(name)
    assert caught.value.hint == hint


def test_config_of_the_other_verb_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="a config of mmvit finetune, not of mmvit pretrain") as caught:
        load_config(PretrainConfig, "finetune/swin_t", ["data.tarin=x"])
    assert caught.value.hint == "mmvit finetune finetune/swin_t"
    with pytest.raises(UsageError) as caught:
        load_config(FinetuneConfig, "quickstart")
    assert caught.value.hint == "mmvit pretrain quickstart"
    file = tmp_path / "mine.yaml"
    file.write_text("data: {train: x}\nclasses: a,b\n")
    assert load_config(FinetuneConfig, file, ["data.train=y"]).classes == "a,b"
    with pytest.raises(UsageError, match="a config of mmvit finetune") as caught:
        load_config(PretrainConfig, file, ["data.train=y"])
    assert caught.value.hint == f"mmvit finetune {file}"
    file.write_text("data: {train: x}\nclases: a,b\n")
    with pytest.raises(UsageError, match="unknown config key clases"):
        load_config(PretrainConfig, file)


def test_config_without_data_can_be_printed_but_not_run(run_cli: RunCli):
    code, out, err = run_cli("pretrain", "pretrain/clip_vit_b32", "--print-config")
    assert (code, err) == (0, "")
    assert "train: []" in out
    code, out, err = run_cli("pretrain", "pretrain/clip_vit_b32")
    assert (code, out) == (2, "")
    assert "no training data is given" in err
    assert run_cli("pretrain", "pretrain/clip_vit_b32", "--print-config", "optim.lr=-1")[0] == 2
    assert run_cli("finetune", "finetune/swin_t", "--print-config")[0] == 0


def test_config_that_leaves_a_model_open_can_be_printed(run_cli: RunCli):
    for name in ("pretrain/lit_vit_b16", "finetune/wise_ft_vit_b16", "finetune/deit_b16_distilled"):
        code, out, err = run_cli(name.partition("/")[0], name, "--print-config")
        assert (code, err) == (0, ""), name
        assert "optim:" in out


def test_last_of_equal_arguments_wins(run_cli: RunCli, caplog: pytest.LogCaptureFixture):
    code, out, _ = run_cli("pretrain", "pretrain/clip_vit_b32", "data.train=a", "data.train=b", "--print-config")
    assert code == 0
    assert "- b\n" in out
    assert "- a\n" not in out
    assert "data.train is given 2 times" in caplog.text


def test_missing_files_are_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").touch()
    config = PretrainConfig(out="runs/a")
    config.data.train = ["data", "data/*.tar", "data/{a..b}.tar", "https://example.org/a.tar"]
    check_files(config)
    for change, value in ((config.data, "train"), (config.zero_shot, "data")):
        before = getattr(change, value)
        setattr(change, value, ["dta/a.tar"])
        with pytest.raises(DataError, match="no shards found") as caught:
            check_files(config)
        assert str(caught.value.hint).startswith("did you mean data/a.tar?")
        setattr(change, value, before)
    config.train.init = "runs/b"
    with pytest.raises(UsageError, match="not a model folder"):
        check_files(config)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    check_files(config)  # a run resumes without the model that it started from


def test_place_of_a_wrong_value_is_where_it_was_written(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: x}\noptim: {lr: -1}\n")
    for overrides, where in (
        ([], f"optim.lr, {file}"),
        (["optim.lr=-2"], "optim.lr, the command line"),
        (["optim={lr: -2}"], "optim.lr, the command line"),
        (["seed=1"], f"optim.lr, {file}"),
    ):
        with pytest.raises(UsageError) as caught:
            load_config(PretrainConfig, file, overrides)
        assert caught.value.where == where
    with pytest.raises(UsageError) as caught:
        load_config(PretrainConfig, file, ["seed=-1"])
    assert caught.value.where == f"{file} and the command line"
