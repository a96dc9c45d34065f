"""The files that a config names, looked for before anything slow is imported."""

from pathlib import Path
from typing import Any

from data_tools.tar.expand import expand_shards
from mmvit.model_folder import find_model

_SETS = ("data", "validation", "zero_shot")
_MANY = "{"  # a range of shards, which opening the data looks through


def check_files(config: Any) -> None:
    """Raise the error of a data set or a start model that does not exist.

    Raises:
        DataError: there are no data at a path.
        UsageError: `train.init` is no model.
    """
    for name in _SETS:
        part = getattr(config, name, None)
        paths = getattr(part, "train" if name == "data" else "data", ())
        for path in paths:
            if _MANY not in path and not Path(path).exists():
                expand_shards(path)
    init = config.train.init
    if init and ":" not in init and not (Path(config.out) / "config.yaml").exists():
        find_model(init)
