"""Fine-tuning: images and their classes."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.checkpoint import Checkpoint, model_fingerprint, save_classifier
from mmvit.config import FinetuneConfig
from mmvit.data.batches import Batch
from mmvit.data.curriculum import stage_at
from mmvit.data.labels import Labelled, check_same_classes, open_labelled
from mmvit.data.mixing import mix_pairs
from mmvit.eval.classify import check_images, evaluate_classifier
from mmvit.layers.drop_path import DrawKey
from mmvit.layers.patch_dropout import kept_patches
from mmvit.layers.patch_embedding import patch_grid
from mmvit.losses.classification import soft_targets
from mmvit.models.build import build_classifier
from mmvit.models.classifier import ImageClassifier
from mmvit.train.contract import FlopInputs, Part, TaskParts
from mmvit.train.runs.batches import build_batches
from mmvit.train.runs.class_teacher import ClassTeacher, load_class_teacher
from mmvit.train.runs.finetuning_loss import ClassObjective, ClassTargets
from mmvit.train.safety.agree import main_first
from mmvit.train.safety.learning import Chance
from mmvit.train.safety.watch import Watch
from mmvit.train.start.batch_norm import check_share
from mmvit.train.start.classifier import build_start, with_start


class AccuracyEvaluator:
    """Measures accuracy on labelled images; at the end also that of the model interpolated with its start (WiSE-FT)."""

    def __init__(self, config: FinetuneConfig, data: Labelled):
        self.every = config.validation.every
        self.config = config
        self.data = data

    def check(self) -> None:
        """Read all labels and an image."""
        self.data.samples.check_labels()
        check_images(self.data.samples)

    def measure(self, model: ImageClassifier, last: bool, before_each_batch: Callable[[], None]) -> dict[str, float]:
        """Return top-1 and top-5 accuracy, of `validation.limit` images unless `last`."""
        models, figures = {"val": model}, dict[str, float]()
        if last and self.config.wise_ft is not None:
            models["wise_ft"] = mixed_with_start(model, self.config)
        size, limit = self.config.model.image.image_size, None if last else self.config.validation.limit
        for name, measured in models.items():
            found = evaluate_classifier(measured, self.data.samples, size, limit, before_each_batch)
            figures |= {f"{name}_acc1": found.acc1, f"{name}_acc5": found.acc5}
            figures |= {"val_bad_samples": found.num_bad} if found.num_bad else {}
        return figures


class ClassInputs:
    """Turns micro-batches of labelled images into the arguments of the model and the targets of the loss."""

    def __init__(
        self, config: FinetuneConfig, model: ImageClassifier, teacher: ClassTeacher | None, device: torch.device
    ):
        self.config = config
        self.model = model
        self.teacher = teacher
        self.device = device

    def part(self, step: int, batch: Batch) -> Part:
        """Move a micro-batch to the device, mix its images and compute its targets."""
        assert isinstance(batch.images, Tensor)
        assert batch.labels is not None
        config, images = self.config, batch.images.to(self.device, non_blocking=True)
        labels, num_classes = batch.labels.to(self.device), len(self.model.class_names)
        shares = soft_targets(labels, num_classes, config.loss.label_smoothing)
        if config.mix.mixup or config.mix.cutmix:
            images, shares = mix_pairs(images, shares, batch.positions, config.mix, config.seed)
        teacher = self.teacher.logits(images) if self.teacher else None
        draws = DrawKey(batch.positions.to(self.device), config.seed)
        return Part((images, self._keep(step, images, batch.positions)), ClassTargets(shares, teacher), draws)

    def flop_inputs(self, step: int, batch: Batch) -> FlopInputs:
        """Return images and the patches to keep of the first sample."""
        assert isinstance(batch.images, Tensor)
        return batch.images, None, self._keep(step, batch.images, batch.positions[:1])

    def _keep(self, step: int, images: Tensor, positions: Tensor) -> Tensor | None:
        """Return the patches that the tower sees, if the stage of the curriculum drops some."""
        drop = stage_at(step, self.config.train.steps, self.config.curriculum).patch_dropout
        if not drop:
            return None
        rows, columns = patch_grid(images.shape[2], images.shape[3], self.model.image_tower.stride)
        return kept_patches(positions.to(self.device), rows * columns, drop, self.config.seed)


def build_finetuning(config: FinetuneConfig, accelerator: Accelerator, watch: Watch) -> TaskParts:
    """Open the data and build the model, the losses and the evaluator."""
    _check_pairs(config, accelerator.num_processes)
    data = config.data
    with main_first(accelerator, watch, "indexing"):
        shards, class_names = open_labelled(data.train, config.classes, verify=data.verify)
        if len(class_names) < 2:
            what = f"the data has only one class, {class_names[0]!r}; at least two are needed"
            raise UsageError(what, where="data.train", hint="pass the folder that contains the class folders")
        validation = open_labelled(config.validation.data, known=class_names) if config.validation.data else None
    model = build_start(config, class_names, accelerator)
    batches = build_batches(config, shards, accelerator)
    check_share(model, batches.share)
    device, teacher = accelerator.device, config.loss.teacher
    class_teacher = load_class_teacher(teacher, class_names, device) if teacher else None
    inputs = ClassInputs(config, model, class_teacher, device)
    statistics = config.preprocess.mean, config.preprocess.std
    return TaskParts(
        source=shards,
        model=model,
        batches=batches,
        part=inputs.part,
        flop_inputs=inputs.flop_inputs,
        objective=ClassObjective(config.loss),
        chance=None if class_teacher else Chance("classification", math.log(len(class_names)), "ln(classes)"),
        fresh_model=partial(build_classifier, config.model, class_names, *statistics),
        export=partial(_export, config),
        identity=_identity(config, class_names, class_teacher),
        check_checkpoint=partial(_check_classes, class_names),
        evaluators=(AccuracyEvaluator(config, validation),) if validation else (),
    )


def mixed_with_start(model: ImageClassifier, config: FinetuneConfig) -> ImageClassifier:
    """Return the model to export: interpolated with the start if `wise_ft` is set."""
    share = config.wise_ft
    return model if share is None else with_start(model, config, model.class_names, share)


def _check_pairs(config: FinetuneConfig, num_ranks: int) -> None:
    parts, size = num_ranks * config.train.micro_batches, config.train.batch_size
    if (config.mix.mixup or config.mix.cutmix) and size % (2 * parts):
        raise UsageError(
            f"mixup and CutMix mix pairs: a batch of {size} is not divisible into pairs for {parts} micro-batches",
            where="train.batch_size",
            hint=f"use a multiple of {2 * parts}, or mix.mixup=0 mix.cutmix=0",
        )


def _identity(config: FinetuneConfig, class_names: list[str], teacher: ClassTeacher | None) -> dict[str, str]:
    """Return the fingerprints of the classes, the teacher, and the start model of WiSE-FT."""
    identity = {"class names": "\n".join(class_names)}
    if teacher:
        identity["teacher"] = teacher.fingerprint
    if config.wise_ft is not None:
        identity["model to start from"] = model_fingerprint(config.train.init)
    return identity


def _check_classes(class_names: list[str], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, naming the first difference, if a checkpoint has other classes."""
    before = checkpoint.state["identity"].get("class names", "").split("\n")
    sides = ("the checkpoint", "the data")
    check_same_classes(before, class_names, sides, str(checkpoint.folder), CheckpointError)


def _export(config: FinetuneConfig, model: ImageClassifier, folder: Path) -> None:
    save_classifier(folder, mixed_with_start(model, config), config.model, config.preprocess)
