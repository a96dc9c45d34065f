"""Texts to token ids."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from data_tools.core.errors import UsageError
from data_tools.make.tokenizer import END_OF_TEXT, PAD, START_OF_TEXT
from mmvit.data.config import TokenizerConfig as TokenizerConfig

TOKENIZER_FILE = "tokenizer.json"

# Role -> what tokenizers call its token, and the keys under which transformers stores the name.
_KNOWN_NAMES = {
    "start": (START_OF_TEXT, "[CLS]", "<s>", "<bos>"),
    "end": (END_OF_TEXT, "[SEP]", "</s>", "<eos>"),
    "pad": (PAD, "[PAD]", "<pad>"),
}
_TRANSFORMERS_KEYS = {"start": ("bos_token", "cls_token"), "end": ("eos_token", "sep_token"), "pad": ("pad_token",)}


_PROBES = ["a photo of a dog.", "Zwei rote \u00c4pfel, 37 St\u00fcck", "\uac15\uc544\uc9c0 \uc5bc\uad74", "x" * 40]


class Tokens(NamedTuple):
    """Ids of texts, and how many of the texts lost tokens: too long, or spelling out a reserved token."""

    ids: Int[Tensor, "B L"]
    num_cut: int


class Tokenizer:
    """Texts to ids [B, L]: start where the tokenizer has one, the text's tokens, end, padding.

    A text that is too long is truncated and keeps its end-of-text id. The ids of `reserved` never come from a text: one
    that spells out the name of such a token is encoded as plain text, or if `encode` cannot do that loses the token and
    counts as truncated.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[list[int]]],
        *,
        vocab_size: int,
        start: int | None,
        end: int,
        pad: int,
        reserved: Collection[int],
        context_length: int,
    ):
        self.encode = encode
        self.reserved = frozenset(reserved)
        self.vocab_size = vocab_size
        self.start_of_text = start
        self.end_of_text = end
        self.pad = pad
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Encode texts and pad them to the longest of them, which is at most the context length."""
        return self.tokenize(texts).ids

    def tokenize(self, texts: Sequence[str], limit: int | None = None) -> Tokens:
        """Encode texts and count the truncated ones; `limit` may be shorter than the context length."""
        head = [] if self.start_of_text is None else [self.start_of_text]
        room = min(self.context_length, limit or self.context_length) - len(head) - 1
        rows = self.encode(list(texts))
        lengths = [len(row) for row in rows]
        rows = [row if self.reserved.isdisjoint(row) else [i for i in row if i not in self.reserved] for row in rows]
        num_cut = sum(len(row) > room or len(row) < length for row, length in zip(rows, lengths, strict=True))
        rows = [[*head, *row[:room], self.end_of_text] for row in rows]
        ids = torch.full((len(rows), max(map(len, rows), default=2)), self.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return Tokens(ids, num_cut)


class _ClipEncode:
    """Texts to ids by open_clip's tokenizer; a class, not a lambda, so that it can be pickled for loader workers.

    open_clip turns the text "<end_of_text>" into that token, which ends a caption early; here it is text.
    """

    def __init__(self, bpe: Any):
        from open_clip.tokenizer import re as regex

        names = "|".join(bpe.decoder[i] for i in bpe.all_special_ids)
        bpe.pat = regex.compile(bpe.pat.pattern.removeprefix(f"{names}|"), bpe.pat.flags)
        self.bpe = bpe

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.bpe.encode(text) for text in texts]


class _FileEncode:
    """The same by a tokenizer of the tokenizers library; the reserved tokens, by name, are text in a caption."""

    def __init__(self, bpe: Any, reserved: dict[str, int]):
        self.bpe = bpe
        self.reserved = frozenset(reserved.values())
        # A blank after the first character: for tokens that the file does not mark as special, or that are words of
        # the model itself.
        long = [f"(?<={re.escape(name[0])}){re.escape(name[1:])}" for name in reserved if len(name) > 1]
        self.names = re.compile("|".join(long) or "(?!)", re.IGNORECASE)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._ids(texts)
        spelt = [i for i, row in enumerate(rows) if not self.reserved.isdisjoint(row)]
        if spelt:
            again = self._ids([self.names.sub(r" \g<0>", texts[i]) for i in spelt])
            for i, row in zip(spelt, again, strict=True):
                rows[i] = row
        return rows

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # A caption that spells out an end-of-text token must not end there; set here, as a copy forgets it.
        self.bpe.encode_special_tokens = True
        return [row.ids for row in self.bpe.encode_batch(texts, add_special_tokens=False)]


def build_tokenizer(config: TokenizerConfig, context_length: int) -> Tokenizer:
    """Build the tokenizer; raise UsageError for an unknown kind or an invalid file.

    `context_length` is the text tower's, in tokens, start and end included.
    """
    if config.kind == "clip":
        return _clip_tokenizer(context_length)
    config, bpe = _open(config)
    vocabulary = bpe.get_vocab()
    reserved = {name: vocabulary[name] for name in (config.start, config.end, config.pad) if name}
    return Tokenizer(
        _FileEncode(bpe, reserved),
        vocab_size=max(vocabulary.values()) + 1,
        start=vocabulary[config.start] if config.start else None,
        end=vocabulary[config.end],
        pad=vocabulary[config.pad],
        reserved=reserved.values(),
        context_length=context_length,
    )


def resolve_tokenizer(config: TokenizerConfig) -> TokenizerConfig:
    """Return the complete config: the path of the tokenizer.json itself and the names of its three tokens.

    With it that file is sufficient, without the other files of a transformers folder.
    """
    return config if config.kind == "clip" else _open(config)[0]


def tokenizer_file(path: str) -> Path:
    """Return the tokenizer.json that `TokenizerConfig.path` means."""
    return Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)


def _clip_tokenizer(context_length: int) -> Tokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # slow to import: pulls in torchvision and timm

    bpe = SimpleTokenizer()
    return Tokenizer(
        _ClipEncode(bpe),
        vocab_size=bpe.vocab_size,
        start=bpe.sot_token_id,
        end=bpe.eot_token_id,
        pad=0,  # the token "!", as in open_clip
        reserved=bpe.all_special_ids,
        context_length=context_length,
    )


def _open(config: TokenizerConfig) -> tuple[TokenizerConfig, Any]:
    """Read the file of the tokenizers library and find its special tokens."""
    import tokenizers

    path = tokenizer_file(config.path)
    if not path.is_file():
        hint = f"set tokenizer.path to a {TOKENIZER_FILE}; transformers writes one when it saves a fast tokenizer"
        raise UsageError("tokenizer file is missing", where=str(path), hint=hint)
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UsageError(f"tokenizer file cannot be read: {error}", where=str(path)) from error
    bpe.no_padding()
    bpe.no_truncation()
    named = _transformers_names(path.parent) if Path(config.path).is_dir() else {}
    tokens = _special_tokens(config, bpe, named, str(path))
    return replace(config, path=str(path), start=tokens["start"], end=tokens["end"], pad=tokens["pad"]), bpe


def _special_tokens(config: TokenizerConfig, bpe: Any, named: dict[str, str], where: str) -> dict[str, str]:
    """Return the names of the tokens "start" ("" for none), "end" and "pad"."""
    vocabulary = bpe.get_vocab()
    given = {"start": config.start, "end": config.end, "pad": config.pad}
    frame = _frame(bpe, where) if config.start is None or config.end is None else {}
    found: dict[str, str] = {}
    for role, known in _KNOWN_NAMES.items():
        names = [given[role], frame.get(role), *map(named.get, _TRANSFORMERS_KEYS[role])]
        names += [name for name in known if name in vocabulary]
        found[role] = next((name for name in names if name is not None), "")
    missing = [token for token in found.values() if token and token not in vocabulary]
    if missing or not found["end"]:
        raise UsageError(
            f"tokenizer has no token {' '.join(missing) or 'that ends a text'}",
            where=where,
            note="texts could not be delimited",
            hint="set tokenizer.start, tokenizer.end and tokenizer.pad",
        )
    if found["start"] == found["end"]:
        if config.start:
            what = f"the token {config.start} cannot be used both before and after a text: it marks the end of texts"
            raise UsageError(what, where="tokenizer.start", hint="use tokenizer.start='' for no start token")
        found["start"] = ""  # GPT-2 has one token for both
    return {**found, "pad": found["pad"] or found["end"]}


def _frame(bpe: Any, where: str) -> dict[str, str]:
    """Return the tokens that the template of the file adds before and after a text, if any."""
    try:
        row = bpe.encode("a \ue000")  # the second word is outside every vocabulary
    except Exception as error:
        what = f"the tokenizer cannot read words outside its vocabulary: {error}"
        raise UsageError(what, where=where, hint="train it with an unk token, or at byte level") from error
    inside = [i for i, special in enumerate(row.special_tokens_mask) if not special]
    if not inside or len(inside) == len(row.tokens):
        return {}
    before, after = row.tokens[: inside[0]], row.tokens[inside[-1] + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise UsageError(
            f"the tokenizer adds {' '.join(before)} before a text and {' '.join(after)} after it",
            where=where,
            note="at most one token is supported at each end",
            hint="set tokenizer.start and tokenizer.end",
        )
    return {"start": before[0] if before else ""} | ({"end": after[0]} if after else {})


def _transformers_names(folder: Path) -> dict[str, str]:
    """Return the special tokens that a transformers folder names, as "pad_token" -> "<pad>"."""
    names: dict[str, Any] = {}
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if path.is_file():
            try:
                names |= json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise UsageError(f"tokenizer file cannot be read: {error}", where=str(path)) from error
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
    return {key: token for key, token in tokens.items() if isinstance(token, str)}


def read_alike(first: Tokenizer, second: Tokenizer, context_length: int) -> bool:
    """Return whether two tokenizers give the same ids to texts on which only equal tokenizers agree."""
    return first.vocab_size == second.vocab_size and all(
        torch.equal(*(tokenizer.tokenize([probe], context_length).ids for tokenizer in (first, second)))
        for probe in _PROBES
    )
