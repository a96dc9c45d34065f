"""The rehearsal of a run by `--dry-run`: it reads some samples, takes a few steps, estimates time, memory and disk."""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from data_tools.core.errors import DataError, ResourceError, SampleError, UsageError
from mmvit.config import RunConfig
from mmvit.data.batches import TrainBatches
from mmvit.data.captions import caption_texts
from mmvit.data.source import some_samples
from mmvit.train.preflight import checkpoint_bytes, nearest, num_checkpoints, readable
from mmvit.train.record.figures import peak_memory
from mmvit.train.run import Run

NUM_SAMPLES = 200  # that are read, at most
NUM_CAPTIONS = 3  # that are shown
FIRST_SHARE = 8  # samples of a rank in the first step; more until a step takes long
LONG_S = 1.0
# Invalid samples are more than a sample of the data set shows by chance: a run with the tolerated fraction has so many
# among `NUM_SAMPLES` once in a thousand times.
BY_CHANCE = 4

logger = logging.getLogger(__name__)


class StepCost(NamedTuple):
    """What the largest tried step took."""

    samples: int  # of this rank
    read_s: float
    step_s: float
    memory: int  # bytes of this rank, estimated for a whole micro-batch


def rehearse(run: Run, step: int) -> list[str]:
    """Read samples and take steps as the run would from `step` on, and return lines that describe it.

    The weights of `run` change; nothing is written. All ranks call this.

    Raises:
        DataError: more samples are invalid than the run tolerates.
        UsageError: loss or gradient of a step is not finite.
        ResourceError: memory is too small for a step.
    """
    lines = run.on_main("reading samples", lambda: list(_samples(run))) or []
    cost = _try_steps(run, step)
    left = run.config.train.steps - step
    return [*lines, _rate(run.config, run.accelerator.num_processes, cost, left), _memory(run, cost), _disk(run)]


def _samples(run: Run) -> Iterator[str]:
    batches, source = run.task.batches, run.task.source
    if source.num_samples is None:
        return
    chosen = some_samples(source, NUM_SAMPLES)
    bad, captions = list[SampleError](), list[str]()
    for i in chosen:
        try:
            batches.try_sample(i)
        except SampleError as error:
            bad.append(error)
            continue
        if len(captions) < NUM_CAPTIONS and batches.captions:
            sample = source.read(i, image=False)
            texts = [caption_texts(sample, each)[0] for each in batches.captions]
            captions.append(f"  {sample.key}: {' | '.join(text.text for text in texts)}")
    tried, limit = len(chosen), run.config.data.max_bad_fraction
    if bad:
        tolerated = max(1, int(limit * tried))
        what = f"{len(bad)} of {tried} samples that were read are invalid, and the run tolerates {limit:.1%}"
        hint = "mmvit-data check SHARDS lists them, and mmvit-data repair writes the others; or data.max_bad_fraction"
        if len(bad) > tolerated * (1 if tried == source.num_samples else BY_CHANCE):
            note = f"the last one: {bad[-1].what}"
            raise DataError(what, where=bad[-1].where, note=note, hint=hint)
        logger.warning("%s; the last one: %s\n  hint: %s", what, bad[-1], hint)
    yield f"samples: {tried - len(bad)} of {tried} that were read are valid"
    if captions:
        yield "captions, as the model sees them:"
        yield from captions


def _try_steps(run: Run, step: int) -> StepCost:
    """Take steps of more and more samples, until one takes long or has the samples of a micro-batch."""
    whole, device = run.task.batches, run.accelerator.device
    before = memory = peak_memory(device)
    share = whole.share if device.type == "cuda" else min(whole.share, _multiple(FIRST_SHARE, whole))
    while True:
        batches = _resized(whole, share * whole.split.world_size)
        try:
            read_s, step_s = min(_one_step(run, batches, step) for _ in range(2))
        except torch.OutOfMemoryError as error:
            what = f"the device has too little memory for a step of {share} samples"
            raise ResourceError(what, where="train.batch_size", hint=_less_memory(run)) from error
        memory = peak_memory(device)
        longest = run.accelerator.reduce(torch.tensor(step_s, device=device), "mean").item()  # equal on all ranks
        if share == whole.share or longest > LONG_S:
            break
        share = min(whole.share, share * 4)
    fixed = 4 * sum(weights.numel() for weights in run.model.parameters() if weights.requires_grad)  # gradients
    fixed += checkpoint_bytes(run)[0] - checkpoint_bytes(run)[1]  # states of the optimizers, and EMA weights
    growth = max(0, int((memory - before) * 2**20) - fixed)
    return StepCost(share, read_s, step_s, int(before * 2**20) + fixed + growth * whole.share // share)


def _one_step(run: Run, batches: TrainBatches, step: int) -> tuple[float, float]:
    """Return the seconds of reading and of a step."""
    start = time.perf_counter()
    batch = batches[step]
    read = time.perf_counter()
    result = run.step(step, [batch])
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise UsageError(
            f"loss {result.loss} and gradient norm {result.grad_norm} in the first step",
            where=f"step {step + 1}",
            note="nothing was started",
            hint="check the values of model and preprocess, or train.precision=fp32",
        )
    return read - start, time.perf_counter() - read


def _rate(config: RunConfig, ranks: int, cost: StepCost, steps: int) -> str:
    workers = config.data.num_workers
    each = (max(cost.step_s, cost.read_s / workers) if workers else cost.step_s + cost.read_s) / cost.samples
    seconds = steps * config.train.batch_size / ranks * each
    slower = workers and cost.read_s / workers > cost.step_s
    text = f"time: about {ranks / each:,.0f} samples/s, {_duration(seconds)} for {steps} steps"
    return text + (f"; loading is slower than training: data.num_workers={workers + 1} or more" if slower else "")


def _memory(run: Run, cost: StepCost) -> str:
    device = run.accelerator.device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // run.accelerator.num_processes
    text = f"memory: about {readable(cost.memory)} a rank of {readable(total)}"
    if cost.memory > total:
        what = f"a step needs about {readable(cost.memory)} a rank, and there are {readable(total)}"
        raise ResourceError(what, where="train.batch_size", note="nothing was started", hint=_less_memory(run))
    return text


def _disk(run: Run) -> str:
    one, model = checkpoint_bytes(run)
    num = num_checkpoints(run.config.train)
    free = shutil.disk_usage(nearest(run.folder)).free
    return (
        f"disk: up to {num} checkpoint{'s' * (num > 1)} of {readable(one)} and a model of {readable(model)}; "
        f"{readable(free)} free"
    )


def _less_memory(run: Run) -> str:
    return f"train.micro_batches={2 * run.config.train.micro_batches}, train.checkpointing=full, or a smaller batch"


def _resized(batches: TrainBatches, batch_size: int) -> TrainBatches:
    """Return batches of another size, each a single micro-batch."""
    return TrainBatches(
        batches.source,
        batches.config,
        batches.tokenizer,
        image_size=batches.image_size,
        batch_size=batch_size,
        num_steps=batches.num_steps,
        seed=batches.seed,
        split=replace(batches.split, micro_batches=1),
        stages=batches.stages,
        patch_size=batches.budget.patch_size if batches.budget else None,
        teacher=batches.teacher,
    )


def _multiple(share: int, batches: TrainBatches) -> int:
    """Return a share that copies of samples divide, and pairs of them."""
    of = 2 * batches.config.repeats
    return -(-share // of) * of


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
