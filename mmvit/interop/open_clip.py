"""Import of open_clip models: CLIP with a ViT or a modified ResNet."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.core.errors import UsageError, did_you_mean
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.data.transforms import PreprocessConfig
from mmvit.interop.imported import Imported, Names, activation_name, cannot_open, rename_weights
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.contract import TowerConfig
from mmvit.towers.resnet import ResNetConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

_TEXTS = ["a photo of a Dog.", "Zwei rote \u00c4pfel, 37 St\u00fcck", "\uac15\uc544\uc9c0 \uc5bc\uad74", "x" * 400]
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
_PROJECTIONS = ("image_projection.weight", "text_projection.weight")  # transposed in open_clip


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip `CLIP` to those of a `DualEncoder`; unknown names are kept."""
    is_resnet = any(name.startswith("visual.attnpool.") for name in state)
    weights = rename_weights(state, {**(_RESNET_NAMES if is_resnet else _VIT_NAMES), **_NAMES})
    return weights | {name: weights[name].T.contiguous() for name in _PROJECTIONS if name in weights}


def load_open_clip(name: str) -> list[Imported]:
    """Load ARCH/TAG with its published weights, or a folder that open_clip wrote.

    Raises:
        UsageError: the model does not exist, or its architecture is not CLIP's.
    """
    import open_clip

    source = f"open_clip:{name}"
    is_folder = (Path(name) / "open_clip_config.json").is_file()
    options = {} if is_folder else _tag_options(name, source)
    logging.disable(logging.WARNING)  # open_clip logs each of its steps on the root logger
    try:
        opened = f"local-dir:{name}" if is_folder else name.rpartition("/")[0]
        model: Any = open_clip.create_model(opened, require_pretrained=True, **options)
        tokenizer: Any = open_clip.get_tokenizer(opened)
    except Exception as error:  # of many kinds: no network, no weights, other shapes
        raise cannot_open(source, error) from error
    finally:
        logging.disable(logging.NOTSET)
    visual = type(model.visual).__name__
    if type(model) is not open_clip.CLIP or visual not in ("VisionTransformer", "ModifiedResNet"):
        raise UsageError(f"a {type(model).__name__} with a {visual} is not supported: it is not CLIP", where=source)
    config = config_of(model.eval(), source)
    _check_tokenizer(tokenizer, config.text, source)
    image = open_clip.get_model_preprocess_cfg(model)
    return [
        Imported(
            config,
            from_open_clip(model.state_dict()),
            PreprocessConfig(list(image["mean"]), list(image["std"])),
            f"{image['resize_mode']}, {image['interpolation']}",
            lambda images: model.encode_image(images, normalize=True),
            tokenizer=TokenizerConfig(),
            answer_text=lambda ids: model.encode_text(ids, normalize=True),
        )
    ]


def _tag_options(name: str, source: str) -> dict[str, Any]:
    """Return the options that load ARCH/TAG with the activation that its weights were trained with."""
    import open_clip

    arch, _, tag = name.rpartition("/")
    settings: Any = open_clip.get_model_config(arch)
    if settings is None:
        hint = did_you_mean(arch, open_clip.list_models()) or "use ARCH/TAG of open_clip.list_pretrained(), or a folder"
        raise UsageError(f"open_clip has no model {arch!r}", where=source, hint=hint)
    published = open_clip.get_pretrained_cfg(arch, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        hint = did_you_mean(tag, tags) or f"choose from {', '.join(tags)}"
        raise UsageError(f"open_clip has no weights {tag!r} of {arch}", where=source, hint=hint)
    # The name of the architecture is not enough: OpenAI's weights are also listed under names without -quickgelu.
    quick = bool(published.get("quick_gelu", False))
    if settings.get("quick_gelu", False) and not quick:
        what = "these weights were trained without QuickGELU"
        raise UsageError(what, where=source, hint=f"open_clip:{arch.removesuffix('-quickgelu')}/{tag}")
    return {"pretrained": tag, "force_quick_gelu": quick}


def _check_tokenizer(tokenizer: Any, text: TextConfig, source: str) -> None:
    theirs, ours = (
        tokenizer(_TEXTS, text.context_length),
        build_tokenizer(TokenizerConfig(), text.context_length)(_TEXTS),
    )
    if not torch.equal(theirs, nn.functional.pad(ours, (0, theirs.shape[1] - ours.shape[1]))):
        raise UsageError("its tokenizer is not CLIP's", where=source)


def config_of(model: Any, where: str) -> DualEncoderConfig:
    """Return our config of an open_clip `CLIP`."""
    width = model.token_embedding.embedding_dim
    text = TextConfig(
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        end_of_text=model.vocab_size - 1,  # open_clip pools at the largest id
        width=width,
        **_blocks(model.transformer.resblocks, width, where),
    )
    is_vit = hasattr(model.visual, "transformer")
    image = _vit(model.visual, where) if is_vit else _resnet(model.visual)
    if not isinstance(model.text_projection, Tensor):
        raise UsageError("its text projection has a bias", where=where)
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
