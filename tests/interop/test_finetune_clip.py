"""A CLIP model of another library is fine-tuned on own pairs by one line, stopped, resumed, and used."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from support.processes import launch, start

from data_tools.core.errors import UsageError
from mmvit.checkpoint import load_model
from mmvit.config import PretrainConfig
from mmvit.interop.start import with_imported_start
from mmvit.train.record.run_log import read_log
from mmvit.train.start.config import load_pretrain_config

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TINY = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 64}, {"layers": 1, "width": 32, "heads": 2}
B32 = {"layers": 12, "width": 768, "patch_size": 32, "image_size": 224}, {"layers": 12, "width": 512, "heads": 8}
LIMIT_S = 300
RunCli = Callable[..., tuple[int, str, str]]


def save_open_clip(folder: Path, image: dict[str, Any], text: dict[str, Any], embed_dim: int) -> str:
    torch.manual_seed(0)
    model = CLIP(embed_dim, CLIPVisionCfg(**image), CLIPTextCfg(**text))
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    config = {"embed_dim": embed_dim, "vision_cfg": image, "text_cfg": text}
    described = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return f"open_clip:{folder}"


def save_transformers(folder: Path) -> str:
    torch.manual_seed(0)
    text = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text)).save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    return f"hf:{folder}"


def test_one_line_takes_architecture_preprocessing_and_tokenizer(
    run_cli: RunCli, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, out = save_open_clip(tmp_path / "theirs", *TINY, embed_dim=24), tmp_path / "run"
    line = ["finetune", "finetune/clip", f"train.init={source}", f"data.train={tiny_data}/train-*.tar", f"out={out}"]
    line += ["train.steps=2", "train.batch_size=8", "train.precision=fp32", "data.num_workers=0"]
    code, printed, err = run_cli(*line)
    assert (code, printed) == (0, f"model: {out / 'model'}\n"), err
    begin, end = (load_model(folder) for folder in (next((out / "start").iterdir()), out / "model"))
    assert (end.config, end.preprocess) == (begin.config, begin.preprocess)
    texts = ["a photo of a dog", "\uac15\uc544\uc9c0"]
    assert torch.equal(
        end.tokenizer(texts), open_clip.get_tokenizer("ViT-B-32")(texts)[:, : len(end.tokenizer(texts)[0])]
    )
    moved = [name for name, value in begin.model.state_dict().items() if not value.equal(end.model.state_dict()[name])]
    assert len(moved) > 20
    distance = max((begin.model.state_dict()[name] - end.model.state_dict()[name]).abs().max() for name in moved)
    assert distance < 1e-3  # two steps of 1e-5

    # The model that it came from may go, and the run is extended.
    shutil.rmtree(tmp_path / "theirs")
    code, _, err = run_cli(*line, "train.steps=3")
    assert code == 0, err
    assert [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line] == [2, 3]
    shutil.rmtree(out / "start")
    code, _, err = run_cli("finetune", out / "config.yaml", "train.steps=4", "data.num_workers=0")
    assert code == 0, err


def test_keys_that_the_config_sets_stay(tmp_path: Path):
    source = save_open_clip(tmp_path / "theirs", *TINY, embed_dim=24)
    overrides = [f"train.init={source}", "data.train=x", f"out={tmp_path / 'run'}", "model.image.drop_path=0.1"]
    overrides = with_imported_start("finetune/clip", overrides, PretrainConfig)
    config = load_pretrain_config("finetune/clip", overrides)
    image = config.model.image
    assert (image.width, image.depth, image.image_size, image.drop_path) == (64, 1, 64, 0.1)
    assert (config.model.text.width, config.model.embed_dim) == (32, 24)
    assert config.optim.lr == 1e-5


def test_a_recipe_without_its_model_is_refused():
    with pytest.raises(UsageError, match="the recipe starts from a model, and none is given") as caught:
        load_pretrain_config("finetune/clip", ["data.train=x"])
    assert "open_clip:ARCH/TAG" in caught.value.hint


def test_wise_ft_exports_weights_between_start_and_end(run_cli: RunCli, tiny_data: Path, tmp_path: Path):
    source = save_open_clip(tmp_path / "theirs", *TINY, embed_dim=24)
    line = ["finetune", "finetune/clip", f"train.init={source}", f"data.train={tiny_data}/train-*.tar"]
    line += ["train.steps=2", "train.batch_size=8", "train.precision=fp32", "data.num_workers=0", "optim.lr=1e-3"]
    weights = {}
    for share in ("null", "0.25"):
        code, _, err = run_cli(*line, f"out={tmp_path / share}", f"wise_ft={share}")
        assert code == 0, err
        weights[share] = load_file(tmp_path / share / "model" / "model.safetensors")
    begin = load_file(next((tmp_path / "null" / "start").iterdir()) / "model.safetensors")
    for name, end in weights["null"].items():
        assert torch.allclose(weights["0.25"][name], torch.lerp(begin[name], end, 0.25), atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_real_size_vit_b32_on_two_ranks_is_stopped_and_resumed(library: str, tiny_data: Path, tmp_path: Path):
    theirs = tmp_path / "theirs"
    source = save_open_clip(theirs, *B32, embed_dim=512) if library == "open_clip" else save_transformers(theirs)
    ends = {}
    for name in ("alone", "stopped"):
        out = tmp_path / name
        line = ["-m", "mmvit", "finetune", "finetune/clip", f"train.init={source}", f"out={out}"]
        line += [f"data.train={tiny_data}/train-*.tar", "train.steps=8", "train.batch_size=8", "train.log_every=1"]
        line += ["train.precision=fp32", "data.num_workers=0", "train.save_every=8"]
        if name == "stopped":
            first = launch(2, line, lambda rank, out=out: out.with_suffix(".txt"))
            limit = time.monotonic() + LIMIT_S
            while len(read_log(out / "log.jsonl")) < 2:
                assert all(rank.poll() is None for rank in first), out.with_suffix(".txt").read_text()
                assert time.monotonic() < limit
                time.sleep(0.05)
            for rank in first:
                rank.send_signal(signal.SIGTERM)
            assert [rank.wait(LIMIT_S) for rank in first] == [143, 143]
            shutil.rmtree(theirs)
        ranks = launch(2, line, lambda rank, out=out: out.with_suffix(".txt"))
        assert [rank.wait(LIMIT_S) for rank in ranks] == [0, 0], out.with_suffix(".txt").read_text()
        ends[name] = (out / "model" / "model.safetensors").read_bytes()
    assert ends["alone"] == ends["stopped"]
    loaded = load_model(tmp_path / "alone" / "model")
    assert sum(weights.numel() for weights in loaded.model.parameters()) == 151_277_313
    command = [sys.executable, "-m", "mmvit", "embed", str(tmp_path / "alone" / "model"), f"{tiny_data}/val-*.tar"]
    assert start([*command, "--out", str(tmp_path / "e")], tmp_path / "embed.txt").wait(LIMIT_S) == 0
