"""The teacher of a distillation: a model that looks at the same batch, or embeddings that one left on disk."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from data_tools.core.errors import UsageError
from mmvit.checkpoint import DESCRIPTION, LoadedModel, load_model
from mmvit.data.batches import Batch
from mmvit.data.stored import StoredEmbeddings
from mmvit.data.tokenizers import Tokenizer, read_alike

STORED_SCALE = 100.0  # what CLIP models end at, for folders that do not say what their model's is


class Teacher:
    """Gives unit-length rows for the images and first captions of a batch, without gradient.

    It is a model, or `stored` rows that the batches bring along; `fingerprint` is the SHA-256 of its weights.
    """

    def __init__(self, model: LoadedModel | None, stored: StoredEmbeddings | None):
        self.model = model
        self.stored = stored
        self.logit_scale = torch.tensor(stored.manifest.get("logit_scale", STORED_SCALE) if stored else 1.0)
        if model is not None:
            self.logit_scale = model.model.logit_scale.exp().detach()
        self.fingerprint = model.fingerprint if model else f"stored {stored.fingerprint()}" if stored else ""

    @torch.no_grad()
    def rows(self, batch: Batch, device: torch.device) -> tuple[Float[Tensor, "b T"], Float[Tensor, "b T"]]:
        """Return image rows and text rows."""
        if self.model is None:
            assert batch.teacher is not None
            return batch.teacher.image.to(device), batch.teacher.text.to(device)
        size = self.model.config.image.image_size
        assert isinstance(batch.images, Tensor)
        images = batch.images.to(device)
        if images.shape[-1] != size:
            images = (
                F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
            )
        return self.model.model.encode_image(images), self.model.model.encode_text(batch.ids[:, 0].to(device))


def load_teacher(
    folder: str, tokenizer: Tokenizer, context_length: int, device: torch.device, *, pictures: bool = True
) -> Teacher:
    """Open a model folder, or one of stored embeddings.

    Raises:
        UsageError: a model with another tokenizer, or one where batches hold no whole `pictures`.
    """
    if not (Path(folder) / DESCRIPTION).is_file():
        return Teacher(None, StoredEmbeddings(folder))
    loaded = load_model(folder, device)
    same_ids = read_alike(loaded.tokenizer, tokenizer, context_length)
    if not pictures or not same_ids or loaded.config.text.context_length < context_length:
        raise UsageError(
            "the teacher reads "
            + ("other tokens than this run" if pictures else "whole pictures, and this run has none"),
            where="loss.teacher",
            note="it cannot look at the same batch",
            hint="write its embeddings with mmvit embed TEACHER SHARDS --modality both, and name that folder",
        )
    return Teacher(loaded, None)
