"""A pretraining run: images and their captions, one shared space."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import file_sha256, save_model
from mmvit.config import PretrainConfig, ZeroShotConfig
from mmvit.data.batches import Batch, BatchSplit, TrainBatches
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.source import SampleSource
from mmvit.data.streaming import open_shards
from mmvit.data.tokenizers import Tokenizer, build_tokenizer, tokenizer_file
from mmvit.eval.classify import Accuracy
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.layers.patch_dropout import kept_patches
from mmvit.layers.patch_embedding import Patches
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder
from mmvit.towers.text import TextConfig
from mmvit.train.device.parallel import whole
from mmvit.train.run import Run
from mmvit.train.runs.objective import PretrainObjective
from mmvit.train.runs.teacher import load_teacher
from mmvit.train.start.dual_encoder import build_start
from mmvit.train.step import Part


class ZeroShotTask(NamedTuple):
    """What the live zero-shot figure is measured on."""

    shards: IndexedShards
    names: list[str]
    templates: list[str]


class Pretraining(Run):
    """The run of a dual encoder."""

    config: PretrainConfig
    model: DualEncoder

    def open_data(self) -> None:
        """Open the tokenizer, the shards, and what zero-shot classification is measured on."""
        self.tokenizer = build_tokenizer(self.config.tokenizer, self.config.model.text.context_length)
        _check_tokenizer(self.config.model.text, self.tokenizer)
        self.shards = self.opened("indexing shards", self._open_shards)
        self.zero_shot = self.on_main("indexing shards", lambda: _zero_shot_task(self.config.zero_shot))

    def build_model(self) -> None:
        """Make both towers."""
        self.model = build_start(self.config, self.accelerator)

    def build_objective(self) -> None:
        """Make the losses, and load the teacher."""
        config, self.teacher = self.config, None
        if config.loss.teacher:
            length = config.model.text.context_length
            pictures = not (config.data.patch_budget or config.data.image_embeddings)
            self.teacher = load_teacher(
                config.loss.teacher, self.tokenizer, length, self.accelerator.device, pictures=pictures
            )
        self.objective = self._losses = PretrainObjective(
            config.loss,
            self.teacher,
            same_caption_positives=config.train.same_caption_positives,
            tokenizer=self.tokenizer,
        )

    def build_batches(self, split: BatchSplit) -> TrainBatches:
        """Make the training data of one process."""
        config = self.config
        return TrainBatches(
            self.shards,
            config.data,
            self.tokenizer,
            image_size=config.model.image.image_size,
            batch_size=config.train.batch_size,
            num_steps=config.train.steps,
            seed=config.seed,
            split=split,
            stages=config.curriculum,
            patch_size=config.model.image.stride,
            teacher=self.teacher.stored if self.teacher else None,
        )

    def part(self, batch: Batch) -> Part:
        """Move a micro-batch to the device, with what it is held against."""
        device, images = self.accelerator.device, batch.images
        if isinstance(images, Patches):
            moved: Tensor | Patches = images._replace(pixels=images.pixels.to(device, non_blocking=True))
        else:
            moved = images.to(device, non_blocking=True)
        inputs = (moved, batch.ids.to(device, non_blocking=True), self.keep(batch))
        return Part(inputs, self._losses.targets(batch, device))

    def keep(self, batch: Batch) -> Tensor | None:
        """Return which patches the image tower sees, where the stage of this batch drops some."""
        drop = self.stage(int(batch.positions[0]) // self.config.train.batch_size).patch_dropout
        if not drop:
            return None
        positions = batch.positions.to(self.accelerator.device)
        return kept_patches(positions, self.model.num_patches(batch.images), drop, self.config.seed)

    def sample_flops(self, batch: Batch) -> float:
        """Return the floating-point operations that a sample of this batch costs."""
        keep = self.keep(batch._replace(positions=batch.positions[:1]))
        return self.flops.sample_flops(batch.images, batch.ids, keep)

    def own_identity(self) -> dict[str, str]:
        """Fingerprint the tokenizer, stored embeddings and the teacher."""
        path = self.config.tokenizer.path
        others = {"tokenizer": file_sha256(tokenizer_file(path)) if path else self.config.tokenizer.kind}
        if self.batches.stored_images:
            others["stored embeddings"] = self.batches.stored_images.fingerprint()
        if self.teacher:
            others["teacher"] = self.teacher.fingerprint
        return others

    def after_update(self) -> None:
        """Keep the logit scale within its bounds."""
        if self.model.logit_scale.requires_grad:
            self.model.clamp_logit_scale(self.config.loss.max_logit_scale)

    def figures(self) -> dict[str, float]:
        """Return the logit scale."""
        return {"logit_scale": whole(self.model.logit_scale).exp().item()}

    @property
    def evaluates_every(self) -> int | None:
        """The steps between two evaluations; None where there is nothing to evaluate on."""
        return self.config.zero_shot.every if self.config.zero_shot.data else None

    def evaluate(self, last: bool, stop_wished: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Classify zero-shot on the main process; the others wait. All raise Interrupted when a stop is wished."""
        size, limit = self.config.model.image.image_size, None if last else self.config.zero_shot.limit
        with self.finished_model() as model:
            encoder = Encoder(model, self.tokenizer, image_size=size, fingerprint="")
            result = self.on_main("evaluating", lambda: self._evaluated(encoder, limit, stop_wished))
        return {"zero_shot_acc1": result.acc1, "zero_shot_acc5": result.acc5} if result else {}

    def fresh_model(self) -> DualEncoder:
        """Make an empty model for weights without adapters."""
        return build_dual_encoder(self.config.model, self.config.preprocess.mean, self.config.preprocess.std)

    def export(self) -> Path:
        """Write the model folder."""
        config, folder = self.config, self.folder / "model"
        path = config.tokenizer.path
        if path and file_sha256(tokenizer_file(path)) != self.identity["tokenizer"]:
            raise CheckpointError(
                "the tokenizer changed while the run went on",
                where=path,
                note="the last checkpoint is whole; no model was written",
                hint="bring back what was, then run again",
            )
        with self.finished_model() as model:
            self.on_main("saving", lambda: save_model(folder, model, config.model, config.preprocess, config.tokenizer))
        return folder

    def _open_shards(self) -> SampleSource:
        data, announce = self.config.data, self.accelerator.is_main_process
        return open_shards(expand_shards(data.train), data.verify, require_caption=False, announce=announce)

    def _evaluated(self, encoder: Encoder, limit: int | None, stop_wished: Callable[[], bool]) -> Accuracy:
        assert self.zero_shot is not None
        go_on = self.interrupting(stop_wished)
        return evaluate_zero_shot(encoder, *self.zero_shot, limit=limit, before_each_batch=go_on)


def _zero_shot_task(config: ZeroShotConfig) -> ZeroShotTask | None:
    if not config.data:
        return None
    shards = IndexedShards(expand_shards(config.data), require_caption=False)
    class_names = load_class_names(config.class_names)
    known = {None, *range(len(class_names)), *class_names}
    labels = (shards.label(i) for i in range(0, len(shards), -(-len(shards) // 1000)))
    unknown = next((label for label in labels if label not in known), None)
    if unknown is not None:
        raise UsageError(
            f"label {unknown} has no class name: the file has {len(class_names)}",
            where=config.class_names,
            hint="name the file that belongs to zero_shot.data; line n, from 0, names label n",
        )
    return ZeroShotTask(shards, class_names, load_templates(config.templates))


def _check_tokenizer(config: TextConfig, tokenizer: Tokenizer) -> None:
    """Refuse a text tower that was not made for the tokenizer: it would read other words, or pool at no token."""
    wanted = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    wrong = [f"model.text.{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        raise UsageError("the text tower does not fit the tokenizer", where="model.text", hint=" ".join(wrong))
