"""Which texts of a sample a training step sees."""

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from data_tools.errors import DataError
from mmvit.data.prompts import fill
from mmvit.data.shards import RawSample


@dataclass
class CaptionConfig:
    """One text of each sample: its source and the templates that it may stand in."""

    source: str = "txt"  # "txt", or a path into the sample's JSON such as "names.ko"
    templates: list[str] = field(default_factory=list)  # one is drawn at random; none: the text as it is


def caption_text(sample: RawSample, config: CaptionConfig) -> str:
    """Return the bare text; raises DataError naming the sample where it is missing or blank."""
    text: Any = sample.caption
    if config.source != "txt":
        text = reduce(
            lambda node, name: node.get(name) if isinstance(node, dict) else None, config.source.split("."), sample.meta
        )
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"caption {config.source!r} is missing or empty",
            where=sample.key,
            mend="remove the sample, or name another source in data.captions",
        )
    return text.strip()


def draw_caption(text: str, config: CaptionConfig, rng: np.random.Generator) -> str:
    """Put the text into one of the templates, drawn from `rng`."""
    return fill(config.templates[rng.integers(len(config.templates))], text) if config.templates else text
