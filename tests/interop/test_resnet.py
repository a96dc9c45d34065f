"""Copied weights reproduce open_clip's RN50; each missing detail is detected."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.modified_resnet import ModifiedResNet as OpenClipResNet
from torch import Tensor, nn

from mmvit.interop.open_clip import from_open_clip
from mmvit.models.build import build_text_tower
from mmvit.models.dual_encoder import DualEncoder
from mmvit.models.pixels import CLIP_MEAN, CLIP_STD, PixelNorm
from mmvit.towers.resnet import Bottleneck, ModifiedResNet
from mmvit.towers.text import TextConfig

TOLERANCE = 1e-5  # on unit rows, float32
VOCAB = 99
EMBED_DIM = 48
DEPTHS = (1, 2, 1, 1)


def renamed(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of open_clip's image tower under our names."""
    whole = from_open_clip({f"visual.{name}": tensor for name, tensor in visual.items()})
    return {name.removeprefix("image_tower."): tensor for name, tensor in whole.items()}


def random_reference() -> CLIP:
    torch.manual_seed(0)
    image = CLIPVisionCfg(layers=DEPTHS, width=16, head_width=64, image_size=64)
    text = CLIPTextCfg(layers=1, width=32, heads=2, vocab_size=VOCAB, context_length=8)
    return randomize(CLIP(EMBED_DIM, image, text)).eval()


@torch.no_grad()
def randomize(model: nn.Module, least_variance: float = 0.5) -> nn.Module:
    """Randomise norms, biases and statistics, with a larger effect of the images."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, least_variance, 4 * least_variance)
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            nn.init.normal_(module.bias, std=0.2)
    return model


def copied(reference: CLIP, *, num_heads: int = 8) -> DualEncoder:
    tower = ModifiedResNet((2, 2), EMBED_DIM, DEPTHS, stem_width=16, num_heads=num_heads)
    text = TextConfig(vocab_size=VOCAB, context_length=8, end_of_text=VOCAB - 1, width=32, depth=1, num_heads=2)
    return with_weights(dual_encoder(tower, text, EMBED_DIM), reference)


def dual_encoder(tower: ModifiedResNet, text: TextConfig, embed_dim: int) -> DualEncoder:
    pixel_norm = PixelNorm(CLIP_MEAN, CLIP_STD)
    return DualEncoder(tower, build_text_tower(text), embed_dim, pixel_norm, image_projection=False).eval()


def with_weights(model: DualEncoder, reference: CLIP) -> DualEncoder:
    model.load_state_dict(from_open_clip(reference.state_dict()))
    return model


def some_images(size: int = 64) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model: DualEncoder, reference: CLIP, images: Tensor) -> float:
    return (model.encode_image(images) - reference.encode_image(images, normalize=True)).abs().max().item()


@torch.no_grad()
def test_p5_copied_weights_give_equal_embeddings_and_logits():
    reference, images = random_reference(), some_images()
    model = copied(reference)
    assert difference(model, reference, images) <= TOLERANCE
    ids = torch.tensor([[5, 7, VOCAB - 1, 0, 0, 0, 0, 0], [9, 3, 4, 4, 1, VOCAB - 1, 0, 0]])
    expected = reference.get_logits(images, ids)[0]
    logits = model.logit_scale.exp() * model.encode_image(images) @ model.encode_text(ids).T
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_training_gives_equal_statistics_and_gradients():
    reference, images = random_reference(), some_images()
    model = copied(reference)
    reference.train()
    model.train()
    with torch.enable_grad():
        reference.encode_image(images, normalize=True)[:, 0].sum().backward()
        model.encode_image(images)[:, 0].sum().backward()
    ours = dict(model.image_tower.named_parameters())
    gradients = {name: parameter.grad for name, parameter in reference.visual.named_parameters()}
    for name, expected in renamed(gradients).items():
        torch.testing.assert_close(ours[name].grad, expected, rtol=1e-3, atol=1e-5)
    statistics = dict(model.image_tower.named_buffers())
    assert len(statistics) == len(list(reference.visual.buffers())) > 0
    theirs = renamed(reference.visual.state_dict())
    for name, tensor in statistics.items():
        torch.testing.assert_close(tensor, theirs[name])


def test_a_pool_at_another_place_is_seen(monkeypatch: pytest.MonkeyPatch):
    """After the third convolution the result would be equal: average pooling and a 1x1 convolution commute."""

    def pool_first(self: Bottleneck, x: Tensor) -> Tensor:
        y = torch.relu(self.norm2(self.conv2(self.pool(torch.relu(self.norm1(self.conv1(x)))))))
        return torch.relu(self.norm3(self.conv3(y)) + self.shortcut(x))

    reference = random_reference()
    model = copied(reference)
    monkeypatch.setattr(Bottleneck, "forward", pool_first)
    assert difference(model, reference, some_images()) > TOLERANCE


def test_a_strided_convolution_instead_of_the_average_is_seen():
    reference = random_reference()
    model = copied(reference)
    for module in model.image_tower.modules():
        if isinstance(module, nn.AvgPool2d):
            module.forward = lambda x: x[:, :, ::2, ::2]
    assert difference(model, reference, some_images()) > TOLERANCE


def test_wrong_heads_are_seen():
    reference = random_reference()
    assert difference(copied(reference, num_heads=16), reference, some_images()) > TOLERANCE


@pytest.mark.parametrize("name", ["positions", "q.weight", "k.bias", "v.bias"])
@torch.no_grad()
def test_a_wrong_scale_or_missing_part_of_the_pooling_is_seen(name: str):
    """Doubled queries imitate a wrong scale; the bias of keys has no effect, as softmax is invariant to it."""
    reference = random_reference()
    model = copied(reference)
    parameter = model.image_tower.pool.get_parameter(name)
    parameter.mul_(2 if name == "q.weight" else 0)
    moved = difference(model, reference, some_images())
    assert moved <= TOLERANCE if name == "k.bias" else moved > TOLERANCE


@pytest.mark.parametrize("place", ["stem", "stages.3"])
def test_a_wrong_epsilon_is_seen(place: str):
    reference = random_reference()
    model = copied(reference)
    for module in model.image_tower.get_submodule(place).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    assert difference(model, reference, some_images()) > TOLERANCE


def full_size() -> ModifiedResNet:
    with torch.device("meta"):
        return ModifiedResNet((7, 7), 1024, (3, 4, 6, 3), stem_width=64, num_heads=32)


def test_p5_rn50_has_its_number_of_parameters():
    tower = full_size()
    with torch.device("meta"):
        model = dual_encoder(tower, TextConfig(), 1024)
        reference = CLIP(1024, CLIPVisionCfg(layers=(3, 4, 6, 3), width=64), CLIPTextCfg())
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, tower, reference)]
    assert counts == [102_007_137, 38_316_896, 102_007_137]
    assert 102_007_137 - 38_316_896 - 1 == 63_690_240  # text


@torch.no_grad()
def test_p5_full_rn50_gives_equal_embeddings():
    torch.manual_seed(0)
    # With smaller variances maps grow until each head attends to one place alone, which would hide its scale.
    reference = randomize(OpenClipResNet([3, 4, 6, 3], 1024, 32), least_variance=1.0).eval()
    tower = full_size().eval()
    tower.load_state_dict(renamed(reference.state_dict()), assign=True)
    images = some_images(224)[:1]
    ours, expected = (F.normalize(each, dim=-1) for each in (tower(images).pooled, reference(images)))
    assert (ours - expected).abs().max() <= TOLERANCE
