"""An image tower that wraps any timm model."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from mmvit.layers.drop_path import DropPath
from mmvit.layers.patch_embedding import Patches
from mmvit.towers.config import TimmConfig as TimmConfig
from mmvit.towers.contract import Tower, TowerOutput
from mmvit.towers.timm_models import create_timm


class TimmTower(Tower):
    """A timm model (Wightman 2019, PyTorch Image Models) without its classifier, randomly initialised.

    `pooled` is the input of its classifier. The tokens are its last features: the positions of a feature map row by
    row, or all tokens of a transformer, including its class token. If they have another width because a hidden layer
    follows the pooling, as in MobileNetV3, or if there are several feature maps, as in CoaT, the one token is `pooled`.

    Models with position tables or windows accept images of `image_size` only, convolutional ones of any size.
    """

    def __init__(self, name: str, image_size: int):
        super().__init__()
        self.name = name
        self.model, self.takes_one_size = create_timm(name, image_size)
        _replace_drop_path(self.model)
        self.image_size = image_size
        self.width = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)
        self.stride = int(self.model.feature_info[-1]["reduction"])
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(
        self, images: Float[Tensor, "B 3 H W"] | Patches, keep: Int[Tensor, "B K"] | None = None
    ) -> TowerOutput:
        """Encode normalised images.

        Raises:
            ValueError: the model was not built for this image size, or `Patches` or `keep` are passed.
        """
        self.check_inputs(images, keep)
        assert isinstance(images, Tensor)
        features = self.model.forward_features(images.to(next(self.model.parameters()).dtype))
        pooled = self.model.forward_head(features)  # [B, D]
        if isinstance(features, Tensor) and features.ndim == 4:
            features = features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)
        fits = isinstance(features, Tensor) and features.shape[2] == self.width
        return TowerOutput(pooled, features if fits else pooled[:, None])

    def check_inputs(self, images: Tensor | Patches, keep: Tensor | None = None) -> None:
        """Raise ValueError for a size that the model was not built for, and for patches."""
        if isinstance(images, Patches) or keep is not None:
            raise ValueError("a timm model needs whole images: it supports neither patch dropout nor packed patches")
        height, width = images.shape[2:]
        if self.takes_one_size and (height, width) != (self.image_size, self.image_size):
            size = f"{self.image_size}x{self.image_size}"
            raise ValueError(f"timm's {self.name} was built for images of {size} px, got {height}x{width} px")


def _replace_drop_path(model: nn.Module) -> None:
    """Replace timm's layers, which some models have by default, by ours, whose draws are the same for every split."""
    from timm.layers.drop import DropPath as TimmDropPath

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TimmDropPath) and child.scale_by_keep and child.drop_prob != 1:
                setattr(parent, name, DropPath(child.drop_prob or 0.0))
