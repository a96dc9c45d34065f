"""The pretraining run: build, resume, step, log, evaluate, save."""

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from data_tools.errors import CheckpointError, DataError, DivergedError, UsageError
from data_tools.expand import expand_shards
from mmvit.checkpoint import file_sha256, latest_checkpoint, load_weights, save_checkpoint, save_model
from mmvit.config import PretrainConfig, ZeroShotConfig
from mmvit.data.batches import Batch, TrainBatches, iterate_batches
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import Tokenizer, build_tokenizer
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.models.build import build_dual_encoder
from mmvit.towers.text import TextConfig
from mmvit.train.log import RunLog, Throughput
from mmvit.train.optim import build_optimizers, flatten_state, restore_state, schedule_factor, set_learning_rates
from mmvit.train.precision import choose_precision
from mmvit.train.run_folder import open_run_folder
from mmvit.train.step import StepResult, train_step
from mmvit.train.stop import StopFlag, Stopped

logger = logging.getLogger(__name__)


class ZeroShotTask(NamedTuple):
    """What the live zero-shot figure is measured on."""

    shards: IndexedShards
    names: list[str]
    templates: list[str]


class Run:
    """Everything that a run holds, from the config to the prepared model."""

    def __init__(self, config: PretrainConfig):
        config.check()
        self.config = config
        self.folder = Path(config.out)
        self.accelerator = Accelerator(mixed_precision=_mixed_precision(config.train.precision))
        if config.train.batch_size % self.accelerator.num_processes:
            raise UsageError(
                f"a batch of {config.train.batch_size} does not divide over {self.accelerator.num_processes} processes",
                where="train.batch_size",
            )
        _warn_of_lone_process(self.accelerator)
        self.tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
        _check_tokenizer(config.model.text, self.tokenizer)
        with self.accelerator.main_process_first():  # the others then find the indexes made
            self.shards = IndexedShards(expand_shards(config.data.train), require_caption=False)
        torch.manual_seed(config.seed)
        try:
            self.model = build_dual_encoder(config.model, config.preprocess.mean, config.preprocess.std)
        except ValueError as error:
            raise UsageError(f"there is no such model: {error}", where="model") from error
        self.optimizers = build_optimizers(self.model, config.optim)
        prepared: Any = self.accelerator.prepare(self.model, *self.optimizers)
        self.wrapped: nn.Module = prepared[0]
        self.prepared_optimizers: list[Optimizer] = list(prepared[1:])
        self.zero_shot = _zero_shot_task(config.zero_shot)

    def batches(self) -> TrainBatches:
        """The training data of this process."""
        return TrainBatches(
            self.shards,
            self.config.data,
            self.tokenizer,
            image_size=self.config.model.image.image_size,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def resume(self) -> int:
        """Take up the newest whole checkpoint and return the step to go on with; 0 where there is none."""
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return 0
        before, now = checkpoint.state["identity"], self.identity()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise CheckpointError(
                f"the {' and the '.join(changed)} changed since the checkpoint",
                where=str(checkpoint.folder),
                meaning="the run would go on as another one; nothing was changed",
                mend="bring back what was, or start anew with another out=FOLDER",
            )
        load_weights(self.model, checkpoint.tensors["model"], where=str(checkpoint.folder))
        restore_state(self.optimizers, checkpoint.tensors["optimizer"])
        return checkpoint.step

    def identity(self) -> dict[str, str]:
        """Name what makes the run this run besides its config: the content of its files, and its arithmetic."""
        path = self.config.tokenizer.path
        return {
            "training data": self.shards.fingerprint(),
            "tokenizer": file_sha256(Path(path)) if path else self.config.tokenizer.kind,
            "precision": self.accelerator.mixed_precision,
        }

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps; only the main process writes, all wait for it."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder,
                step,
                {"model": self.model.state_dict(), "optimizer": flatten_state(self.optimizers)},
                {"step": step, "identity": self.identity()},
                keep_last=self.config.train.keep_last,
            )
        self.accelerator.wait_for_everyone()

    def evaluate(self, limit: int | None) -> dict[str, float]:
        """Classify zero-shot on the main process; the others wait."""
        numbers: dict[str, float] = {}
        if self.zero_shot and self.accelerator.is_main_process:
            self.model.eval()
            size = self.config.model.image.image_size
            encoder = Encoder(self.model, self.tokenizer, image_size=size, fingerprint="")
            result = evaluate_zero_shot(encoder, *self.zero_shot, limit=limit)
            self.model.train()
            numbers = {"zero_shot_acc1": result.acc1, "zero_shot_acc5": result.acc5}
        self.accelerator.wait_for_everyone()
        return numbers


def pretrain(config: PretrainConfig) -> Path:
    """Train a dual encoder, or go on with a run that was interrupted; returns the model folder.

    Under `accelerate launch` every process calls this. The result does not depend on how often the run was killed.

    Raises:
        UsageError: a config that no run can have, or a folder of another run.
        CheckpointError: changed data, or checkpoints that do not fit.
        DivergedError: the loss is no longer a number.
        Stopped: a signal came; the state is saved.
    """
    run = Run(config)
    if run.accelerator.is_main_process:
        open_run_folder(run.folder, config)
    run.accelerator.wait_for_everyone()
    step = run.resume()
    log = RunLog(
        run.folder / "log.jsonl",
        num_steps=config.train.steps,
        start_step=step,
        active=run.accelerator.is_main_process,
    )
    try:
        _announce(run, step)
        with StopFlag() as stop:
            _train(run, step, log, stop)
    finally:
        log.close()
    if run.accelerator.is_main_process:
        save_model(run.folder / "model", run.model, config.model, config.preprocess, config.tokenizer)
    run.accelerator.wait_for_everyone()
    return run.folder / "model"


def check(config: PretrainConfig) -> str:
    """Build everything that the run needs, take no step and write nothing; returns what would be trained."""
    run = Run(config)
    return _description(run)


def measure_step_time(config: PretrainConfig, num_steps: int = 8) -> float:
    """Return the seconds of the fastest of some steps, reading included, on weights that are thrown away.

    The fastest and not the median: a machine that is busy while this measures would plan far too short a run.
    """
    run = Run(config)
    batches, times = run.batches(), []
    for step in range(num_steps + 1):
        start = time.perf_counter()
        _step(run, batches[step])
        times.append(time.perf_counter() - start)
    return min(times)


def _zero_shot_task(config: ZeroShotConfig) -> ZeroShotTask | None:
    if not config.data:
        return None
    shards = IndexedShards(expand_shards(config.data), require_caption=False)
    return ZeroShotTask(shards, load_class_names(config.class_names), load_templates(config.templates))


def _check_tokenizer(config: TextConfig, tokenizer: Tokenizer) -> None:
    """Refuse a text tower that was not made for the tokenizer: it would read other words, or pool at no token."""
    wanted = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    wrong = [f"model.text.{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        raise UsageError("the text tower does not fit the tokenizer", where="model.text", mend=" ".join(wrong))


def _warn_of_lone_process(accelerator: Accelerator) -> None:
    """Say so where several processes were asked for and `accelerate launch --cpu`, which starts one, was the way."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if asked and accelerator.num_processes == 1:
        logger.warning(
            "this run has one process: accelerate launch --cpu starts no more without MPI\n"
            "  mend: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m mmvit pretrain ..."
        )


def _mixed_precision(wish: str) -> str:
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    return "bf16" if choose_precision(wish, device)[0] == "bf16" else "no"


def _train(run: Run, start: int, log: RunLog, stop: StopFlag) -> None:
    config, accelerator = run.config, run.accelerator
    throughput = Throughput()
    batches = _saving_on_bad_data(run, start)
    for step, batch in enumerate(batches, start):
        torch.manual_seed(config.seed * 1_000_003 + step)  # all randomness of a step is a function of its number
        factor = schedule_factor(step, config.train.steps, config.optim)
        set_learning_rates(run.optimizers, factor)
        result = _step(run, batch)
        throughput.count(config.train.batch_size)

        done = step + 1
        last = done == config.train.steps
        stopping = stop.agreed(accelerator)
        logging_now = done % config.train.log_every == 0 or last
        saving_now = done % config.train.save_every == 0 or last or stopping
        evaluating_now = run.zero_shot is not None and (done % config.zero_shot.every == 0 or last)
        if not (logging_now or saving_now or evaluating_now):
            continue
        numbers = _numbers(run, result, factor) | {"samples_per_s": throughput.rate()}
        with throughput.paused():
            _check_finite(numbers, done, batch.keys)  # before a save too: no broken weights on disk
            if evaluating_now:
                numbers |= run.evaluate(limit=None if last else config.zero_shot.limit)
            if logging_now or evaluating_now:
                log.write(done, numbers)
            if saving_now:
                run.save(done)
        if stopping and not last:
            raise Stopped(done)


def _saving_on_bad_data(run: Run, start: int) -> Iterator[Batch]:
    """Yield the batches of the steps to go; when a sample cannot be used, save the steps done and raise its error."""
    steps = range(start, run.config.train.steps)
    done = start
    try:
        for batch in iterate_batches(run.batches(), steps, run.config.data.num_workers):
            yield batch
            done += 1
    except DataError:
        if done > start:
            run.save(done)
        raise


def _step(run: Run, batch: Batch) -> StepResult:
    return train_step(
        run.accelerator,
        run.wrapped,
        run.prepared_optimizers,
        batch,
        clip_norm=run.config.optim.clip_norm,
        same_caption_positives=run.config.train.same_caption_positives,
    )


def _numbers(run: Run, result: StepResult, factor: float) -> dict[str, float]:
    return {
        "loss": run.accelerator.reduce(result.loss, "mean").item(),
        "grad_norm": result.grad_norm.item(),
        "logit_scale": run.model.logit_scale.exp().item(),
        "lr": factor * run.config.optim.lr,
    }


def _check_finite(numbers: dict[str, float], step: int, keys: list[str]) -> None:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
    if bad:
        raise DivergedError(
            f"{' and '.join(bad)} is no longer a number",
            where=f"step {step}, samples {keys[0]} to {keys[-1]}",
            meaning="the run stopped; the last checkpoint is from before",
            mend="lower optim.lr, or lengthen optim.warmup_share, and start anew with another out=FOLDER",
        )


def _announce(run: Run, step: int) -> None:
    if run.accelerator.is_main_process:
        logger.info("%s%s", _description(run), f", going on at step {step}" if step else "")


def _description(run: Run) -> str:
    train = run.config.train
    precision, reason = choose_precision(train.precision, run.accelerator.device)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    num_processes = run.accelerator.num_processes
    shared = f" over {num_processes} processes" if num_processes > 1 else ""
    return (
        f"{run.folder}: {len(run.shards)} samples, {train.steps} steps of {train.batch_size}{shared}, "
        f"{parameters / 1e6:.1f} M parameters, {precision} ({reason})"
    )
