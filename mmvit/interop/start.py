"""The model of another library that a run starts from, as a model folder in the folder of the run."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from data_tools.core.errors import ResourceError
from mmvit.config import START, RunConfig, read_tree
from mmvit.model_folder import DESCRIPTION

INIT = "train.init"
PREFIXES = ("hf", "open_clip", "timm")
LIMIT_S = 3600  # for the import by the main rank, which may download


def with_imported_start(source: str | Path, overrides: Sequence[str], cls: type[RunConfig]) -> list[str]:
    """Return the overrides with `train.init=hf:NAME` and the like replaced by the folder of the imported model.

    It is imported once, by the main rank, into `start/` of the run folder; runs that resume find it there.

    Raises:
        UsageError: the model does not exist or is not supported.
        CheckpointError: its weights do not fit.
        ResourceError: the main rank did not import it in time.
    """
    tree = read_tree(source, overrides, cls)
    tree = tree if isinstance(tree, dict) else {}
    init = (tree.get("train") or {}).get("init")
    if not isinstance(init, str) or init.partition(":")[0] not in PREFIXES:
        return list(overrides)
    name = re.sub(r"[^\w.-]+", "-", init).strip("-")
    folder = Path(str(tree.get("out", cls.out))).expanduser() / START / name
    if not (folder / DESCRIPTION).is_file():
        if int(os.environ.get("RANK", "0")) == 0:
            from mmvit.interop.convert import import_model  # the libraries take seconds to import

            import_model(init, folder)
        else:
            _wait_for(folder / DESCRIPTION, init)
    return [*(each for each in overrides if each.partition("=")[0] != INIT), f"{INIT}={folder}"]


def _wait_for(path: Path, init: str) -> None:
    limit = time.monotonic() + LIMIT_S
    while not path.is_file():
        if time.monotonic() > limit:
            raise ResourceError(f"rank 0 did not import {init} in {LIMIT_S} s", where=str(path.parent))
        time.sleep(0.2)
