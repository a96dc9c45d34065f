"""Zero-shot classification: the ensembling formula, one classifier, and right answers where they are known."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_tools.core.errors import DataError, UsageError
from data_tools.sample.decode import decode_image, read_image
from data_tools.tar.writer import ShardWriter
from mmvit.data.prompts import load_class_names, load_templates
from mmvit.data.shards import IndexedShards
from mmvit.data.transforms import eval_pixels
from mmvit.eval import classify
from mmvit.eval.classify import classify_files
from mmvit.eval.encoder import Encoder
from mmvit.eval.zero_shot import class_embeddings, evaluate_zero_shot, zero_shot_classifier

TEMPLATES = ["{}", "a photo of something {}", "something {c} in a photo"]


def test_class_embeddings_are_the_formula(encoder: Encoder, colour_names: list[str]):
    found = class_embeddings(encoder, colour_names, TEMPLATES)
    for row, name in zip(found, colour_names, strict=True):
        texts = [name, f"a photo of something {name}", f"something {name} in a photo"]
        mean = sum(encoder.encode_text([text])[0].double() for text in texts) / 3
        assert mean.norm() < 0.999  # renormalising is not for nothing
        assert (row - mean / mean.norm()).abs().max() <= 1e-6


def test_one_template_is_the_plain_embedding(encoder: Encoder, colour_names: list[str]):
    plain = encoder.encode_text([f"a photo of something {name}" for name in colour_names])
    assert (class_embeddings(encoder, colour_names, TEMPLATES[1:2]) - plain).abs().max() <= 1e-6


def test_the_order_of_templates_does_not_matter(encoder: Encoder, colour_names: list[str]):
    forwards, backwards = (class_embeddings(encoder, colour_names, ts) for ts in (TEMPLATES, TEMPLATES[::-1]))
    assert (forwards - backwards).abs().max() <= 1e-6


def test_logits_are_scaled_cosines(encoder: Encoder, colour_names: list[str], colour_files: list[Path]):
    classifier = zero_shot_classifier(encoder, colour_names, TEMPLATES)
    pixels = encoder.pixels(colour_files)
    cosines = encoder.encode_image(colour_files) @ class_embeddings(encoder, colour_names, TEMPLATES).T
    with torch.no_grad():
        assert (classifier(pixels).logits - encoder.logit_scale * cosines).abs().max() <= 1e-4
    assert classifier.class_names == colour_names


def test_templates_are_a_list_a_template_or_a_set_by_name(encoder: Encoder, colour_names: list[str]):
    heads = [
        zero_shot_classifier(encoder, colour_names, *templates).head.weight
        for templates in (["simple"], ["a photo of a {}."], [["a photo of a {}."]], [])
    ]
    assert all(torch.equal(head, heads[0]) for head in heads)
    korean = zero_shot_classifier(encoder, colour_names, "korean").head.weight
    assert torch.equal(korean, zero_shot_classifier(encoder, colour_names, load_templates("korean")).head.weight)


def test_what_gives_no_classifier_is_refused(encoder: Encoder, colour_names: list[str]):
    with pytest.raises(UsageError, match="has 0 placeholders"):  # all classes would have one embedding
        zero_shot_classifier(encoder, colour_names, ["a photo of a dog"])
    with pytest.raises(UsageError, match="no templates named 'koraen': did you mean 'korean'"):
        zero_shot_classifier(encoder, colour_names, "koraen")
    with pytest.raises(UsageError, match="class names must be a list"):
        zero_shot_classifier(encoder, "dog", TEMPLATES)


def test_all_pictures_of_a_planted_set_are_named(
    encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards
):
    result = evaluate_zero_shot(encoder, colour_shards, colour_names, TEMPLATES[:2])
    assert (result.acc1, result.acc5) == (1.0, 1.0)
    assert result.labels.tolist() == list(range(6)) * 4
    assert result.best.shape == (24, 5)
    assert torch.equal(result.best[:, 0], result.labels)


def test_originals_are_not_held_together(
    encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    monkeypatch.setattr(classify, "decode_image", lambda *a, **k: done.append("decode") or decode_image(*a, **k))
    monkeypatch.setattr(classify, "eval_pixels", lambda *a: done.append("preprocess") or eval_pixels(*a))
    evaluate_zero_shot(encoder, colour_shards, colour_names, TEMPLATES[:1], limit=3)
    assert done == ["decode", "preprocess"] * 3


def test_wrong_names_are_wrong(encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards):
    moved = [*colour_names[1:], colour_names[0]]
    assert evaluate_zero_shot(encoder, colour_shards, moved, TEMPLATES[:2]).acc1 == 0.0


def test_names_that_are_equal_are_one_class(encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards):
    """Images of classes 0 and 1 are both "RED" now: the red ones are right, the green ones are not."""
    names = ["red", "RED", *colour_names[2:]]
    result = evaluate_zero_shot(encoder, colour_shards, names, TEMPLATES[:2])
    assert result.labels.tolist() == [0, 0, 2, 3, 4, 5] * 4
    assert set(result.best.flatten().tolist()) <= {0, 2, 3, 4, 5}
    assert result.acc1 == pytest.approx(5 / 6)


def test_a_limit_spreads_over_the_samples(encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards):
    result = evaluate_zero_shot(encoder, colour_shards, colour_names, TEMPLATES[:1], limit=3)
    assert result.labels.tolist() == [0, 5, 5]  # samples 0, 11 and 23 of 24
    generous = evaluate_zero_shot(encoder, colour_shards, colour_names, TEMPLATES[:1], limit=1000)
    assert generous.labels.tolist() == list(range(6)) * 4


def test_a_label_beyond_the_names_is_named(encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards):
    with pytest.raises(DataError, match="label 5 has no class name") as caught:
        evaluate_zero_shot(encoder, colour_shards, colour_names[:5], TEMPLATES)
    assert caught.value.where == "shard-00000.tar/yellow0"


def test_a_label_may_be_a_class_name(
    encoder: Encoder, colour_names: list[str], colour_files: list[Path], tmp_path: Path
):
    with ShardWriter(tmp_path / "named") as writer:
        for name, path in zip(colour_names, colour_files, strict=True):
            writer.write(path.stem, {"png": path.read_bytes(), "cls": name})
    shards = IndexedShards(writer.shards, require_caption=False)
    assert evaluate_zero_shot(encoder, shards, colour_names, TEMPLATES[:2]).labels.tolist() == list(range(6))
    with pytest.raises(DataError, match=f"label '{colour_names[5]}' has no class name"):
        evaluate_zero_shot(encoder, shards, colour_names[:5], TEMPLATES)


def test_a_sample_without_label_is_named(encoder: Encoder, colour_files: list[Path], tmp_path: Path):
    with ShardWriter(tmp_path / "unlabelled") as writer:
        writer.write("key1", {"png": colour_files[0].read_bytes(), "txt": "red"})
    with pytest.raises(DataError, match="label None has no class name") as caught:
        evaluate_zero_shot(encoder, IndexedShards(writer.shards), ["red", "green"], TEMPLATES)
    assert caught.value.where == "shard-00000.tar/key1"


def write_colours(folder: Path, files: list[Path], broken: tuple[int, ...]) -> IndexedShards:
    with ShardWriter(folder, max_samples=3) as writer:
        for label, path in enumerate(files):
            data = path.read_bytes()
            writer.write(path.stem, {"png": data[:40] if label in broken else data, "cls": label})
    return IndexedShards(writer.shards, require_caption=False)


def test_what_cannot_be_read_is_left_out_and_told_once(
    encoder: Encoder,
    colour_names: list[str],
    colour_files: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    shards = write_colours(tmp_path / "some", colour_files, broken=(1, 4))
    result = evaluate_zero_shot(encoder, shards, colour_names, TEMPLATES[:2])
    assert (result.acc1, result.num_bad) == (1.0, 2)
    assert result.samples.tolist() == result.labels.tolist() == result.best[:, 0].tolist() == [0, 2, 3, 5]
    (message,) = caplog.messages
    assert "2 of 6 samples cannot be classified" in message
    assert "shard-00000.tar/green" in message


def test_when_nothing_can_be_read_there_is_no_accuracy(
    encoder: Encoder, colour_names: list[str], colour_files: list[Path], tmp_path: Path
):
    shards = write_colours(tmp_path / "none", colour_files, broken=tuple(range(6)))
    with pytest.raises(DataError, match="6 of 6 samples cannot be classified") as caught:
        evaluate_zero_shot(encoder, shards, colour_names, TEMPLATES)
    assert caught.value.where == "shard-00000.tar/red"


def test_a_missing_shard_is_no_bad_sample(
    encoder: Encoder, colour_names: list[str], colour_files: list[Path], tmp_path: Path
):
    shards = write_colours(tmp_path / "gone", colour_files, broken=())
    shards.paths[1].path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        evaluate_zero_shot(encoder, shards, colour_names, TEMPLATES)


def test_files_are_classified_best_first(encoder: Encoder, colour_names: list[str], colour_files: list[Path]):
    classifier = zero_shot_classifier(encoder, colour_names, TEMPLATES)
    predictions = classify_files(classifier, encoder.image_size, colour_files, top=6, batch_size=4)
    assert [prediction.image for prediction in predictions] == [str(path) for path in colour_files]
    assert [prediction.classes[0]["name"] for prediction in predictions] == colour_names
    for prediction in predictions:
        values = [entry["probability"] for entry in prediction.classes]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)
    cosines = encoder.encode_image([read_image(colour_files[0])]) @ class_embeddings(encoder, colour_names, TEMPLATES).T
    expected = (encoder.logit_scale * cosines[0]).softmax(dim=0).max().item()
    assert predictions[0].classes[0]["probability"] == pytest.approx(expected, abs=1e-5)


def test_no_more_classes_than_there_are(encoder: Encoder, colour_files: list[Path]):
    two = zero_shot_classifier(encoder, ["red", "blue"], TEMPLATES)
    (prediction,) = classify_files(two, encoder.image_size, colour_files[:1], top=5)
    assert len(prediction.classes) == 2
    three = zero_shot_classifier(encoder, ["red", "blue", "green"], TEMPLATES)
    (prediction,) = classify_files(three, encoder.image_size, colour_files[:1], top=1)
    assert [entry["name"] for entry in prediction.classes] == ["red"]


def test_nothing_to_classify_with_or_by_is_refused(
    encoder: Encoder, colour_names: list[str], colour_shards: IndexedShards, colour_files: list[Path]
):
    cafe = b"caf\xe9".decode(errors="surrogateescape")
    calls: dict[str, Callable[[], object]] = {
        "there are no class names": lambda: zero_shot_classifier(encoder, [], TEMPLATES),
        "there are no templates": lambda: zero_shot_classifier(encoder, colour_names, []),
        "the text 'a photo of a caf\\\\udce9.' is not": lambda: encoder.encode_text([f"a photo of a {cafe}."]),
        "batch_size is 0": lambda: Encoder(
            encoder.model, encoder.tokenizer, image_size=32, fingerprint="", batch_size=0
        ),
        "limit is 0": lambda: evaluate_zero_shot(encoder, colour_shards, colour_names, TEMPLATES, limit=0),
        "top is 0": lambda: classify_files(zero_shot_classifier(encoder, colour_names, TEMPLATES), 32, colour_files, 0),
        "the class name 'caf\\\\udce9' is not": lambda: load_class_names(f"red,{cafe}"),
    }
    for message, call in calls.items():
        with pytest.raises(UsageError, match=message):
            call()
