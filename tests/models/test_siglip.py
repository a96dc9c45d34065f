"""Copied weights reproduce SigLIP's embeddings; a wrong activation, epsilon, mask or pooling is detected."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

VOCAB, END, LENGTH = 99, 1, 16
TOLERANCE = 1e-5  # on unit rows, float32
SHAPE = {"width": 64, "depth": 2, "num_heads": 4, "norm_eps": 1e-6}
CONFIG = DualEncoderConfig(
    embed_dim=64,
    image_projection=False,
    text_projection_bias=True,
    initial_logit_bias=-10.0,
    image=ViTConfig(image_size=32, patch_size=8, pool="attention", pre_norm=False, patch_bias=True, **SHAPE),
    text=TextConfig(VOCAB, LENGTH, END, causal=False, pool="last", **SHAPE),
)
MODULES = {
    "patch_embed.proj": "embed.projection",
    "attn_pool.q": "pool.attention.q",
    "attn_pool.proj": "pool.attention.out",
    "attn_pool.norm": "pool.norm",
    "attn_pool.mlp.fc1": "pool.feed_forward.up",
    "attn_pool.mlp.fc2": "pool.feed_forward.down",
    "ln_final": "norm",
}
BLOCK_PARTS = {"attn.proj": "attention.out", "norm1": "attention_norm", "norm2": "feed_forward_norm"}
BLOCK_PARTS |= {"attn.out_proj": "attention.out", "ln_1": "attention_norm", "ln_2": "feed_forward_norm"}
BLOCK_PARTS |= {"mlp.fc1": "feed_forward.up", "mlp.fc2": "feed_forward.down"}
BLOCK_PARTS |= {"mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down"}


@pytest.fixture(scope="module")
def references() -> tuple[nn.Module, nn.Module]:
    """The towers of open_clip's ViT-B-16-SigLIP, small, with every number drawn at random."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    image = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **shape)
    text = TextTransformer(
        *(LENGTH, VOCAB, 64, 4, 2),
        output_dim=64,
        no_causal_mask=True,
        pool_type="last",
        proj_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    with torch.no_grad():
        for tower in (image, text):
            for parameter in tower.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return image.eval(), text.eval()


def renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One weight of timm's image tower or of open_clip's text tower under our names."""
    parts = name.split(".")
    module, kind = ".".join(parts[:-1]), parts[-1]
    prefix = ""
    if "blocks" in name:
        depth = 2 if parts[0] == "blocks" else 3  # blocks.0 | transformer.resblocks.0
        prefix, module = f"blocks.{parts[depth - 1]}.", ".".join(parts[depth:-1])
    if kind.startswith("in_proj_") or module in ("attn.qkv", "attn_pool.kv"):
        letters = "kv" if module == "attn_pool.kv" else "qkv"
        place = "pool.attention" if module == "attn_pool.kv" else "attention"
        rows = tensor.chunk(len(letters))
        kind = kind.removeprefix("in_proj_")
        return {f"{prefix}{place}.{letter}.{kind}": part for letter, part in zip(letters, rows, strict=True)}
    tables = {"pos_embed": "positions", "positional_embedding": "positions", "attn_pool.latent": "pool.probe"}
    if name in tables:
        return {tables[name]: tensor.squeeze()}
    return {f"{prefix}{(BLOCK_PARTS if prefix else MODULES).get(module, module)}.{kind}": tensor}


def copied(references: tuple[nn.Module, nn.Module], config: DualEncoderConfig) -> DualEncoder:
    model = build_dual_encoder(config).eval()
    state = {"logit_scale": model.logit_scale.data, "logit_bias": model.logit_bias.data}
    for tower, reference in zip(("image_tower", "text_tower"), references, strict=True):
        for name, tensor in reference.state_dict().items():
            for ours, part in renamed(name, tensor).items():
                state[ours if ours.startswith("text_projection") else f"{tower}.{ours}"] = part
    model.load_state_dict(state)
    return model


@torch.no_grad()
def differences(references: tuple[nn.Module, nn.Module], config: DualEncoderConfig) -> tuple[float, float]:
    """The largest difference between image embeddings and between text embeddings."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    ids = torch.randint(2, VOCAB, (4, LENGTH), generator=generator)
    for row, end in enumerate((1, 4, 9, LENGTH - 1)):
        ids[row, end:] = END  # SigLIP's end-of-text is its padding
    model = copied(references, config)
    image, text = (F.normalize(tower(given), dim=-1) for tower, given in zip(references, (images, ids), strict=True))
    found = model.encode_image(images), model.encode_text(ids[:3, :10])  # cut: the tower fills up itself
    return (found[0] - image).abs().max().item(), (found[1] - text[:3]).abs().max().item()


def test_copied_weights_give_equal_embeddings(references: tuple[nn.Module, nn.Module]):
    assert max(differences(references, CONFIG)) <= TOLERANCE


@pytest.mark.parametrize("wrong", [{"activation": "gelu_tanh"}, {"norm_eps": 1e-3}], ids=str)
def test_a_wrong_activation_or_epsilon_is_seen(references: tuple[nn.Module, nn.Module], wrong: dict):
    image, text = replace(CONFIG.image, **wrong), replace(CONFIG.text, **wrong)
    assert min(differences(references, replace(CONFIG, image=image, text=text))) > TOLERANCE


@pytest.mark.parametrize("wrong", [{"causal": True}, {"pool": "end_of_text"}], ids=str)
def test_a_wrong_mask_or_pool_is_seen(references: tuple[nn.Module, nn.Module], wrong: dict):
    image, text = differences(references, replace(CONFIG, text=replace(CONFIG.text, **wrong)))
    assert image <= TOLERANCE
    assert text > TOLERANCE
