"""Logits of all image-text pairs of the global batch, tile by tile, and the gradients of losses on them.

A rank scores its own images against the texts of all ranks. The layout chooses how:

- global: every rank scores all pairs of the global batch
- rows: the texts are gathered, and the logits of this rank's images are one matrix
- tiles: the texts are gathered, only one tile of logits is in memory, and the gradients recompute it
- ring: the texts and their partial sums are sent from rank to rank; no rank holds all texts
- auto: tiles; a single tile if all logits fit into one

The result is the same in each. A loss on the pairs is this rank's part, whose mean over the ranks is the loss of the
global batch; averaged over ranks, as in data-parallel training, gradients are those of a single rank with all rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmvit.losses.gather import gather_rows, pass_on, scatter_sum, world
from mmvit.losses.layout import Layout as Layout

# Images and texts of the largest tile. On a CPU its logits stay in the cache; a GPU needs large kernels.
CPU_TILE, TILE = (1024, 1024), (8192, 8192)


class Tile(NamedTuple):
    """A block of this rank's images against a block of texts; the next tile overwrites the tensors."""

    rows: slice
    columns: slice
    logits: Float[Tensor, "r c"]
    space: Float[Tensor, "r c"]  # scratch memory
    positive: Bool[Tensor, "r c"] | None  # pairs of equal groups; None if there are none


class Pairs:
    """All pairs of this rank's images with the global batch's texts.

    Pairs of equal groups are positives; without groups, row i is paired with row i.
    """

    def __init__(
        self,
        image: Float[Tensor, "m E"],
        text: Float[Tensor, "n E"],
        logit_scale: Float[Tensor, ""],
        image_groups: Int[Tensor, " m"] | None = None,
        text_groups: Int[Tensor, " n"] | None = None,
        *,
        layout: Layout = "auto",
    ):
        rank, size = world()
        self.diagonal = image_groups is None
        if image_groups is None:
            image_groups = torch.arange(rank * len(image), (rank + 1) * len(image), device=image.device)
        text_groups = image_groups if text_groups is None else text_groups
        if len(text_groups) != len(text) or (self.diagonal and text_groups is not image_groups):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts: pass the groups of both, or of neither if row i is paired "
                f"with row i"
            )
        self.layout, self.logit_scale, self.image, self.text = layout, logit_scale, image, text
        self.image_groups, self.text_groups = image_groups, text_groups
        self.first_row, self.num_texts = rank * len(image), len(text)
        if layout == "global":
            self.image, self.image_groups, self.first_row = gather_rows(image), gather_rows(image_groups), 0
            self.num_texts *= size
        if layout != "ring":
            self.text, self.text_groups = gather_rows(text), gather_rows(text_groups)
        # Sums over the images of all ranks are complete here (global), after the ring, or after a reduction over ranks.
        self.adds_over_ranks = layout not in {"global", "ring"}

    def walk(self, *carried: Tensor) -> Iterator[Tile]:
        """Yield every tile once; `carried` tensors, a row per held text, move along the ring with the texts."""
        rank, size = world()
        height, width = self._tile_size()
        space = self.image.new_empty(2, height * width)
        for hop in range(size if self.layout == "ring" else 1):
            first_column = (rank - hop) % size * len(self.text) if self.layout == "ring" else 0
            for rows in _spans(len(self.image), height):
                for columns in _spans(len(self.text), width):
                    shape = rows.stop - rows.start, columns.stop - columns.start
                    logits, scratch = (flat[: shape[0] * shape[1]].view(shape) for flat in space)
                    torch.mm(self.image[rows], self.text[columns].T, out=logits).mul_(self.logit_scale)
                    yield Tile(rows, columns, logits, scratch, self._positive(rows, columns, first_column))
            if self.layout == "ring":
                self.text, self.text_groups, *received = pass_on(self.text, self.text_groups, *carried)
                for old, new in zip(carried, received, strict=True):
                    old.copy_(new)

    def _tile_size(self) -> tuple[int, int]:
        whole = len(self.image), len(self.text)
        largest = whole if self.layout == "rows" else CPU_TILE if self.image.device.type == "cpu" else TILE
        return min(largest[0], whole[0]), min(largest[1], whole[1])

    def _positive(self, rows: slice, columns: slice, first_column: int) -> Tensor | None:
        shift = self.first_row - first_column
        if self.diagonal and (rows.stop + shift <= columns.start or columns.stop <= rows.start + shift):
            return None
        return self.image_groups[rows, None] == self.text_groups[columns]

    def of_held_images(self, values: Float[Tensor, " m"]) -> Float[Tensor, " held"]:
        """Return the values of the held images, given those of this rank's images."""
        return gather_rows(values) if self.layout == "global" else values

    def of_held_texts(self, values: Float[Tensor, " n"]) -> Float[Tensor, " held"]:
        """Return the values of the held texts, given those of this rank's texts."""
        return values if self.layout == "ring" else gather_rows(values)

    def own_images(self, values: Shaped[Tensor, " held"]) -> Shaped[Tensor, " m"]:
        """Return the values of this rank's images, given those of the held images."""
        return values.chunk(world()[1])[world()[0]] if self.layout == "global" else values

    def own_texts(self, values: Shaped[Tensor, " held"]) -> Shaped[Tensor, " n"]:
        """Return the values of this rank's texts, given those of the held texts."""
        return values if self.layout == "ring" else values.chunk(world()[1])[world()[0]]

    def gradients(self, slope: Callable[[Tile], Tensor], *carried: Tensor) -> list[Tensor]:
        """Return the gradients of images, texts and scale, given the derivative of the loss by the logits of a tile."""
        image_grad, text_grad = torch.zeros_like(self.image), torch.zeros_like(self.text)
        for tile in self.walk(text_grad, *carried):
            slopes = slope(tile)
            image_grad[tile.rows].addmm_(slopes, self.text[tile.columns])
            text_grad[tile.columns].addmm_(slopes.T, self.image[tile.rows])
        # A logit is scale * cosine, so that sum(slope * cosine) is image_grad * image before it is scaled.
        spans = _spans(len(self.image), CPU_TILE[0])
        scale_grad = torch.stack([(image_grad[rows] * self.image[rows]).sum() for rows in spans]).sum()
        rank, size = world()
        if self.layout == "global":  # the mean over ranks counts each row once, not once per rank
            image_grad, text_grad = (grad.chunk(size)[rank] * size for grad in (image_grad, text_grad))
        elif self.adds_over_ranks:
            text_grad = scatter_sum(text_grad)
        return [image_grad.mul_(self.logit_scale), text_grad.mul_(self.logit_scale), scale_grad]


def _spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def differentiable(
    compute: Callable[..., tuple[Tensor, list[Tensor]]], *inputs: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Return the value of `compute(needed, *inputs)`, which also returns the inputs' gradients if they are needed.

    It runs in float32, and only the gradients are kept for the backward pass, which can run once.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        inputs = tuple(tensor.float() for tensor in inputs)
        needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        with torch.no_grad():
            value, gradients = compute(needed, *(tensor.detach().contiguous() for tensor in inputs))
        return _Computed.apply(value, gradients, *inputs) if needed else value


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were freed by an earlier backward pass: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(slope) for gradient in gradients)
