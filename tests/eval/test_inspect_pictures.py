"""`mmvit inspect`: images that hold something, the numbers in them, and errors in words."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.core.errors import UsageError
from data_tools.make.tokenizer import train_tokenizer
from mmvit.checkpoint import save_classifier, save_model
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.data.transforms import PreprocessConfig
from mmvit.eval.inspect_pictures import VIEWS, inspect_model
from mmvit.models.build import build_classifier, build_dual_encoder
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

RunCli = Callable[..., tuple[int, str, str]]
KOREAN = "\ube68\uac04 \ud558\ud2b8"  # red heart


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT and text tower with fresh weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = TokenizerConfig("file", str(folder / "tokenizer.json"))
    train_tokenizer([f"a red heart {KOREAN}"], folder / "tokenizer.json", vocab_size=320)
    built = build_tokenizer(tokenizer, 16)
    text = TextConfig(built.vocab_size, 16, built.end_of_text, width=32, depth=1, num_heads=2)
    image = ViTConfig(image_size=32, patch_size=8, width=64, depth=2, num_heads=4)
    config = DualEncoderConfig(32, image=image, text=text)
    torch.manual_seed(0)
    save_model(folder / "model", build_dual_encoder(config), config, PreprocessConfig(), tokenizer)
    return folder / "model"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid ViT without positions that sorts into two classes."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    image = ViTConfig(
        image_size=32, patch_size=8, width=32, depth=1, num_heads=2, stem_channels=[8, 16, 16], position="none"
    )
    config = ClassifierConfig(image=image)
    save_classifier(folder, build_classifier(config, ["a", "b"]), config, PreprocessConfig())
    return folder


@pytest.fixture
def pictures(colour_files: list[Path], tmp_path: Path) -> list[Path]:
    return [path.rename(tmp_path / f"{path.stem} $x_1$.png") for path in colour_files[:2]]  # no mathematics


def checked(path: Path) -> np.ndarray:
    """An image of the size that a person looks at, and not blank."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert 400 <= pixels.shape[0] <= 2400
    assert 400 <= pixels.shape[1] <= 2400
    share = (pixels == 255).all(axis=2).mean()
    assert 0.05 < share < 0.98, "blank, or no margin"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return pixels


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_of_a_contrastive_model(view: str, model: Path, pictures: list[Path], tmp_path: Path):
    facts = inspect_model(model, view, pictures, "a red heart", tmp_path / "view.png")
    assert facts["view"] == view
    checked(tmp_path / "view.png")
    json.dumps(facts)
    if view == "filters":
        assert facts["shape"] == [28, 8, 8, 3]
    elif view == "positions":
        assert facts["grid"] == [4, 4]
    elif view == "distance":
        assert np.shape(facts["distance_px"]) == (2, 4)
        # Fresh weights look everywhere alike, more or less.
        assert np.allclose(facts["distance_px"], facts["even_distance_px"], rtol=0.2)
    else:
        assert [each["image"] for each in facts["images"]] == [str(path) for path in pictures]
        assert np.shape(facts["images"][0]["map"]) == (4, 4)
    if view == "relevance":
        for each in facts["images"]:
            assert np.max(each["map"]) == pytest.approx(1)
            assert np.min(each["map"]) >= 0
            assert -1 <= each["cosine"] <= 1


@pytest.mark.slow
def test_size_and_shards(model: Path, colour_shards: IndexedShards, tmp_path: Path):
    shard = colour_shards.paths[0].path
    facts = inspect_model(model, "distance", [shard], None, tmp_path / "a.png", size=48)
    assert facts["num_images"] == 24
    facts = inspect_model(model, "relevance", [shard], KOREAN, tmp_path / "b.png", size=48)
    assert len(facts["images"]) == 8
    assert np.shape(facts["images"][7]["map"]) == (6, 6)
    assert facts["text"] == KOREAN
    checked(tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"does not accept images of 50 px: .*multiples of 8") as error:
        inspect_model(model, "rollout", [shard], None, tmp_path / "c.png", size=50)
    assert error.value.where == "--size"
    assert not (tmp_path / "c.png").exists()


def test_a_classifier_has_the_views_that_it_has(classifier: Path, pictures: list[Path], tmp_path: Path):
    for view in ("filters", "distance", "rollout"):
        facts = inspect_model(classifier, view, pictures, None, tmp_path / f"{view}.png")
        checked(tmp_path / f"{view}.png")
        assert facts.get("channels") is None or sorted(facts["channels"]) == list(range(8))
    for view in ("positions", "relevance"):
        with pytest.raises(UsageError, match=f"has no view '{view}'") as error:
            inspect_model(classifier, view, pictures, "a", tmp_path / "none.png")
        assert error.value.hint == "use --view filters | distance | rollout"
    assert not (tmp_path / "none.png").exists()


def test_the_plots_differ_with_what_they_show(model: Path, pictures: list[Path], tmp_path: Path):
    for name, text in (("a", "a red heart"), ("b", KOREAN), ("c", "a red heart")):
        inspect_model(model, "relevance", pictures, text, tmp_path / f"{name}.png")
    drawn = {name: (tmp_path / f"{name}.png").read_bytes() for name in "abc"}
    assert drawn["a"] == drawn["c"] != drawn["b"]


def test_the_verb(run_cli: RunCli, model: Path, pictures: list[Path], tmp_path: Path):
    out = tmp_path / "new" / "view.png"
    code, printed, _ = run_cli("inspect", model, "--view", "rollout", "--image", pictures[0], "--out", out, "--json")
    assert code == 0
    assert json.loads(printed)["out"] == str(out)
    checked(out)
    code, printed, _ = run_cli("inspect", model, "--view", "filters", "--out", out)
    assert (code, printed.strip()) == (0, str(out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--view", "rolout"], "did you mean 'rollout'?"),
        (["--view", "rollout"], "needs images"),
        (["--view", "relevance", "--image", "x.png"], "needs a text"),
        ([], "--view"),
    ],
)
def test_wrong_use(run_cli: RunCli, model: Path, arguments: list[str], message: str):
    code, printed, err = run_cli("inspect", model, *arguments)
    assert (code, printed) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_images_that_are_missing(run_cli: RunCli, model: Path, tmp_path: Path):
    for name in ("none.png", "none.tar"):
        code, _, err = run_cli("inspect", model, "--view", "rollout", "--image", tmp_path / name)
        assert code == 3
        assert name in err
