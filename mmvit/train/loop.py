"""The pretraining run: build, resume, step, log, evaluate, save."""

import logging
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer

from data_tools.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    MmvitError,
    ResourceError,
    SampleError,
    UsageError,
)
from data_tools.expand import expand_shards
from mmvit.checkpoint import file_sha256, latest_checkpoint, load_weights, save_checkpoint, save_model
from mmvit.config import PretrainConfig, ZeroShotConfig
from mmvit.data.batches import Batch, TrainBatches
from mmvit.data.loader import Loader, plan_prefetch
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.streaming import StreamBatches, StreamedShards, open_shards
from mmvit.data.tokenizers import Tokenizer, build_tokenizer, tokenizer_file
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.models.build import build_dual_encoder
from mmvit.towers.text import TextConfig
from mmvit.train.agree import gather_errors, leaving_group, on_main
from mmvit.train.bad_samples import BadSamples
from mmvit.train.log import CutCaptions, RunLog, Throughput
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
        # The others wait while the main process indexes shards or evaluates, which may take hours.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
        self.accelerator = Accelerator(
            mixed_precision=_mixed_precision(config.train.precision), kwargs_handlers=[patience]
        )
        if config.train.batch_size % self.accelerator.num_processes:
            raise UsageError(
                f"a batch of {config.train.batch_size} does not divide over {self.accelerator.num_processes} processes",
                where="train.batch_size",
            )
        _warn_of_lone_process(self.accelerator)
        self.tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
        _check_tokenizer(config.model.text, self.tokenizer)
        shards = on_main(self.accelerator, self._open_shards)
        self.shards = self._open_shards() if shards is None else shards  # the others then find the indexes made
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

    def _open_shards(self) -> IndexedShards:
        data, announce = self.config.data, self.accelerator.is_main_process
        return open_shards(expand_shards(data.train), data.verify, require_caption=False, announce=announce)

    def batches(self) -> TrainBatches:
        """The training data of this process."""
        kind: type[TrainBatches] = StreamBatches if isinstance(self.shards, StreamedShards) else TrainBatches
        return kind(
            self.shards,
            self.config.data,
            self.tokenizer,
            image_size=self.config.model.image.image_size,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            shards_per_set=[len(expand_shards(spec)) for spec in self.config.data.train]
            if self.config.data.weights
            else (),
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
            "tokenizer": file_sha256(tokenizer_file(path)) if path else self.config.tokenizer.kind,
            "precision": self.accelerator.mixed_precision,
        }

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps; only the main process writes, all wait for it."""
        on_main(
            self.accelerator,
            lambda: save_checkpoint(
                self.folder,
                step,
                {"model": self.model.state_dict(), "optimizer": flatten_state(self.optimizers)},
                {"step": step, "identity": self.identity()},
                keep_last=self.config.train.keep_last,
            ),
        )

    def evaluate(self, limit: int | None) -> dict[str, float]:
        """Classify zero-shot on the main process; the others wait."""
        task = self.zero_shot
        if task is None:
            return {}
        self.model.eval()
        encoder = Encoder(self.model, self.tokenizer, image_size=self.config.model.image.image_size, fingerprint="")
        result = on_main(self.accelerator, lambda: evaluate_zero_shot(encoder, *task, limit=limit))
        self.model.train()
        return {"zero_shot_acc1": result.acc1, "zero_shot_acc5": result.acc5} if result else {}


@leaving_group()
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
    on_main(run.accelerator, lambda: open_run_folder(run.folder, config))
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
    on_main(
        run.accelerator,
        lambda: save_model(run.folder / "model", run.model, config.model, config.preprocess, config.tokenizer),
    )
    return run.folder / "model"


@leaving_group()
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
    captions = CutCaptions()
    streamed = isinstance(run.shards, StreamedShards)  # nobody knows how many samples there are
    num_samples = config.train.steps * config.train.batch_size if streamed else len(run.shards)
    limit = max(1, int(config.data.max_bad_fraction * num_samples))
    bad = BadSamples(run.folder, start_step=start, limit=limit, active=accelerator.is_main_process)
    with Loader(run.batches(), range(start, config.train.steps)) as loader:
        for step, (batch, stopping) in enumerate(_agreed(run, loader, bad, stop, start), start):
            torch.manual_seed(config.seed * 1_000_003 + step)  # all randomness of a step is a function of its number
            factor = schedule_factor(step, config.train.steps, config.optim)
            set_learning_rates(run.optimizers, factor)
            result = _step(run, batch)
            throughput.count(config.train.batch_size)
            captions.count(batch.num_cut, batch.ids.shape[0] * batch.ids.shape[1])

            done = step + 1
            last = done == config.train.steps
            logging_now = done % config.train.log_every == 0 or last
            saving_now = done % config.train.save_every == 0 or last or stopping
            evaluating_now = run.zero_shot is not None and (done % config.zero_shot.every == 0 or last)
            if not (logging_now or saving_now or evaluating_now):
                continue
            numbers = (
                _numbers(run, result, factor, captions.share()) | {"samples_per_s": throughput.rate()} | bad.numbers()
            )
            with throughput.paused():
                _check_finite(numbers, done, batch.keys)  # before a save too: no broken weights on disk
                if evaluating_now:
                    numbers |= run.evaluate(limit=None if last else config.zero_shot.limit)
                if logging_now or evaluating_now:
                    log.write(done, numbers)
                if saving_now:
                    bad.sync()
                    run.save(done)
            if stopping and not last:
                raise Stopped(done)
    if bad.counts and accelerator.is_main_process:
        logger.warning("%d samples could not be used: %s; %s", bad.counts.total(), bad.summary(), bad.path)


def _agreed(run: Run, loader: Loader, bad: BadSamples, stop: StopFlag, start: int) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches of the steps to go, and whether to stop after each; every process gets the same answer.

    When the data can no longer be used, the steps done are saved and all processes raise the same error.
    """
    done = start
    try:
        bad.add(0, run.shards.lost())
        for loaded in loader:
            mine = [loaded] if isinstance(loaded, MmvitError) else loaded.bad
            errors, stopping = gather_errors(run.accelerator, mine, stop.wished)
            samples = [error for error in errors if isinstance(error, SampleError)]
            bad.add(done + 1, samples)
            if len(samples) < len(errors):
                raise next(error for error in errors if not isinstance(error, SampleError))
            assert isinstance(loaded, Batch)
            yield loaded, stopping
            done += 1
    except (DataError, ResourceError):
        if done > start:
            bad.sync()
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


def _numbers(run: Run, result: StepResult, factor: float, cut_share: float) -> dict[str, Any]:
    shares = torch.stack([result.loss, torch.tensor(cut_share, device=result.loss.device)])
    loss, cut_share = run.accelerator.reduce(shares, "mean").tolist()
    return {
        "loss": loss,
        **({"cut_captions": cut_share} if cut_share else {}),
        "grad_norm": result.grad_norm.item(),
        "logit_scale": run.model.logit_scale.exp().item(),
        "lr": factor * run.config.optim.lr,
    }


def _check_finite(numbers: dict[str, Any], step: int, keys: list[str]) -> None:
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
    samples = "streamed" if isinstance(run.shards, StreamedShards) else len(run.shards)
    shared = f" over {num_processes} processes" if num_processes > 1 else ""
    return (
        f"{run.folder}: {samples} samples, {train.steps} steps of {train.batch_size}{shared}, "
        f"{parameters / 1e6:.1f} M parameters, {precision} ({reason}); {plan_prefetch(run.batches())}"
    )
