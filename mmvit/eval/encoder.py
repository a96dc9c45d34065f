"""A trained model with its tokenizer and preprocessing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from data_tools.core.errors import UsageError
from data_tools.core.text import check_text
from data_tools.sample.decode import read_image, to_rgb
from mmvit.checkpoint import load_model
from mmvit.data.tokenizers import Tokenizer
from mmvit.data.transforms import Pixels, eval_pixels
from mmvit.models.dual_encoder import DualEncoder

Item = TypeVar("Item")


class Encoder:
    """Embeds images and texts as unit-length float32 vectors in a shared space, without gradients.

    `fingerprint` identifies the weights; embeddings of two encoders are comparable only if it is equal.
    """

    def __init__(
        self, model: DualEncoder, tokenizer: Tokenizer, *, image_size: int, fingerprint: str, batch_size: int = 256
    ):
        refuse_zero(batch_size=batch_size)
        self.model = model
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.fingerprint = fingerprint
        self.batch_size = batch_size

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.logit_scale.device

    @property
    def embed_dim(self) -> int:
        """Width of the shared space."""
        return self.model.embed_dim

    @property
    def logit_scale(self) -> float:
        """Factor that turns cosines into logits."""
        return self.model.logit_scale.exp().item()

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Image.Image | str | Path]) -> Float[Tensor, "B E"]:
        """Encode images or image files; raise DataError naming a file that cannot be read."""
        refuse_str(images, "images")
        rows = [self.model.encode_image(self.pixels(part)) for part in _parts(images, self.batch_size)]
        return torch.cat(rows).cpu() if rows else torch.empty(0, self.embed_dim)

    @torch.inference_mode()
    def encode_pixels(self, pixels: Sequence[Pixels]) -> Float[Tensor, "B E"]:
        """Encode preprocessed images."""
        rows = [self.model.encode_image(self._stack(part)) for part in _parts(pixels, self.batch_size)]
        return torch.cat(rows).cpu() if rows else torch.empty(0, self.embed_dim)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """Encode texts; those longer than the context length are truncated."""
        refuse_str(texts, "texts")
        for text in texts:
            check_text(text, "text")
        rows = [self.model.encode_text(self.tokenizer(part).to(self.device)) for part in _parts(texts, self.batch_size)]
        return torch.cat(rows).cpu() if rows else torch.empty(0, self.embed_dim)

    def pixels(self, images: Sequence[Image.Image | str | Path]) -> UInt8[Tensor, "B 3 H W"]:
        """Preprocess images and move them to the device of the model."""
        refuse_str(images, "images")
        return self._stack([self.preprocess(image) for image in images])

    def preprocess(self, image: Image.Image | str | Path) -> Pixels:
        """Read one image and resize it to the image size of the model, uint8 [3, S, S]."""
        rgb = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        return eval_pixels(rgb, self.image_size)

    def _stack(self, pixels: Sequence[Pixels]) -> UInt8[Tensor, "B 3 H W"]:
        return torch.from_numpy(np.stack(pixels)).to(self.device)


def load(folder: str | Path, device: str | torch.device | None = None) -> Encoder:
    """Load a model folder; `device=None` takes a GPU if there is one."""
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(folder, target)
    return Encoder(
        loaded.model,
        loaded.tokenizer,
        image_size=loaded.config.image.image_size,
        fingerprint=loaded.fingerprint,
    )


def refuse_str(items: Sequence[object], kind: str) -> None:
    """Raise UsageError if one str is given instead of a list: its characters would be treated as items."""
    if isinstance(items, str):
        raise UsageError(f"{kind} must be a list, got the text {items!r}", hint=f"pass a list: [{items!r}]")


def refuse_zero(**counts: int) -> None:
    """Raise UsageError if one of the counts, given by name, is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; it must be at least 1")


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
