"""Import of timm models: ViT, hybrid ViT, DeiT and Swin as native towers, any other as a `TimmTower`."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_tools.core.errors import UsageError
from mmvit.data.transforms import PreprocessConfig
from mmvit.interop.imported import Imported, Names, activation_name, cannot_open, rename_weights
from mmvit.models.classifier import ClassifierConfig
from mmvit.towers.contract import TowerConfig
from mmvit.towers.swin import SwinConfig
from mmvit.towers.timm_tower import TimmConfig
from mmvit.towers.vit import ViTConfig

_BLOCKS: Names = {
    r"\.attn\.proj\.": ".attention.out.",
    r"\.attn\.": ".attention.",
    r"^(blocks\.\d+)\.norm1\.": r"\1.attention_norm.",
    r"^(blocks\.\d+)\.norm2\.": r"\1.feed_forward_norm.",
    r"\.mlp\.fc1\.": ".feed_forward.up.",
    r"\.mlp\.fc2\.": ".feed_forward.down.",
}
VIT_NAMES: Names = {
    r"^patch_embed\.backbone\.stem\.conv": "embed.first.0",
    r"^patch_embed\.backbone\.stem\.norm": "embed.first.1",
    r"^patch_embed\.backbone\.(stages\.\d)\.blocks\.(\d)\.downsample\.conv": r"embed.\1.\2.shortcut.0",
    r"^patch_embed\.backbone\.(stages\.\d)\.blocks\.(\d)\.downsample\.norm": r"embed.\1.\2.shortcut.1",
    r"^patch_embed\.backbone\.(stages\.\d)\.blocks\.": r"embed.\1.",
    r"^patch_embed\.proj": "embed.projection",
    r"^cls_token": "class_token",
    r"^dist_token": "distillation_token",
    r"^pos_embed": "positions",
    r"^reg_token": "registers",
    r"^norm_pre\.": "pre_norm.",
    r"^head_dist\.": "distillation_head.",
    r"\.ls1\.": ".attention_scale.",
    r"\.ls2\.": ".feed_forward_scale.",
    **_BLOCKS,
}


def swin_names(depths: list[int]) -> Names:
    """Return the names of a Swin, whose blocks are numbered across stages here; `depths` are those of its stages."""
    first = [0, *accumulate(depths)]  # number of each stage's first block
    return {
        r"^layers\.(\d)\.blocks\.(\d+)\.": lambda m: f"blocks.{first[int(m[1])] + int(m[2])}.",
        r"^layers\.(\d)\.downsample\.": lambda m: f"blocks.{first[int(m[1])]}.merge.",
        r"^patch_embed\.proj\.": "embed.projection.",
        r"^patch_embed\.norm\.": "pre_norm.",
        r"^head\.fc\.": "head.",
        r"\.attn\.relative_position_bias_table": ".relative_positions",
        r".*relative_position_index": "",
        **_BLOCKS,
    }


def load_timm(name: str) -> list[Imported]:
    """Load a timm model with its published weights, or a folder that timm wrote: as a native tower and as a timm tower.

    Raises:
        UsageError: the model does not exist, or its head is not a linear layer.
    """
    import timm
    from timm.data.config import resolve_data_config

    source = f"timm:{name}"
    is_folder = (Path(name) / "config.json").is_file()
    try:
        model: Any = timm.create_model(f"local-dir:{name}" if is_folder else name, pretrained=True)
    except Exception as error:  # of many kinds: unknown names, no network, no weights, other shapes
        raise cannot_open(source, error) from error
    model.eval()
    data: dict[str, Any] = resolve_data_config({}, model=model)
    preprocess = PreprocessConfig(list(data["mean"]), list(data["std"]))
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = int(built_for[-1] if built_for else data["input_size"][-1])
    resizing = f"{data['crop_mode']} {data['crop_pct']:.1%}, {data['interpolation']}"
    class_names = _class_names(model, is_published=not is_folder) if model.num_classes else None
    towers = [_as_native(model, size), _as_timm_tower(model, size)]
    found = [
        Imported(
            ClassifierConfig(tower[0]) if class_names else tower[0],
            *(tower[1], preprocess, resizing, _answer(model), class_names),
        )
        for tower in towers
        if tower is not None
    ]
    if not found:
        raise UsageError(f"timm's {type(model).__name__} is not supported: its head is not linear", where=source)
    return found


def _as_native(model: Any, size: int) -> tuple[TowerConfig, dict[str, Tensor]] | None:
    """Return config and weights of the equivalent native tower; None if the model has other parts."""
    kind, state = type(model).__name__, model.state_dict()
    try:
        if kind == "SwinTransformer":
            return swin_config(model, size), rename_weights(state, swin_names(_depths(model)))
        if kind not in ("VisionTransformer", "VisionTransformerDistilled"):
            return None
        if type(model.blocks[0]).__name__ != "Block" or type(model.blocks[0].mlp).__name__ != "Mlp":
            return None
        if hasattr(model.patch_embed, "backbone") and not hasattr(model.patch_embed.backbone, "stages"):
            return None
        config, weights = vit_config(model, size), rename_weights(state, VIT_NAMES)
    except UsageError:  # an activation that is not supported
        return None
    num_first = len(weights.get("positions", ())) - (size // config.patch_size) ** 2
    if num_first == 0 and "class_token" in weights:  # timm's class token has no position: add a row of zeros
        weights["positions"] = nn.functional.pad(weights["positions"], (0, 0, 1 + config.distilled, 0))
    return config, weights


def vit_config(model: Any, size: int) -> ViTConfig:
    """Return our config of a timm ViT, as far as supported; comparing outputs reveals what it does not cover."""
    embed, block = model.patch_embed, model.blocks[0]
    backbone = getattr(embed, "backbone", None)
    return ViTConfig(
        image_size=size,
        patch_size=size // embed.grid_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        activation=activation_name(block.mlp.act, "timm"),
        norm_eps=block.norm1.eps,
        pool="class" if model.cls_token is not None else "mean",
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        patch_bias=embed.proj.bias is not None,
        init="vit",
        stem_stages=[] if backbone is None else [len(stage.blocks) for stage in backbone.stages],
        distilled=hasattr(model, "dist_token"),
        num_registers=0 if model.reg_token is None else model.reg_token.shape[1],
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        layer_scale=None if isinstance(block.ls1, nn.Identity) else 1.0,
    )


def swin_config(model: Any, size: int) -> SwinConfig:
    """Return our config of a timm Swin; comparing outputs reveals what it does not cover."""
    block = model.layers[0].blocks[0]
    return SwinConfig(
        image_size=size,
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depths=_depths(model),
        num_heads=[stage.blocks[0].attn.num_heads for stage in model.layers],
        window_size=block.window_size[0],
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        activation=activation_name(block.mlp.act, "timm"),
        norm_eps=block.norm1.eps,
    )


def _depths(model: Any) -> list[int]:
    return [len(stage.blocks) for stage in model.layers]


def _as_timm_tower(model: Any, size: int) -> tuple[TowerConfig, dict[str, Tensor]] | None:
    """Return config and weights of a `TimmTower`; None if the head is not a linear layer."""
    head = model.get_classifier() if model.num_classes else None
    if not isinstance(head, nn.Linear | None):
        return None
    prefix = next((name for name, module in model.named_modules() if module is head), None)
    weights = {}
    for name, tensor in model.state_dict().items():
        is_head = prefix is not None and name.startswith(f"{prefix}.")
        weights[f"head.{name.rpartition('.')[2]}" if is_head else f"model.{name}"] = tensor
    return TimmConfig(f"timm:{model.pretrained_cfg['architecture']}", size), weights


def _class_names(model: Any, is_published: bool) -> list[str]:
    """Return the class names of the model's own config, else ImageNet's for published weights, else numbers."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    named = model.pretrained_cfg.get("label_names")
    subset = infer_imagenet_subset(model)  # by the number of classes: for other people's models only a guess
    if not named and is_published and subset:
        named = ImageNetInfo(subset).label_descriptions()
    return list(named or map(str, range(model.num_classes)))


def _answer(model: Any) -> Callable[[Tensor], Tensor]:
    if model.num_classes:
        return lambda images: model(images)
    return lambda images: model.forward_head(model.forward_features(images))
