"""Settings that a run takes from its tokenizer."""

from pathlib import Path

import pytest

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


def test_what_is_set_on_the_command_line_stays(tiny_data: Path):
    overrides = ["data.train=x", f"tokenizer.path={tiny_data / 'tokenizer.json'}", "model.text.vocab_size=5000"]
    assert load_pretrain_config("pretrain/clip_vit_b32", overrides).model.text.vocab_size == 5000


def test_the_default_tokenizer_has_the_default_values():
    text = load_pretrain_config("pretrain/clip_vit_b32", ["data.train=x"]).model.text
    assert (text.vocab_size, text.end_of_text) == (49408, 49407)
    tokenizer = build_tokenizer(TokenizerConfig("clip"), 77)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (49408, 49407)
