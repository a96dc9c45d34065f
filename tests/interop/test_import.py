"""A model of another library becomes a model folder with the same outputs, or an error says why not."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import tokenizers
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.checkpoint import load_classifier, load_model, load_tower
from mmvit.interop import transformers as transformers_names
from mmvit.interop.convert import import_model

transformers = pytest.importorskip("transformers")

Randomized = Callable[[nn.Module], nn.Module]
RunCli = Callable[..., tuple[int, str, str]]
VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
VIT |= {"image_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 64}
CVT = {"embed_dim": [16, 24, 48], "depth": [1, 2, 3], "num_heads": [1, 3, 6]}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
LABELS = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}


def vit(**more: Any) -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, **LABELS, **more))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit, no head": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
    "vit, tanh": lambda: vit(hidden_act="gelu_new"),
    "deit": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VIT, **LABELS)),
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, **LABELS)),
    "swin, no head": lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)),
    "cvt": lambda: transformers.CvtForImageClassification(transformers.CvtConfig(**CVT, **LABELS)),
}
TIMM: dict[str, tuple[str, dict[str, Any], str]] = {  # name, arguments, the kind of tower that it becomes
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, "vit"),
    "vit of clip, no head": ("vit_base_patch16_clip_224", {"depth": 1, "embed_dim": 96, "num_heads": 3}, "vit"),
    "registers": ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 2, "no_embed_class": True}, "vit"),
    "hybrid": ("vit_base_r50_s16_224", {"depth": 1, "embed_dim": 96, "num_heads": 3}, "vit"),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2}, "vit"),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1), "embed_dim": 48}, "swin"),
    "mean of patches": ("test_vit2", {}, "timm:test_vit2"),
    "attention pool": ("test_vit3", {}, "timm:test_vit3"),
    "convolutions": ("test_resnet", {}, "timm:test_resnet"),
}


def save_transformers(folder: Path, model: nn.Module, **more: Any) -> str:
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, **{"image_mean": MEAN, "image_std": STD} | more
    )
    processor.save_pretrained(folder)
    return f"hf:{folder}"


def save_open_clip(folder: Path, model: CLIP, config: dict[str, Any]) -> str:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}})
    )
    return f"open_clip:{folder}"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(randomized: Randomized, tmp_path: Path, name: str):
    torch.manual_seed(0)
    theirs = randomized(TRANSFORMERS[name]())
    facts = import_model(save_transformers(tmp_path / "theirs", theirs), tmp_path / "ours")
    assert facts.largest_difference <= 1e-5
    images = torch.randn(2, 3, facts.image_size, facts.image_size)
    if "no head" in name:
        loaded = load_tower(tmp_path / "ours")
        output = theirs(pixel_values=images)
        expected = output.pooler_output if name.startswith("swin") else output.last_hidden_state[:, 0]
        ours = loaded.tower(images, None).pooled
    else:
        loaded = load_classifier(tmp_path / "ours")
        assert loaded.model.class_names == ["cat", "dog"]
        ours, expected = loaded.model(images).logits, theirs(pixel_values=images).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (loaded.preprocess.mean, loaded.preprocess.std) == (MEAN, STD)
    assert facts.their_resizing == "squash to 64 px, bilinear"


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(randomized: Randomized, tmp_path: Path, name: str):
    torch.manual_seed(0)
    arch, arguments, kind = TIMM[name]
    arguments = arguments | ({"num_classes": 0} if "no head" in name else {"num_classes": 3})
    theirs = randomized(timm.create_model(arch, **arguments))
    size = arguments.get("img_size", theirs.pretrained_cfg["input_size"][-1])
    names = {"label_names": ["cat", "dog", "cat"]} if arguments["num_classes"] else {}
    config = theirs.pretrained_cfg | {"num_classes": arguments["num_classes"], "mean": MEAN, "std": STD} | names
    save_for_hf(theirs, tmp_path / "theirs", {"pretrained_cfg": config}, arguments, safe_serialization=True)
    facts = import_model(f"timm:{tmp_path / 'theirs'}", tmp_path / "ours")
    assert facts.tower == kind
    assert facts.largest_difference <= 1e-5
    assert facts.classes == arguments["num_classes"]
    images = torch.randn(2, 3, size, size)
    loaded = load_tower(tmp_path / "ours")
    assert (loaded.preprocess.mean, loaded.preprocess.std) == (MEAN, STD)
    ours, expected = loaded.tower(images, None).pooled, theirs(images)
    if "no head" not in name:
        model = load_classifier(tmp_path / "ours").model
        assert model.class_names == ["cat", "dog", "cat (2)"]
        ours = model(images).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("image", [{"layers": 2, "width": 64, "patch_size": 16}, {"layers": [1, 1, 1, 1], "width": 16}])
def test_models_of_open_clip(tmp_path: Path, image: dict[str, Any]):
    torch.manual_seed(0)
    embed_dim = 64
    config = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": image | {"image_size": 64}}
    config["text_cfg"] = {"layers": 1, "width": 32, "heads": 2}
    theirs = CLIP(embed_dim, CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]), quick_gelu=True)
    theirs.logit_scale.data.fill_(3.0)
    facts = import_model(save_open_clip(tmp_path / "theirs", theirs.eval(), config), tmp_path / "ours")
    assert facts.largest_difference <= 1e-5
    loaded = load_model(tmp_path / "ours")
    assert loaded.model.logit_scale.item() == 3
    assert (loaded.preprocess.mean, loaded.preprocess.std) == (MEAN, STD)
    images, texts = torch.randn(2, 3, 64, 64), ["a photo of a dog", "\uac15\uc544\uc9c0"]
    ids = open_clip.get_tokenizer("ViT-B-32")(texts)
    for ours, expected in (
        (loaded.model.encode_image(images), theirs.encode_image(images, normalize=True)),
        (loaded.model.encode_text(loaded.tokenizer(texts)), theirs.encode_text(ids, normalize=True)),
    ):
        assert (ours - expected).abs().max() <= 1e-5


def save_clip(folder: Path, randomized: Randomized, end: int) -> str:
    """Return a transformers CLIP that pools at the id `end`, with a tokenizer whose end-of-text id is 6."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "[UNK]", "a", "red", "dog", "</s>"])}
    bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    frame = [("<s>", 1), ("</s>", 6)]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=frame)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>").save_pretrained(folder)
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    text = size | {"vocab_size": 7, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": end}
    image = size | {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=24)
    return save_transformers(folder, randomized(transformers.CLIPModel(config)))


@pytest.mark.parametrize("end", [6, 2], ids=["its id", "of old checkpoints"])
def test_clip_of_transformers_with_its_tokenizer(randomized: Randomized, tmp_path: Path, end: int):
    torch.manual_seed(0)
    import_model(save_clip(tmp_path / "theirs", randomized, end), tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "theirs")
    ids = loaded.tokenizer(["a red dog"])
    assert ids.tolist() == [[1, 3, 4, 5, 6]]
    expected = theirs(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    assert (loaded.model.encode_text(ids) - expected).abs().max() <= 1e-5


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(randomized: Randomized, tmp_path: Path):
    with pytest.raises(CheckpointError, match="tokenizer's end-of-text id is 6, but the text tower pools at 5"):
        import_model(save_clip(tmp_path / "theirs", randomized, end=5), tmp_path / "ours")


def test_other_answers_are_refused_and_nothing_is_written(
    randomized: Randomized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = save_transformers(tmp_path / "theirs", randomized(vit()))
    monkeypatch.setattr(transformers_names, "activation_name", lambda name, where: "quick_gelu")
    with pytest.raises(CheckpointError, match="outputs of the imported model differ"):
        import_model(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_unsupported_models_raise(tmp_path: Path):
    no_tower = save_transformers(tmp_path / "bert", transformers.ResNetModel(transformers.ResNetConfig()))
    named = save_transformers(tmp_path / "vit", vit())
    bare = tmp_path / "bare"
    vit().save_pretrained(bare)
    raw = save_transformers(tmp_path / "raw", vit(), rescale_factor=1.0)
    headless = transformers.ViTModel(transformers.ViTConfig(**VIT))
    headless.config.architectures = ["ViTForImageClassification"]
    cut = save_transformers(tmp_path / "cut", headless)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"architectures": ["ViTForImageClassification"]}))
    deit = transformers.DeiTForImageClassification(transformers.DeiTConfig(**VIT))
    torn = save_transformers(tmp_path / "torn", vit())
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    relu = save_transformers(tmp_path / "relu", vit(hidden_act="relu"))
    for source, message in (
        (str(tmp_path), "does not start with the library"),
        ("tim:resnet18", "did you mean 'timm'"),
        ("timm:resnet_18", "cannot be opened"),
        ("open_clip:ViT-B-32", "no model ''; did you|no model ''"),
        ("open_clip:ViT-B-23/openai", "no model 'ViT-B-23'"),
        ("open_clip:ViT-B-32/opanai", "no weights 'opanai' of ViT-B-32"),
        (f"hf:{tmp_path / 'nothing'}", "the folder does not exist"),
        (f"timm:{tmp_path / 'vit'}", "its config has no 'architecture'"),
        (f"hf:{bare}", "preprocessor_config.json is missing"),
        (no_tower, "model type 'resnet' is not supported"),
        (raw, "not rescale pixels to"),
        (save_transformers(tmp_path / "deit", deit), "only one of the two tokens"),
        (torn, "cannot be opened"),
        (relu, "activation relu is not supported"),
    ):
        with pytest.raises(UsageError, match=message):
            import_model(source, tmp_path / "ours")
    with pytest.raises(UsageError, match="got 3 class names, but the model has 2 classes"):
        import_model(named, tmp_path / "ours", ["a", "b", "c"])
    with pytest.raises(CheckpointError, match="lacks weights of a ViTForImageClassification"):
        import_model(cut, tmp_path / "ours")
    with pytest.raises(UsageError, match="not empty and not a model folder"):
        import_model(named, tmp_path / "vit")
    assert import_model(named, tmp_path / "ours", ["a", "b"]).classes == 2
    assert load_classifier(tmp_path / "ours").model.class_names == ["a", "b"]
    with pytest.raises(UsageError, match="already holds a model"):
        import_model(named, tmp_path / "ours")


def test_pixels_that_are_not_normalised(tmp_path: Path):
    import_model(save_transformers(tmp_path / "theirs", vit(), do_normalize=False), tmp_path / "ours")
    preprocess = load_classifier(tmp_path / "ours").preprocess
    assert (preprocess.mean, preprocess.std) == ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])


def test_names_of_imagenet_are_those_of_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs = timm.create_model("test_vit")
    save_for_hf(theirs, tmp_path / "theirs", {"pretrained_cfg": theirs.pretrained_cfg}, safe_serialization=True)
    import_model(f"timm:{tmp_path / 'theirs'}", tmp_path / "ours")
    assert load_classifier(tmp_path / "ours").model.class_names == [str(i) for i in range(1000)]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))  # no download
    import_model("timm:test_vit", tmp_path / "published")
    names = load_classifier(tmp_path / "published").model.class_names
    assert names[0] == "tench, Tinca tinca"
    assert {"crane", "crane (2)"} < set(names)
    assert len(set(names)) == 1000


@pytest.mark.parametrize("tag", ["openai", "laion2b_s34b_b79k"])
def test_the_activation_is_that_of_the_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str):
    """OpenAI's weights are also listed under ViT-B-32, whose own activation is different."""
    small = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    small["text_cfg"] = {"layers": 1, "width": 64, "heads": 1}

    def create(name: str, pretrained: str, require_pretrained: bool, force_quick_gelu: bool) -> CLIP:
        assert (name, pretrained, require_pretrained) == ("ViT-B-32", tag, True)
        parts = CLIPVisionCfg(**small["vision_cfg"]), CLIPTextCfg(**small["text_cfg"])
        model = CLIP(small["embed_dim"], *parts, quick_gelu=force_quick_gelu)
        model.visual.preprocess_cfg = asdict(PreprocessCfg())
        return model

    monkeypatch.setattr(open_clip, "create_model", create)  # no download
    import_model(f"open_clip:ViT-B-32/{tag}", tmp_path / "ours")
    config = load_model(tmp_path / "ours").config
    assert config.image.activation == config.text.activation == ("quick_gelu" if tag == "openai" else "gelu")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: {"hf_hub": "x"})
    with pytest.raises(UsageError, match="trained without QuickGELU"):
        import_model(f"open_clip:ViT-B-32-quickgelu/{tag}", tmp_path / "other")


def test_another_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    config["text_cfg"] = {"layers": 1, "width": 64, "heads": 1, "tokenizer_kwargs": {"clean": "canonicalize"}}
    text = CLIPTextCfg(layers=1, width=64, heads=1)
    source = save_open_clip(tmp_path / "theirs", CLIP(32, CLIPVisionCfg(**config["vision_cfg"]), text), config)
    with pytest.raises(UsageError, match="tokenizer is not CLIP's"):
        import_model(source, tmp_path / "ours")


def test_models_of_timm_that_take_any_size(tmp_path: Path):
    theirs = timm.create_model("test_resnet", num_classes=2)
    config = theirs.pretrained_cfg | {"input_size": [3, 150, 150], "num_classes": 2}
    save_for_hf(theirs, tmp_path / "theirs", {"pretrained_cfg": config}, {"num_classes": 2}, safe_serialization=True)
    assert import_model(f"timm:{tmp_path / 'theirs'}", tmp_path / "ours").image_size == 150


def test_the_verb_and_what_comes_after(run_cli: RunCli, tmp_path: Path):
    source = save_transformers(tmp_path / "theirs", vit())
    code, out, err = run_cli("import", source, tmp_path / "ours", "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == "classifier"
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "red.png")
    code, out, err = run_cli("classify", tmp_path / "ours", tmp_path / "red.png", "--json")
    assert code == 0, err
    assert {entry["name"] for entry in json.loads(out)[0]["classes"]} == {"cat", "dog"}
    code, _, err = run_cli("import", "timm:nothing", tmp_path / "other")
    assert code == 2
    assert "cannot be opened" in err
