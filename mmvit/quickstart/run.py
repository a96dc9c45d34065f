"""The whole pipeline in one call: data, training, zero-shot accuracy on unseen images, embeddings, search, report."""

import json
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.core.errors import UsageError
from data_tools.core.files import write_atomic
from data_tools.core.output_folder import check_free
from data_tools.core.ownership import owned
from data_tools.demo.emoji import EmojiOptions, write_emoji
from data_tools.make.tokenizer import train_tokenizer
from data_tools.tar.expand import expand_shards
from mmvit.config import PretrainConfig, load_config, to_yaml
from mmvit.data.prompts import fill, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import build_tokenizer
from mmvit.doctor import missing_modules, pip_line, versions
from mmvit.eval.classify import Accuracy
from mmvit.eval.encoder import Encoder, load
from mmvit.eval.picture import draw_report
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.retrieval.search import Searcher
from mmvit.retrieval.sources import open_source
from mmvit.retrieval.store import embed_source
from mmvit.terminal import print_accuracies
from mmvit.train.device.precision import choose_precision
from mmvit.train.loop import measure_step_time, pretrain
from mmvit.train.record.run_log import read_log

LANGUAGES = {"en": "emoji", "ko": "emoji-korean"}  # language -> prompt templates
QUERIES = ("a red fruit", "smiling cat", "broken heart", "\ub545\ucf69")  # the last is Korean for peanut
MIN_STEPS = 20
MARK = "quickstart.json"
EXAMPLE = "dog.png"

logger = logging.getLogger(__name__)


def run_quickstart(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Train on emoji images, evaluate on a vendor that is not in the training data, and return the report.

    A second call with the same folder resumes, or shows the finished report.

    Raises:
        UsageError: the folder is not empty and not a quickstart, or the extra packages are missing.
    """
    _check_extra()
    with owned(out):
        return _run(out, minutes, seed)


def _run(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    _claim(out, {"minutes": minutes, "seed": seed})
    if (out / "report.json").exists():
        report = json.loads((out / "report.json").read_text())
        logger.info("%s is already finished; remove the folder to start again", out)
        _show(report, out)
        return report
    clock = StageClock(out / "seconds.json")
    with clock.stage("data"):
        logger.info("1/5 writing emoji images and their names")
        write_emoji(out / "data", EmojiOptions(seed=seed))
    with clock.stage("plan"):
        logger.info("2/5 measuring the speed of this machine")
        config = _planned_config(out, minutes, seed)
    with clock.stage("train"):
        logger.info("3/5 training for about %g minutes", minutes)
        pretrain(config)
    with clock.stage("evaluate"):
        logger.info("4/5 classifying images of the held-out vendor")
        encoder = load(out / "model")
        results = _evaluate(encoder, out)
    with clock.stage("embed"):
        logger.info("5/5 writing embeddings and searching them")
        embed_source(encoder, out / "model", open_source(str(out / "data" / "val-*.tar")), out / "embeddings")
    report = _report(config, encoder, results, clock, out)
    _write_example(out)
    draw_report(
        out / "report.png", report, read_log(out / "log.jsonl"), _shards(out, "val"), results["en"], _names(out, "en")
    )
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    _show(report, out)
    return report


class StageClock:
    """Seconds of each stage, summed over interruptions and stored in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block, even if it ends with an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)
            write_atomic(self.path, json.dumps(self.seconds).encode())


def _check_extra() -> None:
    """Raise UsageError before any work if a package of the [demo] extra is missing."""
    missing = missing_modules("demo")
    if missing:
        what = f"the quickstart needs {', '.join(missing)}"
        raise UsageError(what, note="nothing was started", hint=pip_line("demo"))


def _claim(out: Path, arguments: dict[str, Any]) -> None:
    """Mark the folder as one of this quickstart; raises UsageError if it contains anything else."""
    mark = out / MARK
    if mark.is_file():
        if json.loads(mark.read_text()) != arguments:
            raise UsageError(
                f"the folder contains a quickstart with other arguments: {mark.read_text()}",
                where=str(out),
                note="nothing was changed",
                hint="use the same --minutes and --seed, or another --out",
            )
        return
    check_free(out, "the folder is not empty and not a quickstart", hint="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(mark, json.dumps(arguments).encode())


def _planned_config(out: Path, minutes: float, seed: int) -> PretrainConfig:
    """Return configs/quickstart.yaml with the paths of this folder and the number of steps for the given minutes.

    The number of steps is measured once: an interrupted run resumes with the same plan and ends with the same weights.
    """
    plan, data = out / "config.yaml", out / "data"
    planned = plan.exists()
    config = load_config(PretrainConfig, plan if planned else "quickstart", complete=False)
    config.out, config.seed = str(out), seed
    config.data.train = [str(data / "train-*.tar")]
    config.zero_shot.data = [str(data / "val-*.tar")]
    config.zero_shot.class_names = str(data / "names.en.txt")
    config.tokenizer.path = str(out / "tokenizer.json")
    if planned:
        return config  # with the current paths: the folder may have been moved
    prepare_tokenizer(config, data, Path(config.tokenizer.path))
    seconds = measure_step_time(config)
    config.train.steps = max(MIN_STEPS, round(minutes * 60 / seconds))
    logger.info("%.0f samples/s: %d steps", config.train.batch_size / seconds, config.train.steps)
    write_atomic(plan, to_yaml(config).encode())
    return config


def prepare_tokenizer(config: PretrainConfig, data: Path, path: Path) -> None:
    """Train a tokenizer on the captions that the config makes from the names in `data`; set the text tower's sizes."""
    texts = [
        fill(template, name)
        for caption in config.data.captions
        for template in caption.templates
        for name in (data / f"names.{caption.source.removeprefix('names.')}.txt").read_text("utf-8").splitlines()
    ]
    train_tokenizer(texts, path)
    config.tokenizer.path = str(path)
    tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
    config.model.text.vocab_size, config.model.text.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text


def _evaluate(encoder: Encoder, out: Path) -> dict[str, Accuracy]:
    shards = _shards(out, "val")
    return {
        language: evaluate_zero_shot(encoder, shards, _names(out, language), load_templates(templates))
        for language, templates in LANGUAGES.items()
    }


def _report(
    config: PretrainConfig, encoder: Encoder, results: dict[str, Accuracy], clock: StageClock, out: Path
) -> dict[str, Any]:
    searcher = Searcher(out / "embeddings")
    rates = [line["samples_per_s"] for line in read_log(out / "log.jsonl") if "samples_per_s" in line]
    return {
        "zero_shot": {name: {"acc1": result.acc1, "acc5": result.acc5} for name, result in results.items()},
        "num_classes": len(_names(out, "en")),
        "num_images": len(results["en"].labels),
        "steps": config.train.steps,
        "samples_seen": config.train.steps * config.train.batch_size,
        "samples_per_s": statistics.median(rates),
        "precision": choose_precision(config.train.precision, encoder.device)[0],
        "seconds": clock.seconds,
        "searches": {query: [hit._asdict() for hit in searcher.search(text=query, k=3)] for query in QUERIES},
        "versions": versions(),
    }


def _write_example(out: Path) -> None:
    """Write one unseen image next to the report, to try the model on."""
    shards, label = _shards(out, "val"), _names(out, "en").index("dog face")
    sample = next(i for i in range(len(shards)) if shards.label(i) == label)
    write_atomic(out / EXAMPLE, shards.read(sample).image)


def _show(report: dict[str, Any], out: Path) -> None:
    print(
        f"\n{report['num_images']} images of a vendor not in the training data, {report['num_classes']} names; "
        f"trained on {report['samples_seen']} samples at {report['samples_per_s']:.0f}/s in {report['precision']}"
    )
    print_accuracies(report["zero_shot"])
    for query, hits in report["searches"].items():
        print(f'search "{query}": {", ".join(hit["caption"] for hit in hits)}')
    print(f"\nreport: {out / 'report.json'}, figure: {out / 'report.png'}\n\nTry next:")
    print(f'  mmvit search {out}/embeddings --text "smiling cat" -k 5')
    print(f'  mmvit zero-shot {out}/model {out}/{EXAMPLE} --classes "dog face,cat face,red apple"')
    print(f"  mmvit pretrain {out}/config.yaml out=longer train.steps={4 * report['steps']}")


def _shards(out: Path, split: str) -> IndexedShards:
    return IndexedShards(expand_shards(str(out / "data" / f"{split}-*.tar")), require_caption=False)


def _names(out: Path, language: str) -> list[str]:
    return (out / "data" / f"names.{language}.txt").read_text(encoding="utf-8").splitlines()
