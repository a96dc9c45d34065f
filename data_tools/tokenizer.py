"""A tokenizer trained on the user's own captions."""

from collections.abc import Iterable
from pathlib import Path

from data_tools.atomic import write_atomic

PAD = "<|pad|>"
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int = 4096) -> None:
    """Train a byte-level BPE (Sennrich et al. 2016) on `texts` and write its `tokenizer.json`.

    All 256 bytes are in the vocabulary, so that the tokenizer reads any text, and the trained merges keep the
    languages of the captions short: a Korean syllable costs CLIP's English vocabulary up to three tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START_OF_TEXT, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_atomic(path, tokenizer.to_str(pretty=True).encode())
