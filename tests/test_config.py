"""A run's configuration: what is read is what was written, and what does not fit is named."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from data_tools.core.errors import UsageError
from mmvit.config import FinetuneConfig, PretrainConfig, RunConfig, find_config, from_tree, load_config, to_yaml
from mmvit.data.captions import CaptionConfig
from mmvit.data.prompts import configs_folder
from mmvit.keys import Key, Resume, key_of
from mmvit.keys import key as key_declared
from mmvit.layers.feed_forward import ACTIVATIONS, Activation
from mmvit.layers.pooling import POOLS
from mmvit.layers.positions import POSITIONS
from mmvit.models.image_towers import TOWERS, tower_config
from mmvit.towers.contract import TowerConfig
from mmvit.towers.timm_tower import TimmConfig
from mmvit.towers.vit import Pool, Position

CONFIGS = sorted(path for path in configs_folder().rglob("*.yaml") if "prompts" not in path.parts)


def kind_of(path: Path | None) -> type[RunConfig]:
    is_classifier = path and path.parent.name == "finetune" and path.stem != "clip"
    return FinetuneConfig if is_classifier else PretrainConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\ntrain: {steps: 7}\ndata: {train: shards}\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_runs(path: Path):
    config = load_config(kind_of(path), path, complete=False)
    config.data.train = config.data.train or ["shards"]  # filled in by the program where the file leaves it open
    if isinstance(config, FinetuneConfig) and config.loss.kind == "labels":
        config.train.init = config.train.init or "model"  # which the command names
    config.check()
    from_tree(kind_of(path), dataclasses.asdict(config), str(path))
    head = path.read_text().split("\nseed")[0]
    assert "# Command:" in head
    assert find_config(str(path.relative_to(configs_folder()).with_suffix(""))) == path


def test_there_is_a_shipped_config():
    assert "quickstart" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", [None, *CONFIGS], ids=lambda path: path.stem if path else "default")
def test_yaml_round_trip_is_the_identity(path: Path | None, tmp_path: Path):
    config = PretrainConfig() if path is None else load_config(kind_of(path), path, complete=False)
    config.data.train = ["a b/{000..012}.tar", "*.tar", "\uac1c: x"]
    config.data.captions = [CaptionConfig("names.ko", ["{} \uc774\ubaa8\uc9c0", "{}", "# {}"]), CaptionConfig()]
    config.optim.clip_norm = None
    config.data.augment.zoom = [0.5, 1.0]
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(kind_of(path), tmp_path / "run.yaml", complete=False) == config


def test_values_of_the_file_and_of_the_command_line(file: Path):
    config = load_config(PretrainConfig, file, ["train.steps=9", "optim.clip_norm=null", "optim.lr=1e-3", "out=a=b"])
    assert (config.seed, config.train.steps, config.optim.clip_norm, config.optim.lr) == (5, 9, None, 1e-3)
    assert config.out == "a=b"
    assert config.data.train == ["shards"]  # a single value for a list
    assert load_config(PretrainConfig, file, ["data.train=[a,b]"]).data.train == ["a", "b"]
    captions = load_config(PretrainConfig, file, ["data.captions={source: names.ko}"]).data.captions
    assert captions == [CaptionConfig("names.ko")]
    assert load_config(PretrainConfig, file, ["zero_shot.limit=3"]).zero_shot.limit == 3
    converted = load_config(PretrainConfig, file, ["tokenizer.path=7", "train.steps=1e3", "optim.lr=1"])
    assert (converted.tokenizer.path, converted.train.steps, converted.optim.lr) == ("7", 1000, 1.0)
    nothing = load_config(PretrainConfig, file, ["train.init=", "train.freeze="])
    assert (nothing.train.init, nothing.train.freeze) == ("", [])


def test_last_of_repeated_overrides_wins(file: Path, caplog: pytest.LogCaptureFixture):
    overrides = ["data.train=a-0.tar", "seed=1", "data.train=a-1.tar"]  # what a shell makes of an unquoted {0..1}
    assert load_config(PretrainConfig, file, overrides).data.train == ["a-1.tar"]
    assert caplog.messages == ["data.train is given 2 times; the last one wins"]


def test_values_may_stand_for_those_of_other_keys_and_of_defaults(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MMVIT_TEST_OUT", "there")
    config = load_config(PretrainConfig, file, ["out=${oc.env:MMVIT_TEST_OUT}/${seed}-${optim.name}"])
    assert (config.out, config.seed, config.optim) == ("there/5-adamw", 5, PretrainConfig().optim)


def test_all_errors_are_reported_at_once(file: Path):
    overrides = [
        *("trian.steps=5", "optim.lr=-1", "optim.betas=[0.9, a]", "loss.kind=sigmiod", "data.train=[]"),
        *("train.steps=many", "model.image.kind=swim", "data.captions=[{}, {templates: foo}]", "zero_shot=1"),
        *("data.augment.rand_augment=[0, 9]", "train.timeout_s=2", "lora.rank=-4"),
    ]
    with pytest.raises(UsageError) as error:
        load_config(PretrainConfig, file, overrides)
    assert error.value.where == "the command line"
    assert error.value.what.splitlines() == [
        "the config has 12 errors",
        "  - train.steps is 'many'; it must be a valid integer, unable to parse string as an integer",
        "      hint: for example train.steps=10000",
        "  - unknown config key trian",
        "      hint: did you mean 'train.steps'?",
        "  - optim.lr is -1.0; it must be from 1e-12 to 100",
        "      hint: for example optim.lr=0.0005",
        "  - optim.betas[1] is 'a'; it must be a valid number, unable to parse string as a number",
        "      hint: for example optim.betas=[0.9, 0.98]",
        "  - loss.kind is 'sigmiod'; it must be 'softmax' or 'sigmoid'",
        "      hint: did you mean 'sigmoid'?",
        "  - model.image.kind: there is no image tower 'swim'",
        "      hint: did you mean 'swin'?",
        "  - zero_shot is 1; it must be a mapping of keys to values",
        "      hint: did you mean zero_shot.data=1?",
        "  - lora.rank is -4; it must be from 0 to 65536",
        "      hint: for example lora.rank=0",
        "  - data.train: no training data is given",
        "      hint: data.train=[FOLDER or SHARDS]",
        "  - data.stall_timeout_s 300.0 must be below train.timeout_s",
        "      hint: train.timeout_s=330.0",
        "  - data.captions[1].templates: the template 'foo' has 0 placeholders",
        "      hint: write {} exactly once, where the class name goes: a photo of a {}.",
        "  - data.augment.rand_augment is [0, 9]",
        "      hint: set the number of changes and their magnitude from 0 to 30, such as [2, 9], or null",
    ]


def test_unreadable_overrides_are_reported_at_once(file: Path):
    with pytest.raises(UsageError, match=r"(?s)2 errors.*'train.steps' is not key=value.*cannot be read"):
        load_config(PretrainConfig, file, ["train.steps", "data.train=[a"])


def test_rules_are_silent_about_values_that_are_wrong_by_themselves(file: Path):
    for overrides in (["lora.rank=4", "train.init=[]"], ["zero_shot.data=x", "zero_shot.class_names={}"]):
        with pytest.raises(UsageError) as error:
            load_config(PretrainConfig, file, overrides)
        assert overrides[1].partition("=")[0] in error.value.what
        assert "errors" not in error.value.what


def test_recipe_with_open_keys_loads_where_the_caller_fills_them_in(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("seed: 5")
    with pytest.raises(UsageError, match="no training data is given"):
        load_config(PretrainConfig, tmp_path / "run.yaml")
    config = load_config(PretrainConfig, tmp_path / "run.yaml", complete=False)
    with pytest.raises(UsageError, match="no training data is given"):
        config.check()
    with pytest.raises(UsageError, match=r"train\.steps is 0"):
        load_config(PretrainConfig, tmp_path / "run.yaml", ["train.steps=0"], complete=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=true", "train.steps is true"),
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.steps=[1]", "train.steps"),
        ("optim.betas=[a,b]", "optim.betas"),
        ("train=5", "train"),
        ("train.same_caption_positives=maybe", "train.same_caption_positives"),
        ("train.steps", "not key=value"),
        ("=5", "not key=value"),
        ("data=[]", "override 'data=[]' cannot be read"),
        ("data.train=[a", "cannot be read"),
        ("train.step=5", "did you mean 'train.steps'?"),
        ("trian.steps=5", "did you mean 'train.steps'?"),
        ("bath_size=5", "did you mean 'train.batch_size'?"),
        ("epochs=5", "did you mean 'train.steps'?"),
        ("model.image.layers=5", "did you mean 'model.image.depth'?"),
        ("model.vision.width=5", "did you mean 'model.image.width' or 'model.text.width'?"),
        ("data.batch_size=5", "did you mean 'train.batch_size'?"),
        ("optim=adamw", "did you mean optim.name=adamw?"),
        ("model=vit_b32", "did you mean model.image.kind=vit_b32?"),
        ("optim.betas=0.9", "for example optim.betas=[0.9, 0.98]"),
        ("device=0", "CUDA_VISIBLE_DEVICES"),
        ("train.batch_size:5", "write train.batch_size=5"),
        ("data.captions=[{sources: txt}]", "data.captions[0].sources"),
        ("model.image.patch=5", "model.image.patch"),
        ("out=${nothing}", "out"),
        ("zero_shot.data={}", "zero_shot.data"),  # a mapping over a list
    ],
)
def test_override_that_does_not_fit_is_named(file: Path, override: str, message: str):
    with pytest.raises(UsageError) as error:
        load_config(PretrainConfig, file, [override])
    assert message in str(error.value)
    assert "\n\n" not in str(error.value)  # one line of the library's message, not its whole page


@pytest.mark.parametrize(
    "override", ["data.train=[[{}]]", "train.steps='{}'", "data.train=[{}: x: y", "data.train=[{}{{0..1}}]", "{}"]
)
def test_problems_show_no_secrets_of_urls(file: Path, override: str):
    place = (
        f"https://{'user' * 5}:SECRET{'x' * 20}SECRET@host/a.tar?token=SECRET"  # longer than what is shown of a value
    )
    with pytest.raises(UsageError) as error:
        load_config(PretrainConfig, file, [override.format(place), "seed=-1"])
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "seed: {a: 1}", "just words", "train: [1]", "\x00"])
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        load_config(PretrainConfig, tmp_path / "bad.yaml")


def test_tag_that_runs_code_is_refused(tmp_path: Path):
    canary = tmp_path / "canary"
    (tmp_path / "bad.yaml").write_text(f'out: !!python/object/apply:os.system ["touch {canary}"]\n')
    with pytest.raises(UsageError):
        load_config(PretrainConfig, tmp_path / "bad.yaml")
    assert not canary.exists()


def test_missing_config_suggests_one(tmp_path: Path):
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        load_config(PretrainConfig, "quikstart")
    with pytest.raises(UsageError, match="mmvit configs lists"):
        load_config(PretrainConfig, tmp_path / "none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.name", "adam"),
        ("optim.decay", "step"),
        ("train.precision", "fp16"),
        ("train.steps", 0),
        ("train.batch_size", -1),
        ("train.log_every", 0),
        ("train.save_every", 0),
        ("data.train", []),
        ("train.steps", "5"),
        ("optim.betas", (0.9, 0.98)),
        ("lora.targets", ["q", "query"]),
        ("out", Path("runs")),
        ("data", {"train": ["shards"], "num_workers": -1}),
    ],
)
def test_values_that_no_run_can_have(key: str, value: Any):
    config = PretrainConfig()
    config.data.train = ["shards"]
    config.check()
    *path, name = key.split(".")
    node: Any = config
    for part in path:
        node = getattr(node, part)
    setattr(node, name, value)
    with pytest.raises(UsageError, match=key) as error:
        config.check()
    assert "errors" not in error.value.what


def test_written_config_names_every_field():
    tree = yaml.safe_load(to_yaml(PretrainConfig()))
    assert from_tree(PretrainConfig, tree, "there", complete=False) == PretrainConfig()
    assert set(tree["train"]) == {entry.name for entry in dataclasses.fields(PretrainConfig().train)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=.nan", "optim.lr is nan"),
        ("optim.muon_lr=-1", "optim.muon_lr is -1"),
        ("optim.eps=-1", "optim.eps is -1"),
        (
            "curriculum=[{until: 1, text_tokens: 400}]",
            "curriculum[0].text_tokens is 400; it must be at most model.text",
        ),
        ("zero_shot.every=0", "zero_shot.every is 0; it must be from 1 to 1000000000"),
        ("seed=-1", "seed is -1"),
        ("optim.warmup_share=2000", "optim.warmup_share is 2000.0; it must be from 0 to 1"),
        ("optim.betas=[0.9]", "optim.betas has 1 items; it must have exactly 2"),
        ("data.captions=[]", "data.captions has 0 items; it must have at least 1"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("data.captions={templates: simple}", "the template 'simple' has 0 placeholders"),
        ("zero_shot.data=x", "zero_shot.data has no class names"),
    ],
)
def test_values_no_run_can_have(file: Path, override: str, message: str):
    load_config(PretrainConfig, file).check()
    with pytest.raises(UsageError, match=re.escape(message)):
        load_config(PretrainConfig, file, [override])


@pytest.mark.parametrize("kind", ["swin_t", "cvt_13", "rn50", "vit_ti16", "timm:resnet18"])
def test_image_towers_of_every_kind_survive_a_round_trip(tmp_path: Path, kind: str):
    (tmp_path / "run.yaml").write_text(f"data: {{train: x}}\nmodel: {{image: {{kind: '{kind}', image_size: 448}}}}\n")
    config = load_config(PretrainConfig, tmp_path / "run.yaml")
    assert config.model.image == dataclasses.replace(tower_config(kind), image_size=448)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(PretrainConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize("kind", ["vit_ti16", "swin_t", "cvt_13", "resnet", "timm:resnet18"])
@pytest.mark.parametrize("recipe", ["pretrain/clip_vit_b32", "quickstart", "pretrain/siglip_vit_b16"])
def test_a_kind_on_the_command_line_brings_its_own_values(recipe: str, kind: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        config = load_config(PretrainConfig, recipe, [f"model.image.kind={kind}"], complete=False)
    assert config.model.image == tower_config(kind)
    assert f"model.image.kind={kind}: its own values replace those of the config for image_size" in caplog.text


@pytest.mark.parametrize("order", [1, -1])
def test_other_values_on_the_command_line_apply_to_the_new_kind(order: int):
    overrides = ["model.image.drop_path=0.1", "model.image.kind=swin_t"][::order]
    config = load_config(FinetuneConfig, "finetune/digits_vit", overrides, complete=False)
    assert config.model.image == dataclasses.replace(tower_config("swin_t"), drop_path=0.1)
    with pytest.raises(UsageError, match=r"unknown config key model\.image\.depth, which swin_t does not have"):
        load_config(FinetuneConfig, "finetune/digits_vit", [*overrides, "model.image.depth=3"])


def test_the_kind_that_a_config_has_keeps_its_values():
    config = load_config(PretrainConfig, "quickstart", ["model.image.kind=vit"], complete=False)
    assert config.model.image.image_size == 48


def test_keys_of_another_kind_are_refused(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("data: {train: x}\nmodel: {image: {kind: swin_t, depth: 3}}\n")
    with pytest.raises(UsageError, match=r"unknown config key model\.image\.depth") as error:
        load_config(PretrainConfig, tmp_path / "run.yaml")
    assert error.value.hint == "did you mean 'model.image.depths'?"


def entries(cls: type, seen: set[type]) -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Yield every key of a config and of those in it, also of those that stand in lists and of each image tower."""
    if cls in seen:
        return
    seen.add(cls)
    for entry in dataclasses.fields(cls):
        inner = [kind for kind in (entry.type, *get_args(entry.type)) if dataclasses.is_dataclass(kind)]
        for kind in inner:
            kinds = [type(tower) for tower in TOWERS.values()] + [TimmConfig] if kind is TowerConfig else [kind]
            for each in kinds:
                yield from entries(each, seen)
        if not dataclasses.is_dataclass(entry.type):
            yield cls.__name__, entry


def leaves(cls: type, seen: set[type]) -> Iterator[tuple[str, Key | None]]:
    return ((f"{owner}.{entry.name}", key_of(entry)) for owner, entry in entries(cls, seen))


LEAVES = dict(leaf for seen in [set[type]()] for cls in (PretrainConfig, FinetuneConfig) for leaf in leaves(cls, seen))


def test_each_key_has_help_and_a_meaning_at_resume():
    assert len(LEAVES) > 150
    assert [name for name, key in LEAVES.items() if key is None or key.resume not in get_args(Resume)] == []
    bad = [name for name, key in LEAVES.items() if not key or not 5 <= len(key.help) <= 110 or key.help.endswith(".")]
    assert bad == []


def is_numeric(kind: Any) -> bool:
    return kind in (int, float) or any(is_numeric(part) for part in get_args(kind))


def unbounded(cls: type) -> list[str]:
    """Return the numeric keys of a config that lack a lower or an upper bound."""
    kinds = {f"{owner}.{entry.name}": entry.type for owner, entry in entries(cls, set())}
    keys = dict(leaves(cls, set()))
    return [
        name
        for name, kind in kinds.items()
        if is_numeric(kind) and (key := keys[name]) and (key.ge is key.gt is None or key.le is key.lt is None)
    ]


def test_each_number_has_bounds_on_both_sides():
    assert unbounded(PretrainConfig) == unbounded(FinetuneConfig) == []


def test_number_without_a_bound_is_found():
    @dataclasses.dataclass
    class Open:
        fine: float = key_declared(1.0, "a fraction", ge=0, le=1)
        steps: int | None = key_declared(None, "number of steps", ge=1)
        rates: list[float] = key_declared([], "rates", lt=1)
        weights: dict[str, float] = key_declared({}, "weights")

    assert unbounded(Open) == ["Open.steps", "Open.rates", "Open.weights"]


BEYOND_BOUNDS = {
    "data.augment.shift=4": "at least 0 and below 1",
    "data.augment.crop_area=[50,100]": "above 0 and at most 1",
    "data.augment.crop_area=[0.9,0.5]": "from the lower to the higher value",
    "data.augment.zoom=[2,1]": "from the lower to the higher value",
    "data.augment.rotate=400": "from 0 to 180",
    "data.augment.hue=1": "from 0 to 0.5",
    "data.augment.brightness=3": "from 0 to 1",
    "data.weights=[-1]": "above 0",
    "data.captions=[{source: t, weights: {en: -1}}]": "data.captions[0].weights.en",
    "preprocess.std=[-1,1,1]": "preprocess.std[0] is -1.0; it must be from 0.001",
    "preprocess.mean=[123.7,116,103]": "from 0 to 1",
    "model.embed_dim=0": "from 1 to",
    "model.text.width=1000000000000": "from 1 to",
    "optim.eps=0": "from 1e-16 to 1",
    "optim.lr=0": "from 1e-12 to 100",
    "optim.weight_decay=.inf": "optim.weight_decay",
    "train.batch_size=1": "compares each pair with the others",
    "lora.alpha=0": "from 0.001",
    "loss.max_logit_scale=1e30": "from 1 to 10000",
    "out=": "it must name the run folder",
    'zero_shot.templates="a\\0"': "zero_shot.templates is 'a\\x00'; it contains a NUL",
}


def test_values_beyond_bounds_are_all_named_at_once(file: Path):
    for override, bounds in BEYOND_BOUNDS.items():
        text = refused(file, override)
        assert bounds in text, override
        assert override.partition("=")[0] in text
    together = dict(override.split("=", 1) for override in BEYOND_BOUNDS)  # the last one of each key
    text = refused(file, *(f"{key}={value}" for key, value in together.items()))
    assert [key for key in together if key not in text] == []
    assert "optim.weight_decay is 1.0; with lr=2.0" in refused(file, "optim.weight_decay=1", "optim.lr=2")


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        load_config(PretrainConfig, file, overrides)
    return str(error.value)


def test_key_without_declaration_is_found():
    @dataclasses.dataclass
    class Bare:
        steps: int = 5

    assert list(leaves(Bare, set())) == [("Bare.steps", None)]


@pytest.mark.parametrize(
    ("choices", "known"),
    [(Activation, ACTIVATIONS), (Pool, [*POOLS, "attention"]), (Position, POSITIONS)],
)
def test_choices_of_the_towers_are_those_that_the_layers_know(choices: Any, known: Iterable[str]):
    assert sorted(get_args(choices)) == sorted(known)
