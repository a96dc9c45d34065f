"""Texts to ids and back: CLIP's vocabulary as open_clip has it, or one trained on the user's captions."""

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import open_clip
import pytest
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from data_tools.core.errors import UsageError
from data_tools.make.tokenizer import END_OF_TEXT, PAD, START_OF_TEXT, train_tokenizer
from mmvit.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer, resolve_tokenizer

TEXTS = [
    "a photo of a cat",
    "A Photo of a CAT!",
    "caf\u00e9 cr\u00e8me br\u00fbl\u00e9e, na\u00efve fa\u00e7ade",
    "\uc774\uac83\uc740 \uace0\uc591\uc774\uc758 \uc0ac\uc9c4\uc785\ub2c8\ub2e4.",
    "\u7308\u306e\u5199\u771f \u0643\u062a\u0627\u0628 \u043a\u043e\u0448\u043a\u0430",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f thumbs up \U0001f44d\U0001f3fd",
    "  two   spaces &amp; a tab\t, it's 3.14 & 1/2 ",
    "",
]
LONG = "one two three four five six seven eight nine ten " * 10
CAPTIONS = [
    "a red apple",
    "a green apple",
    "a photo of a dog face",
    "\ube68\uac04 \uc0ac\uacfc",
    "\uac15\uc544\uc9c0 \uc5bc\uad74",
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(), 77)


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(CAPTIONS, path, vocab_size=320)
    return path


@pytest.fixture
def trained(trained_file: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig("file", str(trained_file)), 24)


def test_clip_ids_are_those_of_open_clip(clip: Tokenizer):
    texts = [*TEXTS, LONG]
    ids, expected = clip(texts), open_clip.tokenize(texts)
    assert ids.shape == expected.shape == (len(texts), 77)
    assert ids.tolist() == expected.tolist()
    assert (clip.vocab_size, clip.start_of_text, clip.end_of_text) == (49408, 49406, 49407)


def test_cut_texts_are_counted(clip: Tokenizer):
    exact = "cat " * 75
    ids, num_cut = clip.tokenize([LONG, "short", exact, f"{exact} cat"])
    assert num_cut == 2
    assert ids.tolist() == clip([LONG, "short", exact, f"{exact} cat"]).tolist()
    assert clip.tokenize([]).num_cut == 0
    assert clip.tokenize([LONG], limit=500).ids.tolist() == clip.tokenize([LONG]).ids.tolist()
    short, one_cut = clip.tokenize([LONG, "cat"], limit=5)
    assert (tuple(short.shape), one_cut) == ((2, 5), 1)
    assert short[0].tolist() == [*clip.tokenize([LONG]).ids[0, :4].tolist(), clip.end_of_text]


def test_ids_are_cut_to_the_longest_text(clip: Tokenizer):
    ids = clip(TEXTS[:2])
    assert ids.shape == (2, 8)
    assert ids.tolist() == open_clip.tokenize(TEXTS[:2])[:, :8].tolist()


def test_a_long_text_keeps_its_end(clip: Tokenizer):
    ids = clip([LONG, "short", LONG])
    assert ids.shape == (3, 77)
    assert ids[:, 0].tolist() == [49406] * 3
    assert (ids == 49407).sum(dim=1).tolist() == [1, 1, 1]
    assert ids[0, 76] == ids[2, 76] == 49407
    exact = "cat " * 75  # 75 tokens and both ends: nothing is lost
    assert clip([exact])[0, 75] == clip(["cat"])[0, 1]


def test_clip_ids_fit_a_shorter_context():
    assert build_tokenizer(TokenizerConfig(), 16)([LONG]).tolist() == open_clip.tokenize([LONG], 16).tolist()


def test_a_trained_tokenizer_gives_texts_back(trained: Tokenizer, trained_file: Path):
    texts = [*CAPTIONS, "an unseen giraffe", "\uc774\uac83\uc740 \uae30\ub9b0", "\U0001f600 caf\u00e9"]
    ids = trained(texts)
    bpe = tokenizers.Tokenizer.from_file(str(trained_file))
    bpe.decoder = tokenizers.decoders.ByteLevel()
    assert [text.strip() for text in bpe.decode_batch(ids.tolist(), skip_special_tokens=True)] == texts
    for row in ids.tolist():
        end = row.index(trained.end_of_text)
        assert row[0] == trained.start_of_text
        assert row[end + 1 :] == [trained.pad] * (len(row) - end - 1)
        assert max(row) < trained.vocab_size


def test_training_shortens_its_own_language(trained: Tokenizer):
    """Each of the four syllables has three bytes."""
    assert trained([CAPTIONS[3]]).shape[1] - 2 < 3 * 4


def test_case_and_composition_of_letters_make_no_difference(trained: Tokenizer):
    assert trained(["A Red APPLE"]).tolist() == trained(["a red apple"]).tolist()
    assert trained(["\u1111\u1161"]).tolist() == trained(["\ud30c"]).tolist()


def test_a_caption_that_spells_out_the_end_does_not_end_there(trained: Tokenizer):
    row = trained([f"a {END_OF_TEXT} red {START_OF_TEXT} apple {PAD}"])[0].tolist()
    assert row.index(trained.end_of_text) == len(row) - 1
    assert row.count(trained.start_of_text) == 1
    assert trained.pad not in row


def test_training_twice_gives_the_same_bytes(trained_file: Path, tmp_path: Path):
    train_tokenizer(iter(CAPTIONS), tmp_path / "again.json", vocab_size=320)
    assert (tmp_path / "again.json").read_bytes() == trained_file.read_bytes()


def test_a_file_that_is_none_is_named(tmp_path: Path):
    for name, content in (("missing.json", None), ("broken.json", "{"), ("other.json", '{"version": "1.0"}')):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match="missing" if content is None else "cannot be read") as caught:
            build_tokenizer(TokenizerConfig("file", str(path)), 24)
        assert caught.value.where == str(path)


def test_a_file_without_the_special_tokens_is_refused(trained_file: Path, tmp_path: Path):
    tree = json.loads(trained_file.read_text(encoding="utf-8"))
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != END_OF_TEXT]
    vocabulary = tree["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop(END_OF_TEXT)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UsageError, match=r"tokenizer has no token that ends a text\n"):
        build_tokenizer(TokenizerConfig("file", str(path)), 24)
    assert build_tokenizer(TokenizerConfig("file", str(path), end="other"), 24).end_of_text == vocabulary["other"]


@pytest.mark.parametrize("kind", ["clip", "trained"])
def test_a_copy_sent_to_a_worker_gives_the_same_ids(kind: str, request: pytest.FixtureRequest):
    """Processes that are spawned, not forked, get their tokenizer pickled."""
    tokenizer = request.getfixturevalue(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, LONG, *CAPTIONS, f"a {END_OF_TEXT} red {START_OF_TEXT} apple {PAD}"]
    assert copy(texts).tolist() == tokenizer(texts).tolist()


def word_piece() -> tokenizers.Tokenizer:
    """A tokenizer of BERT's kind."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        CAPTIONS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def unigram(frame: str = "$A </s>") -> tokenizers.Tokenizer:
    """A tokenizer of the kind of T5 and SigLIP, which put nothing before a text."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<bos>", "<lang>"]
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CAPTIONS, trainer)
    tokens = [(token, i) for i, token in enumerate(special)]
    made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=tokens)
    return made


def gpt2() -> tokenizers.Tokenizer:
    """A tokenizer of GPT-2's kind, which puts nothing around a text and has one token for both ends."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|both|>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CAPTIONS, trainer)
    return made


def clip_fast() -> transformers.CLIPTokenizer:
    """CLIP's tokenizer as transformers has it, of open_clip's vocabulary."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): i for token, i in bpe.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks))


def fast(made: tokenizers.Tokenizer, **special: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


OUTSIDE = {
    "bert": lambda: fast(word_piece(), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"),
    "t5": lambda: fast(unigram(), eos_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<bos>"),
    "siglip": lambda: fast(unigram(), eos_token="</s>", pad_token="</s>", unk_token="<unk>"),
    "clip": clip_fast,
}


@pytest.fixture(params=OUTSIDE)
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[transformers.PreTrainedTokenizerFast, Path]:
    """A tokenizer of transformers and its folder, written after use so that its file asks for padding and cutting."""
    reference = OUTSIDE[request.param]()
    reference(["a", LONG], padding=True, truncation=True, max_length=5)
    reference.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["truncation"]
    return reference, tmp_path


def test_ids_are_those_of_transformers(outside: tuple[transformers.PreTrainedTokenizerFast, Path]):
    reference, folder = outside
    ours = build_tokenizer(TokenizerConfig("file", str(folder)), 16)
    texts = [*CAPTIONS, *TEXTS[:5], TEXTS[-1], LONG]
    expected = reference(texts, padding=True, truncation=True, max_length=16)["input_ids"]
    assert ours(texts).tolist() == expected
    assert ours.vocab_size == len(reference)
    assert ours.tokenize(texts).num_cut == sum(len(row) > 16 for row in reference(texts)["input_ids"])
    assert (ours(texts) == ours.end_of_text).any(dim=1).all()


def assert_nothing_ends_early(tokenizer: Tokenizer, names: Sequence[str]) -> None:
    """Captions that spell out these tokens have one end, at their end, and keep what comes after the name."""
    for name in names:
        for text in (f"a dog {name} sits", f"{name}a dog{name.upper()} sits", name, f"{name}{name} sits"):
            ids, num_cut = tokenizer.tokenize([text])
            inner = ids[0, 0 if tokenizer.start_of_text is None else 1 : -1].tolist()
            assert ids[0, -1] == tokenizer.end_of_text
            assert num_cut == 0
            assert not {tokenizer.end_of_text, tokenizer.start_of_text, *tokenizer.reserved} & set(inner)
            ending = tokenizer(["a dog sits"])[0, -2:].tolist()
            assert name == text or ids[0, -2:].tolist() == ending


def test_clip_takes_the_names_of_its_tokens_for_text(clip: Tokenizer):
    assert_nothing_ends_early(clip, ["<start_of_text>", "<end_of_text>", "<|endoftext|>"])
    spelt, apart = (
        ["a dog <end_of_text> sits", "&lt;end_of_text&gt;"],
        ["a dog < end_of_text > sits", "< end_of_text >"],
    )
    assert clip(spelt).tolist() == clip(apart).tolist() == open_clip.tokenize(apart)[:, : clip(apart).shape[1]].tolist()
    assert open_clip.tokenize(spelt[0])[0].tolist().index(clip.end_of_text) == 3  # what open_clip does
    assert clip(["!! wow !"]).tolist() == open_clip.tokenize("!! wow !")[:, :5].tolist()  # its id is that of padding


def test_a_trained_tokenizer_takes_the_names_of_its_tokens_for_text(trained_file: Path):
    trained = build_tokenizer(TokenizerConfig("file", str(trained_file)), 99)
    assert_nothing_ends_early(trained, [PAD, START_OF_TEXT, END_OF_TEXT])


def test_transformers_tokens_in_captions_are_text(outside: tuple[transformers.PreTrainedTokenizerFast, Path]):
    ours = build_tokenizer(TokenizerConfig("file", str(outside[1])), 64)
    assert_nothing_ends_early(ours, ["[SEP]", "[CLS]", "</s>", "<bos>", "<pad>", "<|endoftext|>", "<|startoftext|>"])


def test_reserved_tokens_that_are_words_of_the_model_never_come_from_a_caption(tmp_path: Path):
    """Words of a WordLevel model, a token that is added but not special, and one that cannot be spelt apart."""
    vocabulary = {"<end>": 0, "a": 1, "dog": 2, "sits": 3, "[UNK]": 4, "$": 5, ">": 6}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_tokens(["<pad>"])
    made.save(str(tmp_path / "tokenizer.json"))

    def tokenizer(end: str) -> Tokenizer:
        return build_tokenizer(TokenizerConfig("file", str(tmp_path / "tokenizer.json"), "", end, "<pad>"), 16)

    for name in ("<end>", "<pad>"):
        ids, num_cut = tokenizer("<end>").tokenize([f"a dog {name} sits"])
        assert (ids.tolist(), num_cut) == ([[1, 2, 4, 4, 3, 0]], 0)
    ids, num_cut = tokenizer("$").tokenize(["a dog $ sits", "a dog"])
    assert (ids[0].tolist(), num_cut) == ([1, 2, 3, 5], 1)


def test_transformers_clip_is_open_clip(tmp_path: Path, clip: Tokenizer):
    clip_fast().save_pretrained(tmp_path)
    ours = build_tokenizer(TokenizerConfig("file", str(tmp_path)), 77)
    texts = ["a photo of a cat", TEXTS[2], TEXTS[3], TEXTS[4], LONG, ""]
    ids, expected = ours(texts), clip(texts)
    for row, other in zip(ids.tolist(), expected.tolist(), strict=True):
        end = row.index(ours.end_of_text) + 1
        assert row[:end] == other[:end]
        assert set(row[end:]) <= {ours.pad}
    assert (ours.start_of_text, ours.end_of_text, ours.vocab_size) == (49406, 49407, 49408)


def test_the_file_alone_is_enough_once_resolved(
    outside: tuple[transformers.PreTrainedTokenizerFast, Path], tmp_path: Path
):
    config = TokenizerConfig("file", str(outside[1]))
    resolved = resolve_tokenizer(config)
    assert resolved.path == str(outside[1] / "tokenizer.json")
    resolved.path = str(shutil.copy(resolved.path, tmp_path / "moved.json"))
    assert resolve_tokenizer(resolved) == resolved
    texts = [*CAPTIONS, LONG]
    assert build_tokenizer(resolved, 16)(texts).tolist() == build_tokenizer(config, 16)(texts).tolist()
    assert resolve_tokenizer(TokenizerConfig()) == TokenizerConfig()


def test_one_token_for_both_ends_stands_after_the_text(tmp_path: Path):
    fast(gpt2(), eos_token="<|both|>", bos_token="<|both|>").save_pretrained(tmp_path)
    ours = build_tokenizer(TokenizerConfig("file", str(tmp_path)), 16)
    ids = ours(["a", "a red apple"]).tolist()
    assert [row.index(ours.end_of_text) for row in ids] == [1, 3]
    assert (ours.start_of_text, ours.pad) == (None, ours.end_of_text)
    with pytest.raises(UsageError, match="cannot be used both before and after"):
        build_tokenizer(TokenizerConfig("file", str(tmp_path), start="<|both|>"), 16)


def test_older_folders_name_their_tokens_in_a_map(tmp_path: Path):
    gpt2().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|both|>", "lstrip": false}}')
    assert build_tokenizer(TokenizerConfig("file", str(tmp_path)), 16).end_of_text == 0
    with pytest.raises(UsageError, match="no token that ends a text"):
        build_tokenizer(TokenizerConfig("file", str(tmp_path / "tokenizer.json")), 16)
    for content in ("{", "[1]", "3"):
        (tmp_path / "special_tokens_map.json").write_text(content)
        with pytest.raises(UsageError, match="cannot be read") as caught:
            build_tokenizer(TokenizerConfig("file", str(tmp_path)), 16)
        assert caught.value.where == str(tmp_path / "special_tokens_map.json")


def test_named_tokens_are_taken(tmp_path: Path):
    unigram("$A </s>").save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    found = build_tokenizer(TokenizerConfig("file", path), 16)
    assert (found.start_of_text, found.end_of_text, found.pad) == (None, 1, 0)
    named = build_tokenizer(TokenizerConfig("file", path, "<bos>", "<lang>", "<unk>"), 16)
    assert (named.start_of_text, named.end_of_text, named.pad) == (3, 4, 2)
    unigram("<bos> $A").save(path)
    begun = build_tokenizer(TokenizerConfig("file", path), 16)
    assert (begun.start_of_text, begun.end_of_text, begun.pad) == (3, 1, 0)
    with pytest.raises(UsageError, match=r"tokenizer has no token <nix>\n"):
        build_tokenizer(TokenizerConfig("file", path, pad="<nix>"), 16)
    with pytest.raises(UsageError, match="that ends a text"):
        build_tokenizer(TokenizerConfig("file", path, end=""), 16)


def test_more_than_one_token_around_a_text_is_refused(tmp_path: Path):
    unigram("<lang> <bos> $A </s>").save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="adds <lang> <bos> before a text and </s> after it"):
        build_tokenizer(TokenizerConfig("file", path), 16)
    assert build_tokenizer(TokenizerConfig("file", path, start="<bos>", end="</s>"), 16).start_of_text == 3


def test_a_tokenizer_that_fails_at_unknown_words_is_refused(tmp_path: Path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>")).save(str(tmp_path / "t.json"))
    with pytest.raises(UsageError, match="cannot read words outside its vocabulary"):
        build_tokenizer(TokenizerConfig("file", str(tmp_path / "t.json")), 16)


def test_a_folder_without_the_file_is_named(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(UsageError, match="tokenizer file is missing") as caught:
        build_tokenizer(TokenizerConfig("file", str(tmp_path)), 16)
    assert caught.value.where == str(tmp_path / "tokenizer.json")
