"""Copied weights reproduce timm, transformers and torchvision; each wrong detail is detected."""

from itertools import accumulate

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.interop import timm as timm_names
from mmvit.interop import transformers as transformers_names
from mmvit.interop.imported import Names, rename_weights
from mmvit.towers.swin import PatchMerging, SwinBlock, SwinConfig, SwinTransformer

TOLERANCE = 1e-5  # of the largest logit, float32
LIBRARIES = ["timm", "transformers", "torchvision"]
SMALL = SwinConfig(image_size=64, width=32, depths=[2, 2, 4], num_heads=[1, 2, 4], window_size=4)
PADDED = SwinConfig(image_size=256, width=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=7)
LARGE = SwinConfig(image_size=384, width=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=12)
TINY = SwinConfig()
VARIANTS = {
    "tiny": TINY,
    "small": SwinConfig(depths=[2, 2, 18, 2]),
    "base": SwinConfig(width=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
    "base_384": SwinConfig(image_size=384, width=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12),
    "large": SwinConfig(width=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]),
}


class Classifier(nn.Module):
    """Return a tower with a linear head, as in all three libraries."""

    def __init__(self, config: SwinConfig, num_classes: int):
        super().__init__()
        self.features = SwinTransformer(
            config.patch_size,
            config.width,
            config.depths,
            config.num_heads,
            window_size=config.window_size,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            norm_eps=config.norm_eps,
            drop_path=config.drop_path,
        )
        self.head = nn.Linear(self.features.width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).pooled)


def build_reference(library: str, config: SwinConfig, num_classes: int) -> nn.Module:
    sizes = {"embed_dim": config.width, "depths": config.depths, "num_heads": config.num_heads}
    if library == "timm":
        sizes |= {"img_size": config.image_size, "window_size": config.window_size, "num_classes": num_classes}
        return timm.models.SwinTransformer(**sizes, drop_path_rate=0.0)
    if library == "torchvision":
        windows = {"patch_size": [4, 4], "window_size": [config.window_size] * 2}
        return torchvision.models.SwinTransformer(
            **sizes, **windows, num_classes=num_classes, stochastic_depth_prob=0.0
        )
    sizes |= {"image_size": config.image_size, "window_size": config.window_size}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=num_classes))


@torch.no_grad()
def random_reference(library: str, config: SwinConfig, num_classes: int = 10) -> nn.Module:
    """Randomise weights with preserved activation scale, norms, biases and tables."""
    torch.manual_seed(0)
    model = build_reference(library, config, num_classes).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            parameter.normal_()
        elif parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:  # patches stay small, as in trained models: there an epsilon counts
            parameter.normal_(std=(0.1 if parameter.ndim == 4 else 1.0) * parameter[0].numel() ** -0.5)
    return model


def torchvision_names(depths: list[int]) -> Names:
    first = [0, *accumulate(depths)]  # block of each stage
    return {
        r"^features\.0\.0\.": "embed.projection.",
        r"^features\.0\.2\.": "pre_norm.",
        r"^features\.([1357])\.(\d+)\.": lambda m: f"blocks.{first[int(m[1]) // 2] + int(m[2])}.",
        r"^features\.([246])\.": lambda m: f"blocks.{first[int(m[1]) // 2]}.merge.",
        r"\.norm1\.": ".attention_norm.",
        r"\.norm2\.": ".feed_forward_norm.",
        r"\.attn\.relative_position_bias_table": ".relative_positions",
        r".*relative_position_index": "",
        r"\.attn\.proj\.": ".attention.out.",
        r"\.attn\.": ".attention.",
        r"\.mlp\.0\.": ".feed_forward.up.",
        r"\.mlp\.3\.": ".feed_forward.down.",
    }


NAMES = {"timm": timm_names.swin_names, "transformers": transformers_names.swin_names, "torchvision": torchvision_names}


def copied(reference: nn.Module, config: SwinConfig, num_classes: int = 10) -> Classifier:
    library = type(reference).__module__.partition(".")[0]
    weights = rename_weights(reference.state_dict(), NAMES[library](config.depths))
    state = {name if name.startswith("head.") else f"features.{name}": tensor for name, tensor in weights.items()}
    model = Classifier(config, num_classes).eval()
    model.load_state_dict(state)
    return model


def images_of(height: int, width: int | None = None, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """The largest difference between logits, as a share of the largest logit."""
    expected = reference(images)
    expected = expected if isinstance(expected, Tensor) else expected.logits
    return ((model(images) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("library", LIBRARIES)
def test_copied_weights_give_equal_logits(library: str):
    reference = random_reference(library, SMALL)
    assert difference(copied(reference, SMALL), reference, images_of(64)) <= TOLERANCE


def test_swin_tiny_gives_equal_logits():
    reference = random_reference("timm", TINY, 1000)
    assert difference(copied(reference, TINY, 1000), reference, images_of(224, count=1)) <= TOLERANCE


@pytest.mark.parametrize("library", ["transformers", "torchvision"])
@pytest.mark.parametrize("sides", [(256, 256), (256, 320)])
def test_maps_that_the_window_does_not_divide(library: str, sides: tuple[int, int]):
    """Maps of 64, 32, 16 and 8 places a side, windows of 7."""
    reference = random_reference(library, PADDED)
    assert difference(copied(reference, PADDED), reference, images_of(*sides)) <= TOLERANCE


@pytest.mark.parametrize("library", LIBRARIES)
def test_384_px_with_windows_of_12(library: str):
    reference = random_reference(library, LARGE)
    assert difference(copied(reference, LARGE), reference, images_of(384, count=1)) <= TOLERANCE


@pytest.mark.parametrize(
    "wrong", [{"norm_eps": 1e-6}, {"activation": "gelu_tanh"}, {"activation": "quick_gelu"}], ids=str
)
def test_a_wrong_epsilon_or_activation_is_seen(wrong: dict):
    reference = random_reference("timm", SMALL)
    model = copied(reference, SMALL)
    changed = SwinConfig(**(vars(SMALL) | wrong))
    other = Classifier(changed, 10).eval()
    other.load_state_dict(model.state_dict())
    assert difference(other, reference, images_of(64)) > TOLERANCE


def without_masks(block: SwinBlock) -> None:
    block.shift_masks.zero_()


def without_shift(block: SwinBlock) -> None:
    block.shift = 0


def keys_before_queries(block: SwinBlock) -> None:
    block.index = block.index.T


def without_bias(block: SwinBlock) -> None:
    nn.init.zeros_(block.relative_positions)


def with_the_scale_of_the_whole_width(block: SwinBlock) -> None:
    for parameter in block.attention.q.parameters():
        parameter.mul_(block.attention.num_heads**-0.5)


def with_columns_first(block: SwinBlock) -> None:
    """Patches in the order [00, 01, 10, 11]."""
    if isinstance(block.merge, PatchMerging):
        for parameter in (block.merge.norm.weight, block.merge.norm.bias, block.merge.reduction.weight):
            quarters = parameter.chunk(4, dim=-1)
            parameter.copy_(torch.cat([quarters[i] for i in (0, 2, 1, 3)], dim=-1))


@pytest.mark.parametrize(
    "spoil",
    [
        without_masks,
        without_shift,
        without_bias,
        keys_before_queries,
        with_the_scale_of_the_whole_width,
        with_columns_first,
    ],
)
@torch.no_grad()
def test_a_wrong_block_is_seen(spoil: object):
    reference = random_reference("timm", SMALL)
    model = copied(reference, SMALL)
    for block in model.features.blocks:
        spoil(block)  # type: ignore[operator]
    assert difference(model, reference, images_of(64)) > 1e-3


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("tiny", 28_288_354),
        ("small", 49_606_258),
        ("base", 87_768_224),
        ("base_384", 87_903_584),
        ("large", 196_532_476),
    ],
)
def test_number_of_parameters(variant: str, count: int):
    with torch.device("meta"):
        model = Classifier(VARIANTS[variant], 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("variant", "billions"),
    [
        ("tiny", 4.49),
        pytest.param("small", 8.74, marks=pytest.mark.slow),
        pytest.param("base", 15.43, marks=pytest.mark.slow),
        pytest.param("base_384", 47.08, marks=pytest.mark.slow),
    ],
)
def test_multiply_accumulates(variant: str, billions: float):
    config = VARIANTS[variant]
    with torch.device("meta"):
        model = Classifier(config, 1000)
        images = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.01)
