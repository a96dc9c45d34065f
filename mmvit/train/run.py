"""A task in training: its prepared model and optimizers, and the operations on them."""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env
from torch import nn

from data_tools.core.errors import CheckpointError, MmvitError, UsageError
from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import Checkpoint, check_leaves, latest_checkpoint, load_weights
from mmvit.config import RunConfig
from mmvit.data.batches import Batch
from mmvit.data.curriculum import Stage, stage_at
from mmvit.data.loader import Interrupted
from mmvit.train.contract import Evaluator, StepResult, TaskParts
from mmvit.train.device.bf16 import Bf16Copy
from mmvit.train.device.flops import FlopCounter
from mmvit.train.device.memory import compile_blocks
from mmvit.train.device.parallel import ddp_arguments, full_state, shard_optimizer_state, shard_state
from mmvit.train.device.precision import choose_precision
from mmvit.train.optim.build import build_optimizers, set_learning_rates
from mmvit.train.optim.ema import EmaWeights
from mmvit.train.optim.schedule import schedule_factor
from mmvit.train.optim.state import flatten_state, restore_state
from mmvit.train.record.run_folder import settings
from mmvit.train.record.saver import Saver
from mmvit.train.record.trackers import tracker_arguments
from mmvit.train.safety.agree import Failure, on_main
from mmvit.train.safety.guard import Guard
from mmvit.train.safety.learning import dead_towers
from mmvit.train.safety.watch import Watch, joining
from mmvit.train.start.batch_norm import train_mode
from mmvit.train.start.lora import merge_adapters
from mmvit.train.step import train_step

T = TypeVar("T")


def open_accelerator(config: RunConfig) -> Accelerator:
    """Join the process group and return the accelerator."""
    # Other ranks wait while the main rank indexes shards or evaluates, which may take hours; `Watch` ends a run whose
    # ranks wait for a lost one.
    process_group = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    precision = _mixed_precision(config.train.precision)
    # Accelerate has one precision per Python process and refuses another; the process group is kept.
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    with joining(config.train.timeout_s):
        return Accelerator(
            mixed_precision=precision,
            kwargs_handlers=[process_group, ddp_arguments()],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=1
            ),  # overrides the config of the launcher
            **tracker_arguments(config.train.trackers, Path(config.out)),
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of what a rank draws from torch's RNG state in a step, such as the dropout of a timm model."""
    return seed * 1_000_003 + step + rank * 0x9E3779B1  # generators on CPUs take the lower 32 bits


class Run:
    """A task in training: `model` holds the float32 weights to save, `wrapped` is the module that a step calls."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, watch: Watch, task: TaskParts):
        self.config = config
        self.folder = Path(config.out)
        self.accelerator = accelerator
        self.watch = watch
        self.task = task
        self.model = task.model
        self.guard = Guard(config.train.spike_factor)
        self.dead_towers: list[str] = []  # without a gradient in the last step, on the main rank
        self.optimizers = build_optimizers(self.model, config.optim)
        self.bf16 = Bf16Copy(self.model) if config.train.precision == "bf16_params" else None
        if self.bf16 and accelerator.is_fsdp2:
            hint = "use train.precision=bf16: sharded weights are float32, and bfloat16 when they are used"
            raise UsageError("bf16_params is not supported with FSDP2", where="train.precision", hint=hint)
        running: nn.Module = self.model if self.bf16 is None else self.bf16.model
        self.flops = FlopCounter(self.model)
        if config.train.compile:
            compile_blocks(running)
        prepared: Any = accelerator.prepare(running, *self.optimizers)
        self.wrapped: nn.Module = prepared[0]
        self.prepared_optimizers = list(prepared[1:])
        self.ema = None if config.optim.ema_decay is None else EmaWeights(self.model, config.optim.ema_decay)
        self.saver = Saver(self.folder, config.train.keep_last, config.train.keep_every)
        self.identity = self._identity()

    def on_main(self, what: str, call: Callable[[], T]) -> T | None:
        """Return the result of `call` on the main rank and None on the others, which wait without a timeout."""
        with self.watch.patient(what):
            return on_main(self.accelerator, call)

    def step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Run the training step with this number, from 0."""
        config = self.config
        torch.manual_seed(step_seed(config.seed, step, self.accelerator.process_index))
        if step and self.stage(step) != self.stage(step - 1):
            self.guard.forget()  # the statistics of the previous stage
        is_logged = (step + 1) % config.train.log_every == 0 or step + 1 == config.train.steps
        looking = is_logged and self.accelerator.is_main_process and not self.accelerator.is_fsdp2

        def refuse(loss: float, grad_norm: float) -> str | None:
            self.dead_towers = dead_towers(self.model) if looking else []
            return self.guard.refuse(loss, grad_norm)

        set_learning_rates(self.optimizers, schedule_factor(step, config.train.steps, config.optim))
        result = train_step(
            self.accelerator,
            self.wrapped,
            self.prepared_optimizers,
            self.task.objective,
            [self.task.part(step, batch) for batch in micro_batches],
            clip_norm=config.optim.clip_norm,
            refuse=refuse,
            bf16=self.bf16,
        )
        if result.skipped is None:
            if self.task.after_update is not None:
                self.task.after_update()
            if self.bf16 is not None:
                self.bf16.push_weights()
            if self.ema is not None:
                self.ema.update(step)
        return result

    def stage(self, step: int) -> Stage:
        """Return the stage of the curriculum at a step."""
        return stage_at(step, self.config.train.steps, self.config.curriculum)

    def compiles_at(self, step: int, start: int) -> bool:
        """Return whether blocks may be compiled in a step: for new shapes, and once more for dynamic shapes."""
        return self.config.train.compile and (step < start + 2 or self.stage(step) != self.stage(step - 2))

    def facts(self, step: int) -> dict[str, str]:
        """Return the facts that must be equal on all ranks."""
        versions = {"torch": torch.__version__, "mmvit": importlib.metadata.version("mmvit")}
        values = {key: str(value) for key, value in settings(self.config).items()}
        return versions | {"step": str(step)} | self.identity | values

    def resume(self) -> int:
        """Load the newest complete checkpoint and return the step to resume from; 0 if there is none."""
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return 0
        if self.task.check_checkpoint is not None:
            self.task.check_checkpoint(checkpoint)
        _check_identity(checkpoint, self.identity)
        groups = ["model", "optimizer", *(["ema"] if self.ema else [])]
        check_leaves(checkpoint, groups, ("step", "identity", "guard"))
        tensors = checkpoint.tensors
        weights = shard_state(tensors["model"], self.model.state_dict())
        load_weights(self.model, weights, where=str(checkpoint.folder))
        restore_state(self.optimizers, shard_optimizer_state(tensors["optimizer"], self.optimizers))
        if self.ema is not None:
            self.ema.restore(shard_state(tensors["ema"], self.ema.tensors()))
        if self.bf16 is not None:
            self.bf16.push_weights()
        if "guard" in checkpoint.state:
            self.guard.restore(checkpoint.state["guard"])
        return checkpoint.step

    def save(self, step: int) -> None:
        """Start writing a checkpoint after `step` steps; training may continue while the main rank writes it."""
        tensors = {
            "model": full_state(self.model.state_dict()),
            "optimizer": full_state(flatten_state(self.optimizers)),
        }
        if self.ema is not None:
            tensors["ema"] = full_state(self.ema.tensors())
        state = {"step": step, "identity": self.identity, "guard": self.guard.state()}
        self.on_main("saving", lambda: self.saver.save(step, tensors, state))

    def save_failures(self) -> list[Failure]:
        """Return the error of the last checkpoint if it could not be written."""
        if self.saver.failed():
            try:
                self.saver.wait()
            except (MmvitError, OSError) as error:
                return [error]
        return []

    def wait_until_saved(self) -> None:
        """Wait until the last checkpoint is complete."""
        self.on_main("saving", self.saver.wait)

    def last_saved(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        folders = (self.folder / "checkpoints").glob("step-*")
        newest = max(folders, key=lambda folder: (len(folder.name), folder.name), default=None)
        return f"the last checkpoint is {newest}" if newest else "no checkpoint was saved"

    @contextlib.contextmanager
    def finished_model(self) -> Iterator[Any]:
        """Yield the model to evaluate and export: with EMA weights if they are kept, and merged adapters."""
        with self.ema.in_place() if self.ema else contextlib.nullcontext():
            self.model.eval()
            model = self.model
            if self.config.lora.rank or self.accelerator.is_fsdp2:
                weights = merge_adapters(full_state(self.model.state_dict()), self.config.lora)
                model = self.task.fresh_model()
                if weights:  # only on the main rank, which uses it
                    model.load_state_dict(weights)
                model.to(self.accelerator.device).eval()
            yield model
            train_mode(self.model)

    def evaluate(
        self, evaluators: Sequence[Evaluator], last: bool, stop_requested: Callable[[], bool]
    ) -> dict[str, float]:
        """Measure the finished model on the main rank; all ranks raise Interrupted if a stop is requested."""

        def before_each_batch() -> None:
            if stop_requested():
                raise Interrupted("stop requested during an evaluation", where=str(self.folder))

        with self.finished_model() as model:
            found = [
                self.on_main("evaluating", partial(each.measure, model, last, before_each_batch)) or {}
                for each in evaluators
            ]
        return {name: value for figures in found for name, value in figures.items()}

    def export(self) -> Path:
        """Write the model folder on the main rank and return it."""
        folder = self.folder / "model"
        with self.finished_model() as model:
            self.on_main("saving", lambda: self.task.export(model, folder))
        return folder

    def _identity(self) -> dict[str, str]:
        """Return what the result depends on in addition to the config: the content of files, and the precision."""
        identity = {"training data": self.task.source.fingerprint()}
        identity["precision"] = "bf16_params" if self.bf16 else self.accelerator.mixed_precision
        if len(self.config.data.weights or []) > 1:  # each applies to this many shards
            counts = [len(expand_shards(entry)) for entry in self.config.data.train]
            identity["shards of each entry of data.train"] = str(counts)
        return identity | self.task.identity


def _check_identity(checkpoint: Checkpoint, now: dict[str, str]) -> None:
    """Raise CheckpointError if a checkpoint was made from other files, or with another precision."""
    before = checkpoint.state["identity"]
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise CheckpointError(
            f"the {' and the '.join(changed)} changed since the checkpoint",
            where=str(checkpoint.folder),
            note="resuming would mix two runs; nothing was changed",
            hint="restore the previous state, or start a new run with another out=FOLDER",
        )


def _mixed_precision(requested: str) -> str:
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    return "bf16" if choose_precision(requested, device)[0] == "bf16" else "no"
