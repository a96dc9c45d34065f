"""A model of seconds that has really learned something: six colours and their names."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.make.tokenizer import train_tokenizer
from data_tools.tar.writer import ShardWriter
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.eval.encoder import Encoder
from mmvit.losses.contrastive import contrastive_loss
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "yellow": (240, 240, 0),
}
IMAGE_SIZE = 16


def coloured(name: str, seed: int) -> Image.Image:
    """A plain image of one colour with a little noise, of some size."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(16, 40, 2)
    noise = rng.integers(-15, 16, (height, width, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def colour_names() -> list[str]:
    return list(COLOURS)


@pytest.fixture(scope="session")
def colour_shards(tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    """Four images a colour that training does not see; the label is the number of the name."""
    with ShardWriter(tmp_path_factory.mktemp("colours")) as writer:
        for seed in range(4):
            for label, name in enumerate(COLOURS):
                png = as_png(coloured(name, 1000 + 10 * seed + label))
                writer.write(f"{name}{seed}", {"png": png, "txt": name, "cls": label})
    return IndexedShards(writer.shards)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([f"a photo of something {name}" for name in COLOURS], path, vocab_size=320)
    tokenizer = build_tokenizer(TokenizerConfig("file", str(path)), 16)
    torch.manual_seed(0)
    text = TextConfig(tokenizer.vocab_size, 16, tokenizer.end_of_text, width=32, depth=1, num_heads=2)
    image = ViTConfig(image_size=IMAGE_SIZE, patch_size=8, width=32, depth=1, num_heads=2)
    model = build_dual_encoder(DualEncoderConfig(24, image=image, text=text))
    encoder = Encoder(model, tokenizer, image_size=IMAGE_SIZE, fingerprint="colours", batch_size=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        template = ("{}", "a photo of something {}")[step % 2]
        pixels = encoder.pixels([coloured(name, 10 * step + i) for i, name in enumerate(COLOURS)])
        ids = tokenizer([template.format(name) for name in COLOURS])
        embeddings = model(pixels, ids[:, None])
        loss = contrastive_loss(embeddings.image, embeddings.text[:, 0], embeddings.logit_scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return encoder


@pytest.fixture
def colour_files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in COLOURS]
    for i, path in enumerate(paths):
        path.write_bytes(as_png(coloured(path.stem, 2000 + i)))
    return paths
