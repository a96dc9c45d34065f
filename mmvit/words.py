"""Words of other programs for what `mmvit` does, and the hints they get."""

import shlex
from collections.abc import Collection, Mapping, Sequence

from data_tools.core.near import plain
from data_tools.core.verbs import Verbs

_TRAIN = "mmvit pretrain CONFIG for images with texts, mmvit finetune CONFIG for images with classes; see mmvit configs"
_EVALUATE = (
    "mmvit zero-shot MODEL IMAGE --classes a,b or mmvit classify MODEL IMAGE; accuracy is measured in training, on "
    "validation.data of finetune and zero_shot.data of pretrain"
)
_PREDICT = "mmvit classify MODEL IMAGE by trained classes, or mmvit zero-shot MODEL IMAGE --classes a,b by any"
_EMBED = "mmvit embed MODEL SOURCE --out DIR writes embeddings of images and texts"
_SEARCH = "mmvit search DIR --text QUERY, in a folder that mmvit embed wrote"
_IMPORT = "mmvit import hf:NAME|open_clip:ARCH/TAG|timm:NAME OUT downloads and converts a model"
_INSPECT = "mmvit inspect MODEL --view filters|positions|distance|rollout|relevance"
_CONFIGS = "mmvit configs lists the built-in configs, mmvit configs NAME prints one"

WORDS = {
    **dict.fromkeys(("train", "fit", "learn", "run", "launch", "main"), _TRAIN),
    **dict.fromkeys(("eval", "evaluate", "val", "validate", "validation", "test", "score", "benchmark"), _EVALUATE),
    **dict.fromkeys(("predict", "infer", "inference", "label", "detect", "recognize"), _PREDICT),
    **dict.fromkeys(("encode", "embedding", "embeddings", "extract", "features", "vectorize"), _EMBED),
    **dict.fromkeys(("retrieve", "retrieval", "query", "find", "knn", "similar", "semantic-search"), _SEARCH),
    **dict.fromkeys(("convert", "download", "pull", "load", "fetch", "get", "from-pretrained"), _IMPORT),
    **dict.fromkeys(("show", "view", "visualize", "visualise", "attention", "explain", "gradcam"), _INSPECT),
    **dict.fromkeys(("list", "ls", "config", "models", "recipes", "zoo", "model-zoo", "cfg"), _CONFIGS),
    **dict.fromkeys(("resume", "continue", "restart"), "mmvit pretrain RUN/config.yaml (or finetune) resumes a run"),
    **dict.fromkeys(("tensorboard", "curves", "graph", "history", "loss"), "mmvit plot RUN draws the curves of a run"),
    **dict.fromkeys(("monitor", "watch", "progress", "ps", "log", "logs", "state"), "mmvit status RUN shows a run"),
    **dict.fromkeys(
        ("info", "env", "system", "check-env", "devices"), "mmvit doctor shows this machine, mmvit status RUN a run"
    ),
    **dict.fromkeys(("demo", "example", "tutorial", "start", "init"), "mmvit quickstart trains on emoji images"),
    **dict.fromkeys(("data", "dataset", "shards"), "shards are made and checked by another program: mmvit-data --help"),
    "version": "mmvit --version",
    **dict.fromkeys(("export", "save"), "a model is a folder already: mmvit.load(MODEL) opens it in Python"),
}

OPTIONS = {
    **dict.fromkeys(("--output", "--output-dir", "--output_dir", "--save", "-o"), ("--out",)),
    **dict.fromkeys(("--class", "--labels", "--label", "--names", "--class-names", "--classnames"), ("--classes",)),
    **dict.fromkeys(("--prompt", "--prompts", "--prompt-template", "--template"), ("--templates", "--text")),
    **dict.fromkeys(("--topk", "--top-k", "--top_k", "--top", "--k", "--limit", "-n", "-k"), ("--top", "-k")),
    **dict.fromkeys(("--query", "--q", "-q"), ("--text",)),
    **dict.fromkeys(("--source", "--img", "--images", "-i"), ("--image",)),
    **dict.fromkeys(("--format", "--output-format", "--out", "--csv"), ("--out", "--json")),
    **dict.fromkeys(("--imgsz", "--img-size", "--image-size", "--resolution"), ("--size",)),
    **dict.fromkeys(("--kind", "--type", "--method", "--mode"), ("--view", "--modality")),
    **dict.fromkeys(("--ckpt", "--checkpoint", "--weights", "-m"), ("--model",)),
    **dict.fromkeys(("--time", "--epochs", "--max-time"), ("--minutes",)),
    **dict.fromkeys(("--check", "--test"), ("--dry-run",)),
    **dict.fromkeys(("--show-config", "--cfg"), ("--print-config",)),
}
_CONFIG_VERBS = ("pretrain", "finetune")


class MmvitVerbs(Verbs):
    """The verbs of `mmvit`."""

    program = "mmvit"
    words = WORDS
    options = OPTIONS
    arguments = {  # noqa: RUF012 - as the base class declares it
        "CONFIG": "pass a YAML file or a built-in name: mmvit configs lists them",
        "DIR": "pass a folder that mmvit embed wrote",
        "MODEL": "pass a model: the folder of a run, or what mmvit import wrote",
        "extra of search": "mmvit search DIR --text 'QUERY'",
    }

    def elsewhere(self) -> Mapping[str, str]:
        """Return the verbs of `mmvit-data`, which make and change shards."""
        from typer.main import get_command

        from data_tools.cli.app import app
        from data_tools.cli.words import WORDS as DATA_WORDS

        verbs = get_command(app).commands  # type: ignore[attr-defined]  # of a group
        own = {verb: f"mmvit-data {verb}, of the other program" for verb in verbs}
        return {word: hint for word, hint in DATA_WORDS.items() if word not in WORDS} | own

    def option_hint(self, verb: str | None, option: str, has: Collection[str], arguments: Sequence[str]) -> str:
        """Return which option was meant; for runs, which key=value argument."""
        here = super().option_hint(verb, option, has, arguments)
        if verb is None and option.startswith("--") and "did you mean" not in here:
            return f"a verb comes first: {_TRAIN}"
        same = any(plain(each) == plain(option) for each in has)
        if verb not in _CONFIG_VERBS or same or any(each in has for each in self.options.get(option, ())):
            return here
        return _key_hint(verb, option, arguments)


def _key_hint(verb: str, option: str, arguments: Sequence[str]) -> str:
    """Return the key=value argument for an option that a training script of another library has."""
    from mmvit.config import FinetuneConfig, PretrainConfig
    from mmvit.config.near import near_keys, note

    at = next(i for i, each in enumerate(arguments) if each.startswith(option))
    option, _, value = arguments[at].partition("=")  # the parser takes the letters of -lr one by one
    if not value and at + 1 < len(arguments) and not arguments[at + 1].startswith("-"):
        value = arguments[at + 1]
    value = shlex.quote(value or "VALUE")
    if option in ("--config", "--cfg", "-c", "--model-config"):
        return f"the config is an argument: mmvit {verb} {value} key=value"
    if option == "--resume":
        return "run the same command again to resume a run: its folder is out=FOLDER"
    name = option.lstrip("-")
    if note(name):
        return note(name)
    keys = near_keys(PretrainConfig if verb == "pretrain" else FinetuneConfig, name)
    if keys:
        return f"settings follow CONFIG as key=value: {' or '.join(f'{key}={value}' for key in keys)}"
    return f"settings follow CONFIG as key=value: mmvit {verb} CONFIG --print-config shows all keys"
