"""Filters, position embeddings and attention of an image tower, as numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from data_tools.core.errors import UsageError
from mmvit.layers.attention import Attention
from mmvit.layers.block import Block
from mmvit.layers.patch_embedding import patch_grid
from mmvit.layers.pooling import AttentionPool
from mmvit.layers.positions import Grid
from mmvit.models.dual_encoder import DualEncoder
from mmvit.towers.contract import Tower
from mmvit.towers.cvt import CvT
from mmvit.towers.vit import VisionTransformer

IMAGES_AT_ONCE = 8  # whose attention weights are held in memory together


class PatchFilters(NamedTuple):
    """The principal components of the D filters of a patch embedding, largest first.

    Attributes:
        images: the components, orthonormal; the channel is the last axis.
        explained: share of the filters' variance along each.
        mean: the mean filter.
        scores: the filters in the components' coordinates: with all of them, mean + scores @ images is the embedding.
    """

    images: Float[Tensor, "n P P 3"]
    explained: Float[Tensor, " n"]
    mean: Float[Tensor, "P P 3"]
    scores: Float[Tensor, "D n"]


class Attended(NamedTuple):
    """The attention weights of some images.

    Attributes:
        weights: softmax weights of each layer; the patches are the last tokens, row by row.
        readout: share of each token in the pooled vector.
        grid: rows and columns of patches.
    """

    weights: list[Float[Tensor, "B H N N"]]
    readout: Float[Tensor, "B N"]
    grid: Grid


def views(tower: Tower, with_text: bool) -> list[str]:
    """Return the available views of this tower; `with_text` if it shares its space with a text tower."""
    vit = tower if isinstance(tower, VisionTransformer) else None
    there = {
        "filters": _first_convolution(tower) is not None,
        "positions": vit is not None and vit.position_table(vit.grid) is not None,
        "distance": vit is not None,
        "rollout": vit is not None,
        "relevance": with_text and not isinstance(tower, CvT),
    }
    return [name for name, is_there in there.items() if is_there]


def has_patch_filters(tower: Tower) -> bool:
    """Return whether the patches of the first convolution do not overlap."""
    convolution = _first_convolution(tower)
    return convolution is not None and convolution.stride == convolution.kernel_size


def patch_filters(tower: Tower, num: int = 28) -> PatchFilters:
    """Return the first principal components of the patch filters (ViT, section 4.5, figure 7 left).

    There are fewer than `num` if the filters span fewer dimensions. The largest entry of each component is positive.

    Raises:
        UsageError: the tower has no patch embedding.
    """
    convolution = _first_convolution(tower)
    if convolution is None or not has_patch_filters(tower):
        raise UsageError("this tower has no patch embedding", hint="see its first convolution: first_filters")
    filters = convolution.weight.detach().double().cpu().permute(0, 2, 3, 1)  # [D, P, P, 3]
    mean = filters.mean(dim=0)
    left, sizes, components = torch.linalg.svd((filters - mean).flatten(1), full_matrices=False)
    signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()[:num]
    explained = sizes.square() / sizes.square().sum().clamp_min(1e-30)
    return PatchFilters(
        (components[:num] * signs).unflatten(1, mean.shape).float(),
        explained[:num].float(),
        mean.float(),
        (left * sizes)[:, :num].mul(signs.T).float(),
    )


def first_filters(tower: Tower) -> Float[Tensor, "D k k 3"]:
    """Return the kernels of the first convolution; raise UsageError for a tower without one."""
    convolution = _first_convolution(tower)
    if convolution is None:
        raise UsageError("this tower has no convolution over pixels")
    return convolution.weight.detach().float().cpu().permute(0, 2, 3, 1)


def _first_convolution(tower: Tower) -> nn.Conv2d | None:
    found = (each for each in tower.modules() if isinstance(each, nn.Conv2d) and each.in_channels == 3)
    return next(found, None)


def position_similarity(tower: Tower) -> Float[Tensor, "h w h w"]:
    """Return the cosine of the position of each patch with that of each other (ViT, section 4.5, figure 7 centre).

    Raises:
        UsageError: the tower adds no position table to its patches.
    """
    grid, table = _vit(tower).grid, _vit(tower).position_table(_vit(tower).grid)
    if table is None:
        raise UsageError(f"this tower adds no position table: its positions are {tower.position!r}")
    unit = F.normalize(table.detach().double().cpu(), dim=1)
    return (unit @ unit.T).unflatten(1, grid).unflatten(0, grid).float()


@torch.no_grad()
def attend(tower: Tower, images: Float[Tensor, "B 3 H W"]) -> Attended:
    """Return the attention for normalized images; raise UsageError for a tower without global attention."""
    vit = _vit(tower)
    layers = _layers(vit)
    pool = [vit.pool.attention] if isinstance(vit.pool, AttentionPool) else []
    with _calls([*layers, *pool]) as calls:
        vit(images, None)
    weights = [layer.weights(*calls[layer].positional, **calls[layer].named).float() for layer in layers]
    grid = patch_grid(images.shape[2], images.shape[3], vit.patch_size)
    shares = images.new_full((len(images), grid[0] * grid[1]), 1 / (grid[0] * grid[1]))
    if pool:
        shares = pool[0].weights(*calls[pool[0]].positional, **calls[pool[0]].named).float().mean(dim=1)[:, 0]
    num_others = weights[0].shape[3] - shares.shape[1]  # tokens before the patches
    readout = F.pad(shares, (num_others, 0))
    if vit.class_token is not None:
        readout = F.one_hot(torch.full((len(images),), num_others - vit.num_prefix), readout.shape[1]).to(readout)
    return Attended(weights, readout, grid)


def attention_distance(weights: Float[Tensor, "B H N N"], grid: Grid, patch_size: int) -> Float[Tensor, " H"]:
    """Return the mean attention distance of each head, px (ViT, section 4.5, figure 11).

    (1/n) sum_ij A_ij |p_i - p_j| P over the n patches; the class token and registers are excluded, and the
    remaining rows of A are normalized to sum to 1.
    """
    num_patches = grid[0] * grid[1]
    among = weights[:, :, -num_patches:, -num_patches:]
    among = among / among.sum(dim=3, keepdim=True).clamp_min(1e-30)
    places = torch.cartesian_prod(*(torch.arange(side, device=weights.device, dtype=torch.float) for side in grid))
    steps = (places[:, None] - places).square().sum(dim=2).sqrt()  # [n, n]
    return patch_size * (among * steps).sum(dim=3).mean(dim=(0, 2))


def attention_distances(tower: Tower, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "layers heads"]:
    """Return the `attention_distance` of each layer and head over all images."""
    total: float | Tensor = 0.0
    for part in images.split(IMAGES_AT_ONCE):
        attended = attend(tower, part)
        layers = [attention_distance(layer, attended.grid, tower.stride) for layer in attended.weights]
        total = total + torch.stack(layers) * len(part) / len(images)
    assert isinstance(total, Tensor)
    return total.float().cpu()


def rollout(weights: Sequence[Float[Tensor, "B H N N"]]) -> Float[Tensor, "B N N"]:
    """Return the share of each input token (column) in each output token: the product of (mean of heads + I) / 2.

    Attention rollout (Abnar and Zuidema 2020, section 3).
    """
    identity = torch.eye(weights[0].shape[-1], device=weights[0].device)
    result = identity.expand(len(weights[0]), -1, -1)
    for layer in weights:
        mixed = layer.float().mean(dim=1) + identity
        result = mixed / mixed.sum(dim=2, keepdim=True) @ result
    return result


def rollout_maps(tower: Tower, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
    """Return the share of each patch in the pooled vector by `rollout`; the rest up to 1 is that of the class token.

    With mean pooling it is the mean of the rows, with attention pooling their mean weighted by the attention.
    """
    parts = []
    for part in images.split(IMAGES_AT_ONCE):
        attended = attend(tower, part)
        shares = (attended.readout[:, None].float() @ rollout(attended.weights))[:, 0]  # [B, N]
        parts.append(_as_maps(shares, attended.grid))
    return torch.cat(parts)


def relevance_maps(
    model: DualEncoder, images: UInt8[Tensor, "B 3 H W"], text: Float[Tensor, "E"]
) -> Float[Tensor, "B h w"]:
    """Return the relevance of each patch for a text, at least 0; values are comparable within an image.

    The dot product of image and text is attributed to the patches in two steps. First to the last tokens: gradient
    times token, which for a mean and a linear projection is the exact split of the product (class activation maps, Zhou
    et al. 2016, equation 2); all to the class token if there is one. Then back through the layers of a ViT:
    R = R + mean over heads of max(A * dS/dA, 0) R (Chefer et al. 2021, equations 5 and 6). The last tokens of a ResNet
    are compared with the text directly (Zhou et al. 2022, section 3.2).

    Args:
        model: the contrastive model.
        images: pixels as the model takes them.
        text: the text's embedding.

    Raises:
        UsageError: a tower whose attention is not available.
    """
    text = text.clone().to(images.device)  # a clone: what inference mode has made may not enter a graph
    return torch.cat([_relevance(model, part, text) for part in images.split(IMAGES_AT_ONCE)])


@torch.enable_grad()
def _relevance(model: DualEncoder, images: Tensor, text: Tensor) -> Float[Tensor, "B h w"]:
    tower = model.image_tower
    layers = _layers(tower) if isinstance(tower, VisionTransformer) else []
    pixels = model.pixel_norm(images).detach().requires_grad_()  # a graph, also where the weights are frozen
    with _calls([*layers, *(layer.out for layer in layers)]) as calls:
        output = tower(pixels, None)
    grid = images.shape[2] // tower.stride, images.shape[3] // tower.stride
    if not isinstance(tower, VisionTransformer):
        if output.tokens.shape[1] != grid[0] * grid[1]:
            raise UsageError(f"a {type(tower).__name__} has no tokens comparable with a text")
        scores = model.image_projection(output.tokens).float() @ text  # [B, N]
        return _as_maps(scores.detach().clamp_min(0), grid)
    mixed = [calls[layer.out].positional[0] for layer in layers]  # each layer's A V, [B, N, D]
    total = (model.image_projection(output.pooled).float() @ text).sum()
    token_gradient, *gradients = torch.autograd.grad(total, [output.tokens, *mixed])
    with torch.no_grad():
        shares = (token_gradient * output.tokens).sum(dim=2).clamp_min(0)
        if tower.class_token is not None:
            shares = F.one_hot(torch.zeros(len(images), dtype=torch.long), shares.shape[1]).to(shares)
        shares = F.pad(shares, (mixed[0].shape[1] - shares.shape[1], 0))[:, None]  # registers first
        for layer, gradient in reversed(list(zip(layers, gradients, strict=True))):
            call = calls[layer]
            values, slopes = (_heads(x, layer) for x in (layer.v(call.positional[0]), gradient))  # dS/dA = dS/d(AV) V^T
            weights = layer.weights(*call.positional, **call.named)
            shares = shares + shares @ (weights * (slopes @ values.mT)).clamp_min(0).mean(dim=1)
    return _as_maps(shares[:, 0].float(), grid)


def _heads(x: Float[Tensor, "B N D"], layer: Attention) -> Float[Tensor, "B H N d"]:
    return x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)


def image_size_maps(maps: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """Resize maps over patches to images of `size`, height and width px (bilinear)."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _vit(tower: Tower) -> VisionTransformer:
    if not isinstance(tower, VisionTransformer):
        raise UsageError(f"a {type(tower).__name__} has no attention between all its patches")
    return tower


def _layers(vit: VisionTransformer) -> list[Attention]:
    return [block.attention for block in vit.blocks if isinstance(block, Block)]


def _as_maps(tokens: Float[Tensor, "B N"], grid: Grid) -> Float[Tensor, "B h w"]:
    """Arrange the patches, which are the last tokens, in rows and columns."""
    return tokens[:, -grid[0] * grid[1] :].unflatten(1, grid).cpu()


class Call(NamedTuple):
    """The arguments of a module's call."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


@contextmanager
def _calls(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Record the last call of each module within the block."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[module] = Call(positional, named)

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
