"""Converts models of other libraries to model folders."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError, MmvitError, UsageError
from data_tools.core.ownership import owned
from mmvit.checkpoint import (
    CLASSIFIER,
    DESCRIPTION,
    DUAL_ENCODER,
    TOWER,
    check_place,
    load_weights,
    save_classifier,
    save_model,
    save_tower,
)
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.interop.imported import Imported
from mmvit.interop.open_clip import load_open_clip
from mmvit.interop.source import split_source
from mmvit.interop.timm import load_timm
from mmvit.interop.transformers import load_transformers
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.models.classifier import ClassifierConfig, ImageClassifier
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.models.image_towers import build_image_tower
from mmvit.towers.contract import Tower, TowerConfig
from mmvit.towers.text import TextConfig

logger = logging.getLogger(__name__)

LIBRARIES: dict[str, Callable[[str], list[Imported]]] = {
    "hf": load_transformers,
    "open_clip": load_open_clip,
    "timm": load_timm,
}
TOLERANCE = 1e-4  # relative to the largest output value, float32
_HEADS = ("head.", "distillation_head.")


class ImportedModel(NamedTuple):
    """Result of an import.

    Args:
        out: the model folder.
        kind: DUAL_ENCODER, CLASSIFIER or TOWER.
        tower: kind of its image tower.
        image_size: px.
        parameters: number of parameters.
        classes: number of classes; 0 if it is not a classifier.
        their_resizing: how the other library resizes images; here the shorter side is resized, then a center crop.
        largest_difference: between the outputs of both models, relative to the largest output value.
    """

    out: str
    kind: str
    tower: str
    image_size: int
    parameters: int
    classes: int
    their_resizing: str
    largest_difference: float


def import_model(source: str, out: Path, class_names: Sequence[str] | None = None) -> ImportedModel:
    """Convert a model of another library to a model folder, after checking that the outputs of both agree.

    Args:
        source: hf:NAME, timm:NAME or open_clip:ARCH/TAG, whose published weights are downloaded, or the same prefix
            with a folder that the library wrote.
        out: the model folder.
        class_names: class names of a classifier; default: its own.

    Raises:
        UsageError: the model does not exist or is not supported, or `out` is not empty.
        CheckpointError: its weights do not fit, or its outputs differ here.
    """
    library, name = split_source(source)
    check_place(out)
    if (out / DESCRIPTION).is_file():
        raise UsageError("the output folder already holds a model", where=str(out), hint="remove it, or choose another")
    with owned(out, replaced=True):
        return _import(library, name, source, out, class_names)


def _import(library: str, name: str, source: str, out: Path, class_names: Sequence[str] | None) -> ImportedModel:
    logger.info("opening %s", source)
    candidates = LIBRARIES[library](name)
    for imported in candidates:
        try:
            logger.info("comparing the outputs of both models")
            model, difference = _compared(imported, class_names, source)
            break
        except MmvitError:
            if imported is candidates[-1]:
                raise
    kind = _save(out, model, imported)
    image = imported.config if isinstance(imported.config, TowerConfig) else imported.config.image
    num_classes = len(model.class_names) if isinstance(model, ImageClassifier) else 0
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = num_parameters, num_classes, imported.resizing, difference
    return ImportedModel(str(out), kind, image.kind, image.image_size, *facts)


def _compared(imported: Imported, class_names: Sequence[str] | None, source: str) -> tuple[nn.Module, float]:
    """Build the model and compare its outputs for random inputs with those of the other library."""
    model = _build(imported, class_names, source).eval()
    config, generator = imported.config, torch.Generator().manual_seed(0)
    size = config.image_size if isinstance(config, TowerConfig) else config.image.image_size
    images = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        answers = [(_answer(model, images), imported.answer(images))]
        if imported.answer_text is not None:
            assert isinstance(model, DualEncoder)
            assert isinstance(config, DualEncoderConfig)
            text = config.text
            assert imported.tokenizer is not None
            _check_tokenizer(imported.tokenizer, text, source)
            ids = torch.randint(1, text.end_of_text, (2, text.context_length), generator=generator)
            ids[0, text.context_length // 2], ids[1, -1] = text.end_of_text, text.end_of_text
            answers.append((model.encode_text(ids), imported.answer_text(ids)))
    shares = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12) for ours, theirs in answers]
    difference = max(share.item() for share in shares)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the outputs of the imported model differ from the original's by {difference:.1e} of the largest value",
            where=source,
            note=f"no native tower matches its architecture; rounding explains at most {TOLERANCE}; "
            "nothing was written",
        )
    return model, difference


def _check_tokenizer(tokenizer: TokenizerConfig, text: TextConfig, source: str) -> None:
    end = build_tokenizer(tokenizer, text.context_length).end_of_text
    if end != text.end_of_text:
        what = f"the tokenizer's end-of-text id is {end}, but the text tower pools at {text.end_of_text}"
        raise CheckpointError(what, where=source, note="one of them belongs to another model")


def _build(imported: Imported, class_names: Sequence[str] | None, source: str) -> nn.Module:
    config, weights, mean, std = imported.config, imported.weights, imported.preprocess.mean, imported.preprocess.std
    names = _unique_names(imported.class_names or []) if class_names is None else list(class_names)
    if len(names) != len(imported.class_names or []):
        num = len(imported.class_names or [])
        raise UsageError(f"got {len(names)} class names, but the model has {num} classes", where=source)
    model: nn.Module
    try:
        if isinstance(config, DualEncoderConfig):
            model = build_dual_encoder(config, mean, std)
        elif isinstance(config, ClassifierConfig):
            model = build_classifier(config, names, mean, std)
            weights = {n if n.startswith(_HEADS) else f"image_tower.{n}": each for n, each in weights.items()}
        else:
            model = build_image_tower(config)
        load_weights(model, weights, source)
    except ValueError as error:  # sizes
        raise UsageError(f"no native tower matches the model: {error}", where=source) from error
    except CheckpointError as error:
        note = "no native tower matches the model's architecture"
        raise CheckpointError(error.what, where=source, note=note) from error
    return model


def _unique_names(names: Sequence[str]) -> list[str]:
    """Return unique names: of ImageNet's two cranes, the second becomes "crane (2)"."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    if isinstance(model, DualEncoder):
        return model.encode_image(images)
    output = model(images)
    return output.logits if isinstance(model, ImageClassifier) else output.pooled


def _save(out: Path, model: nn.Module, imported: Imported) -> str:
    """Write the model folder and return its kind."""
    config, preprocess = imported.config, imported.preprocess
    if isinstance(config, DualEncoderConfig):
        assert isinstance(model, DualEncoder)
        assert imported.tokenizer is not None
        save_model(out, model, config, preprocess, imported.tokenizer)
        return DUAL_ENCODER
    if isinstance(config, ClassifierConfig):
        assert isinstance(model, ImageClassifier)
        save_classifier(out, model, config, preprocess)
        return CLASSIFIER
    assert isinstance(model, Tower)
    save_tower(out, model, config, preprocess)
    return TOWER
