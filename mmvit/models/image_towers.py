"""Image towers by name."""

import dataclasses

from torch import nn

from mmvit.keys import bound_problems
from mmvit.layers.block import Block, start_as_identity
from mmvit.layers.conv_stem import ConvStem
from mmvit.layers.drop_path import drop_path_rates
from mmvit.layers.patch_embedding import PatchEmbedding
from mmvit.layers.pooling import AttentionPool
from mmvit.layers.resnet_stem import ResNetStem
from mmvit.models.config import TOWERS as TOWERS
from mmvit.models.config import tower_config as tower_config
from mmvit.towers.config import CvTConfig, ResNetConfig, SwinConfig, TimmConfig, TowerConfig, ViTConfig
from mmvit.towers.contract import Tower
from mmvit.towers.cvt import CvT
from mmvit.towers.resnet import ModifiedResNet
from mmvit.towers.swin import SwinTransformer
from mmvit.towers.timm_tower import TimmTower
from mmvit.towers.vit import VisionTransformer


def build_image_tower(config: TowerConfig) -> Tower:
    """Build an image tower, randomly initialised; raises ValueError if sizes do not fit."""
    for problem in bound_problems(config):
        raise ValueError(problem.what)
    size, stride = config.image_size, config.stride
    takes_any = isinstance(config, TimmConfig) and size >= stride and config.takes_any_size
    if size % stride and not takes_any:
        of = f"patch_size {stride}" if isinstance(config, ViTConfig) else f"{stride} px, the stride of {config.kind}"
        fit = " or ".join(str(side) for side in (size // stride * stride, size // stride * stride + stride) if side)
        raise ValueError(f"image_size {size} is not a multiple of {of}; {fit} px fit")
    if isinstance(config, ViTConfig):
        return _build_vit(config)
    if isinstance(config, TimmConfig):
        return TimmTower(config.name, size)
    shape = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    del shape["kind"], shape["image_size"]
    if isinstance(config, SwinConfig):
        tower = SwinTransformer(**shape)
        tower.grids(size, size)  # raises for windows that do not fit
        return tower
    if isinstance(config, CvTConfig):
        return CvT(**shape)
    assert isinstance(config, ResNetConfig)
    return ModifiedResNet((size // stride,) * 2, **shape)


def _build_vit(config: ViTConfig) -> VisionTransformer:
    embed: ConvStem | ResNetStem | PatchEmbedding
    if config.stem_channels and config.stem_stages:
        raise ValueError("stem_channels and stem_stages exclude each other; leave one of them empty")
    if config.stem_channels:
        embed = ConvStem(config.stem_channels, config.width, config.stem_residuals)
    elif config.stem_stages:
        embed = ResNetStem(config.stem_stages, config.width)
    else:
        embed = PatchEmbedding(config.patch_size, config.width, bias=config.patch_bias)
    if embed.patch_size != config.patch_size:
        raise ValueError(f"the stem has patches of {embed.patch_size} px, but patch_size is {config.patch_size}")
    blocks = [
        Block(
            config.width,
            config.num_heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            norm_eps=config.norm_eps,
            qk_norm=config.qk_norm,
            layer_scale=config.layer_scale,
            drop_path=rate,
        )
        for rate in drop_path_rates(config.drop_path, config.depth)
    ]
    pool: str | AttentionPool = config.pool
    if config.pool == "attention":
        pool = AttentionPool(
            config.width,
            config.num_heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            norm_eps=config.norm_eps,
        )
    tower = VisionTransformer(
        embed,
        (config.image_size // config.patch_size,) * 2,
        config.width,
        blocks,
        position=config.position,
        norm_eps=config.norm_eps,
        pool=pool,
        pre_norm=config.pre_norm,
        distilled=config.distilled,
        num_registers=config.num_registers,
    )
    if config.init == "vit":
        _init_vit(tower)
    elif config.init != "clip":
        raise ValueError(f"init {config.init!r} is unknown; choose from ['clip', 'vit']")
    if config.identity_start:
        start_as_identity(tower)
    return tower


def _init_vit(tower: VisionTransformer) -> None:
    """Initialise linear layers and tables with truncated N(0, 0.02^2), biases with zero, as in DeiT's released code."""
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for table in (tower.positions, tower.class_token, tower.distillation_token, tower.registers):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02)
