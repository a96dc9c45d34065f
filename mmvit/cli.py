"""The `mmvit` program: one short function per verb."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.core.errors import UsageError
from data_tools.core.program import run_program
from mmvit import __version__
from mmvit.words import MmvitVerbs

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmvit.config import FinetuneConfig, PretrainConfig
    from mmvit.models.classifier import ImageClassifier

app = typer.Typer(
    cls=MmvitVerbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train image-text models, classify images zero-shot, and search with embeddings. Errors are short messages; "
    "--debug adds the traceback.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, or what `mmvit import` wrote.")]
ConfigSource = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a name of `mmvit configs`.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Values that override the file.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the complete config and exit.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, take a few steps in memory, and estimate time, memory and disk."),
]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, folders, or shards.")]
Top = Annotated[int, typer.Option(min=1, help="Number of classes to show for each image.")]
TableFile = Annotated[
    Path | None, typer.Option("--out", help="Write one row per image to a .csv, .jsonl or .parquet file instead.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
MaxBad = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Fail (exit code 3) if more than this fraction is rejected; default for folders: one item, or 1 %.",
    ),
]


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"mmvit {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Read the options before a verb."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the data, the run and the report.")] = Path("quickstart"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Approximate training time on this machine.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for weights, sample order and augmentation.")] = 0,
) -> None:
    """Train on emoji images, then classify images of a held-out vendor in English and Korean."""
    from mmvit.quickstart.run import run_quickstart

    run_quickstart(out, minutes=minutes, seed=seed)


@app.command()
def pretrain(
    config: ConfigSource,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Train an image-text model on shards; run the same command again to resume."""
    from mmvit.config import OPEN_KEYS, PretrainConfig
    from mmvit.interop.start import with_imported_start
    from mmvit.train.start.config import load_pretrain_config

    overrides = with_imported_start(config, overrides or [], PretrainConfig)
    _run(load_pretrain_config(config, overrides, open_keys=OPEN_KEYS if print_config else ()), print_config, dry_run)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or log.jsonl files.")],
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("curves.png"),
    x: Annotated[str, typer.Option(help="Unit of the x axis: step, samples or hours.")] = "step",
    json: Json = False,
) -> None:
    """Plot the training curves of one or more runs in one figure."""
    from mmvit.terminal import print_json
    from mmvit.train.record.curves import plot_runs

    summary = plot_runs(runs, out, x)
    if json:
        print_json(summary)
    else:
        print(out)


@app.command("zero-shot")
def zero_shot(
    model: ModelFolder,
    images: Images,
    classes: Annotated[str, typer.Option(help='"a,b,c", or a file with one class name per line.')],
    templates: Annotated[
        str, typer.Option(help="Name of a built-in set of prompt templates, or a file with one template per line.")
    ] = "simple",
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show for each image.")] = 5,
    max_bad: MaxBad = None,
    out: TableFile = None,
    json: Json = False,
) -> None:
    """Classify images zero-shot, given only class names."""
    from data_tools.core.near import check_there
    from mmvit.data.prompts import load_class_names, load_templates
    from mmvit.model_folder import DUAL_ENCODER, find_model
    from mmvit.table_file import check_table_path

    class_names, prompts = load_class_names(classes), load_templates(templates)
    model = find_model(model, DUAL_ENCODER)
    check_there(images, "image")
    if out is not None:
        check_table_path(out)
    from mmvit.eval.encoder import load
    from mmvit.eval.zero_shot import zero_shot_classifier

    encoder = load(model)
    _classify(zero_shot_classifier(encoder, class_names, prompts), encoder.image_size, images, top, max_bad, json, out)


@app.command()
def finetune(
    config: ConfigSource,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Train an image classifier on labelled images, or a CLIP model on own pairs (finetune/clip)."""
    from mmvit.config import OPEN_KEYS, FinetuneConfig, PretrainConfig
    from mmvit.interop.start import with_imported_start
    from mmvit.train.start.config import compares_pairs, load_finetune_config, load_pretrain_config

    pairs = compares_pairs(config, overrides or [])
    overrides = with_imported_start(config, overrides or [], PretrainConfig if pairs else FinetuneConfig)
    load: "Callable[..., PretrainConfig | FinetuneConfig]" = load_pretrain_config if pairs else load_finetune_config
    _run(load(config, overrides, open_keys=OPEN_KEYS if print_config else ()), print_config, dry_run)


def _run(config: "PretrainConfig | FinetuneConfig", print_config: bool, dry_run: bool) -> None:
    """Print the config, check the run, or train."""
    from mmvit.config import check_files, to_yaml

    if print_config:
        print(to_yaml(config), end="")
        return
    check_files(config)
    from mmvit.train.loop import check, run_to_end

    print(check(config) if dry_run else f"model: {run_to_end(config)}")


@app.command()
def configs(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Config to print.")] = None,
    json: Json = False,
) -> None:
    """List the built-in configs of pretrain and finetune, or print one."""
    from mmvit.config import builtin_configs, find_config
    from mmvit.terminal import print_configs, print_json

    if name is not None:
        print(find_config(name).read_text("utf-8"), end="")
    elif json:
        print_json([each._asdict() for each in builtin_configs()])
    else:
        print_configs([each._asdict() for each in builtin_configs()])


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; the run may be in progress.")],
    json: Json = False,
) -> None:
    """Show where a run is: step, rate, time left, loss, last checkpoint, owner, corrupt samples."""
    from mmvit.terminal import print_facts, print_json
    from mmvit.train.record.status import describe_status, run_status

    found = run_status(run)
    if json:
        print_json(found._asdict())
    else:
        print_facts(describe_status(found))


@app.command()
def classify(
    model: ModelFolder,
    images: Images,
    top: Top = 5,
    max_bad: MaxBad = None,
    out: TableFile = None,
    json: Json = False,
) -> None:
    """Classify images by the classes that a model was trained on."""
    from data_tools.core.near import check_there
    from mmvit.model_folder import CLASSIFIER, find_model
    from mmvit.table_file import check_table_path

    model = find_model(model, CLASSIFIER)
    check_there(images, "image")
    if out is not None:
        check_table_path(out)
    from mmvit.checkpoint import load_classifier

    loaded = load_classifier(model)
    _classify(loaded.model, loaded.config.image.image_size, images, top, max_bad, json, out)


def _classify(
    model: "ImageClassifier",
    image_size: int,
    images: list[Path],
    top: int,
    max_bad: float | None,
    as_json: bool,
    out: Path | None,
) -> None:
    from mmvit.eval.classify import as_row, classify_files
    from mmvit.table_file import write_table
    from mmvit.terminal import print_json, print_predictions

    predictions = classify_files(model, image_size, images, top, max_bad=max_bad)
    if out is not None:
        write_table([as_row(prediction) for prediction in predictions], out)
    if as_json or out is None:
        (print_json if as_json else print_predictions)([prediction._asdict() for prediction in predictions])
    else:
        print(f"{out}: {len(predictions)} images")


@app.command()
def embed(
    model: ModelFolder,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Shards, a folder of images, an image, or a .txt file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the embeddings.")],
    modality: Annotated[
        str | None, typer.Option(help="image, text or both; default: all that SOURCE contains.")
    ] = None,
    max_bad: MaxBad = None,
) -> None:
    """Write the embeddings of images and captions to disk."""
    from mmvit.data.stored import check_modality
    from mmvit.model_folder import DUAL_ENCODER, find_model
    from mmvit.retrieval.sources import open_source

    model = find_model(model, DUAL_ENCODER)
    check_modality(modality)
    opened = open_source(source)
    from mmvit.eval.encoder import load
    from mmvit.retrieval.store import embed_source

    summary = embed_source(load(model), model, opened, out, modality, max_bad)
    print(f"{out}: {summary.num_rows} rows, {summary.num_rejected} rejected")


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by `mmvit embed`.")],
    text: Annotated[str | None, typer.Option(help="Text query.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image query.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    model: Annotated[Path | None, typer.Option(help="Model folder; default: the model of the embeddings.")] = None,
    json: Json = False,
) -> None:
    """Search images by text or by image."""
    from mmvit.data.stored import read_manifest

    if text is None and image is None:
        raise UsageError("search needs a query", hint='--text "a red fruit" or --image FILE')
    read_manifest(folder)
    from mmvit.retrieval.search import Searcher
    from mmvit.terminal import print_hits, print_json

    hits = Searcher(folder, model).search(text=text, image=image, k=k)
    (print_json if json else print_hits)([hit._asdict() for hit in hits])


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="hf:NAME, timm:NAME, open_clip:ARCH/TAG; or hf:FOLDER etc.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to write.")],
    classes: Annotated[str | None, typer.Option(help='"a,b,c", or a file with one class name per line.')] = None,
    json: Json = False,
) -> None:
    """Convert another library's model to a model folder, and check that both give the same outputs."""
    from mmvit.data.prompts import load_class_names
    from mmvit.interop.source import split_source

    split_source(source)
    from mmvit.interop.convert import import_model
    from mmvit.terminal import print_facts, print_json

    facts = import_model(source, out, load_class_names(classes) if classes else None)
    if json:
        print_json(facts._asdict())
    else:
        print_facts(facts._asdict() | {"largest_difference": f"{facts.largest_difference:.1e}"})


@app.command()
def inspect(
    model: ModelFolder,
    view: Annotated[str, typer.Option(help="filters, positions, distance, rollout or relevance.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image, or shard with images; can be repeated.")] = None,
    text: Annotated[str | None, typer.Option(help="For relevance: text to explain.")] = None,
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("inspect.png"),
    size: Annotated[int | None, typer.Option(min=1, help="Image size, px; default: the model's own.")] = None,
    json: Json = False,
) -> None:
    """Plot what a model has learned and where it attends."""
    from mmvit.model_folder import find_model

    model = find_model(model)
    from mmvit.eval.inspect_pictures import inspect_model
    from mmvit.terminal import print_json

    facts = inspect_model(model, view, image or [], text, out, size)
    if json:
        print_json(facts)
    else:
        print(out)


@app.command()
def doctor(json: Json = False) -> None:
    """Show versions, hardware and the precision that training uses here."""
    from mmvit.doctor import examine
    from mmvit.terminal import print_facts, print_json

    (print_json if json else print_facts)(examine())


def main() -> None:
    """Run the program."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("accelerate", "PIL", "matplotlib", "fontTools", "timm", "httpx"):
        logging.getLogger(library).setLevel(logging.WARNING)
    run_program(app, "mmvit")
