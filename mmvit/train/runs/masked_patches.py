"""A run without labels: a ViT learns to predict the mean colours of patches that it does not see."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from data_tools.core.errors import UsageError
from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import save_tower
from mmvit.data.batches import Batch
from mmvit.data.shards import IndexedShards
from mmvit.layers.patch_corruption import Corruption, corrupted_patches
from mmvit.layers.patch_embedding import patchify
from mmvit.losses.masked import BITS, masked_patch_loss, mean_colour_classes
from mmvit.models.image_towers import build_image_tower
from mmvit.models.masked_patches import ColourLogits, MaskedPatchModel
from mmvit.models.pixels import PixelNorm
from mmvit.towers.vit import VisionTransformer
from mmvit.train.device.memory import checkpoint_activations
from mmvit.train.device.parallel import make_shardable
from mmvit.train.runs.finetuning import Finetuning
from mmvit.train.step import Objective, Part


class PatchTargets(NamedTuple):
    """The mean colours of all patches, and which of them were corrupted."""

    colours: Int[Tensor, "b N"]
    corruption: Corruption


class MaskedPatchObjective(Objective):
    """Cross-entropy of the corrupted patches' mean colours."""

    compares = False

    def totals(self, parts: Sequence[Part]) -> int:
        """Count the corrupted patches of this process; each image of a step has as many."""
        return sum(int(part.targets.corruption.corrupted.sum()) for part in parts)

    def between(self, rows: ColourLogits, targets: PatchTargets) -> dict[str, Tensor]:
        """Return nothing: no two samples are compared."""
        return {}

    def within(self, rows: ColourLogits, part: Part, totals: int) -> dict[str, Tensor]:
        """Return the loss; its values over the parts of a step add up."""
        targets = part.targets
        loss = masked_patch_loss(rows.logits, targets.colours, targets.corruption.corrupted, totals)
        return {"masked_patches": loss}


class MaskedPatches(Finetuning):
    """The run of a ViT on pictures alone; `mmvit finetune` goes on from the tower that it exports."""

    model: MaskedPatchModel  # type: ignore[assignment]

    def open_data(self) -> None:
        """Open the pictures; labels and captions are not looked at."""
        data = self.config.data
        self.class_names: list[str] = []
        self.validation = None
        self.shards: IndexedShards = self.opened(
            "indexing", lambda: IndexedShards(expand_shards(data.train), data.verify, require_caption=False)
        )

    def build_model(self) -> None:
        """Make the tower, the mask embedding and the head."""
        torch.manual_seed(self.config.seed)
        self.model = self.fresh_model()
        checkpoint_activations(self.model, self.config.train.checkpointing)
        make_shardable(self.accelerator, self.model)
        self.model.to(self.accelerator.device)

    def build_objective(self) -> None:
        """Make the loss."""
        self.teacher = None
        self.objective = MaskedPatchObjective()

    def own_identity(self) -> dict[str, str]:
        """Return nothing: the pictures are all that there is."""
        return {}

    def part(self, batch: Batch) -> Part:
        """Move a micro-batch to the device, and draw which of its patches are corrupted."""
        device, patch_size = self.accelerator.device, self.model.image_tower.patch_size
        assert isinstance(batch.images, Tensor)
        images = batch.images.to(device, non_blocking=True)
        colours = mean_colour_classes(patchify(images, patch_size))
        corruption = corrupted_patches(batch.positions.to(device), colours.shape[1], self.config.seed)
        return Part((images, corruption), PatchTargets(colours, corruption))

    def sample_flops(self, batch: Batch) -> float:
        """Return the floating-point operations that a sample of this batch costs."""
        return self.flops.sample_flops(batch.images, None)

    def fresh_model(self) -> MaskedPatchModel:  # type: ignore[override]
        """Make an empty model for weights without adapters."""
        preprocess = self.config.preprocess
        try:
            tower = build_image_tower(self.config.model.image)
        except ValueError as error:
            raise UsageError(f"there is no such model: {error}", where="model") from error
        if not isinstance(tower, VisionTransformer):
            raise UsageError("masked patches need a ViT", where="model.image.kind", hint="model.image.kind=vit")
        return MaskedPatchModel(tower, PixelNorm(preprocess.mean, preprocess.std), 2 ** (3 * BITS))

    def export(self) -> Path:
        """Write the model folder of the tower alone."""
        config, folder = self.config, self.folder / "model"
        with self.finished_model() as model:
            self.on_main("saving", lambda: save_tower(folder, model.image_tower, config.model.image, config.preprocess))
        return folder
