"""The training recipe that fits a number of samples, with its batch and its steps."""

from __future__ import annotations

from typing import NamedTuple

MIN_STEPS = 100


class Recipe(NamedTuple):
    """A built-in config of mmvit for data sets of up to `max_samples`; the batch is smaller for smaller ones."""

    name: str
    max_samples: int | None
    batch_size: int
    epochs: int


RECIPES = (
    Recipe("pretrain/small", 2_000, 128, 60),
    Recipe("pretrain/small", 50_000, 256, 30),
    Recipe("pretrain/small", 1_000_000, 256, 10),
    Recipe("pretrain/cc3m_vit_b16", 20_000_000, 4096, 40),
    Recipe("pretrain/clip_vit_b32", None, 32_768, 16),
)


def fitting_recipe(num_samples: int) -> list[str] | None:
    """Return the config and the arguments for `mmvit pretrain`; None if there are too few samples to train on.

    A batch has at most a quarter of the samples: a larger one would have few other pairs to compare with in the next.
    """
    recipe = next(each for each in RECIPES if each.max_samples is None or num_samples <= each.max_samples)
    batch_size = min(recipe.batch_size, 2 ** ((num_samples // 4).bit_length() - 1) if num_samples >= 8 else 0)
    if batch_size < 2:
        return None
    steps = max(MIN_STEPS, recipe.epochs * num_samples // batch_size)
    return [recipe.name, f"train.batch_size={batch_size}", f"train.steps={steps}"]
