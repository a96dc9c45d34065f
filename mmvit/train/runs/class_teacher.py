"""The teacher of a supervised run: a classifier of the same images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.checkpoint import load_classifier
from mmvit.data.labels import check_same_classes
from mmvit.models.pixels import PixelNorm

_HINT = "fine-tune the teacher on this data first (mmvit finetune), or list the classes in its order: classes=FILE"


class ClassTeacher:
    """Computes logits of uint8 or unnormalized float images, without gradients.

    `model` maps normalized images of `image_size` px to logits; `fingerprint` identifies its weights.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], norm: PixelNorm, image_size: int, num_classes: int, fingerprint: str
    ):
        self.model = model
        self.norm = norm
        self.image_size = image_size
        self.num_classes = num_classes
        self.fingerprint = fingerprint

    @torch.no_grad()
    def logits(self, images: Tensor) -> Float[Tensor, "b C"]:
        """Return the logits of uint8 images of any size."""
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
            images = resized.round().clamp(0, 255).to(torch.uint8)
        return self.model(self.norm(images)).float()


def load_class_teacher(source: str, class_names: Sequence[str], device: torch.device) -> ClassTeacher:
    """Load a teacher: a model folder of `mmvit finetune`, or timm:NAME or hf:NAME (published weights or a folder).

    Raises:
        UsageError: the model does not exist or has other classes.
        CheckpointError: weights are missing.
    """
    if source.startswith("timm:"):
        teacher = _from_timm(source.removeprefix("timm:"), device)
    elif source.startswith("hf:"):
        teacher = _from_transformers(source.removeprefix("hf:"), class_names, device)
    else:
        teacher = _from_folder(source, class_names, device)
    if teacher.num_classes != len(class_names):
        raise UsageError(
            f"the teacher has {teacher.num_classes} classes, the data has {len(class_names)}",
            where=f"loss.teacher={source}",
            note="it must have the same classes in the same order",
            hint=_HINT,
        )
    return teacher


def _from_folder(folder: str, class_names: Sequence[str], device: torch.device) -> ClassTeacher:
    loaded = load_classifier(folder, device)
    names = loaded.model.class_names
    check_same_classes(names, class_names, ("the teacher", "the data"), f"loss.teacher={folder}", hint=_HINT)
    model = loaded.model.requires_grad_(False)
    norm = PixelNorm(loaded.preprocess.mean, loaded.preprocess.std).to(device)
    return ClassTeacher(
        lambda images: model(images).logits, norm, loaded.config.image.image_size, len(names), loaded.fingerprint
    )


def _from_timm(name: str, device: torch.device) -> ClassTeacher:
    import timm
    from timm.data.config import resolve_data_config

    try:
        is_folder = (Path(name) / "config.json").is_file()
        model: Any = timm.create_model(f"local-dir:{name}" if is_folder else name, pretrained=True)
    except Exception as error:  # of many kinds: unknown names, no network, no weights
        raise _not_there(f"timm:{name}", error) from error
    data: dict[str, Any] = resolve_data_config({}, model=model)
    norm = PixelNorm(data["mean"], data["std"])
    return _frozen(model, lambda out: out, norm, data["input_size"][-1], model.num_classes, f"timm:{name}", device)


def _from_transformers(name: str, class_names: Sequence[str], device: torch.device) -> ClassTeacher:
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ModuleNotFoundError as error:
        what = f"the teacher hf:{name} needs transformers"
        raise UsageError(what, where="loss.teacher", hint="pip install 'mmvit[hf]'") from error
    try:
        options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
        model, info = AutoModelForImageClassification.from_pretrained(name, **options)
        processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds, as that library, its hub and its checks have them
        raise _not_there(f"hf:{name}", error) from error
    if info["missing_keys"]:
        what = f"the teacher hf:{name} lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}"
        raise CheckpointError(what, where="loss.teacher", note="they would be initialized at random")
    known = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if set(class_names) == set(known):  # otherwise the names differ, and the order is not checked
        check_same_classes(known, class_names, ("the teacher", "the data"), f"loss.teacher=hf:{name}", hint=_HINT)
    norm, size = PixelNorm(processor.image_mean, processor.image_std), _side(processor.to_dict(), model.config)
    return _frozen(model, lambda out: out.logits, norm, size, len(known), f"hf:{name}", device)


def _side(processor: dict[str, Any], config: Any) -> int:
    """Return the image size, px, that a model of transformers was trained with."""
    found: Any = getattr(config, "image_size", None) or processor.get("crop_size") or processor.get("size")
    if isinstance(found, Mapping):
        found = found.get("height") or found.get("shortest_edge")
    found = found[0] if isinstance(found, list | tuple) else found
    if not isinstance(found, int):
        what = "the config of the teacher does not state its image size"
        raise UsageError(what, where="loss.teacher", hint="choose another teacher, or train one: mmvit finetune")
    return found


def _frozen(
    model: nn.Module,
    take: Callable[[Any], Tensor],
    norm: PixelNorm,
    image_size: int,
    num_classes: int,
    name: str,
    device: torch.device,
) -> ClassTeacher:
    model.requires_grad_(False).eval().to(device)
    weights = hashlib.sha256(name.encode())
    for tensor in model.state_dict().values():
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    fingerprint = weights.hexdigest()
    return ClassTeacher(lambda images: take(model(images)), norm.to(device), image_size, num_classes, fingerprint)


def _not_there(name: str, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    hint = "check the name, and that its weights exist or can be downloaded; or train a teacher: mmvit finetune"
    return UsageError(f"the teacher {name} cannot be loaded: {reason}", where="loss.teacher", hint=hint)
