"""The training loop: resume, step, log, evaluate, save."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object, parse_flag_from_env

from data_tools.core.errors import DataError, DivergedError, MmvitError, ResourceError, SampleError, UsageError
from data_tools.core.files import write_atomic
from mmvit.config import FinetuneConfig, PretrainConfig
from mmvit.data.batches import Batch
from mmvit.data.loader import Interrupted, Loader, plan_prefetch
from mmvit.train.contract import StepResult, TaskParts
from mmvit.train.device.precision import choose_precision
from mmvit.train.meters import Meters, finite
from mmvit.train.preflight import preflight
from mmvit.train.record.bad_samples import BadSamples
from mmvit.train.record.changes import Changes, describe_changes
from mmvit.train.record.figures import parameter_norm
from mmvit.train.record.run_folder import LOG, check_run_folder, open_run_folder, own_run_folder, settings
from mmvit.train.record.run_log import RunLog
from mmvit.train.record.trackers import Trackers
from mmvit.train.rehearsal import rehearse
from mmvit.train.run import Run, open_accelerator
from mmvit.train.runs.finetuning import build_finetuning
from mmvit.train.runs.masked_patches import build_masked_patches
from mmvit.train.runs.pretraining import build_pretraining
from mmvit.train.safety.agree import check_agreement, gather_errors, leaving_group, on_all, on_main
from mmvit.train.safety.alone import alone_in_process
from mmvit.train.safety.guard import MAX_IN_A_ROW
from mmvit.train.safety.learning import Learning, Observed, batch_symptoms
from mmvit.train.safety.stop import StopFlag, Stopped
from mmvit.train.safety.watch import Watch

DIVERGED = "diverged.json"
SYMPTOMS = "not_learning"  # key of a line of the log: the signs that nothing is learned, by name

logger = logging.getLogger(__name__)

# How each task, named by `loss.kind` of its config, opens its data and builds its parts.
TASKS: dict[str, Callable[[Any, Accelerator, Watch], TaskParts]] = {
    "softmax": build_pretraining,
    "sigmoid": build_pretraining,
    "labels": build_finetuning,
    "masked_patches": build_masked_patches,
}


def pretrain(config: PretrainConfig) -> Path:
    """Train a dual encoder; see `run_to_end`."""
    return run_to_end(config)


def finetune(config: FinetuneConfig) -> Path:
    """Train an image classifier; see `run_to_end`."""
    return run_to_end(config)


def run_to_end(config: PretrainConfig | FinetuneConfig) -> Path:
    """Train what the config describes, or resume an interrupted run; returns the model folder.

    Under `accelerate launch` every rank calls this. The result does not depend on how often the run was interrupted.

    Raises:
        UsageError: an invalid config, the folder of another run or of one in progress, another run in this process.
        CheckpointError: changed data, or checkpoints that do not fit.
        DivergedError: three steps in a row were skipped.
        ResourceError: a full disk, a stalled reader, a lost rank.
        Stopped: a signal requested a stop; the state is saved.
    """
    config.check()
    with alone_in_process(), contextlib.ExitStack() as ending, leaving_group():
        accelerator = open_accelerator(config)
        _warn_about_single_rank(accelerator)
        with Watch(config.train.timeout_s) as watch, watch.explaining():
            with watch.patient("looking at the folder"):
                # Before the data are opened, which may take long; until the end.
                on_main(accelerator, lambda: ending.enter_context(own_run_folder(Path(config.out), config)))
            run = open_run(config, accelerator, watch)
            changes = run.on_main("looking at the folder", lambda: check_run_folder(run.folder, config))
            with watch.patient("reading the checkpoint"):
                step = on_all(accelerator, run.resume)
            check_agreement(accelerator, run.facts(step))
            if step == config.train.steps:
                _announce_finished(run, changes or {})
                return run.export()
            run.on_main("checking what the run needs at its end", lambda: preflight(run))
            run.on_main("opening the folder", lambda: open_run_folder(run.folder, config, step))
            trackers = run.on_main("opening trackers", lambda: Trackers(accelerator, run.folder, settings(config)))
            log = RunLog(
                run.folder / LOG,
                num_steps=config.train.steps,
                start_step=step,
                active=accelerator.is_main_process,
                trackers=trackers,
            )
            try:
                _announce(run, step)
                # Until the end: a second signal may arrive while the run stops.
                _train(run, step, log, ending.enter_context(StopFlag()))
            finally:
                log.close()
                run.saver.join()
            return run.export()


def open_run(config: PretrainConfig | FinetuneConfig, accelerator: Accelerator, watch: Watch) -> Run:
    """Build the parts of the task and the run that trains them."""
    if config.train.batch_size % accelerator.num_processes:
        what = f"a batch of {config.train.batch_size} is not divisible by {accelerator.num_processes} ranks"
        raise UsageError(what, where="train.batch_size")
    return Run(config, accelerator, watch, TASKS[config.loss.kind](config, accelerator, watch))


@alone_in_process()
@leaving_group()
def check(config: PretrainConfig | FinetuneConfig) -> str:
    """Build everything that the run needs, read samples, take a few steps in memory, and return a description of it.

    Nothing is written except missing indexes of shards.
    """
    config.check()
    accelerator = open_accelerator(config)
    _warn_about_single_rank(accelerator)
    run = open_run(config, accelerator, Watch(config.train.timeout_s))
    changes = run.on_main("looking at the folder", lambda: check_run_folder(run.folder, config))
    step = on_all(accelerator, run.resume)
    run.on_main("checking what the run needs at its end", lambda: preflight(run))
    rehearsed = rehearse(run, step) if step < config.train.steps else []
    lines = [_description(run, step), describe_changes(changes or {}, config, step), *rehearsed]
    return "\n".join(line for line in lines if line)


@alone_in_process()
def measure_step_time(config: PretrainConfig | FinetuneConfig, num_steps: int = 8) -> float:
    """Return the mean seconds of a step, including reading, measured on weights that are discarded.

    Each stage of the curriculum counts with its fastest measured step, weighted by the stage's share of the run. The
    minimum is used, not the median, because other load on the machine would lead to far too short a run.
    """
    config.check()
    run = open_run(config, open_accelerator(config), Watch(config.train.timeout_s))
    batches, seconds, begin = run.task.batches, 0.0, 0.0
    for until in [stage.until for stage in config.curriculum] or [1.0]:
        first, times = round(begin * config.train.steps), []
        for step in range(first, first + num_steps + 1):
            start = time.perf_counter()
            run.step(
                step, [batches[step * batches.split.micro_batches + i] for i in range(batches.split.micro_batches)]
            )
            times.append(time.perf_counter() - start)
        seconds += min(times) * (until - begin)
        begin = until
    return seconds


def _train(run: Run, start: int, log: RunLog, stop: StopFlag) -> None:
    config, accelerator = run.config, run.accelerator
    meters = Meters(run)
    bad = _bad_samples(run, start)
    learning = _learning(run, log)
    numbers = range(start * config.train.micro_batches, config.train.steps * config.train.micro_batches)
    with Loader(run.task.batches, numbers, lambda: stop.requested) as loader:
        for step, (parts, stopping) in enumerate(_agreed(run, loader, bad, stop, start), start):
            run.watch.at(step + 1, "step", parts[0].keys[0])
            with run.watch.patient("compiling") if run.compiles_at(step, start) else contextlib.nullcontext():
                result = run.step(step, parts)
            meters.count(step, parts)
            done = step + 1
            if result.skipped:
                _report_skipped(run, done, result, parts)
            else:
                learning.add(done, result.losses, result.grad_norm)
            last = done == config.train.steps
            logging_now = done % config.train.log_every == 0 or last
            # After a skipped step the weights may be corrupt, and saving would delete older checkpoints.
            saving_now = (done % config.train.save_every == 0 and not result.skipped) or last or stopping
            due = [each for each in run.task.evaluators if last or (done % each.every == 0 and not stopping)]
            with meters.throughput.paused():
                figures: dict[str, float] = {}
                if due:
                    run.watch.at(done, "evaluation")
                    try:
                        figures = run.evaluate(due, last, lambda: stop.requested)
                    except MmvitError as error:
                        _save(run, bad, done)
                        if isinstance(error, Interrupted):
                            raise Stopped(done) from error
                        raise
                if logging_now or due:
                    numbers_now = meters.numbers(step, result, loader.waited_s())
                    if logging_now and accelerator.is_main_process:
                        _report_symptoms(run, learning, done, numbers_now, parts)
                    symptoms = {SYMPTOMS: sorted(learning.active)} if learning.active else {}
                    log.write(done, numbers_now | symptoms | bad.numbers() | figures)
                if saving_now:
                    _save(run, bad, done, wait=stopping)
            if stopping and not last:
                raise Stopped(done)
    run.wait_until_saved()
    if bad.counts and accelerator.is_main_process:
        logger.warning("%d invalid samples were replaced: %s; see %s", bad.counts.total(), bad.summary(), bad.path)


def _learning(run: Run, log: RunLog) -> Learning:
    config, task = run.config, run.task
    warmup = config.optim.warmup_share * config.train.steps
    active = log.last.get(SYMPTOMS, [])
    return Learning(config.train.steps, task.chance, task.scale_bounds, warmup=warmup, active=active)


def _report_symptoms(
    run: Run, learning: Learning, done: int, numbers: Mapping[str, Any], parts: Sequence[Batch]
) -> None:
    """Warn about new signs that the run learns nothing."""
    observed = Observed(numbers.get("logit_scale"), run.dead_towers, batch_symptoms(parts))
    for text in learning.symptoms(done, observed):
        logger.warning("step %d: %s", done, text)


def _bad_samples(run: Run, start: int) -> BadSamples:
    config = run.config
    # The number of samples of a stream is unknown.
    num_samples = run.task.source.num_samples or config.train.steps * config.train.batch_size
    limit = max(1, int(config.data.max_bad_fraction * num_samples))
    names, active = run.task.source.names, run.accelerator.is_main_process
    return BadSamples(run.folder, names, start_step=start, limit=limit, active=active)


def _agreed(
    run: Run, loader: Loader, bad: BadSamples, stop: StopFlag, start: int
) -> Iterator[tuple[list[Batch], bool]]:
    """Yield the micro-batches of each remaining step, and whether to stop after it, which is equal on all ranks.

    If reading fails, the completed steps are saved and all ranks raise the same error.
    """
    done, source = start, iter(loader)
    try:
        bad.add(0, run.task.source.lost())
        while done < run.config.train.steps:
            run.watch.at(done + 1, "read")
            loaded = _until_failure(islice(source, run.config.train.micro_batches))
            parts = [part for part in loaded if isinstance(part, Batch)]
            failures = [part for part in loaded if isinstance(part, MmvitError)]
            mine = [
                *failures,
                *run.save_failures(),
                *bad.failures(),
                *(sample for part in parts for sample in part.bad),
            ]
            errors, stopping = gather_errors(run.accelerator, mine, stop.requested)
            samples = [error for error in errors if isinstance(error, SampleError)]
            bad.add(done + 1, samples)
            if len(samples) < len(errors):
                raise next(error for error in errors if not isinstance(error, SampleError))
            yield parts, stopping
            done += 1
    except (DataError, ResourceError) as error:
        if done > start:
            _save(run, bad, done)
        if isinstance(error, Interrupted):
            raise Stopped(done) from error
        raise


def _save(run: Run, bad: BadSamples, done: int, *, wait: bool = True) -> None:
    """Start writing a checkpoint, after the list of invalid samples; `wait` until it is written."""
    run.watch.at(done, "save")
    norm = parameter_norm(run.model)
    if not math.isfinite(norm):
        raise DivergedError(
            f"the weights are no longer finite: their norm is {norm}",
            where=f"step {done}",
            note=f"the run stopped without saving these weights; {run.last_saved()}",
            hint="decrease optim.lr or increase optim.warmup_share, and start a new run with another out=FOLDER",
        )
    bad.sync()
    run.save(done)
    if wait:
        run.wait_until_saved()


def _until_failure(source: Iterable[Batch | MmvitError]) -> list[Batch | MmvitError]:
    """Return the items up to and including the first error, so that a stalled reader is waited for only once."""
    loaded = []
    for item in source:
        loaded.append(item)
        if isinstance(item, MmvitError):
            break
    return loaded


def _report_skipped(run: Run, step: int, result: StepResult, parts: list[Batch]) -> None:
    """Log a skipped step; at the third in a row write its samples to a file and raise DivergedError."""
    if run.accelerator.is_main_process:
        logger.warning("step %d skipped, weights unchanged: %s", step, result.skipped)
    if run.guard.in_a_row < MAX_IN_A_ROW:
        return
    keys = gather_object([key for part in parts for key in part.keys])
    run.wait_until_saved()
    path = run.folder / DIVERGED
    facts = {"step": step, "why": result.skipped, "keys": keys}
    facts["losses"] = {name: finite(value) for name, value in result.losses.items()}
    facts["grad_norm"] = finite(result.grad_norm)
    run.on_main("saving", lambda: write_atomic(path, json.dumps(facts, indent=1).encode()))
    raise DivergedError(
        f"{MAX_IN_A_ROW} steps in a row were skipped, the last one because {result.skipped}",
        where=f"step {step}, samples {keys[0]} to {keys[-1]}; the full list is in {path}",
        note=f"the run stopped; {run.last_saved()}, saved before the first of them",
        hint="decrease optim.lr or increase optim.warmup_share, and start a new run with another out=FOLDER; if the "
        "values are finite and the change is expected, resume with train.spike_factor=null",
    )


def _warn_about_single_rank(accelerator: Accelerator) -> None:
    """Warn if several ranks were requested from `accelerate launch --cpu`, which starts only one."""
    asked = parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ
    if asked and accelerator.num_processes == 1:
        logger.warning(
            "this run has a single rank: accelerate launch --cpu starts only one without MPI\n"
            "  hint: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m mmvit pretrain ..."
        )


def _announce(run: Run, step: int) -> None:
    if run.accelerator.is_main_process:
        logger.info("%s", _description(run, step))


def _announce_finished(run: Run, changes: Changes) -> None:
    """Say that there is nothing to train; the export then only writes a model that is missing or damaged."""
    if run.accelerator.is_main_process:
        unused = f"; these settings have no effect: {', '.join(changes)}" if changes else ""
        steps = run.config.train.steps
        logger.info("%s: the run has already finished its %d steps, nothing was changed%s", run.folder, steps, unused)


def _description(run: Run, step: int) -> str:
    train = run.config.train
    precision, reason = choose_precision(train.precision, run.accelerator.device)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    num_ranks = run.accelerator.num_processes
    samples = run.task.source.num_samples or "streamed"
    shared = f" over {num_ranks} ranks" if num_ranks > 1 else ""
    split = f" in {train.micro_batches} micro-batches" if train.micro_batches > 1 else ""
    resumed = f", resuming at step {step}" if step else ""
    return (
        f"{run.folder}: {samples} samples, {train.steps} steps of {train.batch_size}{split}{shared}, "
        f"{parameters / 1e6:.1f} M parameters, {precision} ({reason}); {plan_prefetch(run.task.batches)}{resumed}"
    )
