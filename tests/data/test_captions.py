"""Where a caption comes from and the template it stands in."""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from data_tools.core.errors import DataError
from data_tools.sample.content import FaultError
from mmvit.config.validate import validate
from mmvit.data.captions import Candidate, Caption, CaptionConfig, caption_texts, draw_caption, text_places
from mmvit.data.shards import IndexedShards
from mmvit.data.source import RawSample

NAMES = {"en": "cat", "de": ["Katze", " ", "Kater"], "ko": " ", "fr": None}


def sample(meta: dict | None = None, caption: str | None = " a red apple ") -> RawSample:
    return RawSample("a.tar/folder/key1", b"image", caption, meta, None)


def test_the_caption_or_a_text_of_the_metadata():
    meta = {"names": {"ko": " \uc0ac\uacfc "}}
    assert caption_texts(sample(meta), CaptionConfig()) == [Candidate("a red apple", 1.0)]
    assert caption_texts(sample(meta), CaptionConfig("names.ko")) == [Candidate("\uc0ac\uacfc", 1.0)]


def test_places_of_texts_are_named_where_the_caption_is_missing(
    squares: IndexedShards, batches_of: Callable[..., object]
):
    meta = {"names": {"en": "cat", "n": 3, "ko": ["a", "b"]}, "url": "x", "size": [1, 2], "none": None, "empty": []}
    assert text_places(meta) == ["names.en", "names.ko", "url"]
    assert text_places(None) == []
    with pytest.raises(DataError, match=r"caption 'title' is missing") as caught:
        batches_of(squares, data={"captions": [CaptionConfig("title")]}).check_samples()
    assert str(caught.value.hint).startswith("data.captions=[{source: txt}] names where the captions are")
    assert "this sample has texts in txt, names.long" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [("cat", 1.0), ("Katze", 0.5), ("Kater", 0.5)]),
        ({"en": 1.0, "de": 3.0}, [("cat", 1.0), ("Katze", 1.5), ("Kater", 1.5)]),
        ({"en": 2.0, "ko": 5.0}, [("cat", 2.0)]),
        ({"en": 0.0, "de": 1.0}, [("Katze", 0.5), ("Kater", 0.5)]),
    ],
)
def test_several_languages_have_their_weights(weights: dict[str, float], expected: list):
    assert caption_texts(sample({"names": NAMES}), CaptionConfig("names", weights=weights)) == expected


def test_texts_without_a_language_are_taken_whatever_the_weights():
    config = CaptionConfig("names", weights={"ko": 1.0})
    assert caption_texts(sample({"names": ["a", "", "b"]}), config) == [("a", 0.5), ("b", 0.5)]


@pytest.mark.parametrize(
    ("meta", "cause"),
    [
        (None, "no-caption"),
        ({}, "no-caption"),
        ({"names": None}, "no-caption"),
        ({"names": "x"}, "no-caption"),
        ({"names": {"ko": 3}}, "no-caption"),
        ({"names": {"ko": [None]}}, "no-caption"),
        ({"names": {"ko": "  "}}, "empty-caption"),
        ({"names": {"ko": ["", "\n"]}}, "empty-caption"),
    ],
)
def test_a_missing_text_is_named(meta: dict | None, cause: str):
    with pytest.raises(FaultError, match=r"caption 'names\.ko' is (missing|empty)") as caught:
        caption_texts(sample(meta), CaptionConfig("names.ko"))
    assert caught.value.fault.cause == cause


@pytest.mark.parametrize(("weights", "cause"), [({"fr": 1.0, "es": 1.0}, "no-caption"), ({"ko": 1.0}, "empty-caption")])
def test_a_missing_language_is_named(weights: dict[str, float], cause: str):
    with pytest.raises(FaultError, match=f"caption 'names' is .* in {', '.join(weights)}") as caught:
        caption_texts(sample({"names": NAMES}), CaptionConfig("names", weights=weights))
    assert caught.value.fault.cause == cause


@pytest.mark.parametrize(("caption", "cause"), [(None, "no-caption"), ("", "empty-caption")])
def test_a_sample_without_its_text(caption: str | None, cause: str):
    with pytest.raises(FaultError) as caught:
        caption_texts(sample(caption=caption), CaptionConfig())
    assert caught.value.fault.cause == cause


def test_templates_are_drawn_from_the_random_state():
    config = CaptionConfig(templates=["a {}", "the {}", "my {}"])
    drawn = [draw_caption([Candidate("cat", 1.0)], config, np.random.default_rng(seed)) for seed in range(30)]
    assert set(drawn) == {Caption("cat", f"{word} cat") for word in ("a", "the", "my")}
    assert [each.text for each in drawn] == [
        config.templates[np.random.default_rng(seed).integers(3)].replace("{}", "cat") for seed in range(30)
    ]


def test_nothing_is_drawn_where_there_is_one_choice():
    rng = np.random.default_rng(0)
    assert draw_caption([Candidate("cat", 0.5)], CaptionConfig(), rng) == ("cat", "cat")
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_texts_are_drawn_as_often_as_their_weights_say():
    candidates = caption_texts(sample({"names": NAMES}), CaptionConfig("names", weights={"en": 1.0, "de": 3.0}))
    config = CaptionConfig("names", ["a {}"])
    drawn = [draw_caption(candidates, config, np.random.default_rng((1, i))) for i in range(4000)]
    assert all(each.text == f"a {each.bare}" for each in drawn)
    counts = collections.Counter(each.bare for each in drawn)
    assert counts == {
        "cat": pytest.approx(1000, abs=110),
        "Katze": pytest.approx(1500, abs=125),
        "Kater": pytest.approx(1500, abs=125),
    }  # four standard deviations
    assert drawn == [draw_caption(candidates, config, np.random.default_rng((1, i))) for i in range(4000)]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (CaptionConfig(templates=["no place"]), "templates"),
        (CaptionConfig(weights={"en": 1.0}), "weights"),
        (CaptionConfig("names", weights={"en": -1.0, "de": 2.0}), "weights"),
        (CaptionConfig("names", weights={"en": float("nan")}), "weights"),
        (CaptionConfig("names", weights={"en": float("inf")}), "weights"),
        (CaptionConfig("names", weights={"en": 0.0}), "weights"),
    ],
)
def test_bad_settings_are_named(config: CaptionConfig, key: str):
    (problem,) = validate(CaptionConfig, dataclasses.asdict(config), strict=True)[1]
    assert problem.key.startswith(key)


def test_good_settings():
    for config in (CaptionConfig(), CaptionConfig("names", ["a {}"], {"en": 1.0, "de": 0.0})):
        assert validate(CaptionConfig, dataclasses.asdict(config), strict=True)[1] == []
