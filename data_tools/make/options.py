"""Options of `make`, and which of them contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_tools.core.errors import UsageError, did_you_mean
from data_tools.make.row import EXTRA_FORMATS, FIELD_FORMATS

KINDS = {
    "folder": "images with a .txt or .json of the same name next to them",
    "classes": "images in one folder per class",
    "csv": "a table with the paths of images",
    "tsv": "the same with tabs between the columns",
    "coco": "captions of COCO: a JSON file with images and annotations",
    "jsonl": "one JSON object per line, with the path of an image",
    "parquet": "a table (or a folder of them, or a pattern such as 'train-*.parquet') with paths or images",
    "img2dataset": "what img2dataset wrote, as webdataset or files",
    "datasets": "a Hugging Face data set saved with save_to_disk",
}

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}  # names of some characters


@dataclass(frozen=True)
class MakeOptions:
    """How to convert a source.

    Args:
        kind: one of `KINDS`; None finds it out.
        image_column: of a table; None goes by the usual names, as for the next two.
        caption_column: one or several, with commas between.
        label_column: "" for none.
        delimiter: of the columns of CSV: one character, or "tab"; None detects it.
        captions: False leaves captions out.
        template: makes captions of class names: "a photo of a {}"; in folders of classes the default is "{}".
        classnames: file with one class name per line, which numbers the classes; None numbers them by sorted names.
        image_root: where paths of images start, and what no path or link may leave; None is the source's folder.
        resize: px of the shorter side, of images that are larger.
        image_format: "keep", "jpg", "png" or "webp".
        quality: 1 .. 100, of re-encoded JPEG and WebP images.
        allow_formats: further formats that may be opened: "gif", "bmp", "tiff".
        shard_size: rows a shard.
        shuffle: seed of the order; None keeps the source's order, but shuffles with 0 where there are labels.
        in_order: keep the source's order in any case.
    """

    kind: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    delimiter: str | None = None
    captions: bool = True
    template: str | None = None
    classnames: Path | None = None
    image_root: Path | None = None
    resize: int | None = None
    image_format: str = "keep"
    quality: int = 95
    allow_formats: tuple[str, ...] = ()
    shard_size: int = 1000
    shuffle: int | None = None
    in_order: bool = False


def check_options(options: MakeOptions) -> None:
    """Raise UsageError if an option has no effect, or two contradict each other."""

    def refuse(what: str, hint: str) -> None:
        raise UsageError(what, hint=hint)

    if options.kind is not None and options.kind not in KINDS:
        refuse(f"unknown kind {options.kind!r}", f"{did_you_mean(options.kind, KINDS)} Kinds: {', '.join(KINDS)}")
    delimiter = options.delimiter
    if delimiter is not None and delimiter not in DELIMITERS and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        refuse(
            f"the delimiter {options.delimiter!r} is not one character", "--delimiter tab, or one of , ; | in quotes"
        )
    if options.image_format not in ("keep", *FIELD_FORMATS):
        refuse(f"unknown format {options.image_format!r}", f"--format keep|{'|'.join(FIELD_FORMATS)}")
    for name in options.allow_formats:
        if name not in EXTRA_FORMATS:
            refuse(f"the format {name!r} cannot be allowed", f"--allow-formats takes {','.join(EXTRA_FORMATS)}")
    if options.allow_formats and options.image_format == "keep":
        refuse("images in further formats must be re-encoded", "add --format jpg, png or webp")
    if options.shard_size < 1 or not 1 <= options.quality <= 100 or (options.resize is not None and options.resize < 1):
        refuse("--shard-size and --resize must be at least 1, --quality 1 to 100", "choose another number")
    if options.shuffle is not None and options.in_order:
        refuse("--shuffle and --in-order contradict each other", "use only one of them")
    if options.image_root is not None and not options.image_root.is_dir():
        refuse(f"--image-root {options.image_root} is not a folder", "check the path and the spelling")
    if options.template is not None and "{}" not in options.template:
        refuse(f"the template {options.template!r} has no place for the name", "--template 'a photo of a {}'")
    if not options.captions and (options.caption_column or options.template):
        refuse("--no-captions contradicts --caption-column and --template", "leave one of them out")
