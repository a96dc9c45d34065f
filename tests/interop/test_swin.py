"""Copied weights give the logits of timm, transformers and torchvision, and each wrong detail is seen."""

import re
from itertools import accumulate

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
# Their names to ours, the first that fits; stages and blocks come before.
RENAMES = {
    r"(patch_embed\.proj|features\.0\.0|.*patch_embeddings\.projection)\.": "features.embed.projection.",
    r"(patch_embed\.norm|features\.0\.2|.*embeddings\.norm)\.": "features.pre_norm.",
    r"(norm1|layernorm_before)\.": "attention_norm.",
    r"(norm2|layernorm_after)\.": "feed_forward_norm.",
    r"att.*\.relative_position_bias_table": "relative_positions",
    r"mlp\.(fc1|0)\.": "feed_forward.up.",
    r"mlp\.(fc2|3)\.": "feed_forward.down.",
    r"(attn\.proj|attention\.o_proj)\.": "attention.out.",
    r"attention\.(.)_proj\.": r"attention.\1.",
    r"^(swin\.layer)?norm\.": "features.norm.",
    r"^(head\.fc|head|classifier)\.": "head.",
}


class Classifier(nn.Module):
    """A tower with a linear head, as all three libraries have it."""

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
    """Weights that keep the size of what they map, and norms, biases and tables of their own."""
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


def renamed(name: str, depths: list[int]) -> str:
    first = [0, *accumulate(depths)]  # block of each stage

    def block(found: re.Match[str]) -> str:
        return f"features.blocks.{first[int(found[1])] + int(found[2])}."

    def merge(stage: int) -> str:
        return f"features.blocks.{first[stage]}.merge."

    name = re.sub(r"^(?:swin\.encoder\.)?layers\.(\d)\.blocks\.(\d+)\.", block, name)
    name = re.sub(r"^layers\.(\d)\.downsample\.", lambda found: merge(int(found[1])), name)
    name = re.sub(r"^swin\.encoder\.layers\.(\d)\.downsample\.", lambda found: merge(int(found[1]) + 1), name)
    found = re.match(r"features\.(\d)\.(\d+|norm|reduction)\.", name)
    if found and found[1] != "0":
        stage, is_stage = divmod(int(found[1]), 2)
        there = f"features.blocks.{first[stage] + int(found[2])}." if is_stage else f"{merge(stage)}{found[2]}."
        name = there + name[found.end() :]
    for theirs, ours in RENAMES.items():
        if re.search(theirs, name):
            return re.sub(theirs, ours, name)
    return name


def copied(reference: nn.Module, config: SwinConfig, num_classes: int = 10) -> Classifier:
    state = {}
    for theirs, tensor in reference.state_dict().items():
        name = renamed(theirs, config.depths)
        if "attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv.", f"attention.{part}.")] = piece
        elif not name.endswith("relative_position_index"):
            state[name] = tensor
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
