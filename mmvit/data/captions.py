"""Which texts of a sample a training step sees."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from data_tools.sample.content import FaultError, find_texts
from mmvit.data.config import CaptionConfig as CaptionConfig
from mmvit.data.prompts import fill
from mmvit.data.source import RawSample


class Candidate(NamedTuple):
    """A text that may be drawn, and how often in proportion to the others."""

    text: str
    weight: float


class Caption(NamedTuple):
    """The text that was drawn, bare and in its template."""

    bare: str
    text: str


def caption_texts(sample: RawSample, config: CaptionConfig) -> list[Candidate]:
    """Return the texts that may be drawn; a language's weight is shared equally among its texts.

    Raises:
        FaultError: there is none ("no-caption"), or all are blank ("empty-caption").
    """
    found = find_texts(config.source, sample.caption, sample.meta)
    by_language = config.weights and "" not in found
    weights = config.weights if by_language else dict.fromkeys(found, 1.0)
    wanted = {language: texts for language, texts in found.items() if weights.get(language)}
    full = {language: [text for text in texts if text] for language, texts in wanted.items()}
    candidates = [Candidate(text, weights[language] / len(texts)) for language, texts in full.items() for text in texts]
    if not candidates:
        cause, what = ("empty-caption", "empty") if wanted else ("no-caption", "missing")
        languages = f" in {', '.join(weights)}" if by_language else ""
        raise FaultError(cause, f"caption {config.source!r} is {what}{languages}")
    return candidates


def text_places(meta: Mapping[str, Any] | None, prefix: str = "") -> list[str]:
    """Return the first paths into a sample's JSON that hold texts, as `CaptionConfig.source` takes them."""
    places: list[str] = []
    for name, value in (meta or {}).items():
        if isinstance(value, Mapping):
            places += text_places(value, f"{prefix}{name}.")
        elif isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
            places.append(f"{prefix}{name}")
    return places[:8]


def draw_caption(candidates: Sequence[Candidate], config: CaptionConfig, rng: np.random.Generator) -> Caption:
    """Draw one text and its template; `rng` is not used if there is only one choice."""
    bare = candidates[0].text
    if len(candidates) > 1:
        stops = list(accumulate(candidate.weight for candidate in candidates))
        bare = candidates[bisect_right(stops, rng.random() * stops[-1])].text
    templates = config.templates
    return Caption(bare, fill(templates[rng.integers(len(templates))], bare) if templates else bare)
