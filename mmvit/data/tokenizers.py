"""Texts to token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from data_tools.errors import UsageError
from data_tools.tokenizer import END_OF_TEXT, PAD, START_OF_TEXT


@dataclass
class TokenizerConfig:
    """Which tokenizer: CLIP's byte-pair encoding, or a `tokenizer.json` of the tokenizers library."""

    kind: str = "clip"  # clip | file
    path: str = ""  # of the tokenizer.json, for kind "file"


class Tokenizer:
    """Texts to ids [B, L]: start, the text's tokens, end, padding.

    A text that is too long loses its tail and keeps its end-of-text id.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[list[int]]],
        *,
        vocab_size: int,
        start: int,
        end: int,
        pad: int,
        context_length: int,
    ):
        self.encode = encode
        self.vocab_size = vocab_size
        self.start_of_text = start
        self.end_of_text = end
        self.pad = pad
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Encode texts and pad them to the longest of them, which is at most the context length."""
        room = self.context_length - 2
        rows = self.encode(list(texts))
        rows = [[self.start_of_text, *row[:room], self.end_of_text] for row in rows]
        ids = torch.full((len(rows), max(map(len, rows), default=2)), self.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids


class _ClipEncode:
    """Texts to ids by open_clip's tokenizer; a class and no lambda, so that a loader worker can be sent it."""

    def __init__(self, bpe: Any):
        self.bpe = bpe

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.bpe.encode(text) for text in texts]


class _FileEncode:
    """The same by a tokenizer of the tokenizers library."""

    def __init__(self, bpe: Any):
        self.bpe = bpe

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        # A caption that spells out an end-of-text token must not end there; set here, as a copy forgets it.
        self.bpe.encode_special_tokens = True
        return [row.ids for row in self.bpe.encode_batch(texts, add_special_tokens=False)]


def build_tokenizer(config: TokenizerConfig, context_length: int) -> Tokenizer:
    """Make the tokenizer; raises UsageError for an unknown kind or a file that is none.

    `context_length` is the text tower's, in tokens, start and end included.
    """
    if config.kind == "clip":
        return _clip_tokenizer(context_length)
    if config.kind == "file":
        return _file_tokenizer(Path(config.path), context_length)
    raise UsageError(f"tokenizer kind {config.kind!r} is unknown", where="tokenizer.kind", mend="use clip or file")


def _clip_tokenizer(context_length: int) -> Tokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # slow to import: pulls in torchvision and timm

    bpe = SimpleTokenizer()
    return Tokenizer(
        _ClipEncode(bpe),
        vocab_size=bpe.vocab_size,
        start=bpe.sot_token_id,
        end=bpe.eot_token_id,
        pad=0,
        context_length=context_length,
    )


def _file_tokenizer(path: Path, context_length: int) -> Tokenizer:
    import tokenizers

    if not path.is_file():
        raise UsageError("tokenizer file is missing", where=str(path), mend="set tokenizer.path to a tokenizer.json")
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"tokenizer file cannot be read: {error}", where=str(path)) from error
    vocabulary = bpe.get_vocab()
    missing = [token for token in (START_OF_TEXT, END_OF_TEXT, PAD) if token not in vocabulary]
    if missing:
        raise UsageError(
            f"tokenizer has no token {' '.join(missing)}",
            where=str(path),
            meaning="texts could not be delimited",
            mend="train one on your captions, or add these special tokens to the file",
        )
    return Tokenizer(
        _FileEncode(bpe),
        vocab_size=bpe.get_vocab_size(),
        start=vocabulary[START_OF_TEXT],
        end=vocabulary[END_OF_TEXT],
        pad=vocabulary[PAD],
        context_length=context_length,
    )
