"""Copied weights reproduce transformers' CvT, and with QuickGELU the released code; exact parameter counts."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmvit.interop.imported import rename_weights
from mmvit.interop.transformers import CVT_NAMES
from mmvit.towers.cvt import CvT

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {"mlp_ratio": 4.0, "qkv_bias": True, "drop_path": 0.0}
SETTINGS |= {"patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "norm_eps": 1e-5, "activation": "gelu"}
CUT_DOWN = ([16, 24, 48], [1, 2, 3], [1, 3, 6])  # widths, depths, heads
CVT_13 = ([64, 192, 384], [1, 2, 10], [1, 3, 6])
CVT_21 = ([64, 192, 384], [1, 4, 16], [1, 3, 6])
CVT_W24 = ([192, 768, 1024], [2, 2, 20], [3, 12, 16])


class Classifier(nn.Module):
    """Return a tower and a head in evaluation mode, like freshly loaded transformers modules."""

    def __init__(self, widths: list[int], depths: list[int], heads: list[int], num_classes: int, **changes: Any):
        super().__init__()
        self.tower = CvT(widths, depths, heads, **(SETTINGS | changes))
        self.head = nn.Linear(widths[-1], num_classes)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tower(images).pooled)


def reference(widths: list[int], depths: list[int], heads: list[int]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": widths, "depth": depths, "num_heads": heads, "num_labels": 10}
    config = transformers.CvtConfig(**sizes, drop_path_rate=[0.0, 0.0, 0.0])
    model = transformers.CvtForImageClassification(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.normal_(std=0.2).add_(1.0 if re.search(r"norm\w*\.weight$", name) else 0.0)
            elif tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
    return model


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of their weights under our names."""
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    named = rename_weights(copies, CVT_NAMES).items()
    return {name if name.startswith("head.") else f"tower.{name}": tensor for name, tensor in named}


def copied(theirs: nn.Module, shape: tuple[list[int], ...], **changes: Any) -> Classifier:
    model = Classifier(*shape, num_classes=10, **changes)
    model.load_state_dict(renamed(theirs.state_dict()))
    return model


def difference(ours: nn.Module, theirs: Tensor, images: Tensor) -> float:
    """Largest difference of logits, as a part of the largest logit."""
    with torch.no_grad():
        return float((ours(images) - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return reference(*CUT_DOWN)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).logits


def test_copied_weights_give_equal_logits(theirs: nn.Module, images: Tensor):
    assert difference(copied(theirs, CUT_DOWN), logits(theirs, images), images) <= 1e-5


def test_copied_weights_of_cvt_13_give_equal_logits(images: Tensor):
    theirs = reference(*CVT_13)
    assert difference(copied(theirs, CVT_13), logits(theirs, images[:1]), images[:1]) <= 1e-5


def test_training_mode_gives_equal_logits_gradients_and_statistics(images: Tensor):
    theirs = reference(*CUT_DOWN).train()
    ours = copied(theirs, CUT_DOWN).train()
    expected, got = theirs(images).logits, ours(images)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected.square().sum().backward()
    got.square().sum().backward()
    statistics = {name: tensor for name, tensor in renamed(theirs.state_dict()).items() if "running" in name}
    assert len(statistics) == 2 * 3 * (1 + 2 + 3)
    for name, tensor in statistics.items():
        assert (ours.state_dict()[name] - tensor).abs().max() <= 1e-5
    gradients = renamed({name: parameter.grad for name, parameter in theirs.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def head_scale(stage: int) -> Callable[[Classifier], None]:
    def damage(model: Classifier) -> None:
        for block in model.tower.stages[stage].blocks:
            block.attention.scale = (block.attention.q.out_features // block.attention.num_heads) ** -0.5

    return damage


def all_keys(model: Classifier) -> None:
    for stage in model.tower.stages:
        for block in stage.blocks:
            block.attention.k_neighbours[0].stride = block.attention.v_neighbours[0].stride = (1, 1)


def other_batch_norm_eps(model: Classifier) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


@pytest.mark.parametrize("damage", [head_scale(1), head_scale(2), all_keys, other_batch_norm_eps])
def test_c3_another_scale_or_stride_is_caught(theirs: nn.Module, images: Tensor, damage: Callable[[Classifier], None]):
    model = copied(theirs, CUT_DOWN)
    damage(model)
    assert difference(model, logits(theirs, images), images) > 1e-4


@pytest.mark.parametrize(
    "changes",
    [{"norm_eps": 1e-6}, {"norm_eps": 1e-12}, {"activation": "quick_gelu"}, {"activation": "gelu_tanh"}],
    ids=str,
)
def test_another_epsilon_or_activation_is_caught(theirs: nn.Module, images: Tensor, changes: dict[str, Any]):
    assert difference(copied(theirs, CUT_DOWN, **changes), logits(theirs, images), images) > 1e-5


def test_the_head_scale_is_the_same_in_a_stage_of_one_head(theirs: nn.Module, images: Tensor):
    model = copied(theirs, CUT_DOWN)
    head_scale(0)(model)
    assert difference(model, logits(theirs, images), images) <= 1e-5


def released(model: Classifier, images: Tensor) -> Tensor:
    """The released network in evaluation mode, written out once more from its description, in float64.

    Maps all the way, attention by sums over positions, QuickGELU x * sigmoid(1.702 x).
    """
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def neighbours(x: Tensor, name: str, stride: int) -> Tensor:  # [B, C, H, W] -> [B, N, C]
        x = F.conv2d(x, state[f"{name}.0.weight"], stride=stride, padding=1, groups=x.shape[1])
        mean, variance = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        x = x.flatten(2).transpose(1, 2)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.1.weight"] + state[f"{name}.1.bias"]

    def attend(x: Tensor, name: str, num_cells: int, rows: int, num_heads: int) -> Tensor:
        token, cells = x[:, :-num_cells], x[:, -num_cells:]
        maps = cells.transpose(1, 2).reshape(len(x), x.shape[2], rows, -1)
        q, k, v = (
            linear(
                torch.cat([token, neighbours(maps, f"{name}.{letter}_neighbours", stride)], dim=1), f"{name}.{letter}"
            )
            for letter, stride in (("q", 1), ("k", 2), ("v", 2))
        )
        heads = []
        for part in torch.arange(x.shape[2]).chunk(num_heads):
            scores = torch.einsum("bnd,bmd->bnm", q[:, :, part], k[:, :, part]) * x.shape[2] ** -0.5
            heads.append(scores.softmax(dim=-1) @ v[:, :, part])
        return linear(torch.cat(heads, dim=2), f"{name}.out")

    maps = images.double()
    for i, (stage, num_heads) in enumerate(zip(model.tower.stages, CUT_DOWN[2], strict=True)):
        name = f"tower.stages.{i}"
        stride, padding = ((4, 2), (2, 1), (2, 1))[i]
        weight, bias = state[f"{name}.embed.projection.weight"], state[f"{name}.embed.projection.bias"]
        maps = F.conv2d(maps, weight, bias, stride=stride, padding=padding)
        rows, num_cells = maps.shape[2], maps.shape[2] * maps.shape[3]
        x = norm(maps.flatten(2).transpose(1, 2), f"{name}.embed.norm")
        if i == 2:
            x = torch.cat([state[f"{name}.class_token"].expand(len(x), 1, -1), x], dim=1)
        for j in range(len(stage.blocks)):
            block = f"{name}.blocks.{j}"
            x = x + attend(norm(x, f"{block}.attention_norm"), f"{block}.attention", num_cells, rows, num_heads)
            hidden = linear(norm(x, f"{block}.feed_forward_norm"), f"{block}.feed_forward.up")
            x = x + linear(hidden * (1.702 * hidden).sigmoid(), f"{block}.feed_forward.down")
        maps = x[:, -num_cells:].transpose(1, 2).reshape(len(x), -1, rows, num_cells // rows)
    return linear(norm(x[:, 0], "tower.norm"), "head")


def test_quick_gelu_gives_the_logits_of_the_released_code(theirs: nn.Module, images: Tensor):
    model = copied(theirs, CUT_DOWN, activation="quick_gelu")
    expected = released(model, images)
    assert difference(model, expected, images) <= 1e-5
    assert difference(copied(theirs, CUT_DOWN), expected, images) > 1e-3


@pytest.mark.parametrize(("shape", "count"), [(CVT_13, 19_997_480), (CVT_21, 31_622_696), (CVT_W24, 277_196_392)])
def test_exact_numbers_of_parameters(shape: tuple[list[int], ...], count: int):
    with torch.device("meta"):
        model = Classifier(*shape, num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("shape", "macs"), [(CVT_13, 4.57e9), (CVT_21, 7.18e9)])
def test_multiply_accumulates_at_224(shape: tuple[list[int], ...], macs: float):
    with torch.device("meta"):
        model, image = Classifier(*shape, num_classes=1000), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
            model(image)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.01)
