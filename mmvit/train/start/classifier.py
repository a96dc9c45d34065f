"""The classifier at the start of a run: new weights, or those of a finished model, with a head for the classes."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from data_tools.core.errors import UsageError
from mmvit.checkpoint import (
    CLASSIFIER,
    DUAL_ENCODER,
    TOWER,
    LoadedClassifier,
    LoadedModel,
    LoadedTower,
    load_classifier,
    load_model,
    load_tower,
    load_weights,
    model_kind,
)
from mmvit.config import FinetuneConfig
from mmvit.data.prompts import load_templates
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import class_embeddings
from mmvit.models.build import build_classifier
from mmvit.models.classifier import ImageClassifier
from mmvit.train.device.memory import checkpoint_activations
from mmvit.train.device.parallel import make_shardable
from mmvit.train.start.batch_norm import check_batch_norm, train_mode
from mmvit.train.start.dual_encoder import check_curriculum, image_differences, image_weights, refuse_other_settings
from mmvit.train.start.freeze import freeze
from mmvit.train.start.lora import add_adapters
from mmvit.train.start.size import check_size
from mmvit.train.start.wise_ft import interpolated

logger = logging.getLogger(__name__)

PROJECTION = "image_projection.weight"


def build_start(config: FinetuneConfig, class_names: Sequence[str], accelerator: Accelerator) -> ImageClassifier:
    """Build the classifier at the start of the run, on the device of this rank.

    Raises:
        UsageError: an invalid model, or contradictory settings.
        CheckpointError: a model folder that does not fit.
    """
    build = partial(build_classifier, config.model, class_names, config.preprocess.mean, config.preprocess.std)
    try:
        check_size(build, config.model.image)
        torch.manual_seed(config.seed)
        model = build()
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"invalid model: {error}", where="model") from error
    check_batch_norm(model, config)
    check_curriculum(model.image_tower, config)
    if config.train.init and (config.wise_ft is not None or not _is_past_start(config)):
        begins = start_from_model(model, config)
        if accelerator.is_main_process:
            logger.info("%s: the head %s", config.train.init, begins)
    freeze(model, config.train.freeze)
    add_adapters(model, config.lora, config.train.freeze)
    checkpoint_activations(model, config.train.checkpointing)
    make_shardable(accelerator, model)
    train_mode(model)
    return model.to(accelerator.device)


def start_from_model(model: ImageClassifier, config: FinetuneConfig) -> str:
    """Load the image weights of `train.init`, a classifier or a contrastive model, and return how the head starts.

    The head is loaded too if its kind and the classes are the same. Otherwise it starts at zero, or with the class
    embeddings of the text tower for `templates`.

    Raises:
        CheckpointError: weights of another architecture.
        UsageError: settings of another image tower, or templates for a model without a text tower.
    """
    where, others = config.train.init, dict[str, Tensor]()
    kind = model_kind(where)
    if config.templates and kind != DUAL_ENCODER:
        what = "a zero-shot head needs a text tower, but the model of train.init has none"
        raise UsageError(what, where="templates", hint="use train.init=MODEL of mmvit pretrain")
    if kind == TOWER:
        start = load_tower(where)
    else:
        loaded = load_model(where) if kind == DUAL_ENCODER else load_classifier(where)
        start = LoadedTower(loaded.model.image_tower, loaded.preprocess, loaded.config.image)
        others = _other_weights(loaded, model, config.templates)
    refuse_other_settings(image_differences(config, start.config, start.preprocess), config)
    weights = model.state_dict()
    if PROJECTION in weights and PROJECTION not in others:
        what = "embeddings need a projection, but the model of train.init has none"
        raise UsageError(what, where="model.embed_dim", hint="model.embed_dim=null model.image_projection=true")
    taken = {name: tensor for name, tensor in others.items() if name in weights}
    load_weights(model, weights | taken | image_weights(start.tower, model.image_tower), where=where)
    if not any(name.startswith("head.") for name in taken):
        return "is new, because its kind or the classes differ" if kind == CLASSIFIER else "is new"
    return "is computed from the class names" if kind == DUAL_ENCODER else "is loaded too"


def _other_weights(loaded: LoadedModel | LoadedClassifier, model: ImageClassifier, templates: str) -> dict[str, Tensor]:
    """Return the projection, and the heads if the classes are the same or class embeddings are used."""
    same = isinstance(loaded, LoadedClassifier) and loaded.model.class_names == model.class_names
    taken = ("image_projection.", *(("head.", "distillation_head.") if same else ()))
    weights = {name: tensor for name, tensor in loaded.model.state_dict().items() if name.startswith(taken)}
    if isinstance(loaded, LoadedModel) and templates:
        weights |= _zero_shot(loaded, model.class_names, templates)
    return weights


def _zero_shot(contrastive: LoadedModel, class_names: Sequence[str], templates: str) -> dict[str, Tensor]:
    size = contrastive.config.image.image_size
    encoder = Encoder(contrastive.model, contrastive.tokenizer, image_size=size, fingerprint="")
    rows = class_embeddings(encoder, class_names, load_templates(templates))
    return {"head.weight": rows * encoder.logit_scale, "head.bias": torch.zeros(len(class_names))}


def with_start(
    model: ImageClassifier, config: FinetuneConfig, class_names: Sequence[str], share: float
) -> ImageClassifier:
    """Return share * model + (1 - share) * the start of the run (WiSE-FT, Wortsman et al. 2022)."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        begin = build_classifier(config.model, class_names, config.preprocess.mean, config.preprocess.std)
    start_from_model(begin, config)
    return interpolated(begin, model, share)


def _is_past_start(config: FinetuneConfig) -> bool:
    """Return whether the run has a checkpoint and its start model no longer exists."""
    return not Path(config.train.init).exists() and any((Path(config.out) / "checkpoints").glob("step-*"))
