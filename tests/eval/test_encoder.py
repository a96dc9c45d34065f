"""An encoder gives unit rows in the order that it was given, whatever the batches."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from data_tools.core.errors import DataError, UsageError
from data_tools.sample.decode import read_image
from mmvit.checkpoint import save_model
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.data.transforms import PreprocessConfig, eval_pixels
from mmvit.eval import encoder as module
from mmvit.eval.encoder import Encoder, load
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig


def test_rows_are_those_of_single_items(encoder: Encoder, colour_names: list[str], colour_files: list[Path]):
    images, texts = colour_files * 3, colour_names * 3  # 18 items, batches of 7
    for encode, items in ((encoder.encode_image, images), (encoder.encode_text, texts)):
        rows = encode(items)
        assert rows.shape == (18, encoder.embed_dim)
        assert rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(18))
        assert torch.allclose(rows, torch.cat([encode([item]) for item in items]), atol=1e-5)


def test_pictures_and_their_files_are_the_same(encoder: Encoder, colour_files: list[Path]):
    expected = encoder.encode_image([str(path) for path in colour_files])
    assert torch.equal(encoder.encode_image(colour_files), expected)
    assert torch.equal(encoder.encode_image([Image.open(path) for path in colour_files]), expected)


def test_a_picture_with_transparency_lies_on_white(encoder: Encoder):
    clear, white = Image.new("RGBA", (20, 20), (0, 0, 0, 0)), Image.new("RGB", (20, 20), "white")
    assert torch.equal(encoder.encode_image([clear]), encoder.encode_image([white]))


def test_nothing_gives_no_rows(encoder: Encoder):
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, encoder.embed_dim)


def test_a_file_that_is_no_picture_is_named(encoder: Encoder, colour_files: list[Path]):
    colour_files[2].write_bytes(b"no picture")
    with pytest.raises(DataError, match="image cannot be decoded") as caught:
        encoder.encode_image(colour_files)
    assert caught.value.where == str(colour_files[2])


def test_one_image_or_text_gives_one_vector(encoder: Encoder, colour_files: list[Path]):
    image = Image.open(colour_files[0]).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = encoder.encode_image(colour_files[:1])[0]
    for one in (colour_files[0], str(colour_files[0]), image, array, tensor, tensor / 255):
        assert torch.equal(encoder.encode_image(one), expected)
    batch = encoder.encode_image(torch.stack([tensor, tensor]))
    assert torch.allclose(batch, torch.stack([expected, expected]), atol=1e-5)
    grey = np.full((8, 8), 200, np.uint8)
    assert torch.equal(encoder.encode_image(grey), encoder.encode_image(np.stack([grey] * 3, axis=2)))
    assert torch.equal(encoder.encode_text("red"), encoder.encode_text(["red"])[0])
    assert encoder.encode_text("red").numpy().shape == (encoder.embed_dim,)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((3, 8, 8), np.uint8),  # channels first, as torch has them
        np.zeros((8, 8, 3), np.float32),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.full((3, 8, 8), -1.0),  # normalised already
        torch.full((3, 8, 8), 2.0),
    ],
)
def test_other_shapes_and_types_are_refused(encoder: Encoder, image: np.ndarray | torch.Tensor):
    with pytest.raises(UsageError, match="as an image") as caught:
        encoder.encode_image([image])
    assert "of an image is" in caught.value.hint


def test_an_encoder_says_what_it_is(encoder: Encoder):
    parts = "VisionTransformer of 16 px", "0.0 M parameters", f"embed_dim={encoder.embed_dim}", "device='cpu'"
    assert repr(encoder) == f"Encoder({', '.join(parts)})"
    assert encoder.to("cpu") is encoder


def test_preprocessed_pictures_give_the_same_rows(encoder: Encoder, colour_files: list[Path]):
    pixels = [encoder.preprocess(path) for path in colour_files * 2]
    assert {(array.shape, array.dtype) for array in pixels} == {((3, 16, 16), np.dtype(np.uint8))}
    assert torch.equal(encoder.encode_pixels(pixels), encoder.encode_image(colour_files * 2))
    assert torch.equal(encoder.pixels(colour_files), torch.from_numpy(np.stack(pixels[: len(colour_files)])))
    assert encoder.encode_pixels([]).shape == (0, encoder.embed_dim)


def test_originals_are_not_held_together(encoder: Encoder, colour_files: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Each image is preprocessed before the next one is read."""
    done: list[str] = []
    monkeypatch.setattr(module, "read_image", lambda path: done.append("read") or read_image(path))
    monkeypatch.setattr(module, "eval_pixels", lambda *given: done.append("preprocess") or eval_pixels(*given))
    encoder.pixels(colour_files[:3])
    assert done == ["read", "preprocess"] * 3


def test_a_photo_lying_on_its_side_is_turned_once(encoder: Encoder, tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gradient = Image.fromarray(np.linspace(0, 255, 20 * 30, dtype=np.uint8).reshape(20, 30)).convert("RGB")
    gradient.save(tmp_path / "side.png", exif=exif)
    gradient.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    expected = encoder.preprocess(tmp_path / "upright.png")
    for picture in (tmp_path / "side.png", read_image(tmp_path / "side.png")):
        assert np.array_equal(encoder.preprocess(picture), expected)


def test_a_model_folder_gives_the_model_back(tmp_path: Path):
    config = DualEncoderConfig(
        embed_dim=16,
        image=ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2),
        text=TextConfig(context_length=8, width=32, depth=1, num_heads=2),
    )
    preprocess = PreprocessConfig([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    model = build_dual_encoder(config, preprocess.mean, preprocess.std).eval()
    save_model(tmp_path / "model", model, config, preprocess, TokenizerConfig())
    loaded = load(tmp_path / "model", "cpu")
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(pixels), model.encode_image(pixels))
    assert not loaded.model.training
    assert loaded.logit_scale == pytest.approx(1 / 0.07)
    assert (loaded.image_size, loaded.embed_dim, loaded.tokenizer.context_length) == (16, 16, 8)
    assert loaded.fingerprint == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
