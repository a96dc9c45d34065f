"""Plots of the filters, position embeddings and attention of an image tower."""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_tools.core.errors import UsageError, did_you_mean
from data_tools.core.files import make_folder, write_atomic
from data_tools.sample.decode import decode_image, read_image
from mmvit.checkpoint import DUAL_ENCODER, load_tower, model_kind
from mmvit.data.shards import IndexedShards
from mmvit.data.transforms import Pixels, eval_pixels
from mmvit.eval.encoder import Encoder, load
from mmvit.eval.inspect import (
    attention_distance,
    attention_distances,
    first_filters,
    has_patch_filters,
    image_size_maps,
    patch_filters,
    position_similarity,
    relevance_maps,
    rollout_maps,
    views,
)
from mmvit.models.pixels import PixelNorm
from mmvit.towers.contract import Tower

DPI = 100
VIEWS = ("filters", "positions", "distance", "rollout", "relevance")
NUM_FROM_SHARD = {"distance": 64, "rollout": 8, "relevance": 8}  # images
MAX_FILTERS = 64
MAX_MAPS = 14  # a side; of a larger grid every second, third .. patch is shown
GAP = 0.1  # between two maps, in widths of a map
HEADS_WIDTH = 0.6  # of the space between two layers
# Common font families with letters that the font of matplotlib lacks.
FONTS = (
    *("Noto Sans CJK KR", "Noto Sans CJK JP", "NanumGothic", "Malgun Gothic", "AppleGothic", "Apple SD Gothic Neo"),
    *("Noto Sans Arabic", "Noto Sans Devanagari", "Arial Unicode MS"),
)


class NamedImage(NamedTuple):
    """The name of an image and its preprocessed pixels."""

    name: str
    pixels: Pixels


class Drawn(NamedTuple):
    """The numbers of a view and their plot, a PNG."""

    facts: dict[str, Any]
    png: bytes


class Inspected(NamedTuple):
    """The image tower of a model folder; `encoder` if the model has a text tower too."""

    tower: Tower
    pixel_norm: PixelNorm
    image_size: int
    encoder: Encoder | None


def inspect_model(
    model: Path, view: str, images: Sequence[Path], text: str | None, out: Path, size: int | None = None
) -> dict[str, Any]:
    """Draw a view of a trained model into a PNG; returns the numbers in it.

    Args:
        model: model folder.
        view: a name in `VIEWS`.
        images: image files, or shards, of which some images are used; for all views except filters and positions.
        text: for relevance.
        out: the PNG file to write.
        size: side of the images, px; None for that of the model.

    Raises:
        UsageError: an unknown or unsupported view, missing images or text, or matplotlib is not installed.
        DataError: an image cannot be read.
    """
    _check(view, images, text)
    inspected = _load(model)
    there = views(inspected.tower, with_text=inspected.encoder is not None)
    if view not in there:
        what = f"this model, a {type(inspected.tower).__name__}, has no view {view!r}"
        raise UsageError(what, where=str(model), hint=f"use --view {' | '.join(there)}")
    read = _read_images(images, NUM_FROM_SHARD.get(view, 0), size or inspected.image_size)
    try:
        with _fonts():
            drawn = _draw(inspected, view, read, text or "")
    except ValueError as error:
        if size is None:
            raise
        raise UsageError(f"the model does not accept images of {size} px: {error}", where="--size") from error
    make_folder(out.parent)
    write_atomic(out, drawn.png)
    return {"view": view, "out": str(out), **drawn.facts}


def _draw(inspected: Inspected, view: str, images: Sequence[NamedImage], text: str) -> Drawn:
    if view == "filters":
        return _filters(inspected.tower)
    if view == "positions":
        return _positions(inspected.tower)
    if view == "distance":
        return _distance(inspected, images)
    return _rollout(inspected, images) if view == "rollout" else _relevance(inspected, images, text)


def _check(view: str, images: Sequence[Path], text: str | None) -> None:
    if view not in VIEWS:
        raise UsageError(f"--view is {view!r}", hint=did_you_mean(view, VIEWS) or f"choose from {', '.join(VIEWS)}")
    if view in NUM_FROM_SHARD and not images:
        raise UsageError(f"the view {view!r} needs images", hint="add --image FILE, repeatable, or --image SHARD.tar")
    if view == "relevance" and not text:
        raise UsageError("the view 'relevance' needs a text", hint='add --text "a red fruit"')
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UsageError("plots need matplotlib", hint="pip install 'mmvit[eval]'") from error
    matplotlib.use("Agg")  # no window, no display needed


def _load(folder: Path) -> Inspected:
    if model_kind(folder) != DUAL_ENCODER:
        tower, preprocess, config = load_tower(folder)
        return Inspected(tower, PixelNorm(preprocess.mean, preprocess.std), config.image_size, None)
    encoder = load(folder)
    return Inspected(encoder.model.image_tower, encoder.model.pixel_norm, encoder.image_size, encoder)


def _read_images(paths: Sequence[Path], num_from_shard: int, size: int) -> list[NamedImage]:
    images = []
    for path in paths:
        if path.suffix == ".tar":
            shard = IndexedShards([path], require_caption=False)
            for i in np.linspace(0, len(shard) - 1, min(num_from_shard, len(shard))).astype(int).tolist():
                key = shard.key(i)
                images.append(NamedImage(key, eval_pixels(decode_image(shard.read(i).image, key), size)))
        else:
            images.append(NamedImage(str(path), eval_pixels(read_image(path), size)))
    return images


def _filters(tower: Tower) -> Drawn:
    if has_patch_filters(tower):
        filters = patch_filters(tower)
        images, facts = filters.images.numpy(), {"explained": filters.explained.tolist()}
        labels = [f"{i}: {share:.1%}" for i, share in enumerate(facts["explained"], 1)]
        title = (
            f"Principal components of the {len(filters.scores)} patch filters, and their shares of the variance "
            f"({sum(facts['explained']):.0%} in all)"
        )
    else:
        every = first_filters(tower)
        order = every.flatten(1).norm(dim=1).argsort(descending=True)[:MAX_FILTERS]
        images, labels = every[order].numpy(), [str(i) for i in order.tolist()]
        facts = {"channels": order.tolist()}
        title = f"Filters of the first convolution, by channel: {len(order)} of {len(every)}, the strongest first"
    columns = min(len(images), 7 if len(images) <= 28 else 8)
    rows = math.ceil(len(images) / columns)
    figure = _figure(1.35 * columns + 0.6, 1.55 * rows + 1.2)
    figure.suptitle(f"{title}\nRed, green, blue of each weight; grey is 0, each image has its own scale", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label in zip(grid.flat, images, labels, strict=False):
        axes.imshow(0.5 + image / max(2 * abs(image).max(), 1e-30), extent=_extent(*image.shape[:2]))
        axes.set_title(label, fontsize=9)
    corner = grid[-1, 0]
    corner.axis("on")
    corner.set(xlabel="px", ylabel="px", xticks=[0, images.shape[2]], yticks=[0, images.shape[1]])
    return Drawn({"shape": list(images.shape), **facts}, _png(figure))


def _positions(tower: Tower) -> Drawn:
    similarity = position_similarity(tower).numpy()
    height, width = similarity.shape[:2]
    step = math.ceil(max(height, width) / MAX_MAPS)
    shown = similarity[::step, ::step]
    rows, columns = shown.shape[:2]
    figure = _figure(8.6, 7.4 * rows / columns + 0.8)
    axes = figure.subplots()
    for row, column in np.ndindex(rows, columns):
        left, top = column * (1 + GAP), row * (1 + GAP)
        extent = (left, left + 1, top + 1, top)
        image = axes.imshow(shown[row, column], vmin=-1, vmax=1, cmap="RdBu_r", extent=extent)
    figure.colorbar(image, label="cosine similarity", shrink=0.8)
    axes.set(
        xlim=(-GAP, columns * (1 + GAP)),
        ylim=(rows * (1 + GAP), -GAP),
        xlabel="column of the patch that is compared",
        ylabel="row of the patch that is compared",
        xticks=[i * (1 + GAP) + 0.5 for i in range(columns)],
        yticks=[i * (1 + GAP) + 0.5 for i in range(rows)],
        xticklabels=range(1, width + 1, step),
        yticklabels=range(1, height + 1, step),
    )
    axes.set_title(
        f"Position of each patch compared with all others: each small map is the grid of {height} x {width} patches",
        fontsize=11,
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return Drawn({"grid": [height, width], "least": float(similarity.min())}, _png(figure))


def _distance(inspected: Inspected, images: Sequence[NamedImage]) -> Drawn:
    pixels = _batch(images, inspected)
    distances = attention_distances(inspected.tower, inspected.pixel_norm(pixels)).numpy()
    num_layers, num_heads = distances.shape
    grid = (pixels.shape[2] // inspected.tower.stride, pixels.shape[3] // inspected.tower.stride)
    even = torch.full((1, 1, math.prod(grid), math.prod(grid)), 1 / math.prod(grid))
    everywhere = attention_distance(even, grid, inspected.tower.stride).item()
    figure = _figure(max(6.5, 2.2 + 0.55 * num_layers), 5.0)
    axes = figure.subplots()
    offsets = np.linspace(-0.5, 0.5, num_heads) * HEADS_WIDTH if num_heads > 1 else np.zeros(1)
    for i, heads in enumerate(np.sort(distances, axis=1), 1):
        axes.plot(i + offsets, heads, "o", color="#0072B2", alpha=0.75, markersize=7, markeredgecolor="white")
    axes.axhline(everywhere, color="#D55E00", linestyle="--", label="the same attention to all patches")
    axes.axhline(inspected.tower.stride, color="#555555", linestyle=":", label="size of a patch")
    axes.plot([], [], "o", color="#0072B2", label="a head; within a layer the shortest is left")
    axes.set(xlabel="layer", ylabel="mean attention distance, px", xticks=range(1, num_layers + 1))
    axes.set(xlim=(0.4, num_layers + 0.6), ylim=(0, 1.25 * max(everywhere, distances.max(), inspected.tower.stride)))
    what = f"{len(images)} image{'s' * (len(images) > 1)} of {pixels.shape[3]} x {pixels.shape[2]} px"
    axes.set_title(f"Mean attention distance over {what}", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", ncols=1, fontsize=9)
    facts = {"num_images": len(images), "even_distance_px": everywhere, "distance_px": distances.tolist()}
    return Drawn(facts, _png(figure))


def _rollout(inspected: Inspected, images: Sequence[NamedImage]) -> Drawn:
    pixels = _batch(images, inspected)
    maps = rollout_maps(inspected.tower, inspected.pixel_norm(pixels))
    even = maps * maps[0].numel()
    title = "Attention rollout: the share of each patch in the vector of the image"
    png = _heat(images, even, title, "share, in multiples of an even share", [""] * len(images))
    return Drawn(
        {"images": [{"image": each.name, "map": row} for each, row in zip(images, maps.tolist(), strict=True)]}, png
    )


def _relevance(inspected: Inspected, images: Sequence[NamedImage], text: str) -> Drawn:
    encoder = inspected.encoder
    assert encoder is not None
    embedding = encoder.encode_text([text])[0]
    pixels = _batch(images, inspected)
    with torch.no_grad():
        cosines = (encoder.model.encode_image(pixels).cpu() @ embedding).tolist()
    maps = relevance_maps(encoder.model, pixels, embedding)
    maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)  # the method's own unit depends on the tower
    title = f'Relevance for the text "{text}"'
    labels = [f"cosine similarity: {cosine:.2f}" for cosine in cosines]
    png = _heat(images, maps, title, "relevance, relative to the maximum in each image", labels)
    rows = [
        {"image": each.name, "cosine": cosine, "map": row}
        for each, cosine, row in zip(images, cosines, maps.tolist(), strict=True)
    ]
    return Drawn({"text": text, "images": rows}, png)


def _batch(images: Sequence[NamedImage], inspected: Inspected) -> Tensor:
    pixels = torch.from_numpy(np.stack([each.pixels for each in images]))
    return pixels.to(inspected.pixel_norm.scale.device)


def _heat(images: Sequence[NamedImage], maps: Tensor, title: str, unit: str, labels: Sequence[str]) -> bytes:
    """Plot images, and below each its map over the grey image; all maps have one scale."""
    columns = min(len(images), 4)
    blocks = math.ceil(len(images) / columns)
    size = images[0].pixels.shape[1:]
    width = 2.5 * columns + 2.2
    figure = _figure(width, 5.4 * blocks + 0.8)
    figure.suptitle(_wrapped(title, int(11 * width)), fontsize=11, parse_math=False)
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    high = max(maps.max().item(), 1e-6)
    for i, (each, heat) in enumerate(zip(images, image_size_maps(maps, size).numpy(), strict=True)):
        row, column = 2 * (i // columns), i % columns
        above, below = grid[row, column], grid[row + 1, column]
        rgb = each.pixels.transpose(1, 2, 0)
        above.imshow(rgb, extent=_extent(*size))
        above.set_title(_wrapped(Path(each.name).name, 30), fontsize=9, parse_math=False)
        below.imshow(rgb.mean(axis=2), extent=_extent(*size), cmap="gray", vmin=0, vmax=255)
        image = below.imshow(heat, extent=_extent(*size), cmap="inferno", alpha=0.65, vmin=0, vmax=high)
        below.set_title(labels[i], fontsize=9)
        if column == 0:
            below.axis("on")
            below.set(xlabel="px", ylabel="px", xticks=[0, size[1]], yticks=[0, size[0]])
    figure.colorbar(image, ax=grid, label=unit, shrink=0.6)
    return _png(figure)


@contextmanager
def _fonts() -> Iterator[None]:
    """Use installed fonts for letters that the font of matplotlib lacks."""
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    with matplotlib.rc_context({"font.family": families}):
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib import pyplot as plt

    return plt.figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that no installed font has
        figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()


def _extent(height: int, width: int) -> tuple[int, int, int, int]:
    return 0, width, height, 0


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
