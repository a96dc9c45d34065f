"""Where a caption comes from and the template it stands in."""

import numpy as np
import pytest

from data_tools.errors import DataError
from mmvit.data.captions import CaptionConfig, caption_text, draw_caption
from mmvit.data.shards import RawSample


def sample(meta: dict | None = None, caption: str = " a red apple ") -> RawSample:
    return RawSample("a.tar/key1", b"image", caption, meta, None)


def test_the_caption_or_a_text_of_the_metadata():
    meta = {"names": {"ko": " \uc0ac\uacfc "}}
    assert caption_text(sample(meta), CaptionConfig()) == "a red apple"
    assert caption_text(sample(meta), CaptionConfig("names.ko")) == "\uc0ac\uacfc"


@pytest.mark.parametrize(
    "meta", [None, {}, {"names": None}, {"names": "x"}, {"names": {"ko": "  "}}, {"names": {"ko": 3}}]
)
def test_a_missing_text_is_named(meta: dict | None):
    with pytest.raises(DataError, match=r"caption 'names\.ko' is missing or empty") as caught:
        caption_text(sample(meta), CaptionConfig("names.ko"))
    assert caught.value.where == "a.tar/key1"


def test_templates_are_drawn_from_the_random_state():
    config = CaptionConfig(templates=["a {}", "the {}", "my {}"])
    drawn = [draw_caption("cat", config, np.random.default_rng(seed)) for seed in range(30)]
    assert set(drawn) == {"a cat", "the cat", "my cat"}
    assert drawn == [draw_caption("cat", config, np.random.default_rng(seed)) for seed in range(30)]
    assert draw_caption("cat", CaptionConfig(), np.random.default_rng(0)) == "cat"
