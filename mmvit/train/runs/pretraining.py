"""Pretraining: images and their captions in one embedding space."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import file_sha256, model_fingerprint, save_model
from mmvit.config import PretrainConfig, ZeroShotConfig
from mmvit.data.batches import Batch, TrainBatches
from mmvit.data.curriculum import stage_at
from mmvit.data.labels import check_class_names
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.streaming import open_shards
from mmvit.data.tokenizers import Tokenizer, build_tokenizer, tokenizer_file
from mmvit.eval.classify import check_images
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.layers.drop_path import DrawKey
from mmvit.layers.patch_dropout import kept_patches
from mmvit.layers.patch_embedding import Patches
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder
from mmvit.towers.text import TextConfig
from mmvit.train.contract import FlopInputs, Part, TaskParts
from mmvit.train.device.parallel import whole
from mmvit.train.runs.batches import build_batches
from mmvit.train.runs.pair_evaluation import PairEvaluator
from mmvit.train.runs.pretraining_loss import PretrainObjective, chance
from mmvit.train.runs.teacher import Teacher, load_teacher
from mmvit.train.safety.agree import main_first
from mmvit.train.safety.watch import Watch
from mmvit.train.start.batch_norm import check_share
from mmvit.train.start.dual_encoder import build_start, with_start


class ZeroShotData(NamedTuple):
    """What the zero-shot accuracy is measured on."""

    shards: IndexedShards
    class_names: list[str]
    templates: list[str]


class ZeroShotEvaluator:
    """Classifies labelled images by the texts of their class names; `data` is None on all ranks but the main one."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, data: ZeroShotData | None):
        self.every = config.zero_shot.every
        self.limit = config.zero_shot.limit
        self.class_file = config.zero_shot.class_names
        self.image_size = config.model.image.image_size
        self.tokenizer = tokenizer
        self.data = data

    def check(self) -> None:
        """Read all labels and an image."""
        assert self.data is not None
        check_class_names(self.data.shards, self.data.class_names, self.class_file)
        check_images(self.data.shards)

    def measure(self, model: Any, last: bool, before_each_batch: Callable[[], None]) -> dict[str, float]:
        """Return top-1 and top-5 accuracy, of `limit` images unless `last`."""
        assert self.data is not None
        encoder = Encoder(model, self.tokenizer, image_size=self.image_size, fingerprint="")
        limit = None if last else self.limit
        result = evaluate_zero_shot(encoder, *self.data, limit=limit, before_each_batch=before_each_batch)
        return {"zero_shot_acc1": result.acc1, "zero_shot_acc5": result.acc5}


class PairInputs:
    """Turns micro-batches of images and captions into the arguments of the model and the targets of the losses."""

    def __init__(self, config: PretrainConfig, model: DualEncoder, losses: PretrainObjective, device: torch.device):
        self.config = config
        self.model = model
        self.losses = losses
        self.device = device

    def part(self, step: int, batch: Batch) -> Part:
        """Move a micro-batch to the device and compute its targets."""
        images = batch.images
        if isinstance(images, Patches):
            moved: Tensor | Patches = images._replace(pixels=images.pixels.to(self.device, non_blocking=True))
        else:
            moved = images.to(self.device, non_blocking=True)
        ids = batch.ids.to(self.device, non_blocking=True)
        keep = self._keep(step, batch.images, batch.positions)
        draws = DrawKey(batch.positions.to(self.device), self.config.seed)
        return Part((moved, ids, keep), self.losses.targets(batch, self.device), draws)

    def flop_inputs(self, step: int, batch: Batch) -> FlopInputs:
        """Return images, token ids and the patches to keep of the first sample."""
        return batch.images, batch.ids, self._keep(step, batch.images, batch.positions[:1])

    def _keep(self, step: int, images: Tensor | Patches, positions: Tensor) -> Tensor | None:
        """Return the patches that the image tower sees, if the stage of the curriculum drops some."""
        drop = stage_at(step, self.config.train.steps, self.config.curriculum).patch_dropout
        if not drop:
            return None
        return kept_patches(positions.to(self.device), self.model.num_patches(images), drop, self.config.seed)


def build_pretraining(config: PretrainConfig, accelerator: Accelerator, watch: Watch) -> TaskParts:
    """Open the data and build the model, the losses and the evaluator."""
    tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
    _check_tokenizer(config.model.text, tokenizer)
    is_main = accelerator.is_main_process
    with main_first(accelerator, watch, "indexing shards"):
        paths = expand_shards(config.data.train)
        shards = open_shards(paths, config.data.verify, require_caption=False, announce=is_main)
        zero_shot = _open_zero_shot(config.zero_shot) if is_main and config.zero_shot.data else None
        held_out = _open_pairs(config) if is_main and config.validation.data else None
    model = build_start(config, accelerator)
    teacher = _load_teacher(config, tokenizer, accelerator.device) if config.loss.teacher else None
    same_captions = config.train.same_caption_positives
    objective = PretrainObjective(config.loss, teacher, same_caption_positives=same_captions, tokenizer=tokenizer)
    batches = build_batches(config, shards, accelerator, tokenizer, teacher.stored if teacher else None)
    check_share(model, batches.share)
    identity = _identity(config, batches, teacher)
    inputs = PairInputs(config, model, objective, accelerator.device)
    return TaskParts(
        source=shards,
        model=model,
        batches=batches,
        part=inputs.part,
        flop_inputs=inputs.flop_inputs,
        objective=objective,
        fresh_model=partial(build_dual_encoder, config.model, config.preprocess.mean, config.preprocess.std),
        export=partial(_export, config, identity["tokenizer"]),
        identity=identity,
        evaluators=(
            *([ZeroShotEvaluator(config, tokenizer, zero_shot)] if config.zero_shot.data else []),
            *([PairEvaluator(config, tokenizer, held_out)] if config.validation.data else []),
        ),
        after_update=partial(_clamp_logit_scale, model, config.loss.max_logit_scale),
        figures=lambda: {"logit_scale": whole(model.logit_scale).exp().item()},
        chance=chance(config.loss, config.train.batch_size, len(config.data.captions)),
        scale_bounds=_scale_bounds(model, config.loss.max_logit_scale),
    )


def _load_teacher(config: PretrainConfig, tokenizer: Tokenizer, device: torch.device) -> Teacher:
    images = not (config.data.patch_budget or config.data.image_embeddings)
    return load_teacher(config.loss.teacher, tokenizer, config.model.text.context_length, device, whole_images=images)


def _identity(config: PretrainConfig, batches: TrainBatches, teacher: Teacher | None) -> dict[str, str]:
    """Return the fingerprints of the tokenizer, stored embeddings and the teacher."""
    identity = {"tokenizer": _tokenizer_fingerprint(config)}
    if batches.stored_images:
        identity["stored embeddings"] = batches.stored_images.fingerprint()
    if teacher:
        identity["teacher"] = teacher.fingerprint
    if config.wise_ft is not None:
        identity["model to start from"] = model_fingerprint(config.train.init)
    return identity


def _tokenizer_fingerprint(config: PretrainConfig) -> str:
    path = config.tokenizer.path
    return file_sha256(tokenizer_file(path)) if path else config.tokenizer.kind


def _scale_bounds(model: DualEncoder, highest: float | None) -> tuple[float, float] | None:
    """Return the lowest and the highest logit scale; None if it is not clamped."""
    return (1.0, highest) if highest is not None and model.logit_scale.requires_grad else None


def _clamp_logit_scale(model: DualEncoder, highest: float | None) -> None:
    if model.logit_scale.requires_grad:
        model.clamp_logit_scale(highest)


def _export(config: PretrainConfig, tokenizer: str, model: DualEncoder, folder: Path) -> None:
    """Write the model folder, unless the tokenizer is no longer the one with this fingerprint."""
    if _tokenizer_fingerprint(config) != tokenizer:
        raise CheckpointError(
            "the tokenizer changed during the run",
            where=config.tokenizer.path,
            note="the last checkpoint is complete; no model was written",
            hint="restore the tokenizer, then run the same command again",
        )
    finished = model if config.wise_ft is None else with_start(model, config, config.wise_ft)
    save_model(folder, finished, config.model, config.preprocess, config.tokenizer)


def _open_pairs(config: PretrainConfig) -> IndexedShards:
    return IndexedShards(expand_shards(config.validation.data), require_caption=config.data.captions[0].source == "txt")


def _open_zero_shot(config: ZeroShotConfig) -> ZeroShotData:
    shards = IndexedShards(expand_shards(config.data), require_caption=False)
    class_names = load_class_names(config.class_names)
    return ZeroShotData(shards, class_names, load_templates(config.templates))


def _check_tokenizer(config: TextConfig, tokenizer: Tokenizer) -> None:
    """Raise UsageError if vocabulary size or end-of-text token of the text tower are not those of the tokenizer."""
    wanted = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    wrong = [f"model.text.{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        raise UsageError("the text tower does not fit the tokenizer", where="model.text", hint=" ".join(wrong))
