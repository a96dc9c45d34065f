"""Which texts of a sample a training step sees."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from data_tools.core.errors import SampleError, UsageError
from data_tools.sample.content import find_texts
from mmvit.data.prompts import check_template, fill
from mmvit.data.source import RawSample


@dataclass
class CaptionConfig:
    """One text of each sample: its source and the templates that it may stand in.

    The source is a text, a list of texts, or an object of language -> text or list; of several, one is drawn at random.
    """

    source: str = "txt"  # "txt", or a path into the sample's JSON such as "names.ko"
    templates: list[str] = field(default_factory=list)  # one is drawn at random; none: the text as it is
    weights: dict[str, float] = field(default_factory=dict)  # language -> how often; none: all languages equally


class Candidate(NamedTuple):
    """A text that may be drawn, and how often in proportion to the others."""

    text: str
    weight: float


class Caption(NamedTuple):
    """The text that was drawn, bare and in its template."""

    bare: str
    text: str


def check_captions(config: CaptionConfig, where: str) -> None:
    """Raise UsageError, naming the key below `where`, for templates and weights that no caption can have."""
    for template in config.templates:
        check_template(template, where=f"{where}.templates")
    weights = config.weights
    if not weights:
        return
    key = f"{where}.weights"
    if config.source == "txt":
        raise UsageError("weights are for texts by language", where=key, hint=f"name their JSON path in {where}.source")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or not any(weights.values()):
        raise UsageError(
            f"{weights} are no weights", where=key, hint="give numbers of at least 0, and not 0 for all languages"
        )


def caption_texts(sample: RawSample, config: CaptionConfig) -> list[Candidate]:
    """Return the texts that may be drawn; a language's weight is shared equally among its texts.

    Raises:
        SampleError: there is none ("no-caption"), or all are blank ("empty-caption").
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
        shard, _, key = sample.key.partition("/")
        raise SampleError(cause, f"caption {config.source!r} is {what}{languages}", shard=shard, key=key)
    return candidates


def draw_caption(candidates: Sequence[Candidate], config: CaptionConfig, rng: np.random.Generator) -> Caption:
    """Draw one text and its template; nothing is taken from `rng` where there is only one choice."""
    bare = candidates[0].text
    if len(candidates) > 1:
        stops = list(accumulate(candidate.weight for candidate in candidates))
        bare = candidates[bisect_right(stops, rng.random() * stops[-1])].text
    templates = config.templates
    return Caption(bare, fill(templates[rng.integers(len(templates))], bare) if templates else bare)
