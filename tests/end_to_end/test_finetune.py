"""Supervised runs on handwritten digits: they learn, resume, start from other models, and refuse invalid settings."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.processes import launch

from data_tools.core.errors import CheckpointError, DataError, UsageError
from data_tools.demo.digits import write_digits
from mmvit.checkpoint import load_classifier, load_model, load_tower, save_model
from mmvit.config import FinetuneConfig, load_config
from mmvit.data.labels import open_labelled
from mmvit.data.prompts import load_templates
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.data.transforms import PreprocessConfig
from mmvit.eval.classify import evaluate_classifier
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import zero_shot_classifier
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.swin import SwinConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.loop import finetune
from mmvit.train.record.run_log import read_log
from mmvit.train.run import open_accelerator
from mmvit.train.start.classifier import build_start
from mmvit.train.start.config import load_finetune_config

CONFIG = """
seed: 1
model: {image: {image_size: 16, patch_size: 4, width: 64, depth: 2, num_heads: 2, pool: mean, pre_norm: false}}
preprocess: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
data: {augment: {crop_area: null, rotate: 10}, cache_mb: 64}
optim: {name: muon, lr: 2.0e-3, warmup_share: 0.1}
train: {steps: 12, batch_size: 32, precision: fp32, log_every: 1, save_every: 5}
"""

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

Configure = Callable[..., FinetuneConfig]
StopAfter = Callable[[FinetuneConfig, int], int]


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    write_digits(folder)
    return folder


def configure_in(folder: Path, data: Path) -> Configure:
    (folder / "config.yaml").write_text(CONFIG)

    def make(name: str, *overrides: str) -> FinetuneConfig:
        arguments = {"out": str(folder / name), "data.train": f"[{data}/train-*.tar]", "classes": f"{data}/classes.txt"}
        arguments |= dict(override.split("=", 1) for override in overrides)
        return load_config(
            FinetuneConfig, folder / "config.yaml", [f"{key}={value}" for key, value in arguments.items()]
        )

    return make


@pytest.fixture
def configure(digits_folder: Path, tmp_path: Path) -> Configure:
    return configure_in(tmp_path, digits_folder)


@pytest.fixture(scope="session")
def trained(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few steps."""
    return finetune(configure_in(tmp_path_factory.mktemp("trained"), digits_folder)("run"))


def validation(folder: Path) -> list[str]:
    return [f"validation.data=[{folder}/val-*.tar]", "validation.every=1000"]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl")]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@pytest.mark.slow
def test_a_small_vit_learns_digits_and_names_them(configure: Configure, digits_folder: Path, mmvit: Any):
    steps = ["train.steps=70", "train.batch_size=64", "mix.mixup=0.1", "loss.label_smoothing=0.1", "data.repeats=2"]
    model = finetune(configure("run", *steps, *validation(digits_folder)))
    last = read_log(model.parent / "log.jsonl")[-1]
    assert last["val_acc1"] > 0.6  # chance 0.1
    assert last["val_acc5"] > last["val_acc1"]
    data = open_labelled([f"{digits_folder}/val-*.tar"], f"{digits_folder}/classes.txt")
    loaded = load_classifier(model)
    found = evaluate_classifier(loaded.model, data.samples, 16)
    assert found.acc1 == pytest.approx(last["val_acc1"], abs=1e-6)
    sample = data.samples.read(int((found.best[:, 0] == found.labels).nonzero()[0]))
    picture = model.parent / "digit.png"
    picture.write_bytes(sample.image)
    done = mmvit("classify", model, picture, "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert answer["classes"][0]["name"] == data.class_names[sample.label]
    assert len(answer["classes"]) == 2


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["train.micro_batches=2", "mix.cutmix=1.0", "optim.ema_decay=0.9"],
    ],
    ids=str,
)
def test_a_stopped_run_resumes_bit_for_bit(configure: Configure, more: list[str], stop_after: StopAfter):
    whole = finetune(configure("whole", *more))
    stop_after(configure("stopped", *more), 6)
    again = finetune(configure("stopped", *more))
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("fp32_units")
def test_micro_batches_equal_the_batch(configure: Configure):
    one, four = (finetune(configure(f"parts{n}", f"train.micro_batches={n}", "mix.mixup=0.2")).parent for n in (1, 4))
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fp32_units")
def test_two_ranks_give_the_losses_of_one(configure: Configure, tmp_path: Path):
    one = finetune(configure("one", "mix.mixup=0.2", "mix.cutmix=1.0", "data.repeats=3")).parent
    processes = launch(2, ["-m", "mmvit", "finetune", str(one / "config.yaml"), f"out={tmp_path / 'two'}"])
    assert [process.wait(300) for process in processes] == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


def test_other_classes_end_a_resumed_run(configure: Configure, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    finetune(configure("run", f"classes={names}"))
    names.write_text("\n".join([*NAMES[:9], "neuf"]))
    with pytest.raises(CheckpointError, match="class 9 is 'nine' in the checkpoint and 'neuf' in the data"):
        finetune(configure("run", f"classes={names}", "train.steps=14"))


def test_labels_beyond_the_classes_are_refused(configure: Configure, tmp_path: Path):
    (tmp_path / "few.txt").write_text("zero\none\n")
    with pytest.raises(DataError, match="out of range: the classes go from 0 to 1"):
        finetune(configure("run", f"classes={tmp_path / 'few.txt'}"))


def start(config: FinetuneConfig, names: Sequence[str]) -> Any:
    return build_start(config, names, open_accelerator(config)).eval()


PIXELS = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_v13_the_same_size_is_bit_identical_and_a_larger_one_runs(configure: Configure, trained: Path):
    before = load_classifier(trained).model
    same = start(configure("same", f"train.init={trained}"), NAMES)
    assert torch.equal(same(PIXELS).logits, before(PIXELS).logits)
    larger = configure("larger", f"train.init={trained}", "model.image.image_size=24", "train.steps=3")
    run = finetune(larger)
    assert weights(run)["image_tower.positions"].shape == (36, 64)
    assert losses(run.parent)[0] < 3


def test_what_the_model_to_start_from_has_need_not_be_said(configure: Configure, tmp_path: Path):
    made = configure("run", "train.steps=1")
    model = finetune(made)
    (tmp_path / "short.yaml").write_text("train: {steps: 3, batch_size: 32}")
    arguments = [f"train.init={model}", f"data.train={made.data.train}", f"classes={made.classes}"]
    config = load_finetune_config(tmp_path / "short.yaml", [*arguments, "model.image.image_size=24"])
    assert config.model.image == dataclasses.replace(made.model.image, image_size=24)
    assert config.preprocess == made.preprocess
    assert config.model.embed_dim is None
    stated = load_finetune_config(
        tmp_path / "short.yaml", [*arguments, "model.image.kind=swin", "preprocess.std=[1,1,1]"]
    )
    assert stated.model.image == SwinConfig()
    assert stated.preprocess == dataclasses.replace(made.preprocess, std=[1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image.norm_eps=1.0e-3", "model.image.norm_eps=1e-05"),
        ("model.image.activation=quick_gelu", "model.image.activation=gelu"),
        ("preprocess.mean=[0,0,0]", "preprocess.mean=[0.5, 0.5, 0.5]"),
    ],
)
def test_weights_of_other_settings_are_refused(configure: Configure, override: str, message: str, trained: Path):
    with pytest.raises(UsageError, match=re.escape(message)):
        start(configure("other", f"train.init={trained}", override), NAMES)
    start(configure("free", f"train.init={trained}", "model.image.drop_path=0.1"), NAMES)


def test_a_swin_takes_its_biases_to_larger_windows(configure: Configure, tmp_path: Path, trained: Path):
    swin = "{kind: swin, image_size: 16, patch_size: 2, width: 16, depths: [1, 1], num_heads: [1, 2], window_size: 2}"
    (tmp_path / "config.yaml").write_text(re.sub("model: .*", f"model: {{image: {swin}}}", CONFIG))
    with pytest.raises(UsageError, match=r"model\.image\.kind=vit"):
        start(configure("other", f"train.init={trained}"), NAMES)
    model = finetune(configure("run", "train.steps=1"))
    larger = start(configure("larger", f"train.init={model}", "model.image.window_size=4"), NAMES)
    before, after = load_tower(model).tower, larger.image_tower.state_dict()
    tables = before.resampled_tables((4, 4))
    assert tables["blocks.0.relative_positions"].shape == (49, 1)
    for name, tensor in before.state_dict().items():
        assert torch.equal(after[name], tables.get(name, tensor))


def test_other_classes_start_with_a_head_of_zeros(
    configure: Configure, trained: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        start(configure("same", f"train.init={trained}"), NAMES)
        other = start(configure("other", f"train.init={trained}"), ["a", "b", "c"])
    same, fresh = caplog.messages[-2:]
    assert same.endswith("the head is loaded too")
    assert fresh.endswith("the head is new, because its kind or the classes differ")
    assert torch.equal(other(PIXELS).logits, torch.zeros(4, 3))
    tower = load_tower(trained).tower.state_dict()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in other.image_tower.state_dict().items())


def contrastive(run: Path, *more: str) -> list[str]:
    loaded = load_model(run / "model")
    image = dataclasses.asdict(loaded.config.image)
    overrides = [f"model.image.{key}={json.dumps(value)}" for key, value in image.items() if value is not None]
    return [
        f"train.init={run / 'model'}",
        f"model.embed_dim={loaded.config.embed_dim}",
        f"preprocess.mean={loaded.preprocess.mean}",
        f"preprocess.std={loaded.preprocess.std}",
        *overrides,
        *more,
    ]


def test_a_contrastive_model_starts_as_its_zero_shot_classifier(configure: Configure, finished_run: Path):
    loaded = load_model(finished_run / "model")
    size = loaded.config.image.image_size
    pixels = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    encoder = Encoder(loaded.model, loaded.tokenizer, image_size=size, fingerprint="")
    expected = zero_shot_classifier(encoder, NAMES, load_templates("simple"))(pixels).logits
    model = start(configure("run", *contrastive(finished_run, "templates=simple")), NAMES)
    assert torch.allclose(model(pixels).logits, expected, atol=1e-5)


def test_a_contrastive_model_without_a_projection_starts_as_its_zero_shot_classifier(
    configure: Configure, tmp_path: Path
):
    """As CLIP's ResNets and SigLIP have none."""
    torch.manual_seed(0)
    text = TextConfig(vocab_size=49408, context_length=77, width=16, depth=1, num_heads=1)
    image = ViTConfig(image_size=16, patch_size=8, width=24, depth=1, num_heads=2)
    config = DualEncoderConfig(embed_dim=24, image=image, text=text, image_projection=False)
    preprocess = PreprocessConfig()
    folder = tmp_path / "contrastive" / "model"
    save_model(folder, build_dual_encoder(config), config, preprocess, TokenizerConfig("clip"))
    loaded = load_model(folder)
    encoder = Encoder(loaded.model, loaded.tokenizer, image_size=16, fingerprint="")
    expected = zero_shot_classifier(encoder, NAMES, load_templates("simple"))(PIXELS).logits
    (tmp_path / "short.yaml").write_text("{}")
    made = configure("run")
    arguments = [f"train.init={folder}", f"data.train={made.data.train}", f"classes={made.classes}"]
    short = load_finetune_config(tmp_path / "short.yaml", [*arguments, "templates=simple"])
    assert (short.model.embed_dim, short.model.image_projection) == (24, False)
    assert torch.allclose(start(short, NAMES)(PIXELS).logits, expected, atol=1e-5)
    short.model.image_projection = True
    with pytest.raises(UsageError, match=r"the model of train\.init has none"):
        start(short, NAMES)


def test_a_projection_comes_along_to_other_classes(configure: Configure, tmp_path: Path):
    model = finetune(configure("run", "model.embed_dim=8", "train.steps=1"))
    other = start(configure("other", f"train.init={model}", "model.embed_dim=8"), ["a", "b"])
    assert torch.equal(other.image_projection.weight, weights(model)["image_projection.weight"])
    assert torch.equal(other(PIXELS).logits, torch.zeros(4, 2))


def test_wise_ft_wants_the_model_that_it_started_from(
    configure: Configure, finished_run: Path, tmp_path: Path, stop_after: StopAfter
):
    moved = tmp_path / "start"
    shutil.copytree(finished_run, moved)
    config = configure("run", *contrastive(moved, "templates=simple", "wise_ft=0.5"))
    stop_after(config, 3)
    other = weights(moved / "model")
    (moved / "model").rename(moved / "gone")
    with pytest.raises(CheckpointError, match="not a model folder"):
        finetune(config)
    loaded = load_model(moved / "gone")
    torch.nn.init.zeros_(loaded.model.logit_scale)
    tokenizer = TokenizerConfig("file", str(moved / "gone" / "tokenizer.json"))
    save_model(moved / "model", loaded.model, loaded.config, loaded.preprocess, tokenizer)
    assert other["logit_scale"] != 0
    with pytest.raises(CheckpointError, match="model to start from changed"):
        finetune(config)


@pytest.mark.slow
def test_wise_ft_goes_from_the_start_to_the_end(configure: Configure, finished_run: Path, digits_folder: Path):
    """Weights between the zero-shot classifier and the trained one: at 0 the one, at 1 the other, linear between."""
    found, measured = {}, validation(digits_folder)
    for share in ("null", "0.0", "0.5", "1.0"):
        config = configure(
            f"run{share}",
            *contrastive(finished_run, "templates=simple", f"wise_ft={share}"),
            "train.steps=5",
            *measured,
        )
        found[share] = weights(finetune(config))
    begin = start(configure("begin", *contrastive(finished_run, "templates=simple")), NAMES).state_dict()
    for name, tensor in found["null"].items():
        assert torch.equal(found["1.0"][name], tensor)
        assert torch.equal(found["0.0"][name], begin[name])
        assert torch.allclose(found["0.5"][name], (tensor + begin[name]) / 2, atol=1e-6)
    assert any(not torch.equal(begin[name], tensor) for name, tensor in found["null"].items())

    data = open_labelled([f"{digits_folder}/val-*.tar"], f"{digits_folder}/classes.txt")
    last = read_log(Path(configure("run0.5").out) / "log.jsonl")[-1]
    for figure, share in (("val_acc1", "null"), ("wise_ft_acc1", "0.5")):
        model = load_classifier(Path(configure(f"run{share}").out) / "model")
        assert last[figure] == evaluate_classifier(model.model, data.samples, model.config.image.image_size).acc1


DISTILLED = ["model.image.pool=class", "model.image.distilled=true"]


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("image", [[], DISTILLED], ids=["plain", "token"])
def test_distillation_reads_the_teacher(configure: Configure, kind: str, image: list[str], trained: Path):
    taught = finetune(configure("taught", f"loss.teacher={trained}", f"loss.distillation={kind}", *image))
    tensors = weights(taught)
    assert ("distillation_head.weight" in tensors) == bool(image)
    if image:
        assert tensors["distillation_head.weight"].abs().max() > 0
    assert losses(taught.parent)[-1] < losses(taught.parent)[0]


def test_a_teacher_of_other_classes_is_refused(configure: Configure, tmp_path: Path, trained: Path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join([*NAMES[:9], "neuf"]))
    with pytest.raises(UsageError, match="class 9 is 'nine' in the teacher and 'neuf' in the data"):
        finetune(configure("run", f"loss.teacher={trained}", f"classes={names}"))
    names.write_text("\n".join([*NAMES, "ten"]))
    with pytest.raises(UsageError, match="class 10, 'ten', is in the data and not in the teacher"):
        finetune(configure("run", f"loss.teacher={trained}", f"classes={names}"))


def test_the_config_of_a_run_can_be_run_again(configure: Configure, tmp_path: Path):
    made = configure("run", "train.steps=2")
    finetune(made)
    again = load_finetune_config(Path(made.out) / "config.yaml", [f"out={tmp_path / 'again'}"])
    assert dataclasses.replace(again, out=made.out) == made
    finetune(again)


def test_a_stopped_run_on_masked_patches_resumes(configure: Configure, stop_after: StopAfter):
    overrides = ["loss.kind=masked_patches", "train.steps=6"]
    whole = weights(finetune(configure("whole", *overrides)))
    config = configure("stopped", *overrides)
    stop_after(config, 3)
    found = weights(finetune(config))
    assert whole.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


def test_masked_patches_teach_a_tower_that_runs_start_from(configure: Configure):
    run = finetune(configure("masked", "loss.kind=masked_patches", "train.steps=30", "train.batch_size=64"))
    found = losses(run.parent)
    assert found[-1] < found[0] / 2
    model = start(configure("next", f"train.init={run}"), NAMES)
    tower = load_tower(run).tower.state_dict()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.image_tower.state_dict().items())


def test_adapters_need_blocks(configure: Configure, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(re.sub("model: .*", "model: {image: {kind: 'timm:test_vit'}}", CONFIG))
    model = finetune(configure("run", "train.steps=1", "model.image.image_size=160"))
    with pytest.raises(UsageError, match="no transformer blocks to adapt"):
        finetune(configure("other", f"train.init={model}", "lora.rank=2", "model.image.image_size=160"))


def test_frozen_adapters_stay(configure: Configure, trained: Path):
    tuned = finetune(
        configure("tuned", f"train.init={trained}", "lora.rank=2", "train.freeze=[image_*]", "optim.name=adamw")
    )
    before, after = weights(trained), weights(tuned)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("image_"))
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_one_class_is_refused(configure: Configure, tmp_path: Path):
    folder = tmp_path / "pictures" / "cat"
    folder.mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    with pytest.raises(UsageError, match="there is only one class folder, 'cat'"):
        finetune(configure("run", f"data.train={folder.parent}", "classes="))
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(UsageError, match="the data has only one class, 'cat'"):
        finetune(configure("run", f"data.train={folder.parent}", f"classes={tmp_path / 'names.txt'}"))


def test_a_classifier_continues_and_without_the_model_it_came_from(
    configure: Configure, tmp_path: Path, stop_after: StopAfter
):
    made = configure("run", "model.embed_dim=8", "model.head=hidden", "train.steps=2")
    model = finetune(made)
    (tmp_path / "short.yaml").write_text("train: {steps: 6, batch_size: 32, save_every: 2}")
    arguments = [
        f"train.init={model}",
        f"data.train={made.data.train}",
        f"classes={made.classes}",
        f"out={tmp_path / 'on'}",
    ]
    config = load_finetune_config(tmp_path / "short.yaml", arguments)
    assert (config.model.embed_dim, config.model.head) == (8, "hidden")
    before, begin = load_classifier(model).model, start(config, NAMES)
    assert torch.equal(begin(PIXELS).logits, before(PIXELS).logits)
    stop_after(config, 3)
    shutil.rmtree(model)
    finetune(load_finetune_config(tmp_path / "short.yaml", arguments))
    with pytest.raises(UsageError, match="the run has no model yet"):
        load_finetune_config(tmp_path / "short.yaml", [*arguments[:3], f"out={tmp_path / 'new'}"])


def test_a_distilled_model_continues_without_its_teacher(configure: Configure, trained: Path):
    """Both heads then learn the labels."""
    taught = finetune(configure("taught", f"loss.teacher={trained}", "train.steps=2", *DISTILLED))
    alone = finetune(configure("alone", f"train.init={taught}", *DISTILLED))
    before, after = weights(taught), weights(alone)
    for head in ("head.weight", "distillation_head.weight"):
        assert not torch.equal(before[head], after[head])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image.image_size=18", "image_size 18 is not a multiple of patch_size 4; 16 or 20 px fit"),
        ("model.image.kind=swim", "did you mean 'swin'"),
        ("loss.distillation=firm", "loss.distillation is 'firm'"),
        ("loss.weight=2", "loss.weight is 2"),
        ("mix.mixup=-1", "mix.mixup is -1"),
        ("wise_ft=0.5", "which is empty"),
        ("templates=simple", "a zero-shot head needs a contrastive model, and train.init is empty"),
        ("model.image.distilled=true", "a distillation token learns from a teacher"),
        ("train.same_caption_positives=false", "supervised runs read no captions"),
        ('curriculum=[{"until":1,"text_tokens":8}]', "supervised runs read no captions"),
        ("data.repeats=0", "data.repeats is 0"),
        ("data.augment.erase=2", "data.augment.erase is 2"),
        ("data.augment.zoom=0.2", "data.augment.zoom is 0.2; it must be a valid list"),
        ("mix.mixup=1.0 train.batch_size=33", "not divisible into pairs"),
        ("mix.cutmix=1.0 train.micro_batches=16 train.batch_size=16", "not divisible into pairs"),
        ("loss.kind=masked_patches train.init=runs", "train.init has no effect with loss.kind=masked_patches"),
        ("loss.kind=masked_patches mix.mixup=1.0", "mix.mixup has no effect"),
        ("train.init=x templates=simple model.embed_dim=8 model.head=hidden", "a zero-shot head is linear"),
        ("model.image.num_heads=0", "num_heads is 0"),
        ("model.image.init=zeros", "model.image.init is 'zeros'; it must be 'clip' or 'vit'"),
        ("train.compile=true model.image.kind=timm:resnet18", "needs transformer blocks"),
        ("train.checkpointing=full model.image.kind=timm:vit_tiny_patch16_224", "needs transformer blocks"),
        ("loss.teacher=timm:no_such_model", "the teacher timm:no_such_model cannot be loaded"),
    ],
)
def test_invalid_settings_are_reported(configure: Configure, tmp_path: Path, override: str, message: str):
    if "timm:" in override and "kind" in override:  # a timm tower has no other settings
        (tmp_path / "config.yaml").write_text(re.sub("model: .*", "model: {image: {image_size: 32}}", CONFIG))
    with pytest.raises(UsageError, match=message):
        finetune(configure("run", *override.split()))


@pytest.mark.parametrize(
    ("kind", "stage", "message"),
    [
        ("swin", "patch_dropout: 0.5", "needs whole images"),
        ("swin", "image_size: 8", "less than window_size"),
        ("timm:test_vit", "image_size: 32", "image"),
    ],
)
def test_a_stage_that_a_tower_cannot_encode_is_reported_before_the_first_step(
    configure: Configure, tmp_path: Path, kind: str, stage: str, message: str
):
    shape = "image_size: 16, patch_size: 2, width: 16, depths: [1, 1], num_heads: [1, 2], window_size: 4"
    image = f"{{kind: {kind}, {shape if kind == 'swin' else 'image_size: 160'}}}"
    curriculum = f"curriculum: [{{until: 0.5}}, {{until: 1, {stage}}}]"
    (tmp_path / "config.yaml").write_text(re.sub("model: .*", f"model: {{image: {image}}}\n{curriculum}", CONFIG))
    with pytest.raises(UsageError, match=rf"curriculum\[1\] does not fit the image tower: .*{message}"):
        finetune(configure("run"))


def test_folders_of_classes_are_data_too(configure: Configure, digits_folder: Path, tmp_path: Path):
    data = open_labelled([f"{digits_folder}/val-*.tar"], f"{digits_folder}/classes.txt")
    for i in range(200):
        sample = data.samples.read(i)
        folder = tmp_path / "pictures" / data.class_names[sample.label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(sample.image)
    model = finetune(configure("run", f"data.train=[{tmp_path / 'pictures'}]", "classes=''"))
    assert load_classifier(model).model.class_names == sorted(NAMES)
