"""The model as a run begins: fresh weights or a finished model's, adapters, and what of it is trained."""

from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from accelerate import Accelerator

from data_tools.errors import CheckpointError, UsageError
from mmvit.checkpoint import LoadedModel, load_model, load_weights
from mmvit.config import PretrainConfig
from mmvit.data.stored import read_manifest
from mmvit.data.tokenizers import build_tokenizer, read_alike
from mmvit.layers.positions import resample_positions
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder
from mmvit.towers.vit import VisionTransformer
from mmvit.train.freeze import fitting, freeze
from mmvit.train.lora import add_adapters
from mmvit.train.memory import checkpoint_activations
from mmvit.train.parallel import make_shardable

# Of a tower's config: what may differ from that of the model to start from.
FREE_SHAPE = ("image_size", "identity_start")


def build_start(config: PretrainConfig, accelerator: Accelerator) -> DualEncoder:
    """Build the model with which the run begins, on the device of this process.

    Raises:
        UsageError: there is no such model, or parts of the config contradict each other.
        CheckpointError: a model folder that does not fit, or stored embeddings of another image tower.
    """
    torch.manual_seed(config.seed)
    try:
        model = build_dual_encoder(config.model, config.preprocess.mean, config.preprocess.std)
    except ValueError as error:
        raise UsageError(f"there is no such model: {error}", where="model") from error
    start_from_model(model, config)
    freeze(model, [*config.train.freeze, *([] if config.loss.learn_logit_scale else ["logit_scale"])])
    if config.data.image_embeddings:
        check_locked(model, config)
    if config.lora.rank:
        add_adapters(model, config.lora)
        for name, parameter in model.named_parameters():  # of the adapters too
            if any(fnmatchcase(name, pattern) for pattern in config.train.freeze):
                parameter.requires_grad_(False)
    checkpoint_activations(model, config.train.checkpointing)
    make_shardable(accelerator, model)
    return model.to(accelerator.device)


def start_from_model(model: DualEncoder, config: PretrainConfig) -> None:
    """Take the weights that `train.init` holds, all or those that `train.init_only` names; none where it is empty.

    Raises:
        UsageError: names without a model, or that no parameter has.
        CheckpointError: weights of another architecture, or `data.image_embeddings` of another image tower.
    """
    where, patterns, stored = config.train.init, config.train.init_only, config.data.image_embeddings
    if not where:
        if patterns:
            what = "train.init_only names parameters, but no model is named to take them from"
            raise UsageError(what, where="train.init", mend="train.init=MODEL, the model/ folder of a run")
        return
    if not Path(where).exists() and any((Path(config.out) / "checkpoints").glob("step-*")):
        return  # the run is past its start, and takes everything from its checkpoint
    loaded = load_model(where)
    weights = loaded.model.state_dict()
    before, now = loaded.model.image_tower, model.image_tower
    if isinstance(before, VisionTransformer) and isinstance(now, VisionTransformer):
        table = "image_tower.positions"
        weights[table] = resample_positions(weights[table], before.grid, now.grid)
    if patterns:
        taken = {name: weights[name] for name in fitting(weights, patterns, where="train.init_only")}
        weights = model.state_dict() | taken
    load_weights(model, weights, where=where)
    _check_alike(config, loaded, patterns)
    if stored and not _embed_alike(model, config, loaded, read_manifest(Path(stored))["model_sha256"]):
        raise CheckpointError(
            "the stored embeddings were not made by the image tower that the run starts from",
            where=f"data.image_embeddings={stored}",
            meaning="the text tower would learn to fit another image tower than the one it is exported with",
            mend=f"mmvit embed {where} SHARDS --out FOLDER; and that model's whole image tower, size and pixels",
        )


def _check_alike(config: PretrainConfig, loaded: LoadedModel, patterns: list[str]) -> None:
    """Refuse weights that fit in their shapes alone: the towers would compute something else with them."""
    differing = []
    for side, probe in (("image", "image_tower.norm.weight"), ("text", "text_tower.norm.weight")):
        if patterns and not any(fnmatchcase(probe, pattern) for pattern in patterns):
            continue
        now, before = asdict(getattr(config.model, side)), asdict(getattr(loaded.config, side))
        keys = [key for key in now if now[key] != before[key] and key not in FREE_SHAPE]
        differing += [f"model.{side}.{key}={before[key]}" for key in keys]
        if side == "image" and config.preprocess != loaded.preprocess:
            differing += [f"preprocess.{key}={value}" for key, value in asdict(loaded.preprocess).items()]
        if side == "text":
            tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
            if not read_alike(tokenizer, loaded.tokenizer, config.model.text.context_length):
                differing.append("the tokenizer")
    if differing:
        raise UsageError(
            f"the model to start from was made with other settings: {', '.join(differing)}",
            where=f"train.init={config.train.init}",
            meaning="with these its weights would compute something else; nothing was started",
            mend="take its settings; config.yaml in the folder of its run has them all",
        )


def check_locked(model: DualEncoder, config: PretrainConfig) -> None:
    """Raise UsageError for stored embeddings in the place of an image tower that would be trained, or that is none."""
    free = [name for name, p in model.named_parameters() if name.startswith("image_") and p.requires_grad]
    if free or not config.train.init:
        raise UsageError(
            "data.image_embeddings stand in for a frozen image tower of a finished model"
            + (f", but {free[0]} is to be trained" if free else ""),
            where="data.image_embeddings",
            mend='train.init=MODEL "train.freeze=[image_*]"',
        )


def _embed_alike(model: DualEncoder, config: PretrainConfig, loaded: LoadedModel, fingerprint: str) -> bool:
    """Tell whether `loaded` has this fingerprint, and `model` makes the same embeddings of pictures."""
    own, theirs = model.state_dict(), loaded.model.state_dict()
    image = {name for name in own.keys() | theirs if name.startswith("image_")}
    same = image <= own.keys() & theirs and all(torch.equal(own[name], theirs[name]) for name in image)
    return same and fingerprint == loaded.fingerprint and config.preprocess == loaded.preprocess
