"""Which texts of a sample a training step sees."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from data_tools.core.errors import UsageError
from data_tools.sample.content import FaultError, find_texts
from mmvit.data.prompts import check_template, fill
from mmvit.data.source import RawSample
from mmvit.keys import Problem, key


@dataclass
class CaptionConfig:
    """One text of each sample: its source, and the templates that it may be inserted into.

    The source is a text, a list of texts, or an object of language -> text or list; of several, one is drawn at random.
    """

    source: str = key("txt", "txt, or a path into the sample's JSON such as names.ko")
    templates: list[str] = key([], "templates with one {}, one is drawn at random; empty: the text unchanged")
    weights: dict[str, float] = key(
        {}, "language: relative frequency; empty: all languages equally often", ge=0, le=10**9
    )

    def problems(self) -> Iterator[Problem]:
        """Yield templates and weights that no caption can have."""
        for template in self.templates:
            try:
                check_template(template, where="templates")
            except UsageError as error:
                yield Problem("templates", error.what, error.hint)
        if self.weights and self.source == "txt":
            yield Problem("weights", "weights are for texts by language", "name their JSON path in source")
        elif self.weights and not (min(self.weights.values()) >= 0 and any(self.weights.values())):
            hint = "use numbers of at least 0, and not 0 for all languages"
            yield Problem("weights", f"weights is {self.weights}", hint)


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


def draw_caption(candidates: Sequence[Candidate], config: CaptionConfig, rng: np.random.Generator) -> Caption:
    """Draw one text and its template; `rng` is not used if there is only one choice."""
    bare = candidates[0].text
    if len(candidates) > 1:
        stops = list(accumulate(candidate.weight for candidate in candidates))
        bare = candidates[bisect_right(stops, rng.random() * stops[-1])].text
    templates = config.templates
    return Caption(bare, fill(templates[rng.integers(len(templates))], bare) if templates else bare)
