"""Copied weights reproduce transformers' CLIPModel, in addition to open_clip."""

import pytest
import torch

from mmvit.interop.imported import rename_weights
from mmvit.interop.transformers import CLIP_NAMES
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

transformers = pytest.importorskip("transformers")

VOCAB = 99


def reference(activation: str) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "hidden_act": activation}
    text = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "vocab_size": VOCAB} | shape
    # With eos_token_id 2 it would pool at the largest id, for the sake of old checkpoints.
    text |= {"max_position_embeddings": 16, "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1, "pad_token_id": 0}
    image = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=image | shape, projection_dim=32)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_copied_weights_give_equal_embeddings(activation: str):
    theirs = reference(activation)
    shape = {"depth": 3, "activation": activation}
    ours = build_dual_encoder(
        DualEncoderConfig(
            embed_dim=32,
            image=ViTConfig(image_size=32, patch_size=8, width=64, num_heads=2, **shape),
            text=TextConfig(vocab_size=VOCAB, end_of_text=VOCAB - 1, context_length=16, width=48, num_heads=4, **shape),
        )
    ).eval()
    ours.load_state_dict(rename_weights(theirs.state_dict(), CLIP_NAMES))
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(1, VOCAB - 1, (3, 16))
    ids[torch.arange(3), torch.tensor([3, 8, 15])] = VOCAB - 1
    with torch.no_grad():
        expected = theirs(pixel_values=images, input_ids=ids)
        assert (ours.encode_image(images) - expected.image_embeds).abs().max() <= 1e-5
        assert (ours.encode_text(ids) - expected.text_embeds).abs().max() <= 1e-5
