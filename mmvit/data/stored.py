"""Stored embeddings of samples, read row by row."""

import functools
import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt64

from data_tools.core.errors import CheckpointError, DataError, UsageError, WrongPathError, did_you_mean
from data_tools.core.mapped import read_parquet
from data_tools.core.names import as_text
from data_tools.core.near import near_path
from data_tools.sample.content import FaultError
from mmvit.data.source import SampleSource, some_samples

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOB = "job.json"  # the inputs of an unfinished folder
MODALITIES = {"image": ("img",), "text": ("text",), "both": ("img", "text")}  # what is embedded: stems of its folders

_OPEN_PARTS = 64  # each holds a file open; training reads from a few at a time
_HASHED = 256  # rows whose content is in the fingerprint
_LOOK_UPS = 1000  # samples that are looked up before the first step

logger = logging.getLogger(__name__)


class StoredEmbeddings:
    """The rows of a folder that `mmvit embed` made of shards, by the key of their sample, as `IndexedShards.key`.

    Rows are read from disk when they are asked for; 16 bytes for each stay in memory. It may be used after a fork, by
    several threads, and may be sent to data loader workers.

    Raises:
        CheckpointError: the folder is not an embedding folder, or is unfinished or damaged.
        DataError: two rows have the same key.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.model_sha256: str = self.manifest["model_sha256"]
        self.dim: int = self.manifest["dim"]
        self.kinds = MODALITIES[self.manifest["modality"]]
        parts = [_names(self._keys(part)) for part in range(len(list_parts(self.folder, "metadata")))]
        names = np.concatenate([np.empty(0, np.uint64), *parts])
        self._rows = np.argsort(names, kind="stable")
        self._names = names[self._rows]
        self._stops = list(accumulate(map(len, parts)))
        self._paths = {kind: list_parts(self.folder, f"{kind}_emb") for kind in self.kinds}
        for kind, paths in self._paths.items():
            shapes = [read_part(path).shape for path in paths]
            check_shapes(self.folder, self.manifest, kind, shapes, len(names))
        double = np.flatnonzero(self._names[1:] == self._names[:-1])
        if len(double):
            part, local = self._place(int(self._rows[double[0]]))
            raise DataError(
                f"{len(double)} rows have the key of another row, such as {self._keys(part)[local]}",
                where=str(self.folder),
                note="the row of a sample is ambiguous",
                hint="embed the shards again into another folder",
            )
        self._make_cache()

    def _make_cache(self) -> None:
        self._open = functools.lru_cache(_OPEN_PARTS)(lambda kind, part: read_part(self._paths[kind][part]))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_cache()

    def fingerprint(self) -> str:
        """Return a hash of the model, of the embedded data, and of some of the rows with their keys."""
        identity = [self.model_sha256, self.manifest["source_sha256"], self.manifest["modality"], len(self._names)]
        digest = hashlib.sha256(json.dumps(identity).encode() + self._names.tobytes())
        for i in range(0, len(self._rows), max(1, len(self._rows) // _HASHED)):
            for kind in self.kinds:
                digest.update(self._vector(kind, int(self._rows[i])).tobytes())
        return digest.hexdigest()

    def row(self, key: str) -> int:
        """Return the number of a sample's row; raise FaultError ("no-embedding") if there is none."""
        (name,) = _names([key])
        at = int(np.searchsorted(self._names, name))
        if at == len(self._names) or self._names[at] != name:
            raise FaultError("no-embedding", f"it has no row in {self.folder}")
        return int(self._rows[at])

    def image(self, row: int) -> Float32[np.ndarray, "E"]:
        """Return the embedding of a sample's image."""
        return self._vector("img", row)

    def text(self, row: int) -> Float32[np.ndarray, "E"]:
        """Return the embedding of a sample's caption, the one in its `txt`."""
        return self._vector("text", row)

    def check_made_of(self, source: SampleSource) -> None:
        """Look up a thousand samples; warn if the rows were computed from other data.

        Raises:
            DataError: most of the samples have no row.
        """
        assert source.num_samples is not None, "a stream does not know its keys"
        keys = [source.key(i) for i in some_samples(source, _LOOK_UPS)]
        missing = [key for key in keys if not self._has(key)]
        if len(missing) > len(keys) / 2:
            raise DataError(
                f"{len(missing)} of {len(keys)} samples have no row in the stored embeddings, such as {missing[0]}",
                where=str(self.folder),
                note=f"its {len(self._names)} rows are of other data, such as {self._keys(0)[0]}",
                hint="embed the training data itself: mmvit embed MODEL SHARDS --out FOLDER",
            )
        if hashlib.sha256(source.fingerprint().encode()).hexdigest() != self.manifest["source_sha256"]:
            logger.warning("%s was computed from other shards, or the shards have changed since", self.folder)

    def _has(self, key: str) -> bool:
        try:
            return self.row(key) >= 0
        except FaultError:
            return False

    def _keys(self, part: int) -> list[str]:
        path = list_parts(self.folder, "metadata")[part]
        return list(map(str, read_part(path, ["image_path"])["image_path"].to_pylist()))

    def _vector(self, kind: str, row: int) -> Float32[np.ndarray, "E"]:
        part, local = self._place(row)
        vector: Float32[np.ndarray, "E"] = self._open(kind, part)[local].astype(np.float32)
        return vector

    def _place(self, row: int) -> tuple[int, int]:
        part = bisect_right(self._stops, row)
        return part, row - (self._stops[part - 1] if part else 0)


def check_modality(modality: str | None) -> None:
    """Raise UsageError for a name that is not in `MODALITIES`; None is none."""
    if modality is not None and modality not in MODALITIES:
        hint = did_you_mean(modality, MODALITIES) or f"choose from {', '.join(MODALITIES)}"
        raise UsageError(f"modality {modality!r} is unknown", hint=hint)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an embedding folder; raise CheckpointError if it is missing or unfinished."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        version, _ = manifest["format_version"], MODALITIES[manifest["modality"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if (folder / JOB).exists():
            hint = "run mmvit embed again with the same arguments"
            raise CheckpointError("the embeddings are not finished", where=str(folder), hint=hint) from error
        kind = CheckpointError if (folder / MANIFEST).exists() else WrongPathError
        what = "not an embedding folder" + ("" if folder.exists() else ": it does not exist")
        near = "" if folder.exists() else near_path(folder)
        hint = near or "pass the folder that mmvit embed wrote: mmvit embed MODEL SOURCE --out FOLDER"
        raise kind(what, where=str(folder), hint=hint) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"embeddings of format version {version}, not {FORMAT_VERSION}", where=str(folder))
    return manifest


def check_shapes(
    folder: Path, manifest: dict[str, Any], kind: str, shapes: list[tuple[int, ...]], num_metadata: int
) -> None:
    """Raise CheckpointError if the parts of `kind` do not match the metadata or the manifest."""
    rows = sum(shape[0] for shape in shapes)
    wide = all(shape[1] == manifest["dim"] for shape in shapes)
    if not (rows == num_metadata == manifest["num_rows"] and wide):
        raise CheckpointError(
            f"{kind}_emb has {rows} rows and the metadata {num_metadata}, where the manifest says "
            f"{manifest['num_rows']} rows of {manifest['dim']}, or the width differs",
            where=str(folder),
            hint="embed again into another folder",
        )


def read_part(path: Path, columns: list[str] | None = None) -> Any:
    """Return a part: a parquet table, of some columns or all, or an array that is mapped from disk."""
    try:
        if path.suffix == ".parquet":
            return read_parquet(path, columns)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"a file of the embeddings is damaged: {error}", where=str(path), hint="embed again into another folder"
        ) from error


def list_parts(folder: Path, name: str) -> list[Path]:
    """Return the files of the subfolder `name` in the order of their rows."""
    return sorted(path for path in (folder / name).glob("*_[0-9]*") if path.suffix in (".npy", ".parquet"))


def _names(keys: Iterable[str]) -> UInt64[np.ndarray, "n"]:
    """Return a 64-bit name for each key."""
    encoded = (as_text(key).encode() for key in keys)  # as they are stored
    return np.frombuffer(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in encoded), np.uint64)
