"""A trained model with its tokenizer and preprocessing."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
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
# An image: a path, a PIL image, an array [H, W, 3] or [H, W], or a tensor [3, H, W].
AnyImage = Image.Image | str | Path | NDArray[Any] | Tensor


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

    def __repr__(self) -> str:
        tower, count = type(self.model.image_tower).__name__, sum(each.numel() for each in self.model.parameters())
        return (
            f"{type(self).__name__}({tower} of {self.image_size} px, {count / 1e6:.1f} M parameters, "
            f"embed_dim={self.embed_dim}, device={str(self.device)!r})"
        )

    def to(self, device: str | torch.device) -> "Encoder":
        """Move the model to a device and return the encoder."""
        self.model.to(device)
        return self

    def encode_image(self, images: AnyImage | Sequence[AnyImage]) -> Tensor:
        """Encode images as unit-length float32 vectors in main memory; `.numpy()` makes an array of them.

        Args:
            images: an image, or a list of images. An image is a path, a PIL image, a uint8 array [H, W, 3] or [H, W],
                or a tensor [3, H, W]: uint8, or floats from 0 to 1. A tensor [B, 3, H, W] is a list of images.

        Returns:
            [B, E] for a list, [E] for one image.

        Raises:
            DataError: a file cannot be read or decoded; the error names it.
            UsageError: an array or tensor of another shape or type.
        """
        rows = [self._encode(self.pixels(part)) for part in _parts(_as_list(images), self.batch_size)]
        return self._joined(rows)[0] if _is_one(images) else self._joined(rows)

    def encode_pixels(self, pixels: Sequence[Pixels]) -> Float[Tensor, "B E"]:
        """Encode preprocessed images."""
        return self._joined([self._encode(self._stack(part)) for part in _parts(pixels, self.batch_size)])

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Encode a text, or a list of texts, as unit-length float32 vectors in main memory.

        Texts longer than the context length are truncated. The result is [B, E] for a list, [E] for one text.
        """
        several = [texts] if isinstance(texts, str) else texts
        for text in several:
            check_text(text, "text")
        parts = _parts(several, self.batch_size)
        rows = [self.model.encode_text(self.tokenizer(part).to(self.device)) for part in parts]
        return self._joined(rows)[0] if isinstance(texts, str) else self._joined(rows)

    def pixels(self, images: AnyImage | Sequence[AnyImage]) -> UInt8[Tensor, "B 3 H W"]:
        """Preprocess images, as for `encode_image`, and move them to the device of the model."""
        return self._stack([self.preprocess(image) for image in _as_list(images)])

    def preprocess(self, image: AnyImage) -> Pixels:
        """Read one image and resize it to the image size of the model, uint8 [3, S, S]."""
        return eval_pixels(_as_rgb(image), self.image_size)

    @torch.inference_mode()
    def _encode(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        return self.model.encode_image(pixels)

    def _joined(self, rows: list[Tensor]) -> Float[Tensor, "B E"]:
        return torch.cat(rows).cpu() if rows else torch.empty(0, self.embed_dim)

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


def refuse_zero(**counts: int) -> None:
    """Raise UsageError if one of the counts, given by name, is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; it must be at least 1")


def _is_one(images: object) -> bool:
    if isinstance(images, Tensor):
        return images.ndim == 3
    return isinstance(images, str | os.PathLike | Image.Image | np.ndarray)


def _as_list(images: AnyImage | Sequence[AnyImage]) -> Sequence[AnyImage]:
    return [images] if _is_one(images) else list(images)  # type: ignore[list-item,arg-type]


def _as_rgb(image: AnyImage) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        shape, array = tuple(image.shape), image.detach().cpu()
        if array.is_floating_point() and array.min() >= 0 and array.max() <= 1:
            array = (array * 255).round().to(torch.uint8)
        if image.ndim == 3 and shape[0] == 3 and array.dtype == torch.uint8:
            return Image.fromarray(array.permute(1, 2, 0).numpy())
        wanted = "a tensor of an image is [3, H, W], uint8 or floats from 0 to 1"
    else:
        shape = image.shape
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and shape[2] == 3)):
            return Image.fromarray(image).convert("RGB")
        wanted = "an array of an image is uint8 [H, W, 3] or [H, W]"
    raise UsageError(f"got {list(shape)} of {image.dtype} as an image", hint=wanted)


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
