"""The handwritten digits that come with scikit-learn, as WebDataset shards with labels.

They are the 1,797 grey images of 8 x 8 px of the test half of "Optical Recognition of Handwritten Digits" (Alpaydin
and Kaynak, UCI, 1998), written by 13 people; the writers of individual images are unknown. `val` is therefore a random
fifth of each digit, with the same writers as `train`; the accuracy on new writers is lower.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.core.errors import UsageError
from data_tools.core.files import write_atomic
from data_tools.core.output_folder import close_output, open_output
from data_tools.core.ownership import owned
from data_tools.tar.writer import ShardWriter

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VAL_SHARE = 0.2

_INK = 16  # maximum pixel value in scikit-learn's tables


def write_digits(out: str | os.PathLike[str], seed: int = 0) -> dict[str, Any]:
    """Write `train-*.tar`, `val-*.tar` and `classes.txt`; return the counts and whether they already existed.

    A folder with the finished data set of the same seed is left unchanged, an unfinished one is written again.

    Raises:
        UsageError: scikit-learn is missing, or the folder holds something else.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the package scikit-learn is not installed", hint="pip install 'mmvit[data]'") from None
    folder, plan = Path(out), {"verb": "digits", "seed": seed}
    with owned(folder):
        report = open_output(folder, plan)
        if report is not None:
            return {**report, "was_there": True}
        for left in [*folder.glob("train-*.tar*"), *folder.glob("val-*.tar*")]:
            left.unlink()
        data = load_digits()
        in_val = val_rows(data.target, seed)
        counts = {}
        for split, rows in (("train", np.flatnonzero(~in_val)), ("val", np.flatnonzero(in_val))):
            with ShardWriter(folder, split, max_samples=500) as writer:
                for row in rows.tolist():
                    writer.write(f"digit-{row:04d}", {"png": _png(data.images[row]), "cls": int(data.target[row])})
            counts[split] = len(rows)
        write_atomic(folder / "classes.txt", "".join(f"{name}\n" for name in NAMES).encode())
        close_output(folder, plan, counts)
        return {**counts, "was_there": False}


def val_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask of the validation rows: a random fraction `VAL_SHARE` of each label, rounded."""
    draws = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[np.argsort(draws[rows], kind="stable")][: round(VAL_SHARE * len(rows))]] = True
    return chosen


def _png(ink: np.ndarray) -> bytes:
    """Return a PNG of the original 8 x 8 px, white on black as in the tables; transforms enlarge it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((ink * (255 / _INK)).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
