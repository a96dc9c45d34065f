"""Everything that a run holds, from the config to the prepared model, and what can be done with it."""

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, nn

from data_tools.errors import CheckpointError, MmvitError, UsageError
from data_tools.expand import expand_shards
from mmvit.checkpoint import (
    check_leaves,
    file_sha256,
    latest_checkpoint,
    load_weights,
    save_model,
)
from mmvit.config import PretrainConfig, ZeroShotConfig
from mmvit.data.batches import Batch, BatchSplit, TrainBatches
from mmvit.data.curriculum import Stage, stage_at
from mmvit.data.loader import Interrupted
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.streaming import StreamBatches, StreamedShards, open_shards
from mmvit.data.tokenizers import Tokenizer, build_tokenizer, tokenizer_file
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import ZeroShotResult, evaluate_zero_shot
from mmvit.layers.patch_dropout import kept_patches
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder
from mmvit.towers.text import TextConfig
from mmvit.train.agree import Failure, on_main
from mmvit.train.bf16 import Bf16Copy
from mmvit.train.ema import WeightAverage
from mmvit.train.flops import FlopCounter
from mmvit.train.guard import Guard
from mmvit.train.lora import merge_adapters
from mmvit.train.memory import compile_blocks
from mmvit.train.objective import Objective
from mmvit.train.optim import build_optimizers, flatten_state, restore_state, set_learning_rates
from mmvit.train.parallel import ddp_arguments, full_state, shard_optimizer_state, shard_state
from mmvit.train.precision import choose_precision
from mmvit.train.run_folder import settings
from mmvit.train.saver import Saver
from mmvit.train.schedule import schedule_factor
from mmvit.train.start import build_start
from mmvit.train.step import StepResult, to_part, train_step
from mmvit.train.teacher import load_teacher
from mmvit.train.trackers import tracker_arguments
from mmvit.train.watch import Watch, joining

T = TypeVar("T")


class ZeroShotTask(NamedTuple):
    """What the live zero-shot figure is measured on."""

    shards: IndexedShards
    names: list[str]
    templates: list[str]


def open_accelerator(config: PretrainConfig) -> Accelerator:
    """Join the processes of the run."""
    config.check()
    # The others wait while the main process indexes shards or evaluates, which may take hours; `Watch` is what ends
    # a run whose processes wait for one that is gone.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    with joining(config.train.timeout_s):
        return Accelerator(
            mixed_precision=_mixed_precision(config.train.precision),
            kwargs_handlers=[patience, ddp_arguments()],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever a launcher's file says
            **tracker_arguments(config.train.trackers, Path(config.out)),
        )


class Run:
    """Everything that a run holds: `model` has the float32 weights that are saved, `wrapped` is what a step calls."""

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, watch: Watch):
        self.config = config
        self.folder = Path(config.out)
        self.accelerator = accelerator
        self.watch = watch
        if config.train.batch_size % accelerator.num_processes:
            raise UsageError(
                f"a batch of {config.train.batch_size} does not divide over {accelerator.num_processes} processes",
                where="train.batch_size",
            )
        self.tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
        _check_tokenizer(config.model.text, self.tokenizer)
        shards = self.on_main("indexing shards", self._open_shards)
        self.shards = self._open_shards() if shards is None else shards  # the others then find the indexes made
        self.zero_shot = self.on_main("indexing shards", lambda: _zero_shot_task(config.zero_shot))
        self.guard = Guard(config.train.spike_factor)
        self.model = build_start(config, accelerator)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.bf16 = Bf16Copy(self.model) if config.train.precision == "bf16_params" else None
        if self.bf16 and accelerator.is_fsdp2:
            mend = "train.precision=bf16: sharded weights are float32, and bfloat16 where they are used"
            raise UsageError("bf16_params does not go with FSDP2", where="train.precision", mend=mend)
        running: nn.Module = self.model if self.bf16 is None else self.bf16.model
        self.flops = FlopCounter(self.model)
        if config.train.compile:
            compile_blocks(running)
        prepared: Any = accelerator.prepare(running, *self.optimizers)
        self.wrapped: nn.Module = prepared[0]
        self.prepared_optimizers = list(prepared[1:])
        self.average = None if config.optim.ema_decay is None else WeightAverage(self.model, config.optim.ema_decay)
        self.teacher = None
        if config.loss.teacher:
            length = config.model.text.context_length
            pictures = not (config.data.patch_budget or config.data.image_embeddings)
            self.teacher = load_teacher(
                config.loss.teacher, self.tokenizer, length, accelerator.device, pictures=pictures
            )
        self.objective = Objective(
            config.loss,
            self.teacher,
            same_caption_positives=config.train.same_caption_positives,
            tokenizer=self.tokenizer,
        )
        self.saver = Saver(self.folder, config.train.keep_last, config.train.keep_every)
        assert self.identity  # now: a file that is replaced later is not what the run was trained with

    def on_main(self, what: str, call: Callable[[], T]) -> T | None:
        """Return what `call` returns on the main process, for which the others wait as long as it takes."""
        with self.watch.patient(what):
            return on_main(self.accelerator, call)

    def _open_shards(self) -> IndexedShards:
        data, announce = self.config.data, self.accelerator.is_main_process
        return open_shards(expand_shards(data.train), data.verify, require_caption=False, announce=announce)

    @functools.cached_property
    def batches(self) -> TrainBatches:
        """The training data of this process."""
        config = self.config
        kind: type[TrainBatches] = StreamBatches if isinstance(self.shards, StreamedShards) else TrainBatches
        return kind(
            self.shards,
            config.data,
            self.tokenizer,
            image_size=config.model.image.image_size,
            batch_size=config.train.batch_size,
            num_steps=config.train.steps,
            seed=config.seed,
            split=BatchSplit(
                self.accelerator.process_index, self.accelerator.num_processes, config.train.micro_batches
            ),
            stages=config.curriculum,
            patch_size=config.model.image.patch_size,
            teacher=self.teacher.stored if self.teacher else None,
        )

    def step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Take the step with this number, from 0."""
        config, device = self.config, self.accelerator.device
        torch.manual_seed(config.seed * 1_000_003 + step)  # all randomness of a step is a function of its number
        if step and self._stage(step) != self._stage(step - 1):
            self.guard.forget()  # what was usual in the stage before
        set_learning_rates(self.optimizers, schedule_factor(step, config.train.steps, config.optim))
        parts = [to_part(batch, self.objective, device, self.keep(batch)) for batch in micro_batches]
        result = train_step(
            self.accelerator,
            self.wrapped,
            self.prepared_optimizers,
            self.objective,
            parts,
            clip_norm=config.optim.clip_norm,
            refuse=self.guard.refuse,
            bf16=self.bf16,
        )
        if result.skipped is None:
            if self.model.logit_scale.requires_grad:
                self.model.clamp_logit_scale(config.loss.max_logit_scale)
            if self.bf16 is not None:
                self.bf16.push_weights()
            if self.average is not None:
                self.average.update(step)
        return result

    def _stage(self, step: int) -> Stage:
        return stage_at(step, self.config.train.steps, self.config.curriculum)

    def compiles_at(self, step: int, start: int) -> bool:
        """Tell whether blocks may have to be compiled in a step: new shapes come, and then shapes of any size."""
        return self.config.train.compile and (step < start + 2 or self._stage(step) != self._stage(step - 2))

    def keep(self, batch: Batch) -> Tensor | None:
        """Return which patches the image tower sees, where the stage of this batch drops some."""
        drop = self._stage(int(batch.positions[0]) // self.config.train.batch_size).patch_dropout
        if not drop:
            return None
        positions = batch.positions.to(self.accelerator.device)
        return kept_patches(positions, self.model.num_patches(batch.images), drop, self.config.seed)

    def sample_flops(self, batch: Batch) -> float:
        """Return the floating-point operations that a sample of this batch costs."""
        keep = self.keep(batch._replace(positions=batch.positions[:1]))
        return self.flops.sample_flops(batch.images, batch.ids, keep)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What makes the run this run besides its config: the content of its files, as it began, and its arithmetic."""
        path = self.config.tokenizer.path
        others = {}
        if self.batches.stored_images:
            others["stored embeddings"] = self.batches.stored_images.fingerprint()
        if self.teacher:
            others["teacher"] = self.teacher.fingerprint
        if self.config.data.weights:  # each belongs to so many shards
            counts = [len(expand_shards(entry)) for entry in self.config.data.train]
            others["shards of each entry of data.train"] = str(counts)
        return {
            "training data": self.shards.fingerprint(),
            "tokenizer": file_sha256(tokenizer_file(path)) if path else self.config.tokenizer.kind,
            "precision": "bf16_params" if self.bf16 else self.accelerator.mixed_precision,
        } | others

    def facts(self, step: int) -> dict[str, str]:
        """Name what all processes must have in common."""
        versions = {"torch": torch.__version__, "mmvit": importlib.metadata.version("mmvit")}
        values = {key: str(value) for key, value in settings(self.config).items()}
        return versions | {"step": str(step)} | self.identity | values

    def resume(self) -> int:
        """Take up the newest whole checkpoint and return the step to go on with; 0 where there is none."""
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return 0
        before, now = checkpoint.state["identity"], self.identity
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise CheckpointError(
                f"the {' and the '.join(changed)} changed since the checkpoint",
                where=str(checkpoint.folder),
                meaning="the run would go on as another one; nothing was changed",
                mend="bring back what was, or start anew with another out=FOLDER",
            )
        groups = ["model", "optimizer", *(["ema"] if self.average else [])]
        check_leaves(checkpoint, groups, ("step", "identity", "guard"))
        tensors = checkpoint.tensors
        weights = shard_state(tensors["model"], self.model.state_dict())
        load_weights(self.model, weights, where=str(checkpoint.folder))
        restore_state(self.optimizers, shard_optimizer_state(tensors["optimizer"], self.optimizers))
        if self.average is not None:
            self.average.restore(shard_state(tensors["ema"], self.average.tensors()))
        if self.bf16 is not None:
            self.bf16.push_weights()
        if "guard" in checkpoint.state:
            self.guard.restore(checkpoint.state["guard"])
        return checkpoint.step

    def save(self, step: int) -> None:
        """Begin to write a checkpoint after `step` steps; training may go on while the main process writes it."""
        tensors = {
            "model": full_state(self.model.state_dict()),
            "optimizer": full_state(flatten_state(self.optimizers)),
        }
        if self.average is not None:
            tensors["ema"] = full_state(self.average.tensors())
        state = {"step": step, "identity": self.identity, "guard": self.guard.state()}
        self.on_main("saving", lambda: self.saver.save(step, tensors, state))

    def save_failures(self) -> list[Failure]:
        """Return the error of the checkpoint that was begun last, where it could not be written."""
        if self.saver.failed():
            try:
                self.saver.wait()
            except (MmvitError, OSError) as error:
                return [error]
        return []

    def wait_until_saved(self) -> None:
        """Return when the checkpoint that was begun last is whole."""
        self.on_main("saving", self.saver.wait)

    def last_saved(self) -> str:
        """Name the newest checkpoint in words."""
        folders = (self.folder / "checkpoints").glob("step-*")
        newest = max(folders, key=lambda folder: (len(folder.name), folder.name), default=None)
        return f"the last good state is {newest}" if newest else "nothing was saved before"

    @contextlib.contextmanager
    def finished_model(self) -> Iterator[DualEncoder]:
        """Give the model as it is evaluated and exported: averaged weights where there are some, adapters merged."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            self.model.eval()
            model = self.model
            if self.config.lora.rank or self.accelerator.is_fsdp2:
                weights = merge_adapters(full_state(self.model.state_dict()), self.config.lora)
                model = build_dual_encoder(self.config.model, self.config.preprocess.mean, self.config.preprocess.std)
                if weights:  # on the main process, where it is used
                    model.load_state_dict(weights)
                model.to(self.accelerator.device).eval()
            yield model
            self.model.train()

    def evaluate(self, limit: int | None, stop_wished: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Classify zero-shot on the main process; the others wait. All raise Interrupted when a stop is wished."""
        size = self.config.model.image.image_size
        with self.finished_model() as model:
            encoder = Encoder(model, self.tokenizer, image_size=size, fingerprint="")
            result = self.on_main("evaluating", lambda: self._evaluated(encoder, limit, stop_wished))
        return {"zero_shot_acc1": result.acc1, "zero_shot_acc5": result.acc5} if result else {}

    def _evaluated(self, encoder: Encoder, limit: int | None, stop_wished: Callable[[], bool]) -> ZeroShotResult:
        assert self.zero_shot is not None

        def go_on() -> None:
            if stop_wished():
                raise Interrupted("asked to stop during an evaluation", where=str(self.folder))

        return evaluate_zero_shot(encoder, *self.zero_shot, limit=limit, before_each_batch=go_on)

    def export(self) -> Path:
        """Write the model folder."""
        config, folder = self.config, self.folder / "model"
        path = config.tokenizer.path
        if path and file_sha256(tokenizer_file(path)) != self.identity["tokenizer"]:
            raise CheckpointError(
                "the tokenizer changed while the run went on",
                where=path,
                meaning="the last checkpoint is whole; no model was written",
                mend="bring back what was, then run again",
            )
        with self.finished_model() as model:
            self.on_main("saving", lambda: save_model(folder, model, config.model, config.preprocess, config.tokenizer))
        return folder


def _zero_shot_task(config: ZeroShotConfig) -> ZeroShotTask | None:
    if not config.data:
        return None
    shards = IndexedShards(expand_shards(config.data), require_caption=False)
    names = load_class_names(config.class_names)
    largest = max(shards.label(i) or 0 for i in range(0, len(shards), -(-len(shards) // 1000)))
    if largest >= len(names):
        raise UsageError(
            f"label {largest} has no class name: the file has {len(names)}",
            where=config.class_names,
            mend="name the file that belongs to zero_shot.data; line n, from 0, names label n",
        )
    return ZeroShotTask(shards, names, load_templates(config.templates))


def _check_tokenizer(config: TextConfig, tokenizer: Tokenizer) -> None:
    """Refuse a text tower that was not made for the tokenizer: it would read other words, or pool at no token."""
    wanted = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    wrong = [f"model.text.{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        raise UsageError("the text tower does not fit the tokenizer", where="model.text", mend=" ".join(wrong))


def _mixed_precision(wish: str) -> str:
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    return "bf16" if choose_precision(wish, device)[0] == "bf16" else "no"
