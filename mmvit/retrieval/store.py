"""The embedding folder: vectors and metadata on disk, in the layout that clip-retrieval reads."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.core.errors import DataError, SampleError, UsageError
from data_tools.core.files import write_atomic
from data_tools.core.mapped import open_mapped
from data_tools.core.names import as_text
from data_tools.core.output_folder import check_free
from data_tools.core.ownership import owned
from data_tools.core.progress import track
from data_tools.sample.decode import decode_image
from mmvit.data.stored import (
    FORMAT_VERSION,
    JOB,
    MANIFEST,
    MODALITIES,
    check_modality,
    check_shapes,
    list_parts,
    read_manifest,
    read_part,
)
from mmvit.data.transforms import Pixels
from mmvit.eval.encoder import Encoder
from mmvit.retrieval.sources import Item, Source

PART_SIZE = 65_536  # rows of one file
MAX_REJECTED = 0.01  # share of the items; one item may always be bad
# image_path and caption as clip-retrieval names them, then the sample's JSON as text.
COLUMNS = pa.schema([("image_path", pa.string()), ("caption", pa.string()), ("meta", pa.string())])


class EmbedSummary(NamedTuple):
    """Result of a job: every item of the source is a row or a rejected item."""

    num_rows: int
    num_rejected: int


class EmbeddingFolder(NamedTuple):
    """An embedding folder read back; `vectors` by "img" and "text", float16 [M, E], mapped from disk part by part."""

    manifest: dict[str, Any]
    vectors: dict[str, list[np.ndarray]]
    metadata: pa.Table


def embed_source(
    encoder: Encoder,
    model: Path,
    source: Source,
    out: Path,
    modality: str | None = None,
    max_bad: float | None = None,
) -> EmbedSummary:
    """Embed a source, all that it holds or one side; run again after an interruption, it resumes with the next part.

    Items that cannot be read are skipped, listed in `rejected/` and counted.

    Args:
        encoder: the model.
        model: its folder.
        source: what to embed.
        out: folder to create.
        modality: image, text or both; None takes all that the source contains.
        max_bad: fraction of the items that may be rejected; None allows one item, or one in a hundred.

    Raises:
        UsageError: the folder holds something else, or the source lacks what the modality needs.
        DataError: more items than allowed cannot be read, or none can.
    """
    modality = modality or source.modality
    _kinds(source, modality)  # refuses what the source lacks
    job = {
        "model_sha256": encoder.fingerprint,
        "modality": modality,
        "source_sha256": hashlib.sha256(source.fingerprint().encode()).hexdigest(),
        "num_items": len(source),
    }
    with owned(out):
        _open_folder(out, job)
        return _embed(encoder, model, source, out, job, max_bad)


def _embed(
    encoder: Encoder, model: Path, source: Source, out: Path, job: dict[str, Any], max_bad: float | None
) -> EmbedSummary:
    """Write the parts that are missing, then the manifest."""
    kinds = _kinds(source, job["modality"])
    starts = range(0, len(source), PART_SIZE)
    digits = len(str(max(len(starts) - 1, 0)))
    for part, start in enumerate(starts):
        name = f"{part:0{digits}d}"
        if not (out / "metadata" / f"metadata_{name}.parquet").exists():  # written last in a part
            _embed_part(encoder, source, range(start, min(start + PART_SIZE, len(source))), kinds, out, name)
    num_rows = sum(pq.read_metadata(open_mapped(path)).num_rows for path in list_parts(out, "metadata"))
    summary = EmbedSummary(num_rows, len(source) - num_rows)
    allowed = max(1.0, MAX_REJECTED * len(source)) if max_bad is None else max_bad * len(source)
    if summary.num_rejected > allowed or 0 < summary.num_rejected == len(source):
        raise _too_many(summary, out, len(source), allowed)
    # Both resolved: "../model" starts from where a folder really is, not from a link to it.
    relative_model = os.path.relpath(model.resolve(), out.resolve())
    facts = {"format_version": FORMAT_VERSION, "model": relative_model, "dim": encoder.embed_dim}
    facts |= {"logit_scale": encoder.logit_scale}
    manifest = job | facts | {"num_rows": num_rows, "num_rejected": summary.num_rejected, "dtype": "float16"}
    write_atomic(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    return summary


def _too_many(summary: EmbedSummary, out: Path, num_items: int, allowed: float) -> DataError:
    hint = "fix or remove the items listed there and embed into another --out"
    if summary.num_rows:
        hint += f"; or accept the loss: the same command with --max-bad {summary.num_rejected / num_items + 0.0005:.3f}"
    return DataError(
        f"{summary.num_rejected} of {num_items} items cannot be embedded",
        where=str(out / "rejected"),
        note=f"at most {int(allowed)} may be invalid; the folder is left without a manifest",
        hint=hint,
    )


def open_embeddings(folder: Path) -> EmbeddingFolder:
    """Read an embedding folder; raises CheckpointError if it is not one, is unfinished, or its parts disagree."""
    manifest = read_manifest(folder)
    tables = [read_part(path) for path in list_parts(folder, "metadata")]
    metadata = pa.concat_tables([COLUMNS.empty_table(), *tables])
    kinds = MODALITIES[manifest["modality"]]
    vectors = {kind: [read_part(path) for path in list_parts(folder, f"{kind}_emb")] for kind in kinds}
    for kind, parts in vectors.items():
        check_shapes(folder, manifest, kind, [part.shape for part in parts], len(metadata))
    return EmbeddingFolder(manifest, vectors, metadata)


def _kinds(source: Source, modality: str) -> tuple[str, ...]:
    """Return what is to be embedded; raises UsageError where the source cannot have it."""
    check_modality(modality)
    kinds = MODALITIES[modality]
    if not set(kinds) <= set(MODALITIES[source.modality]):
        raise UsageError(f"the source does not contain {modality!r}", hint=f"--modality {source.modality}")
    return kinds


def _open_folder(out: Path, job: dict[str, Any]) -> None:
    path = out / JOB
    if path.is_file():
        if json.loads(path.read_text()) != job:
            raise UsageError(
                "the output folder contains other embeddings (another model, source or modality)",
                where=str(out),
                note="nothing was changed",
                hint="choose another --out, or remove the folder",
            )
    else:
        check_free(out, hint="name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(job).encode())


def _embed_part(encoder: Encoder, source: Source, span: range, kinds: Sequence[str], out: Path, name: str) -> None:
    vectors: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    chunks = range(span.start, span.stop, encoder.batch_size)
    for start in track(chunks, total=len(chunks), label="embedding, batches"):
        good: list[Item] = []
        pixels: list[Pixels] = []
        for i in range(start, min(start + encoder.batch_size, span.stop)):
            try:
                item = source.read(i)
                _check_sides(item, kinds)
                if item.image is not None and "img" in kinds:  # small at once: a photo takes 40 MB when decoded
                    pixels.append(encoder.preprocess(decode_image(item.image, where=item.key)))
                good.append(item._replace(image=None))
            except DataError as error:
                cause = getattr(error, "cause", "no-image")  # a file that cannot be read has none
                rejected.append({"key": source.key(i), "cause": cause, "what": error.what})
        if "img" in kinds:
            vectors["img"].append(encoder.encode_pixels(pixels).half().numpy())
        if "text" in kinds:
            vectors["text"].append(encoder.encode_text([item.caption or "" for item in good]).half().numpy())
        rows += [_row(item) for item in good]
    for kind in kinds:
        _write_numpy(out / f"{kind}_emb" / f"{kind}_emb_{name}.npy", np.concatenate(vectors[kind]))
    if rejected:
        _write(
            out / "rejected" / f"rejected_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rejected).encode()
        )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), sink)
    _write(out / "metadata" / f"metadata_{name}.parquet", sink.getvalue())


def _check_sides(item: Item, kinds: Sequence[str]) -> None:
    """Raise DataError if an item lacks a wanted side."""
    if "text" in kinds and not item.caption:
        raise SampleError("no-caption", "no caption", shard=item.key, key="")
    if "img" in kinds and item.image is None:
        raise SampleError("no-image", "no image", shard=item.key, key="")


def _row(item: Item) -> dict[str, Any]:
    """Return one row of metadata, by COLUMNS."""
    return {"image_path": as_text(item.key), "caption": item.caption, "meta": json.dumps(item.meta, ensure_ascii=False)}


def _write_numpy(path: Path, array: np.ndarray) -> None:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    _write(path, sink.getvalue())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
