"""Exact nearest neighbours by cosine."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.eval.encoder import Encoder, load
from mmvit.retrieval.store import EmbeddingFolder, open_embeddings

CHUNK_SIZE = 65_536  # rows scored at a time, so that float32 copies and scores stay small
SHORTEST = 1e-12  # length by which a row of zeros is divided


class Hit(NamedTuple):
    """One row found: its cosine with the query, and its metadata."""

    rank: int
    score: float
    image_path: str
    caption: str | None
    meta: dict[str, Any]


class Neighbours(NamedTuple):
    """The best rows of each query, best first; of equal scores the lower row number comes first."""

    scores: Float[Tensor, "Q k"]
    rows: Int[Tensor, "Q k"]


def top_k(queries: Float[Tensor, "Q E"], vectors: list[Any], k: int) -> Neighbours:
    """Compute the cosines of queries and all rows of the parts [m, E], in float32, and keep the k best.

    Stored rows are of unit length up to the rounding to float16 only, so that both sides are divided by their lengths;
    a row of zeros has the cosine 0.
    """
    queries = F.normalize(queries.float(), dim=1, eps=SHORTEST)
    best_scores = queries.new_empty(len(queries), 0)
    best_rows = torch.empty(len(queries), 0, dtype=torch.long)
    first = 0
    for part in vectors:
        for start in range(0, len(part), CHUNK_SIZE):
            chunk = torch.tensor(part[start : start + CHUNK_SIZE], dtype=torch.float32)
            lengths = torch.linalg.vector_norm(chunk, dim=1).clamp_(min=SHORTEST)
            cosines = (queries @ chunk.T).div_(lengths).clamp_(-1, 1)  # rounding goes beyond by 1e-7
            scores = torch.cat([best_scores, cosines], dim=1)
            rows = torch.cat([best_rows, (first + start + torch.arange(len(chunk))).expand(len(queries), -1)], dim=1)
            # A stable sort keeps the earlier, lower row among equals; topk promises no order.
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
            best_scores, best_rows = scores.gather(1, order), rows.gather(1, order)
        first += len(part)
    return Neighbours(best_scores, best_rows)


class Searcher:
    """An embedding folder with the model that made it, ready for queries.

    `model` None takes the model folder that the manifest names.

    Raises:
        CheckpointError: not an embedding folder, or the model is gone or another one.
    """

    def __init__(self, folder: Path, model: str | Path | None = None):
        self.embeddings: EmbeddingFolder = open_embeddings(folder)
        manifest = self.embeddings.manifest
        self.encoder: Encoder = load(model) if model else _load_named(folder / manifest["model"])
        if self.encoder.fingerprint != manifest["model_sha256"]:
            raise CheckpointError(
                "the embeddings were computed by a model with different weights",
                where=str(model or folder / manifest["model"]),
                note="similarities between embeddings of two models are meaningless",
                hint="embed again with this model, or pass the model that computed them: --model FOLDER",
            )

    def search(self, *, text: str | None = None, image: str | Path | None = None, k: int = 10) -> list[Hit]:
        """Return the rows nearest to a text or an image; image embeddings are searched if the folder has them."""
        if (text is None) == (image is None):
            raise UsageError("pass exactly one query: a text or an image", hint='--text "a red fruit" or --image FILE')
        if text is not None and not text.strip():
            raise UsageError("the text to search for is empty", hint='--text "a red fruit"')
        if k < 1:
            raise UsageError(f"k is {k}; it must be at least 1", where="-k")
        query = self.encoder.encode_text([text]) if text is not None else self.encoder.encode_image([str(image)])
        vectors = self.embeddings.vectors
        found = top_k(query, vectors["img"] if "img" in vectors else vectors["text"], k)
        return [
            self._hit(rank, score, row)
            for rank, (score, row) in enumerate(zip(found.scores[0].tolist(), found.rows[0].tolist(), strict=True), 1)
        ]

    def _hit(self, rank: int, score: float, row: int) -> Hit:
        (values,) = self.embeddings.metadata.slice(row, 1).to_pylist()
        return Hit(rank, score, values["image_path"], values["caption"], json.loads(values["meta"]))


def _load_named(model: Path) -> Encoder:
    """Load the model that a manifest names; it may have been moved or removed since."""
    try:
        return load(model)
    except CheckpointError as error:
        raise CheckpointError(
            f"the model that computed the embeddings cannot be loaded: {error.what}",
            where=error.where,
            hint="pass the model folder: --model FOLDER",
        ) from error
