"""A short real training run learns: it names drawings of a vendor that it has never seen."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mmvit
from mmvit.config import load_config, PretrainConfig
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import build_tokenizer
from mmvit.eval.zero_shot import evaluate_zero_shot
from mmvit.train.loop import pretrain

NUM_CLASSES = 200
NUM_EVERY = 9  # every ninth of about 1,850 classes, so that all groups of emoji are among them
CHANCE = 1 / NUM_CLASSES
BOUNDS = {"en": 0.5, "ko": 0.5}


@pytest.fixture(scope="module")
def data(cut_emoji: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    cut_emoji(folder, [NUM_EVERY * i for i in range(NUM_CLASSES)], 10_000, 10_000)
    return folder


def learn(data: Path, out: Path, seed: int) -> dict[str, float]:
    """Train for some ten thousand samples and return the zero-shot accuracy by language."""
    config = load_config(PretrainConfig, "quickstart")
    config.out, config.seed = str(out), seed
    config.data.train, config.tokenizer.path = [f"{data}/train-*.tar"], f"{data}/tokenizer.json"
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.stem_channels = 32, 8, [32, 64, 96]
    image.width, image.depth = 96, 2
    text.width, text.depth, text.context_length = 96, 1, 24
    config.train.batch_size, config.train.steps, config.train.precision = 100, 200, "fp32"
    tokenizer = build_tokenizer(config.tokenizer, text.context_length)
    text.vocab_size, text.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
    encoder = mmvit.load(pretrain(config))
    val = IndexedShards(sorted(data.glob("val-*.tar")))
    return {
        language: evaluate_zero_shot(
            encoder, val, load_class_names(f"{data}/names.{language}.txt"), load_templates(templates)
        ).acc1
        for language, templates in (("en", "emoji"), ("ko", "emoji-korean"))
    }


def test_learns_to_name_drawings_of_an_unseen_vendor(data: Path, tmp_path: Path):
    start = time.perf_counter()
    accuracies = learn(data, tmp_path / "run", seed=0)
    print(f"top-1 {accuracies}, {time.perf_counter() - start:.0f} s")
    for language, bound in BOUNDS.items():
        assert accuracies[language] >= bound > 20 * CHANCE
