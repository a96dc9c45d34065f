"""Images that keep their shape: cut into patches, as many as a budget allows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from mmvit.layers.patch_embedding import Patches


class PatchBudget(NamedTuple):
    """An image becomes at most `num_patches` patches of `patch_size` px (NaFlex, section 2.4.2 of SigLIP 2)."""

    num_patches: int
    patch_size: int

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of patches at the largest scale that fits, each side rounded, and at least 1.

        SigLIP 2 rounds both sides up; rounding to the nearest leaves the shape closer to what it was.
        """
        rows = columns = 1
        while True:  # as the scale grows, the side that is next to round up to one more patch
            next_row, next_column = (2 * rows + 1) * width, (2 * columns + 1) * height
            larger = rows + (next_row <= next_column), columns + (next_column <= next_row)
            if larger[0] * larger[1] > self.num_patches:
                return rows, columns
            rows, columns = larger

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the height and width, px, that an image is resized to."""
        rows, columns = self.grid(width, height)
        return rows * self.patch_size, columns * self.patch_size


def pack_patches(images: Sequence[UInt8[np.ndarray, "3 _ _"]], budget: PatchBudget) -> Patches:
    """Cut images of the budget's sizes into patches, in the order of `patchify`, and fill up with zeros."""
    side = budget.patch_size
    pixels = np.zeros((len(images), budget.num_patches, side * side * 3), np.uint8)
    grids = np.array([(image.shape[1] // side, image.shape[2] // side) for image in images]).reshape(-1, 2)
    for filled, image, (rows, columns) in zip(pixels, images, grids, strict=True):
        patches = image.reshape(3, rows, side, columns, side).transpose(1, 3, 2, 4, 0)  # [h, w, P, P, 3]
        filled[: rows * columns] = patches.reshape(rows * columns, -1)
    return Patches(torch.from_numpy(pixels), torch.from_numpy(grids))
