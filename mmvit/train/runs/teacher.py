"""The teacher of a distillation: a model that embeds the same batch, or stored embeddings."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from data_tools.core.errors import UsageError
from mmvit.checkpoint import LoadedModel, load_model
from mmvit.data.batches import Batch
from mmvit.data.stored import JOB, MANIFEST, StoredEmbeddings
from mmvit.data.tokenizers import Tokenizer, read_alike

STORED_SCALE = 100.0  # the final logit scale of CLIP models, for folders that do not state that of their model


class Teacher:
    """Returns unit-length embeddings of the images and first captions of a batch, without gradients.

    It is a model, or `stored` embeddings that the batches contain; `fingerprint` is the SHA-256 of its weights.
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
        """Return the image embeddings and the text embeddings."""
        if self.model is None:
            assert batch.teacher is not None
            # Stored in float16, they are of unit length up to the rounding only.
            image, text = (F.normalize(rows.to(device), dim=1) for rows in batch.teacher)
            return image, text
        size = self.model.config.image.image_size
        assert isinstance(batch.images, Tensor)
        images = batch.images.to(device)
        if images.shape[-1] != size:
            images = (
                F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
            )
        return self.model.model.encode_image(images), self.model.model.encode_text(batch.ids[:, 0].to(device))


def load_teacher(
    folder: str, tokenizer: Tokenizer, context_length: int, device: torch.device, *, whole_images: bool = True
) -> Teacher:
    """Load a model, or a folder of stored embeddings.

    Raises:
        UsageError: neither is there; a model with another tokenizer; a model for batches without `whole_images`.
    """
    if any((Path(folder) / name).exists() for name in (MANIFEST, JOB)):
        return Teacher(None, StoredEmbeddings(folder))
    loaded = load_model(folder, device)
    same_ids = read_alike(loaded.tokenizer, tokenizer, context_length)
    if not whole_images or not same_ids or loaded.config.text.context_length < context_length:
        raise UsageError(
            "the teacher reads "
            + ("other tokens than this run" if whole_images else "whole images, and this run has none"),
            where="loss.teacher",
            note="it cannot embed the batches of this run",
            hint="compute its embeddings with mmvit embed TEACHER SHARDS --modality both, and use that folder",
        )
    return Teacher(loaded, None)
