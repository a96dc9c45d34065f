"""Masked patch prediction: a ViT learns without labels to predict the mean colours of hidden patches.

`mmvit finetune` can start from the exported tower.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from data_tools.core.errors import UsageError
from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import save_tower
from mmvit.config import FinetuneConfig
from mmvit.data.batches import Batch
from mmvit.data.shards import IndexedShards
from mmvit.layers.drop_path import DrawKey
from mmvit.layers.patch_corruption import Corruption, corrupted_patches
from mmvit.layers.patch_embedding import patchify
from mmvit.losses.masked import BITS, masked_patch_loss, mean_colour_classes
from mmvit.models.image_towers import build_image_tower
from mmvit.models.masked_patches import ColourLogits, MaskedPatchModel
from mmvit.models.pixels import PixelNorm
from mmvit.towers.vit import VisionTransformer
from mmvit.train.contract import Part, TaskParts
from mmvit.train.device.memory import checkpoint_activations
from mmvit.train.device.parallel import make_shardable
from mmvit.train.runs.batches import build_batches
from mmvit.train.safety.agree import main_first
from mmvit.train.safety.learning import Chance
from mmvit.train.safety.watch import Watch
from mmvit.train.start.size import check_size


class PatchTargets(NamedTuple):
    """The mean colours of all patches, and which of them were corrupted."""

    colours: Int[Tensor, "b N"]
    corruption: Corruption


class MaskedPatchObjective:
    """Cross-entropy of the corrupted patches' mean colours."""

    compares = False

    def totals(self, parts: Sequence[Part]) -> int:
        """Return the number of corrupted patches of this rank; it is equal for all images of a step."""
        return sum(int(part.targets.corruption.corrupted.sum()) for part in parts)

    def between(self, rows: ColourLogits, targets: PatchTargets) -> dict[str, Tensor]:
        """Return no losses: samples are not compared."""
        return {}

    def within(self, rows: ColourLogits, part: Part, totals: int) -> dict[str, Tensor]:
        """Return the loss; its values add up over the micro-batches of a step."""
        targets = part.targets
        loss = masked_patch_loss(rows.logits, targets.colours, targets.corruption.corrupted, totals)
        return {"masked_patches": loss}


def build_masked_patches(config: FinetuneConfig, accelerator: Accelerator, watch: Watch) -> TaskParts:
    """Open the images, whose labels and captions are not used, and build the model and the loss."""
    with main_first(accelerator, watch, "indexing"):
        shards = IndexedShards(expand_shards(config.data.train), config.data.verify, require_caption=False)
    device = accelerator.device
    check_size(partial(_build_model, config), config.model.image)
    torch.manual_seed(config.seed)
    model = _build_model(config)
    checkpoint_activations(model, config.train.checkpointing)
    make_shardable(accelerator, model)
    model.to(device)
    return TaskParts(
        source=shards,
        model=model,
        batches=build_batches(config, shards, accelerator),
        part=lambda step, batch: _part(batch, model.image_tower.patch_size, config.seed, device),
        flop_inputs=lambda step, batch: (batch.images, None, None),
        objective=MaskedPatchObjective(),
        fresh_model=partial(_build_model, config),
        export=lambda model, folder: save_tower(folder, model.image_tower, config.model.image, config.preprocess),
        identity={},
        chance=Chance("masked_patches", math.log(2 ** (3 * BITS)), "ln(colours)"),
    )


def _build_model(config: FinetuneConfig) -> MaskedPatchModel:
    """Build the tower, the mask embedding and the head."""
    try:
        tower = build_image_tower(config.model.image)
    except ValueError as error:
        raise UsageError(f"invalid model: {error}", where="model") from error
    if not isinstance(tower, VisionTransformer):
        raise UsageError("masked patches need a ViT", where="model.image.kind", hint="model.image.kind=vit")
    return MaskedPatchModel(tower, PixelNorm(config.preprocess.mean, config.preprocess.std), 2 ** (3 * BITS))


def _part(batch: Batch, patch_size: int, seed: int, device: torch.device) -> Part:
    """Move a micro-batch to the device and draw the patches that are corrupted."""
    assert isinstance(batch.images, Tensor)
    images = batch.images.to(device, non_blocking=True)
    colours = mean_colour_classes(patchify(images, patch_size))
    draws = DrawKey(batch.positions.to(device), seed)
    corruption = corrupted_patches(draws.positions, colours.shape[1], seed)
    return Part((images, corruption), PatchTargets(colours, corruption), draws)
