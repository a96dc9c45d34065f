"""open_clip's models: CLIP with a ViT or a modified ResNet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_tools.errors import UsageError
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.data.transforms import PreprocessConfig
from mmvit.interop.imported import Imported, Names, activation_name, cannot_open, rename_weights
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.contract import TowerConfig
from mmvit.towers.resnet import ResNetConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

_CLIP_VOCABULARY = 49408  # its tokenizer's
_NAMES: Names = {
    r"^visual\.transformer\.resblocks": "image_tower.blocks",
    r"^transformer\.resblocks": "text_tower.blocks",
    r"\.ln_1\.": ".attention_norm.",
    r"\.ln_2\.": ".feed_forward_norm.",
    r"\.attn\.in_proj_": ".attention.qkv.",
    r"\.attn\.out_proj": ".attention.out",
    r"\.mlp\.c_fc": ".feed_forward.up",
    r"\.mlp\.c_proj": ".feed_forward.down",
    r"^visual\.class_embedding": "image_tower.class_token",
    r"^visual\.positional_embedding": "image_tower.positions",
    r"^visual\.ln_pre": "image_tower.pre_norm",
    r"^visual\.ln_post": "image_tower.norm",
    r"^visual\.proj$": "image_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^token_embedding": "text_tower.token_embedding",
    r"^positional_embedding": "text_tower.positions",
    r"^ln_final": "text_tower.norm",
}
_VIT_NAMES: Names = {r"^visual\.conv1": "image_tower.embed.projection"}
_RESNET_NAMES: Names = {
    r"^visual\.conv([123])": lambda m: f"image_tower.stem.{3 * int(m[1]) - 3}",
    r"^visual\.bn([123])": lambda m: f"image_tower.stem.{3 * int(m[1]) - 2}",
    r"^visual\.layer(\d)\.(\d+)\.bn": r"visual.layer\1.\2.norm",
    r"^visual\.layer(\d)\.(\d+)\.downsample\.(\d)": lambda m: f"visual.layer{m[1]}.{m[2]}.shortcut.{int(m[3]) + 1}",
    r"^visual\.layer(\d)": lambda m: f"image_tower.stages.{int(m[1]) - 1}",
    r"^visual\.attnpool\.positional_embedding": "image_tower.pool.positions",
    r"^visual\.attnpool\.([qkv])_proj": r"image_tower.pool.\1",
    r"^visual\.attnpool\.c_proj": "image_tower.pool.out",
}
_PROJECTIONS = ("image_projection.weight", "text_projection.weight")  # open_clip multiplies from the right


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip `CLIP` to those of a `DualEncoder`; a name that is not known stays."""
    is_resnet = any(name.startswith("visual.attnpool.") for name in state)
    weights = rename_weights(state, {**(_RESNET_NAMES if is_resnet else _VIT_NAMES), **_NAMES})
    return weights | {name: weights[name].T.contiguous() for name in _PROJECTIONS if name in weights}


def load_open_clip(name: str) -> list[Imported]:
    """Open ARCH/TAG with its published weights, or a folder that open_clip wrote.

    Raises:
        UsageError: there is no such model, or it is built otherwise than CLIP.
    """
    import open_clip

    source = f"open_clip:{name}"
    arch, _, tag = name.rpartition("/")
    try:
        if Path(name).is_dir():
            model: Any = open_clip.create_model(f"local-dir:{name}", require_pretrained=True)
        else:
            model = open_clip.create_model(arch, tag, require_pretrained=True)
    except Exception as error:  # of many kinds: unknown names, no network, no weights
        raise cannot_open(source, error) from error
    if type(model) is not open_clip.CLIP:
        raise UsageError(f"a {type(model).__name__} is built otherwise than CLIP", where=source)
    if model.vocab_size != _CLIP_VOCABULARY:
        raise UsageError(f"its {model.vocab_size} tokens are not those of CLIP's tokenizer", where=source)
    model.eval()
    image = open_clip.get_model_preprocess_cfg(model)
    return [
        Imported(
            config_of(model, source),
            from_open_clip(model.state_dict()),
            PreprocessConfig(list(image["mean"]), list(image["std"])),
            lambda images: model.encode_image(images, normalize=True),
            tokenizer=TokenizerConfig(),
            answer_text=lambda ids: model.encode_text(ids, normalize=True),
        )
    ]


def config_of(model: Any, where: str) -> DualEncoderConfig:
    """Return the config of an open_clip `CLIP`."""
    width = model.token_embedding.embedding_dim
    text = TextConfig(
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        end_of_text=model.vocab_size - 1,  # the largest id of a text, where open_clip pools
        width=width,
        **_blocks(model.transformer.resblocks, width, where),
    )
    is_vit = hasattr(model.visual, "transformer")
    image = _vit(model.visual, where) if is_vit else _resnet(model.visual)
    return DualEncoderConfig(model.text_projection.shape[1], image_projection=is_vit, image=image, text=text)


def _vit(visual: Any, where: str) -> TowerConfig:
    width = visual.conv1.out_channels
    return ViTConfig(
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        width=width,
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        **_blocks(visual.transformer.resblocks, width, where),
    )


def _resnet(visual: Any) -> TowerConfig:
    return ResNetConfig(
        image_size=visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size,
        width=visual.output_dim,
        depths=[len(getattr(visual, f"layer{i}")) for i in range(1, 5)],
        stem_width=visual.conv3.out_channels,
        num_heads=visual.attnpool.num_heads,
    )


def _blocks(blocks: Any, width: int, where: str) -> dict[str, Any]:
    first = blocks[0]
    return {
        "depth": len(blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.c_fc.out_features / width,
        "activation": activation_name(first.mlp.gelu, where),
        "norm_eps": first.ln_1.eps,
    }
