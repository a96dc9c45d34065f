"""Teachers of other libraries see the images as they were trained to, and know the classes in this order."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.train.runs.class_teacher import load_class_teacher

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
PROCESSORS = {
    "resnet": {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}},
    "vit": {"size": {"height": 32, "width": 32}},
}


def saved(folder: Path, kind: str, names: list[str]) -> tuple[str, torch.nn.Module]:
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if kind == "resnet":
        shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape, **labels))
    else:
        shape = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
        shape |= {"num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, **labels))
    model.eval().save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD, **PROCESSORS[kind]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}", model


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_model_of_transformers_teaches(tmp_path: Path, kind: str):
    source, model = saved(tmp_path, kind, ["cat", "dog"])
    teacher = load_class_teacher(source, ["cat", "dog"], CPU)
    assert teacher.image_size == 32
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixels).logits
    assert torch.allclose(teacher.logits(images), expected, atol=1e-5)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    model.save_pretrained(tmp_path)
    assert load_class_teacher(source, ["cat", "dog"], CPU).fingerprint != teacher.fingerprint


def test_names_in_another_order_are_refused(tmp_path: Path):
    source, _ = saved(tmp_path, "vit", ["dog", "cat"])
    with pytest.raises(UsageError, match="class 0 is 'dog' in the teacher and 'cat' in the data"):
        load_class_teacher(source, ["cat", "dog"], CPU)
    load_class_teacher(source, ["Katze", "Hund"], CPU)  # other names for them: nobody can tell
    with pytest.raises(UsageError, match="the teacher has 2 classes, the data has 3"):
        load_class_teacher(source, ["cat", "dog", "bird"], CPU)


def test_a_teacher_that_does_not_say_its_size_is_refused(tmp_path: Path):
    source, _ = saved(tmp_path, "resnet", ["cat", "dog"])
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del processor["crop_size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"longest_edge": 40}}))
    with pytest.raises(UsageError, match="does not state its image size"):
        load_class_teacher(source, ["cat", "dog"], CPU)


def test_a_teacher_whose_weights_are_not_all_there_is_refused(tmp_path: Path):
    source, _ = saved(tmp_path, "resnet", ["cat", "dog"])
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: each for name, each in weights.items() if "classifier" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lacks 2 weights, such as classifier\.1\.bias"):
        load_class_teacher(source, ["cat", "dog"], CPU)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_class_teacher(source, ["cat", "dog"], CPU)


def test_a_folder_of_timm_teaches(tmp_path: Path):
    model = timm.create_model("test_vit", num_classes=2)
    config = model.pretrained_cfg | {"num_classes": 2}
    save_for_hf(model, tmp_path, {"pretrained_cfg": config}, {"num_classes": 2}, safe_serialization=True)
    assert load_class_teacher(f"timm:{tmp_path}", ["cat", "dog"], CPU).num_classes == 2


def test_a_model_of_timm_teaches(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2).eval()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    teacher = load_class_teacher("timm:test_vit", ["cat", "dog"], CPU)
    assert teacher.image_size == 160
    images = torch.randint(256, (1, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        expected = model((images / 255 - 0.5) / 0.5)
    assert torch.allclose(teacher.logits(images), expected, atol=1e-5)
