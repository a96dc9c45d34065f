"""The dual encoder at the start of a run: new weights or those of a finished model, adapters, frozen parameters."""

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.checkpoint import LoadedModel, load_model, load_weights
from mmvit.config import FinetuneConfig, PretrainConfig
from mmvit.data.stored import read_manifest
from mmvit.data.tokenizers import build_tokenizer, read_alike
from mmvit.data.transforms import PreprocessConfig
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder
from mmvit.towers.contract import Tower, TowerConfig
from mmvit.towers.timm_tower import TimmConfig
from mmvit.train.device.memory import checkpoint_activations
from mmvit.train.device.parallel import make_shardable
from mmvit.train.start.batch_norm import check_batch_norm, train_mode
from mmvit.train.start.freeze import fitting, freeze
from mmvit.train.start.lora import add_adapters
from mmvit.train.start.size import check_size
from mmvit.train.start.wise_ft import interpolated

# The keys of a tower that may differ from the model to start from. `kind` only names the other values.
FREE_SHAPE = ("kind", "image_size", "window_size", "drop_path", "init", "identity_start")


def build_start(config: PretrainConfig, accelerator: Accelerator) -> DualEncoder:
    """Build the model at the start of the run, on the device of this rank.

    Raises:
        UsageError: an invalid model, or contradictory settings.
        CheckpointError: a model folder that does not fit, or stored embeddings of another image tower.
    """
    build = partial(build_dual_encoder, config.model, config.preprocess.mean, config.preprocess.std)
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
    start_from_model(model, config)
    freeze(model, [*config.train.freeze, *([] if config.loss.learn_logit_scale else ["logit_scale"])])
    if config.data.image_embeddings:
        check_locked(model, config)
    add_adapters(model, config.lora, config.train.freeze)
    checkpoint_activations(model, config.train.checkpointing)
    make_shardable(accelerator, model)
    train_mode(model)
    return model.to(accelerator.device)


def check_curriculum(tower: Tower, config: PretrainConfig | FinetuneConfig) -> None:
    """Raise UsageError if the image tower cannot encode the images of a stage."""
    for i, stage in enumerate(config.curriculum):
        side = stage.image_size or config.model.image.image_size
        keep = torch.empty(1, 1, dtype=torch.long, device="meta") if stage.patch_dropout else None
        try:
            tower.check_inputs(torch.empty(1, 3, side, side, device="meta"), keep)
        except ValueError as error:
            what = f"curriculum[{i}] does not fit the image tower: {error}"
            raise UsageError(what, where="curriculum", hint="choose another size or tower") from error


def start_from_model(model: DualEncoder, config: PretrainConfig) -> None:
    """Load the weights of `train.init`, all or those that match `train.init_only`; none if it is empty.

    Raises:
        UsageError: patterns without a model, or that match no parameter.
        CheckpointError: weights of another architecture, or `data.image_embeddings` of another image tower.
    """
    where, patterns, stored = config.train.init, config.train.init_only, config.data.image_embeddings
    if not where:
        if patterns:
            what = "train.init_only selects parameters, but train.init is empty"
            raise UsageError(what, where="train.init", hint="use train.init=MODEL, the model/ folder of a run")
        return
    is_past_start = any((Path(config.out) / "checkpoints").glob("step-*"))
    if not Path(where).exists() and is_past_start and config.wise_ft is None:
        return  # the run resumes, and loads everything from its checkpoint
    loaded = load_model(where)
    weights = loaded.model.state_dict() | image_weights(loaded.model.image_tower, model.image_tower)
    if patterns:
        taken = {name: weights[name] for name in fitting(weights, patterns, where="train.init_only")}
        weights = model.state_dict() | taken
    load_weights(model, weights, where=where)
    _check_alike(config, loaded, patterns)
    if stored and not _embed_alike(model, config, loaded, read_manifest(Path(stored))["model_sha256"]):
        raise CheckpointError(
            "the stored embeddings were not computed by the image tower that the run starts from",
            where=f"data.image_embeddings={stored}",
            note="the text tower would learn to fit another image tower than the one it is exported with",
            hint=f"run mmvit embed {where} SHARDS --out FOLDER, and use its image tower, image size and preprocessing",
        )


def with_start(model: DualEncoder, config: PretrainConfig, share: float) -> DualEncoder:
    """Return share * model + (1 - share) * the start of the run (WiSE-FT)."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        begin = build_dual_encoder(config.model, config.preprocess.mean, config.preprocess.std)
    start_from_model(begin, config)
    return interpolated(begin, model, share)


def image_weights(before: Tower, now: Tower) -> dict[str, Tensor]:
    """Return the weights of an image tower by their names in a model, with position tables resampled for `now`."""
    weights = before.state_dict()
    if before.grid is not None and now.grid is not None:
        weights |= before.resampled_tables(now.grid)
    return {f"image_tower.{name}": tensor for name, tensor in weights.items()}


def _check_alike(config: PretrainConfig, loaded: LoadedModel, patterns: list[str]) -> None:
    """Raise UsageError for weights of equal shapes but other settings, which would give other results."""

    def taken(probe: str) -> bool:
        return not patterns or any(fnmatchcase(probe, pattern) for pattern in patterns)

    differing = []
    if taken("image_tower.norm.weight"):
        differing += image_differences(config, loaded.config.image, loaded.preprocess)
    if taken("text_tower.norm.weight"):
        differing += _differences("model.text", config.model.text, loaded.config.text)
        tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
        if not read_alike(tokenizer, loaded.tokenizer, config.model.text.context_length):
            differing.append("the tokenizer")
    refuse_other_settings(differing, config)


def image_differences(
    config: PretrainConfig | FinetuneConfig, before: TowerConfig, preprocess: PreprocessConfig
) -> list[str]:
    """Return the settings of an image tower that differ from those of a run, as overrides."""
    now = config.model.image
    if type(now) is not type(before) or (isinstance(now, TimmConfig) and now.kind != before.kind):
        return [f"model.image.kind={before.kind}"]
    return [
        *_differences("model.image", now, before),
        *_differences("preprocess", config.preprocess, preprocess),
    ]


def _differences(key: str, now: Any, before: Any) -> list[str]:
    old = asdict(before)
    return [
        f"{key}.{name}={old[name]}"
        for name, value in asdict(now).items()
        if value != old[name] and name not in FREE_SHAPE
    ]


def refuse_other_settings(differing: Sequence[str], config: PretrainConfig | FinetuneConfig) -> None:
    """Raise UsageError naming the settings of the model to start from, if any differ."""
    if differing:
        hint = "use its settings, from its mmvit.json"
        if isinstance(config, FinetuneConfig):
            hint = "remove model.image.kind and the unchanged keys of model: they default to those of that model"
        raise UsageError(
            f"the initial model has different settings: {', '.join(differing)}",
            where=f"train.init={config.train.init}",
            note="its weights would give other results with the new settings; nothing was started",
            hint=hint,
        )


def check_locked(model: DualEncoder, config: PretrainConfig) -> None:
    """Raise UsageError if stored embeddings replace an image tower that is trained, or that no model provides."""
    free = [name for name, p in model.named_parameters() if name.startswith("image_") and p.requires_grad]
    if free or not config.train.init:
        raise UsageError(
            "data.image_embeddings replace a frozen image tower of a finished model"
            + (f", but {free[0]} is trained" if free else ""),
            where="data.image_embeddings",
            hint='use train.init=MODEL "train.freeze=[image_*]"',
        )


def _embed_alike(model: DualEncoder, config: PretrainConfig, loaded: LoadedModel, fingerprint: str) -> bool:
    """Return whether `loaded` has this fingerprint and `model` computes the same image embeddings."""
    own, theirs = model.state_dict(), loaded.model.state_dict()
    image = {name for name in own.keys() | theirs if name.startswith("image_")}
    same = image <= own.keys() & theirs and all(torch.equal(own[name], theirs[name]) for name in image)
    return same and fingerprint == loaded.fingerprint and config.preprocess == loaded.preprocess
