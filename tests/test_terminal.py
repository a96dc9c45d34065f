"""Names and captions are printed literally: brackets in them are not markup."""

import pytest

from mmvit.terminal import print_accuracies, print_facts, print_hits, print_predictions

NAMES = ["dog [/x]", "photo[1].jpg", "[red]apple[/red]", ":dog:"]


@pytest.mark.parametrize("name", NAMES)
def test_brackets_are_text(name: str, capsys: pytest.CaptureFixture[str]):
    print_predictions([{"image": name, "classes": [{"name": f"class {name}", "probability": 0.5}]}])
    predictions = capsys.readouterr().out
    assert predictions.splitlines()[0].strip() == name
    assert f"class {name}" in predictions
    print_hits([{"rank": 1, "score": 0.5, "caption": name, "image_path": f"in {name}"}])
    hits = capsys.readouterr().out
    assert hits.count(name) == 2
    assert f"in {name}" in hits
    print_facts({f"key {name}": name})
    assert capsys.readouterr().out.count(name) == 2
    print_accuracies({name: {"acc1": 0.5, "acc5": 1.0}})
    assert name in capsys.readouterr().out


def test_a_hit_without_caption_has_an_empty_cell(capsys: pytest.CaptureFixture[str]):
    print_hits([{"rank": 1, "score": 0.5, "caption": None, "image_path": "a.jpg"}])
    assert "None" not in capsys.readouterr().out
