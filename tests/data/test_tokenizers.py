"""Texts to ids and back: CLIP's vocabulary as open_clip has it, or one trained on the user's captions."""

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import tokenizers

from data_tools.errors import UsageError
from data_tools.tokenizer import END_OF_TEXT, PAD, START_OF_TEXT, train_tokenizer
from mmvit.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer

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
    with pytest.raises(UsageError, match=r"tokenizer has no token <\|endoftext\|>\n"):
        build_tokenizer(TokenizerConfig("file", str(path)), 24)


def test_an_unknown_kind_is_named():
    with pytest.raises(UsageError, match="tokenizer kind 'bpe' is unknown"):
        build_tokenizer(TokenizerConfig("bpe"), 77)


@pytest.mark.parametrize("kind", ["clip", "trained"])
def test_a_copy_sent_to_a_worker_gives_the_same_ids(kind: str, request: pytest.FixtureRequest):
    """Processes that are spawned, not forked, get their tokenizer pickled."""
    tokenizer = request.getfixturevalue(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, LONG, *CAPTIONS, f"a {END_OF_TEXT} red {START_OF_TEXT} apple {PAD}"]
    assert copy(texts).tolist() == tokenizer(texts).tolist()
