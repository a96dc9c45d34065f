"""Words of other programs for what `mmvit-data` does, and the hints they get."""

from collections.abc import Mapping

from data_tools.core.verbs import Verbs

_MAKE = "mmvit-data make SOURCE OUT makes shards from a folder, a table or a Hugging Face data set"
_CHECK = "mmvit-data check SHARDS lists all damage"
_PEEK = "mmvit-data peek SHARDS --out sheet.png draws samples with their captions"
_RESHARD = "mmvit-data reshard SHARDS --out OUT merges, splits, shuffles and selects"
_STATS = "mmvit-data stats SHARDS counts images, captions, languages and labels"

WORDS = {
    **dict.fromkeys(
        ("create", "build", "pack", "convert", "write", "new", "img2dataset", "webdataset", "prepare"), _MAKE
    ),
    **dict.fromkeys(("download", "fetch"), f"nothing is downloaded; {_MAKE}"),
    **dict.fromkeys(("verify", "validate", "test", "lint"), _CHECK),
    **dict.fromkeys(("inspect", "view", "show", "head", "cat", "ls", "list", "browse", "preview", "samples"), _PEEK),
    **dict.fromkeys(("split", "shuffle", "merge", "concat", "sample", "subset", "join", "copy"), _RESHARD),
    **dict.fromkeys(("count", "info", "summary", "describe", "analyze", "size"), _STATS),
    **dict.fromkeys(("select", "query", "where", "clean"), "mmvit-data filter SHARDS --where CONDITION --out OUT"),
    **dict.fromkeys(("fix", "recover"), "mmvit-data repair SHARDS --out OUT writes the intact samples"),
    **dict.fromkeys(("duplicates", "unique"), "mmvit-data dedup SHARDS --out OUT"),
    **dict.fromkeys(("tokenize", "vocab", "bpe"), "mmvit-data tokenizer SHARDS --out tokenizer.json"),
    **dict.fromkeys(("mnist", "demo", "toy"), "mmvit-data digits OUT, or mmvit-data emoji OUT"),
    "version": "mmvit-data --version",
    **dict.fromkeys(("fake", "random"), "mmvit-data synthetic OUT"),
}

MMVIT_VERBS = (
    *("quickstart", "pretrain", "finetune", "classify", "zero-shot", "embed", "search", "import", "inspect", "plot"),
    *("configs", "status", "doctor"),
)
_MMVIT_WORDS = {"train": "pretrain", "predict": "classify", "encode": "embed"}

OPTIONS = {
    **dict.fromkeys(("--num-workers", "--num_workers", "--jobs", "--threads", "--processes", "-j"), ("--workers",)),
    **dict.fromkeys(("--output", "--output-dir", "--output_dir", "--dest", "-o"), ("--out", "--picture", "--report")),
    **dict.fromkeys(("--size", "--count", "--samples-per-shard", "--max-count"), ("--shard-size", "--resize", "-n")),
    **dict.fromkeys(("--vocab", "--vocabulary"), ("--vocab-size",)),
    **dict.fromkeys(("--n", "--num", "--limit", "--num-samples"), ("-n", "--samples")),
    **dict.fromkeys(
        ("--captions", "--caption", "--text", "--text-column", "--caption-key"), ("--caption-column", "--source")
    ),
    **dict.fromkeys(("--images", "--image", "--path-column", "--img-key"), ("--image-column",)),
    **dict.fromkeys(("--labels", "--label", "--class-column"), ("--label-column",)),
    **dict.fromkeys(("--classes", "--names"), ("--classnames",)),
    **dict.fromkeys(("--sep", "--csv-separator"), ("--delimiter",)),
    **dict.fromkeys(("--root", "--data-dir"), ("--image-root",)),
    **dict.fromkeys(("--query", "--filter", "--condition"), ("--where",)),
    **dict.fromkeys(("--type", "--format"), ("--kind", "--json")),
}


class DataVerbs(Verbs):
    """The verbs of `mmvit-data`."""

    program = "mmvit-data"
    words = WORDS
    options = OPTIONS

    def elsewhere(self) -> Mapping[str, str]:
        """Return the verbs of `mmvit`, which train and use models."""
        own = {verb: f"mmvit {verb}, of the other program" for verb in MMVIT_VERBS if verb not in WORDS}
        return own | {word: f"mmvit {verb}, of the other program" for word, verb in _MMVIT_WORDS.items()}
