"""A supervised run: images and their classes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.checkpoint import Checkpoint, model_fingerprint, save_classifier
from mmvit.config import FinetuneConfig
from mmvit.data.batches import Batch, BatchSplit, TrainBatches
from mmvit.data.labels import Labelled, check_same_classes, open_labelled
from mmvit.data.mixing import mix_pairs
from mmvit.eval.classify import evaluate_classifier
from mmvit.layers.patch_dropout import kept_patches
from mmvit.layers.patch_embedding import patch_grid
from mmvit.losses.classification import soft_targets
from mmvit.models.build import build_classifier
from mmvit.models.classifier import ImageClassifier
from mmvit.train.run import Run
from mmvit.train.runs.class_teacher import load_class_teacher
from mmvit.train.runs.classification import ClassObjective, ClassTargets
from mmvit.train.start.classifier import build_start, interpolated
from mmvit.train.step import Part


class Finetuning(Run):
    """The run of a classifier, from scratch or from a finished model."""

    config: FinetuneConfig
    model: ImageClassifier

    def open_data(self) -> None:
        """Open the pictures to train on, and those to measure accuracy on."""
        self._check_pairs()
        data, validation = self.config.data, self.config.validation.data
        train = self.opened("indexing", lambda: open_labelled(data.train, self.config.classes, verify=data.verify))
        self.shards, self.class_names = train
        if len(self.class_names) < 2:
            what = f"there is one class alone, {self.class_names[0]!r}, and nothing to tell apart"
            raise UsageError(what, where="data.train", hint="name the folder that holds the folders of all classes")
        self.validation: Labelled | None = None
        if validation:
            names = self.class_names
            self.validation = self.opened("indexing", lambda: open_labelled(validation, known=names))

    def _check_pairs(self) -> None:
        parts, size = self.accelerator.num_processes * self.config.train.micro_batches, self.config.train.batch_size
        if (self.config.mix.mixup or self.config.mix.cutmix) and size % (2 * parts):
            raise UsageError(
                f"mixup and CutMix mix pairs, and a batch of {size} has no whole pairs in each of {parts} parts",
                where="train.batch_size",
                hint=f"give a multiple of {2 * parts}, or mix.mixup=0 mix.cutmix=0",
            )

    def build_model(self) -> None:
        """Make the tower and its head."""
        self.model = build_start(self.config, self.class_names, self.accelerator)

    def build_objective(self) -> None:
        """Make the losses, and load the teacher."""
        name = self.config.loss.teacher
        self.teacher = load_class_teacher(name, self.class_names, self.accelerator.device) if name else None
        self.objective = ClassObjective(self.config.loss)

    def build_batches(self, split: BatchSplit) -> TrainBatches:
        """Make the training data of one process."""
        config = self.config
        return TrainBatches(
            self.shards,
            config.data,
            None,
            image_size=config.model.image.image_size,
            batch_size=config.train.batch_size,
            num_steps=config.train.steps,
            seed=config.seed,
            split=split,
            stages=config.curriculum,
        )

    def part(self, batch: Batch) -> Part:
        """Move a micro-batch to the device, mixed, with what it is held against."""
        device = self.accelerator.device
        assert isinstance(batch.images, Tensor)
        assert batch.labels is not None
        images = batch.images.to(device, non_blocking=True)
        shares = soft_targets(batch.labels.to(device), len(self.class_names), self.config.loss.label_smoothing)
        if self.config.mix.mixup or self.config.mix.cutmix:
            images, shares = mix_pairs(images, shares, batch.positions, self.config.mix, self.config.seed)
        teacher = self.teacher.logits(images) if self.teacher else None
        return Part((images, self.keep(batch)), ClassTargets(shares, teacher))

    def keep(self, batch: Batch) -> Tensor | None:
        """Return which patches the tower sees, where the stage of this batch drops some."""
        drop = self.stage(int(batch.positions[0]) // self.config.train.batch_size).patch_dropout
        if not drop:
            return None
        assert isinstance(batch.images, Tensor)
        rows, columns = patch_grid(batch.images.shape[2], batch.images.shape[3], self.model.image_tower.stride)
        return kept_patches(batch.positions.to(self.accelerator.device), rows * columns, drop, self.config.seed)

    def sample_flops(self, batch: Batch) -> float:
        """Return the floating-point operations that a sample of this batch costs."""
        return self.flops.sample_flops(batch.images, None, self.keep(batch._replace(positions=batch.positions[:1])))

    def own_identity(self) -> dict[str, str]:
        """Name the classes, the teacher, and the model that the weights are mixed with."""
        told = {"class names": "\n".join(self.class_names)}
        if self.teacher:
            told["teacher"] = self.teacher.fingerprint
        if self.config.wise_ft is not None:
            told["model to start from"] = model_fingerprint(self.config.train.init)
        return told

    def check_identity(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError where a checkpoint is of other classes, files or arithmetic."""
        if self.class_names:
            before = checkpoint.state["identity"].get("class names", "").split("\n")
            sides = ("the checkpoint", "the data")
            check_same_classes(before, self.class_names, sides, str(checkpoint.folder), CheckpointError)
        super().check_identity(checkpoint)

    def after_update(self) -> None:
        """Do nothing: all weights are free."""

    def figures(self) -> dict[str, float]:
        """Return nothing beside what all runs log."""
        return {}

    @property
    def evaluates_every(self) -> int | None:
        """The steps between two evaluations; None where there is nothing to evaluate on."""
        return self.config.validation.every if self.validation else None

    def evaluate(self, last: bool, stop_wished: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Measure accuracy on the main process; the others wait. All raise Interrupted when a stop is wished."""
        data, limit = self.validation, None if last else self.config.validation.limit
        assert data is not None
        size, go_on, figures = self.config.model.image.image_size, self.interrupting(stop_wished), dict[str, float]()
        with self.finished_model() as model:
            models = {"val": model}
            if last and self.config.wise_ft is not None:
                models["wise_ft"] = self.mixed(model)
            for name, measured in models.items():
                found = self.on_main(
                    "evaluating", partial(evaluate_classifier, measured, data.samples, size, limit, go_on)
                )
                if found:
                    figures |= {f"{name}_acc1": found.acc1, f"{name}_acc5": found.acc5}
                    figures |= {"val_bad_samples": found.num_bad} if found.num_bad else {}
        return figures

    def mixed(self, model: ImageClassifier) -> ImageClassifier:
        """Return the model that is exported: its weights drawn back towards those of the start where `wise_ft` says so.

        It is made on every process, and read on the main one.
        """
        share = self.config.wise_ft
        return model if share is None else interpolated(model, self.config, self.class_names, share)

    def fresh_model(self) -> ImageClassifier:
        """Make an empty model for weights without adapters."""
        config = self.config
        return build_classifier(config.model, self.class_names, config.preprocess.mean, config.preprocess.std)

    def export(self) -> Path:
        """Write the model folder."""
        config, folder = self.config, self.folder / "model"
        with self.finished_model() as model:
            mixed = self.mixed(model)
            self.on_main("saving", lambda: save_classifier(folder, mixed, config.model, config.preprocess))
        return folder
