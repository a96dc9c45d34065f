"""The folder of a run: made new, or taken up again by the same run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.atomic import write_atomic
from data_tools.errors import UsageError
from mmvit.config import PretrainConfig, load_config, to_yaml

CONFIG = "config.yaml"
# What may change when a run goes on: none of it changes a weight. Shards and tokenizer may move; their content
# is compared.
FREE = (
    *("out", "data.train", "data.num_workers", "data.prefetch_mb", "data.stall_timeout_s"),
    *("data.max_bad_fraction", "tokenizer.path", "zero_shot."),
    *("train.log_every", "train.save_every", "train.keep_last"),
)


def open_run_folder(folder: Path, config: PretrainConfig) -> None:
    """Write `config.yaml` into a new folder, or check that the folder belongs to this very run.

    A run that has neither a checkpoint nor a model yet has nothing to mix up: its settings may change.

    Raises:
        UsageError: the folder holds another run, or something that is no run.
    """
    path = folder / CONFIG
    if path.is_file():
        old, new = (_flat(asdict(each)) for each in (load_config(PretrainConfig, path), config))
        keys = [key for key in new if old.get(key) != new[key] and not key.startswith(FREE)]
        if keys and (any((folder / "checkpoints").glob("step-*")) or (folder / "model").exists()):
            changes = "\n".join(f"    {key}: {old.get(key)} -> {new[key]}" for key in keys)
            raise UsageError(
                f"the folder holds another run; these settings differ:\n{changes}",
                where=str(folder),
                meaning="going on would mix two runs; nothing was changed",
                mend="take the old settings, or start anew with another out=FOLDER",
            )
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):  # hidden: a killed write
        raise UsageError(
            "the output folder is not empty and holds no run", where=str(folder), mend="name another out=FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_yaml(config).encode())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()
    }
