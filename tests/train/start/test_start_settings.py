"""Settings that a run takes from its tokenizer."""

from pathlib import Path

import pytest

from data_tools.make.recipe import fitting_recipe
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.train.start.config import load_pretrain_config


@pytest.mark.parametrize("recipe", ["pretrain/clip_vit_b32", "pretrain/siglip_vit_b16"])
def test_vocabulary_and_end_of_text_are_those_of_the_tokenizer(tiny_data: Path, recipe: str):
    """Of a recipe too whose file has those of another tokenizer."""
    path = tiny_data / "tokenizer.json"
    tokens = ["tokenizer.start=null", "tokenizer.end=null", "tokenizer.pad=null"]
    config = load_pretrain_config(recipe, ["data.train=x", f"tokenizer.path={path}", *tokens])
    tokenizer = build_tokenizer(TokenizerConfig("file", str(path)), 77)
    assert config.tokenizer.kind == "file"
    assert (config.model.text.vocab_size, config.model.text.end_of_text) == (
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )


@pytest.mark.parametrize(
    ("more", "source"), [([], "txt"), (["data.captions=[{source: names.ko}]"], "names.ko")], ids=["txt", "chosen"]
)
def test_captions_of_own_data_are_in_txt_whatever_recipe_is_named(tiny_data: Path, more: list[str], source: str):
    overrides = ["data.train=x", f"tokenizer.path={tiny_data / 'tokenizer.json'}", *more]
    assert [each.source for each in load_pretrain_config("quickstart", overrides).data.captions] == [source]


@pytest.mark.parametrize("num_samples", [8, 50, 782, 20_000, 1_000_000, 3_000_000, 400_000_000])
def test_the_recipe_that_make_names_is_a_run_of_this_size(num_samples: int):
    recipe, *settings = fitting_recipe(num_samples) or []
    config = load_pretrain_config(recipe, ["data.train=x", *settings])
    assert 2 <= config.train.batch_size <= num_samples / 4
    epochs = config.train.steps * config.train.batch_size / num_samples
    assert 9 <= epochs <= 100
    assert (recipe == "pretrain/small") == (num_samples <= 1_000_000)


def test_too_few_samples_have_no_recipe():
    assert fitting_recipe(7) is None


def test_what_is_set_on_the_command_line_stays(tiny_data: Path):
    overrides = ["data.train=x", f"tokenizer.path={tiny_data / 'tokenizer.json'}", "model.text.vocab_size=5000"]
    assert load_pretrain_config("pretrain/clip_vit_b32", overrides).model.text.vocab_size == 5000


def test_the_default_tokenizer_has_the_default_values():
    text = load_pretrain_config("pretrain/clip_vit_b32", ["data.train=x"]).model.text
    assert (text.vocab_size, text.end_of_text) == (49408, 49407)
    tokenizer = build_tokenizer(TokenizerConfig("clip"), 77)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (49408, 49407)
