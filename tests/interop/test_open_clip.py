"""Copied weights reproduce open_clip's embeddings; a wrong activation, epsilon or missing norm is detected."""

import re
from dataclasses import replace

import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError
from mmvit.checkpoint import load_weights
from mmvit.interop.open_clip import from_open_clip
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.models.pixels import CLIP_MEAN, CLIP_STD
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

TOLERANCE = 1e-5  # on unit rows, float32
VOCAB = 99
ACTIVATIONS = {"gelu": False, "quick_gelu": True}  # ours -> open_clip's `quick_gelu`


def small_config(activation: str) -> DualEncoderConfig:
    shape = {"depth": 3, "activation": activation, "norm_eps": 1e-5}
    return DualEncoderConfig(
        embed_dim=32,
        image=ViTConfig(image_size=32, patch_size=8, width=64, num_heads=2, **shape),
        text=TextConfig(vocab_size=VOCAB, end_of_text=VOCAB - 1, context_length=16, width=48, num_heads=4, **shape),
    )


def random_reference(activation: str) -> CLIP:
    torch.manual_seed(0)
    image = CLIPVisionCfg(layers=3, width=64, head_width=32, patch_size=8, image_size=32)
    text = CLIPTextCfg(layers=3, width=48, heads=4, vocab_size=VOCAB, context_length=16)
    model = CLIP(32, image, text, quick_gelu=ACTIVATIONS[activation]).eval()
    randomize_vectors(model)
    return model


def randomize_vectors(model: nn.Module) -> None:
    """Randomise norms and biases: ones and zeros would hide swapped or unused weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "embedding" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


def copied(reference: CLIP, config: DualEncoderConfig) -> DualEncoder:
    model = build_dual_encoder(config).eval()
    model.load_state_dict(from_open_clip(reference.state_dict()))
    return model


def some_images(size: int = 32) -> Tensor:
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_ids(vocab: int = VOCAB, length: int = 16) -> Tensor:
    """Rows of different lengths: text, end-of-text (the largest id), zeros."""
    ids = torch.randint(1, vocab - 1, (6, length), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate((1, 4, 7, 9, length - 2, length - 1)):
        ids[row, end], ids[row, end + 1 :] = vocab - 1, 0
    return ids


@torch.no_grad()
def differences(model: DualEncoder, reference: CLIP, images: Tensor, ids: Tensor) -> tuple[float, float]:
    """The largest difference between image embeddings and between text embeddings."""
    image = model.encode_image(images) - reference.encode_image(images, normalize=True)
    text = model.encode_text(ids) - reference.encode_text(ids, normalize=True)
    return image.abs().max().item(), text.abs().max().item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_copied_weights_give_equal_embeddings(activation: str):
    reference = random_reference(activation)
    model = copied(reference, small_config(activation))
    assert max(differences(model, reference, some_images(), some_ids())) <= TOLERANCE
    assert torch.equal(model.logit_scale, reference.logit_scale)


@pytest.mark.parametrize("wrong", [{"activation": "gelu"}, {"activation": "gelu_tanh"}, {"norm_eps": 1e-6}], ids=str)
def test_a_wrong_activation_or_epsilon_is_seen(wrong: dict):
    reference = random_reference("quick_gelu")
    config = small_config("quick_gelu")
    config.image, config.text = replace(config.image, **wrong), replace(config.text, **wrong)
    assert min(differences(copied(reference, config), reference, some_images(), some_ids())) > TOLERANCE


def test_a_missing_norm_before_the_blocks_is_seen():
    reference = random_reference("gelu")
    config = small_config("gelu")
    config.image.pre_norm = False
    model = build_dual_encoder(config).eval()
    weights = from_open_clip(reference.state_dict())
    model.load_state_dict({name: tensor for name, tensor in weights.items() if ".pre_norm." not in name})
    image, text = differences(model, reference, some_images(), some_ids())
    assert image > TOLERANCE
    assert text <= TOLERANCE


def test_real_size_vit_b32():
    torch.manual_seed(0)
    with torch.device("meta"):
        reference, model = (
            CLIP(512, CLIPVisionCfg(patch_size=32), CLIPTextCfg()),
            build_dual_encoder(DualEncoderConfig()),
        )
    reference.to_empty(device="cpu").eval()
    reference.attn_mask = torch.full((77, 77), float("-inf")).triu_(1)  # a buffer that no checkpoint holds
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.normal_(float(name.endswith(("ln_1.weight", "ln_2.weight"))), fan_in**-0.5)
    model.load_state_dict(from_open_clip(reference.state_dict()), assign=True)
    images, ids = some_images(224)[:2], some_ids(49408, 77)[:2]
    assert max(differences(model.eval(), reference, images, ids)) <= TOLERANCE


def test_a_left_over_weight_is_named():
    reference = random_reference("gelu")
    left_over = {"transformer.resblocks.0.ls_1.gamma": "text_tower.blocks.0.ls_1.gamma", "logit_bias": "logit_bias"}
    for theirs, ours in left_over.items():
        weights = from_open_clip(reference.state_dict() | {theirs: torch.zeros(1)})
        with pytest.raises(CheckpointError, match=re.escape(f'Unexpected key(s) in state_dict: "{ours}"')):
            load_weights(copied(reference, small_config("gelu")), weights, "a checkpoint")


def test_pixels_are_normalised_as_openai_does():
    assert (CLIP_MEAN, CLIP_STD) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
